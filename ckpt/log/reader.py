"""The log as read from one store: the newest fold that verifies, then the records after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, Record, decode_record
from ckpt.log.fold import Unreadable, empty, fold
from ckpt.log.state import LogState
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold

READ_THREADS = 8
"""How many small objects are read at once; more gains nothing on one connection pool."""
RECORDS_AT_ONCE = 1024
"""How many records are in memory before they are folded."""
HOLE_READS_MAX = 2
"""A hole counts after it was read this often.

A list that was made while records were written may show a later record without an earlier one.
"""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class LogNote:
    """A problem that was worked around: ``event`` is what happened to the object at ``key``."""

    event: str
    key: str
    reason: str


def read_all(items: Sequence[K], read: Callable[[K], V]) -> list[V]:
    """``[read(item) for item in items]`` on a few threads; the first error in order is raised."""
    if len(items) < 2:
        return [read(item) for item in items]
    with ThreadPoolExecutor(
        max_workers=min(READ_THREADS, len(items)), thread_name_prefix="ckpt-read"
    ) as pool:
        try:
            results = pool.map(read, items)
        except RuntimeError:
            # The interpreter is exiting: it starts no threads, but still waits for the one that
            # saves.
            return [read(item) for item in items]
        return list(results)


def read_start(backend: Backend, job: str) -> tuple[LogState, tuple[LogNote, ...]]:
    """The state to start from, and notes about folds that were passed over.

    That is the newest fold that verifies, by its own digest and by the record that it ends with;
    without one the empty state. Cost: one list, and two reads per fold that is tried.
    """
    seqs = [
        seq
        for stat in backend.list(keys.FOLDS)
        if (seq := keys.parse_fold_key(stat.key)) is not None
    ]
    notes: list[LogNote] = []
    for seq in reversed(seqs):
        key = keys.fold_key(seq)
        try:
            state = decode_fold(read_alone(backend, key, bytes_max=FOLD_BYTES_MAX))
            last = decode_record(record_bytes(backend, seq))
        except (IntegrityError, FormatVersionError, NotFoundError) as error:
            notes.append(LogNote("fold passed over", key, str(error)))
            continue
        # The digest inside a fold only shows that it is undamaged. That it belongs to this log is
        # shown by the record that it ends with.
        expected = (job, last.seq + 1, last.digest)
        if (state.job, state.next_seq, state.head_digest) == expected and last.seq == seq:
            return state, tuple(notes)
        notes.append(
            LogNote("fold passed over", key, "it is not the fold of the record at its seq")
        )
    return empty(job), tuple(notes)


def read_new(backend: Backend, state: LogState) -> LogState:
    """``state`` and all records after it, up to the first hole. Cost: one list, one read per
    record.

    Raises FormatVersionError if a newer release wrote a record, because its meaning is unknown.
    """
    for _ in range(HOLE_READS_MAX):
        state = _read_new_once(backend, state.without_hole())
        if state.hole is None:
            return state
    return state


def _read_new_once(backend: Backend, state: LogState) -> LogState:
    after = keys.log_key(state.next_seq - 1) if state.next_seq else ""
    positions = _places((stat.key for stat in backend.list(keys.LOG, after=after)), state.next_seq)
    for batch in _batches(positions, RECORDS_AT_ONCE):
        # Records after a gap are not read: the fold stops at the gap anyway. One is passed to it
        # unread, so that it reports the hole.
        unbroken = [entry for n, entry in enumerate(batch) if entry[0] == state.next_seq + n]
        records = read_all(unbroken, lambda entry: _read_record(backend, *entry))
        after_gap = [Unreadable(seq, "after a gap") for seq, _ in batch[len(unbroken) :][:1]]
        state = fold(state, [*records, *after_gap])
        if state.hole is not None:
            return state
    return state


def record_bytes(backend: Backend, seq: int) -> bytes:
    """The record at ``seq`` as one store holds it; the settled key wins.

    Raises NotFoundError, IntegrityError, UnavailableError.
    """
    try:
        return read_alone(backend, keys.settled_key(seq), bytes_max=RECORD_BYTES_MAX)
    except NotFoundError:
        return read_alone(backend, keys.log_key(seq), bytes_max=RECORD_BYTES_MAX)


def _places(listed: Iterable[str], first: int) -> Iterator[tuple[int, str]]:
    """The positions from ``first`` on and the key to read at each.

    ``listed`` is in key order, so a position's settled key follows its first key.
    """
    last: tuple[int, str] | None = None
    for key in listed:
        seq = keys.parse_log_key(key)
        seq = keys.parse_settled_key(key) if seq is None else seq
        if seq is None or seq < first:
            continue
        if last is not None and last[0] != seq:
            yield last
        last = seq, key  # a settled key replaces the first key of its position
    if last is not None:
        yield last


def _read_record(backend: Backend, seq: int, key: str) -> Record | Unreadable:
    try:
        record = decode_record(read_alone(backend, key, bytes_max=RECORD_BYTES_MAX))
    except (IntegrityError, NotFoundError) as error:
        return Unreadable(seq, f"record cannot be read. key={key} reason={error}")
    if record.seq != seq:
        return Unreadable(seq, f"record of another position. key={key} seq={record.seq}")
    return record


def _batches(positions: Iterable[K], size: int) -> Iterator[list[K]]:
    iterator = iter(positions)
    while batch := list(islice(iterator, size)):
        yield batch
