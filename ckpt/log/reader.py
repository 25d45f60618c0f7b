"""The log as read from one store: the newest fold that verifies, then the records after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import read_again, read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys
from ckpt.format.records import (
    RECORD_BYTES_MAX,
    Closed,
    Record,
    decode_record,
    decode_settled,
    is_closed,
)
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.fold import Unreadable, empty, fold
from ckpt.log.state import LogState
from ckpt.log.stored_fold import FOLD_BYTES_MAX, FOLDS_KEPT, decode_fold

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
    notes: list[LogNote] = []
    for seq in reversed(fold_seqs(backend)):
        key = keys.fold_key(seq)
        try:
            state = decode_fold(read_alone(backend, key, bytes_max=FOLD_BYTES_MAX))
            last = record_alone(backend, seq)
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


def fold_seqs(store: Backend) -> list[int]:
    """The positions of the stored folds, ascending. Cost: one list."""
    return [
        seq for stat in store.list(keys.FOLDS) if (seq := keys.parse_fold_key(stat.key)) is not None
    ]


def prune_folds(store: Backend) -> None:
    """Delete all folds but the newest three.

    Each holds what the ones before it hold, and readers start at the newest. Three, because a
    reader that finds one damaged takes the one before. Raises as ``list`` and ``delete``.
    """
    for seq in fold_seqs(store)[:-FOLDS_KEPT]:
        store.delete(keys.fold_key(seq))


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
    for batch in _batches(positions(backend, state.next_seq), RECORDS_AT_ONCE):
        while batch and state.hole is None:
            if batch[0][0] != state.next_seq:
                state = _fold_over_gap(backend, state, *batch[0])
                batch = batch[1:]
                continue
            unbroken = [entry for n, entry in enumerate(batch) if entry[0] == state.next_seq + n]
            state = fold(state, read_all(unbroken, lambda entry: _read_record(backend, *entry)))
            batch = batch[len(unbroken) :]
        if state.hole is not None:
            return state
    return state


def _fold_over_gap(backend: Backend, state: LogState, seq: int, stat: Stat) -> LogState:
    """``state``, the records below ``seq`` from their second copies, and the listed one at ``seq``.

    That one proves them: it was given its position after them, and names their digests. Where one
    is missing or out of this chain, ``state`` with a hole. Second copies never tell what is last.
    """
    filled = state
    # In a log on several stores there are none: what lies there is from before, or no vote.
    if state.stores is None or len(state.stores.ids) == 1:
        for seqs in _batches(range(state.next_seq, seq), READ_THREADS):
            found = read_all(seqs, lambda missing: second_record(backend, missing))
            records = [record for record in found if record is not None]
            filled = fold(filled, records)
            if filled.hole is not None or len(records) < len(found):
                break
    if filled.hole is None and filled.next_seq == seq:
        filled = fold(filled, [_read_record(backend, seq, stat)])
        if filled.hole is None:
            return filled
    return fold(state, [Unreadable(seq, "after a gap")])  # unread: it reports the hole


def records_back(stores: Sequence[Backend], seqs: Sequence[int], digest: str) -> list[Record]:
    """The records at ``seqs``, which descend without a gap; ``digest`` is the first one's.

    Each record names the digest of the one below it, so one that lost a race is never taken. Each
    store is asked by itself: nothing is repaired. Raises IntegrityError if no store has the right
    record, and UnavailableError if one that does not answer may have it. Cost: reads each record
    once, unless stores differ.
    """
    chain: list[Record] = []
    guesses = read_all(seqs, lambda seq: next(_held(stores, seq, []), None))
    for guess, seq in zip(guesses, seqs, strict=True):
        silent: list[UnavailableError] = []
        record = guess
        if record is None or record.digest != digest:
            held = _held(stores, seq, silent)
            record = next((copy for copy in held if copy.digest == digest), None)
        if record is None:
            if silent:
                raise silent[0]
            raise IntegrityError(
                f"a log record is no longer found. key={keys.log_key(seq)} digest={digest}; run "
                "this again, and examine the stores with ckpt doctor"
            )
        chain.append(record)
        digest = record.prev
    return chain


def _held(stores: Sequence[Backend], seq: int, silent: list[UnavailableError]) -> Iterator[Record]:
    """The valid records that the stores hold at a position; who does not answer goes to
    ``silent``."""
    for store in stores:
        for settled in (False, True):
            try:
                data = read_at(store, seq, settled=settled)
                content = decode_settled(data) if settled else decode_record(data)
            except (IntegrityError, NotFoundError):
                continue
            except UnavailableError as error:
                silent.append(error)
                break
            if isinstance(content, Record) and content.seq == seq:
                yield content
        try:
            second = second_record(store, seq)
        except UnavailableError as error:
            silent.append(error)
            continue
        if second is not None:
            yield second


def record_bytes(backend: Backend, seq: int) -> bytes:
    """The record at ``seq`` as one store holds it; the settled key wins, unless it is closed.

    Raises NotFoundError, IntegrityError, UnavailableError.
    """
    try:
        data = read_at(backend, seq, settled=True)
        if not is_closed(data):
            return data
    except NotFoundError:
        pass
    return read_at(backend, seq, settled=False)


def record_alone(store: Backend, seq: int) -> Record:
    """The record at ``seq`` of a log that ``store`` holds alone, from either of its copies.

    Raises NotFoundError, IntegrityError, FormatVersionError, UnavailableError.
    """
    try:
        record = decode_record(record_bytes(store, seq))
        if record.seq == seq:
            return record
        raise IntegrityError(
            f"record of another position. key={keys.log_key(seq)} seq={record.seq}"
        )
    except (IntegrityError, FormatVersionError, NotFoundError):
        if (second := second_record(store, seq)) is None:
            raise
        return second


def second_record(store: Backend, seq: int) -> Record | None:
    """The second copy of the record at ``seq``, if it is right; None otherwise.

    Only a log that is on one store has such copies. They are written after the record got its
    position, so they say what counts there; they are no votes, and whoever counts votes must not
    read them. Raises UnavailableError.
    """
    try:
        data = read_alone(store, keys.copy_key(keys.log_key(seq)), bytes_max=RECORD_BYTES_MAX)
        record = decode_record(data)
    except (IntegrityError, FormatVersionError, NotFoundError):
        return None
    return record if record.seq == seq else None


def read_job_record(store: Backend) -> JobRecord:
    """The store's ``ckpt.json``, or its second copy if that is damaged.

    Raises NotFoundError if it is missing, whether there is a second copy or not: who deleted it
    wants no store here. Raises IntegrityError, FormatVersionError, UnavailableError.
    """
    try:
        return read_again(
            lambda: JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
        )
    except (IntegrityError, FormatVersionError) as error:
        if (second := second_job_record(store)) is None:
            raise error
        return second


def second_job_record(store: Backend) -> JobRecord | None:
    """The second copy of ``ckpt.json``, if it is right; None otherwise. Raises UnavailableError."""
    try:
        data = read_alone(store, keys.copy_key(keys.JOB_KEY), bytes_max=JOB_BYTES_MAX)
        return JobRecord.decode(data)
    except (IntegrityError, FormatVersionError, NotFoundError):
        return None


def read_at(store: Backend, seq: int, *, settled: bool) -> bytes:
    """What ``store`` holds at the first or the settled key of a position.

    Raises NotFoundError, IntegrityError, UnavailableError. Cost: two small requests; two more if a
    store from before logs had folders may hold it.
    """
    try:
        return read_alone(
            store,
            keys.settled_key(seq) if settled else keys.log_key(seq),
            bytes_max=RECORD_BYTES_MAX,
        )
    except NotFoundError:
        if seq < keys.LOG_FOLDER_RECORDS:
            raise
        return read_alone(
            store, keys.flat_log_key(seq, settled=settled), bytes_max=RECORD_BYTES_MAX
        )


@dataclass(frozen=True, slots=True)
class LogObject:
    """A listed object that holds a record, or takes the place of one.

    ``round`` is None at a position's first key, else the number of the round that the record is
    settled in. Votes of later rounds are none of these: readers need no votes but the first.
    """

    seq: int
    round: int | None
    stat: Stat


def positions(store: Backend, first: int) -> Iterator[tuple[int, Stat]]:
    """The positions that ``store`` lists from ``first`` on, ascending, and the object to read at
    each.

    That is the one at the settled key where there is one. Cost: one list that begins near
    ``first``.
    """
    last: tuple[int, Stat] | None = None
    for found in log_objects(store, first):
        if found.round:
            continue  # what a later round settled is at the settled key too, once it was told
        if last is not None and last[0] != found.seq:
            yield last
        # A settled key follows the first key of its position, and replaces it.
        last = found.seq, found.stat
    if last is not None:
        yield last


def log_objects(store: Backend, first: int) -> Iterator[LogObject]:
    """Every listed object of positions from ``first`` on, by position, the first key first.

    Key order is order of positions, but for a store from before logs had folders: its keys of one
    folder's positions come after that folder. So each folder's worth is sorted.
    """

    def parsed() -> Iterator[LogObject]:
        for stat in store.list(keys.LOG, after=keys.log_key(first - 1) if first else ""):
            found = _log_object(stat)
            if found is not None and found.seq >= first:
                yield found

    for _, entries in groupby(parsed(), key=lambda found: found.seq // keys.LOG_FOLDER_RECORDS):
        yield from sorted(entries, key=_in_reading_order)


def _log_object(stat: Stat) -> LogObject | None:
    if (seq := keys.parse_log_key(stat.key)) is not None:
        return LogObject(seq, None, stat)
    if (seq := keys.parse_settled_key(stat.key)) is not None:
        return LogObject(seq, 0, stat)
    match keys.parse_round_key(stat.key):
        case seq, number, True:
            return LogObject(seq, number, stat)
        case _:
            return None


def _in_reading_order(found: LogObject) -> tuple[int, int, int]:
    # The longer key is the one in a folder: it goes before one outside of folders.
    return found.seq, -1 if found.round is None else found.round, len(found.stat.key)


def read_listed(store: Backend, stat: Stat, *, bytes_max: int) -> bytes:
    """The whole of an object that was just listed, unchecked: one request less than ``read_alone``.

    The length is the listed one. Raises as ``read_alone``.
    """
    if stat.size_bytes > bytes_max:
        return read_alone(store, stat.key, bytes_max=bytes_max)  # which says so
    out = bytearray(stat.size_bytes)
    if out:
        store.read_into(stat.key, memoryview(out))
    return bytes(out)


def listed_content(store: Backend, found: LogObject) -> Record | Closed:
    """What is at a listed key. Raises as ``read_alone`` and ``decode_record``."""
    decode = decode_record if found.round is None else decode_settled
    try:
        return decode(read_listed(store, found.stat, bytes_max=RECORD_BYTES_MAX))
    except IntegrityError:
        # A damaged record may have been replaced by the right one, of another length, meanwhile.
        return decode(read_alone(store, found.stat.key, bytes_max=RECORD_BYTES_MAX))


def _read_record(backend: Backend, seq: int, stat: Stat) -> Record | Unreadable:
    settled = keys.parse_settled_key(stat.key) is not None
    try:
        content = listed_content(backend, LogObject(seq, 0 if settled else None, stat))
        if isinstance(content, Closed):
            content = decode_record(read_at(backend, seq, settled=False))
        if content.seq == seq:
            return content
        problem = f"record of another position. key={stat.key} seq={content.seq}"
    except FormatVersionError:
        # The number itself may be damaged: then the second copy is of this release.
        if settled or (second := second_record(backend, seq)) is None:
            raise
        return second
    except (IntegrityError, NotFoundError) as error:
        problem = f"record cannot be read. key={stat.key} reason={error}"
    # A settled record is of a log on several stores, which has no second copies.
    second = None if settled else second_record(backend, seq)
    return Unreadable(seq, problem) if second is None else second


def _batches(positions: Iterable[K], size: int) -> Iterator[list[K]]:
    iterator = iter(positions)
    while batch := list(islice(iterator, size)):
        yield batch
