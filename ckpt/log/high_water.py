"""How much of a log this user has seen on this machine, kept outside of the log's stores.

A disk that is rolled back to an old image, or a store that is restored from an old copy, keeps its
id and holds an older log that is right in itself. Only a memory outside of it can tell.

That memory is in the user's home, which may be on a server that is gone: a call of the file system
that hangs can't be given up, so each is made in a thread of its own.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from ckpt.format.canonical import digest_hex
from ckpt.log.sequencers import machine_id, state_folder
from ckpt.log.state import LogState
from ckpt.threads import start_thread

T = TypeVar("T")

WAIT_S = 2.0
"""How long the opening of a log waits for its mark, and an orderly end for what is to be written. A
call that takes longer is told."""

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

    By address too, since a copy of a folder is another log with the same ids; a folder's address is
    that on one machine, as several may share a home. A state folder that cannot be read or written
    costs the protection and nothing else: no error is raised, and nothing but the first look waits
    for it, for WAIT_S. Not thread-safe; processes may share one.
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
    _reading: Future[SeenRecord | None] | None = field(default=None, init=False, repr=False)
    """The look that is being made."""
    _is_late: bool = field(default=False, init=False, repr=False)
    """Whether that was waited for."""

    @property
    def proof(self) -> dict[int, str]:
        """The digest of the record that was seen, by its position: that one counts, however many
        stores forgot it."""
        return {self.seen.seq: self.seen.digest} if self.seen and self.seen.digest else {}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file, the same in whatever order the stores are named; and the one of releases that
        did not tell machines apart, which is read while there is no other. None without a home."""
        if self.url.startswith(IN_MEMORY):
            return ()
        urls = sorted(self.url.split(" + "))
        here = machine_id() if any(url.startswith("/") for url in urls) else ""
        names = [" + ".join([*urls, here] if here else urls), " + ".join(urls)]
        try:
            folder = state_folder() / "seen"
        except RuntimeError:
            return ()
        # A path may be no UTF-8.
        addresses = [digest_hex(name.encode(errors="surrogateescape"))[:8] for name in names]
        return tuple(
            dict.fromkeys(folder / f"{self.log_id}-{address}.json" for address in addresses)
        )

    def look(self) -> None:
        """Before the log is read: learn what was seen. Later, another process could have seen more.

        Nothing is read any more once the stores were found to hold it.
        """
        if self.known:
            return
        if self._reading is None:
            self._reading = FILES.read(self.paths)
        try:
            self.seen = self._reading.result(0 if self._is_late else WAIT_S)
        except TimeoutError:
            self._is_late = True
        else:
            self._reading, self._is_late = None, False

    def judge(self, state: LogState, *, silent: bool = False) -> str:
        """Why ``state`` is older than what was seen before, or another log; empty if it is not.

        ``silent``: stores did not answer, and may hold what is lacking.
        """
        self.older, self.silent = "", silent
        if self.known or state.stale_reason or self._reading is not None:
            return ""  # too few stores answered to say, or the mark is not known yet
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

        Cost: nothing if that was known, else a thread that writes a small file; a later record
        takes the place of one that is still to be written.
        """
        write_id = state.write_id_at(seq)
        if not self.known or write_id is None or (self.seen is not None and seq <= self.seen.seq):
            return
        digest = state.head_digest if seq == state.next_seq - 1 else ""
        self.seen = SeenRecord(seq=seq, write_id=write_id, digest=digest)
        FILES.write(self.paths, self.seen)

    def accept(self, state: LogState) -> None:
        """Forget what was seen: ``state`` is the log from now on."""
        self.known, self.seen, self.older = True, None, ""
        seq = state.next_seq - 1
        if (write_id := state.write_id_at(seq)) is not None:
            self.seen = SeenRecord(seq=seq, write_id=write_id, digest=state.head_digest)
        FILES.write(self.paths, self.seen, anew=True)


@dataclass(frozen=True, slots=True)
class _Write:
    """What is to be written; ``anew``: also over a later record. Without ``seen`` the files go."""

    paths: tuple[Path, ...]
    seen: SeenRecord | None
    anew: bool


class MarkFiles:
    """The files of the marks that this process keeps. Thread-safe; no call waits for a file."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As in a new process: a fork has no thread that would write or answer."""
        self._changed = threading.Condition()
        self._unwritten: dict[Path, _Write] = {}
        self._is_writing = False
        self._began_s: dict[object, float] = {}
        self._failed = ""

    def read(self, paths: tuple[Path, ...]) -> Future[SeenRecord | None]:
        """What the first of ``paths`` that is there holds, or is about to hold."""
        known: Future[SeenRecord | None] = Future()
        with self._changed:
            write = self._unwritten.get(paths[0]) if paths else None
        if paths and write is None:
            return start_thread(lambda: self._timed(lambda: self._read(paths)), name="ckpt-mark")
        known.set_result(write.seen if write is not None else None)
        return known

    def write(
        self, paths: tuple[Path, ...], seen: SeenRecord | None, *, anew: bool = False
    ) -> None:
        """Have ``seen`` written to the first of ``paths``, unless that holds a later record."""
        if not paths:
            return
        with self._changed:
            if (before := self._unwritten.get(paths[0])) is not None:
                anew = anew or before.anew
            self._unwritten[paths[0]] = _Write(paths, seen, anew)
            if self._is_writing:
                return
            self._is_writing = True
        start_thread(self._write_all, name="ckpt-mark")

    def settle(self, timeout_s: float) -> bool:
        """Wait until all is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_writing, timeout_s)

    def trouble(self) -> str:
        """Why marks cannot be kept now; empty if they can."""
        now_s = time.monotonic()
        with self._changed:
            waited_s = now_s - min(self._began_s.values(), default=now_s)
            if waited_s > WAIT_S:
                return f"the folder does not answer. waited_s={waited_s:.0f}"
            return self._failed

    def _timed(self, call: Callable[[], T]) -> T:
        one = object()
        with self._changed:
            self._began_s[one] = time.monotonic()
        try:
            return call()
        finally:
            with self._changed:
                del self._began_s[one]

    def _write_all(self) -> None:
        while True:
            with self._changed:
                if not self._unwritten:
                    self._is_writing = False
                    self._changed.notify_all()
                    return
                path, write = next(iter(self._unwritten.items()))
            failed = self._timed(lambda write=write: self._write(write))  # type: ignore[misc]
            with self._changed:
                self._failed = failed
                if self._unwritten[path] is write:
                    del self._unwritten[path]

    def _read(self, paths: tuple[Path, ...]) -> SeenRecord | None:
        for path in paths:
            try:
                return msgspec.json.decode(path.read_bytes(), type=SeenRecord)
            except FileNotFoundError:
                continue
            except (OSError, msgspec.DecodeError):
                return None
        return None

    def _write(self, write: _Write) -> str:
        """Why it could not be written. Not synced: after a power cut an older mark protects a
        little less."""
        path, seen = write.paths[0], write.seen
        try:
            if seen is None:
                for one in write.paths:
                    one.unlink(missing_ok=True)
                return ""
            other = None if write.anew else self._read(write.paths[:1])
            if other is not None and other.seq >= seen.seq:
                return ""
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            number, name = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(msgspec.json.encode(seen))
                Path(name).replace(path)
            except OSError:
                Path(name).unlink()
                raise
        except OSError as error:
            return f"the folder cannot be written to. path={path} why={error}"
        return ""


FILES = MarkFiles()
os.register_at_fork(after_in_child=FILES.forget)
atexit.register(lambda: FILES.settle(WAIT_S))


def holds(state: LogState, seen: SeenRecord) -> bool:
    """Whether the log has the record where it was.

    Of one that is older than the last 1,024 only the position is compared.
    """
    if seen.seq >= state.next_seq:
        return False
    return state.write_id_at(seen.seq) in (None, seen.write_id)
