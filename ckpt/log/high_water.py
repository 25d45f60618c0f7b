"""How much of a log this user has seen on this machine, kept outside of the log's stores.

A disk that is rolled back to an old image, or a store that is restored from an old copy, keeps its
id and holds an older log that is right in itself. Only a memory outside of it can tell.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ckpt.format.canonical import digest_hex
from ckpt.log.sequencers import state_folder
from ckpt.log.state import LogState

IN_MEMORY = "memory:"
"""Stores in the memory of one process end with it, so they cannot be rolled back."""


class SeenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record that certainly counted: its position and its writer's id for it, which is random.

    ``digest``: empty if only a record after it was read last.
    """

    seq: int
    write_id: str
    digest: str = ""


@dataclass(slots=True)
class HighWaterMark:
    """The last record that this user saw of the log ``log_id`` at the address ``url``.

    ``log_id`` is known once the stores were asked; of a lone store it is that store's id.

    By address too, since a copy of a folder is another log with the same ids. A state folder that
    cannot be read or written costs the protection and nothing else: no error is raised. Not
    thread-safe; processes may share one.
    """

    url: str
    log_id: str = ""
    known: bool = False
    """Whether the stores were found to hold the record."""
    seen: SeenRecord | None = None
    older: str = ""
    """Why the log as last read is older than what was seen; empty if it is not."""
    silent: bool = False
    """Whether a store did not answer then."""

    @property
    def proof(self) -> dict[int, str]:
        """The digest of the record that was seen, by its position: that one counts, however many
        stores forgot it."""
        return {self.seen.seq: self.seen.digest} if self.seen and self.seen.digest else {}

    @property
    def path(self) -> Path:
        """The file, the same in whatever order the stores are named. Raises RuntimeError for a user
        without a home."""
        urls = " + ".join(sorted(self.url.split(" + ")))
        address = digest_hex(urls.encode(errors="surrogateescape"))[:8]  # a path may be no UTF-8
        return state_folder() / "seen" / f"{self.log_id}-{address}.json"

    def look(self) -> None:
        """Before the log is read: learn what was seen. Later, another process could have seen more.

        Nothing is read any more once the stores were found to hold it.
        """
        if not self.known:
            self.seen = self._read()

    def judge(self, state: LogState, *, silent: bool = False) -> str:
        """Why ``state`` is older than what was seen before, or another log; empty if it is not.

        ``silent``: stores did not answer, and may hold what is lacking.
        """
        self.older, self.silent = "", silent
        if self.known or state.stale_reason:
            return ""  # too few stores answered to say
        self.known = self.seen is None or holds(state, self.seen)
        if self.seen is not None and not self.known:
            what = (
                "what was seen is on stores that do not answer, or one was rolled back"
                if silent
                else "a disk or store was rolled back"
            )
            self.older = (
                "the stores hold an older log, or another one, than was seen from here before: "
                f"{what}. seen={self.seen.seq + 1} found={state.next_seq} records; bring the newer "
                "data back, or go on with what is there by `ckpt stores accept`"
            )
        return self.older

    def advance(self, state: LogState, seq: int) -> None:
        """Note that the record at ``seq`` of ``state`` certainly counts.

        Cost: nothing if that was known, else a small local file.
        """
        write_id = state.write_id_at(seq)
        if not self.known or write_id is None or (self.seen is not None and seq <= self.seen.seq):
            return
        digest = state.head_digest if seq == state.next_seq - 1 else ""
        self.seen = SeenRecord(seq=seq, write_id=write_id, digest=digest)
        other = self._read()
        if other is None or other.seq < seq:
            self._write(self.seen)

    def accept(self, state: LogState) -> None:
        """Forget what was seen: ``state`` is the log from now on."""
        self.known, self.seen, self.older = True, None, ""
        if (write_id := state.write_id_at(state.next_seq - 1)) is not None:
            seq = state.next_seq - 1
            self.seen = SeenRecord(seq=seq, write_id=write_id, digest=state.head_digest)
            self._write(self.seen)
        else:  # an empty log
            with suppress(OSError, RuntimeError):
                self.path.unlink(missing_ok=True)

    def _read(self) -> SeenRecord | None:
        if self.url.startswith(IN_MEMORY):
            return None
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=SeenRecord)
        except (OSError, RuntimeError, msgspec.DecodeError):
            return None

    def _write(self, seen: SeenRecord) -> None:
        # Not synced: after a power cut an older mark protects a little less.
        with suppress(OSError, RuntimeError):
            if self.url.startswith(IN_MEMORY):
                return
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            number, name = tempfile.mkstemp(dir=self.path.parent)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(msgspec.json.encode(seen))
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink()
                raise


def holds(state: LogState, seen: SeenRecord) -> bool:
    """Whether the log has the record where it was.

    Of one that is older than the last 1,024 only the position is compared.
    """
    if seen.seq >= state.next_seq:
        return False
    return state.write_id_at(seen.seq) in (None, seen.write_id)
