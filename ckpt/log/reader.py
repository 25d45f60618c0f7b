"""Reading the log from one store: the newest fold that proves right, then the records after it."""

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
"""How many records are held in memory before they are folded."""
HOLE_READS_MAX = 2
"""A hole is believed when it is seen twice: a list made while records are written may show the
later one alone."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class LogNote:
    """Something that went wrong and was got around: ``what`` happened to the object at ``key``, and
    why."""

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
            found = pool.map(read, items)
        except (
            RuntimeError
        ):  # the interpreter is ending: it starts no more work, but waits for the thread that saves
            return [read(item) for item in items]
        return list(found)


def read_start(backend: Backend, job: str) -> tuple[LogState, tuple[LogNote, ...]]:
    """The state to begin at: the newest fold that proves right, or the log's start; and notes of
    folds passed over.

    A fold proves right by its own digest and by the record that it says it ends with. Cost: a list
    of folds, and per fold tried two reads.
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
        if (state.job, state.next_seq, state.head_digest) == (
            job,
            last.seq + 1,
            last.digest,
        ) and last.seq == seq:
            return state, tuple(notes)
        notes.append(
            LogNote("fold passed over", key, "it is not the fold of the record that it names")
        )
    return empty(job), tuple(notes)


def read_new(backend: Backend, state: LogState) -> LogState:
    """``state`` and all records after it, up to the first hole. Cost: one list, and one read per
    new record.

    Raises FormatVersionError where a newer release wrote a record: what it says can't be guessed.
    """
    for _ in range(HOLE_READS_MAX):
        state = _read_on_once(backend, state.without_hole())
        if state.hole is None:
            return state
    return state


def _read_on_once(backend: Backend, state: LogState) -> LogState:
    after = keys.log_key(state.next_seq - 1) if state.next_seq else ""
    places = _places((stat.key for stat in backend.list(keys.LOG, after=after)), state.next_seq)
    for batch in _batches(places, RECORDS_AT_ONCE):
        seqs = [seq for seq, _ in batch]
        # What stands behind a gap is not read: the fold stops at the gap anyway.
        whole = [one for place, one in enumerate(batch) if one[0] == state.next_seq + place]
        found = read_all(whole, lambda one: _read_record(backend, *one))
        behind = [Unreadable(seq, "behind a gap") for seq in seqs[len(whole) : len(whole) + 1]]
        state = fold(state, [*found, *behind])
        if state.hole is not None:
            return state
    return state


def record_bytes(backend: Backend, seq: int) -> bytes:
    """The record at a place, as one store holds it: at the place's second key where it is there,
    for that one has won.

    Raises NotFoundError, IntegrityError, UnavailableError.
    """
    try:
        return read_alone(backend, keys.settled_key(seq), bytes_max=RECORD_BYTES_MAX)
    except NotFoundError:
        return read_alone(backend, keys.log_key(seq), bytes_max=RECORD_BYTES_MAX)


def _places(listed: Iterable[str], first: int) -> Iterator[tuple[int, str]]:
    """Each place from ``first`` on and the key to read there, of keys in order: the second one
    follows the first."""
    last: tuple[int, str] | None = None
    for key in listed:
        seq = keys.parse_log_key(key)
        seq = keys.parse_settled_key(key) if seq is None else seq
        if seq is None or seq < first:
            continue
        if last is not None and last[0] != seq:
            yield last
        last = seq, key
    if last is not None:
        yield last


def _read_record(backend: Backend, seq: int, key: str) -> Record | Unreadable:
    try:
        record = decode_record(read_alone(backend, key, bytes_max=RECORD_BYTES_MAX))
    except (IntegrityError, NotFoundError) as error:
        return Unreadable(seq, f"record cannot be read. key={key} why={error}")
    if record.seq != seq:
        return Unreadable(seq, f"record of another place. key={key} seq={record.seq}")
    return record


def _batches(places: Iterable[K], size: int) -> Iterator[list[K]]:
    iterator = iter(places)
    while batch := list(islice(iterator, size)):
        yield batch
