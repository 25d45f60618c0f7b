"""Every readable record of a log, each with why it counts for nothing, where it does."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.format.keys import log_key
from ckpt.format.records import RECORD_BYTES_MAX, Record, decode_record
from ckpt.log.commit_fold import empty, fold
from ckpt.log.reader import read_all
from ckpt.log.state import RECENT_MAX, LogState, Void


@dataclass(frozen=True, slots=True)
class Entry:
    """One record, and why it is void (None: it counts)."""

    record: Record
    void: Void | None


def history(backend: Backend, state: LogState) -> list[Entry]:
    """All records that ``state`` folded, oldest first. Reads each of them; a stored fold is no help here.

    Raises NotFoundError or IntegrityError where a record that lies under a stored fold is gone or damaged.
    """
    entries: list[Entry] = []
    at = empty(state.job)
    # A fold remembers as many voids as one batch can have.
    for start in range(0, state.next_seq, RECENT_MAX):
        seqs = range(start, min(state.next_seq, start + RECENT_MAX))
        records = read_all(seqs, lambda seq: _record(backend, seq))
        at = fold(at, records)
        entries += [Entry(record, at.void_at(record.seq)) for record in records]
    return entries


def _record(backend: Backend, seq: int) -> Record:
    return decode_record(read_alone(backend, log_key(seq), bytes_max=RECORD_BYTES_MAX))
