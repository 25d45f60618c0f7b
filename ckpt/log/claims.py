"""Claims on a log that lies on several stores: by the stores together, or through a file or etcd; copies at last."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt.errors import FencedError, FormatVersionError, IntegrityError
from ckpt.format import keys
from ckpt.format.records import decode_record
from ckpt.log.commit_quorum import Beaten, Open, Split, Won, contest
from ckpt.log.copies import Copies, copies_of
from ckpt.log.quorum import Silent
from ckpt.log.sequencer import Claimed, Lost, Sequencer, Unknown


class StoresSequencer:
    """See Sequencer. The stores that create only once decide together: what W of them hold has the place, for good.

    ``full``: the ids of the stores that count and answer, by number; ``absent``: how many others count. A store that refuses to
    create only once has a vote all the same, which is not known: it may refuse only now, or only to this writer.
    """

    def __init__(self, copies: Copies, full: Mapping[int, str], quorum: int, *, absent: int) -> None:
        self._copies = copies
        self._full = dict(full)
        self._quorum = quorum
        self._absent = absent

    def claim(self, seq: int, data: bytes) -> Claimed | Lost | Unknown:
        """See Sequencer. Returns when all stores hold the record, or W hold it at the second key too."""
        found = self._copies.create(keys.log_key(seq), data, self._full, self._quorum, vote=True)
        bytes_of = {
            digest: held for held in found.values() if isinstance(held, bytes) and (digest := _digest(held, seq))
        }
        mine = _digest(data, seq)
        held_by = [_digest(held, seq) or None for held in found.values()]
        match contest(mine, held_by + [None] * self._absent, self._quorum):
            case Won(sure):
                return Claimed() if sure else self._settle(seq, data, data)
            case Beaten(digest):
                return Lost(bytes_of[digest])
            case Split(digest):
                return self._settle(seq, bytes_of[digest], data)
            case Open():
                return Unknown(f"too few stores answered. {silent(self._copies, found)}")

    def _settle(self, seq: int, winner: bytes, data: bytes) -> Claimed | Lost | Unknown:
        found = self._copies.create(keys.settled_key(seq), winner, self._full, self._quorum)
        if copies_of(winner, found) < self._quorum:
            return Unknown(f"it is decided whose the place is, on too few stores yet. {silent(self._copies, found)}")
        return Claimed() if winner == data else Lost(winner)


class FiledSequencer:
    """See Sequencer. ``file`` (or etcd) gives out places; a record that has one is copied to W of the stores that count."""

    def __init__(self, file: Sequencer, copies: Copies, full: Mapping[int, str], quorum: int, *, absent: int) -> None:
        self._file = file
        self._copies = copies
        self._full = dict(full)
        self._quorum = quorum
        self._absent = absent

    def claim(self, seq: int, data: bytes) -> Claimed | Lost | Unknown:
        """See Sequencer. Another's record is copied too: its writer may have died before it did.

        Raises FencedError where the stores hold what it never gave out.
        """
        given = self._file.claim(seq, data)
        if isinstance(given, Unknown):
            return given
        winner = given.data if isinstance(given, Lost) else data
        found = self._copies.create(keys.log_key(seq), winner, self._full, self._quorum)
        if copies_of(winner, found) >= self._quorum:
            return given
        others = sum(isinstance(held, bytes) and held != winner and _digest(held, seq) != "" for held in found.values())
        if len(self._full) + self._absent - others < self._quorum:
            raise FencedError(
                f"the stores hold a record that was never given a place here: another one took over. "
                f"key={keys.log_key(seq)} stop this writer"
            )
        return Unknown(f"the record has its place, and is on too few stores yet. {silent(self._copies, found)}")


def silent(copies: Copies, found: Mapping[int, bytes | Silent]) -> str:
    """Which stores did not say what they hold, and why."""
    return "silent=[" + "; ".join(
        f"{copies.urls[number]}: {held.why}" for number, held in sorted(found.items()) if isinstance(held, Silent)
    ) + "]"  # fmt: skip


def _digest(held: bytes | Silent, seq: int) -> str:
    """The digest of a valid record of this place; empty for anything else, which may have been any record."""
    if isinstance(held, Silent):
        return ""
    try:
        record = decode_record(held)
    except (IntegrityError, FormatVersionError):
        return ""
    return record.digest if record.seq == seq else ""
