"""The comparison of a log's copies: for each position, which record counts and what each store has.

Which record counts is decided by ``quorum.merge_stores``, as for all readers. Here each store's
copy is compared with that record. A position is a seq; a store keeps its record at the first key,
or, if the first key holds a record that lost a race, at the second, settled key.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import (
    CkptError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
)
from ckpt.format import keys
from ckpt.format.records import Closed, Record, Stores, decode_record, decode_settled
from ckpt.log.fold import empty, fold
from ckpt.log.quorum import LastRecord, MergedLog, NoAnswer, StoreRecords, merge_stores
from ckpt.log.reader import (
    LogObject,
    fold_seqs,
    listed_content,
    log_objects,
    read_all,
    read_at,
    second_record,
)
from ckpt.log.state import Hole, LogState
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold, encode_fold, fold_due
from ckpt.maintenance.copies import CopyStatus
from ckpt.maintenance.copy_io import MaintenancePace
from ckpt.values import DIGEST_BYTES

WINDOW = 1024
"""Positions that are compared at a time."""
FOLD_KEPT_BYTES_MAX = 16 << 20
"""Largest fold that is kept in memory until it is written, if no store has it right. Larger ones
are left to the log's writers."""

INVALID = "it is no valid record of this position"
UNPROVEN = "it cannot be proven which record counted here: one behind it is lost"

CountedRecord = Callable[[int], "bytes | None"]
"""Returns the bytes of the record that counts at a seq, or None if the caller does not know."""

CopyObserver = Callable[[int, str, CopyStatus, str], None]
"""Receives each copy: the store's number, the key, the status and a message."""


@dataclass(slots=True)
class RecordFaults:
    """The positions at which one store lacks the right record, ascending.

    ``first``: write the record at the first key. ``second``: write it at the second key, because a
    valid record that lost a race is at the first one.
    """

    first: array[int] = field(default_factory=lambda: array("Q"))
    second: array[int] = field(default_factory=lambda: array("Q"))


@dataclass(frozen=True, slots=True)
class FoldFaults:
    """One fold that some stores lack: the stores with a right copy, and those with a wrong one.

    ``data``: the fold itself, if no store has it.
    """

    seq: int
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    data: bytes | None = None


@dataclass(slots=True)
class LogFindings:
    """The log that the stores were compared with, and the faults of each store by number.

    ``digests`` has 16 bytes for each position of ``state``. ``open_tail``: the last record is on
    too few stores to be final, so it must not be copied. ``silent``: stores that could not be
    listed, and why. ``lost``: positions without a readable record on any store, before a fold from
    which readers start.
    """

    state: LogState
    digests: bytearray
    faults: list[RecordFaults]
    folds: list[FoldFaults]
    open_tail: bool = False
    hole: Hole | None = None
    silent: dict[int, str] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    def digest(self, seq: int) -> str:
        """The digest of the record at ``seq``, which is below ``state.next_seq``."""
        return self.digests[seq * DIGEST_BYTES : (seq + 1) * DIGEST_BYTES].hex()


@dataclass(frozen=True, slots=True)
class _Listing:
    """The seqs that one store lists: records at the first key, at the second key, and folds.

    ``later``: the records that further rounds of a vote settled.
    """

    first: frozenset[int]
    second: frozenset[int]
    folds: frozenset[int]
    later: Sequence[LogObject] = ()


def compare_logs(
    stores: Mapping[int, Backend],
    ids: Mapping[int, str],
    job: str,
    *,
    observe: CopyObserver,
    pace: MaintenancePace,
    counted_record: CountedRecord | None = None,
) -> LogFindings:
    """Read every record and fold of ``stores`` and compare them.

    ``stores`` and ``ids`` are by store number; an unknown id is "". A hole that ``counted_record``
    cannot fill is passed over with a fold behind it, as readers do; without one it stops there.
    Raises FormatVersionError and Stopped. Cost: for each store two
    lists and every small object; memory for WINDOW positions and 16 bytes for each record.
    """
    size = 1 + max(stores, default=-1)
    log = LogFindings(empty(job), bytearray(), [RecordFaults() for _ in range(size)], [])
    listings: dict[int, _Listing] = {}
    newer: dict[int, FormatVersionError] = {}
    for number, store in stores.items():
        try:
            listings[number] = _listing(store)
        except UnavailableError as error:
            log.silent[number] = str(error)
    away = [NoAnswer(reason) for reason in log.silent.values()]
    urls = [stores[number].url for number in (*listings, *log.silent)]
    stores = {number: stores[number] for number in listings}
    end = 1 + max(
        (seq for listing in listings.values() for seq in listing.first | listing.second),
        default=-1,
    )
    while log.state.next_seq < end:
        low = log.state.next_seq
        # One position more than the window: the record after the last one may prove it.
        seqs = range(low, min(end, low + WINDOW + 1))
        copies = {
            number: _read_records(
                stores[number], ids.get(number, ""), listings[number], seqs, newer, pace
            )
            for number in stores
        }
        counted, hole = _counted_records(
            log.state, [*copies.values(), *away], urls, seqs.stop, counted_record
        )
        records = counted.chain
        if not records and hole is None:
            break
        at_end = seqs[-1] + 1 >= end
        log.open_tail = at_end and _is_open(counted.merged.tail, records, counted_record)
        for record in records:
            log.digests += bytes.fromhex(record.digest)
            if log.open_tail and record is records[-1]:
                # It may not count: its writer has to finish it, and a copy would be a vote.
                continue
            for number, copy in copies.items():
                _compare_record(log.faults[number], number, copy, record, observe)
        for seq in (record.seq for record in records):
            if fold_due(seq) and any(seq in listing.folds for listing in listings.values()):
                state = fold(log.state, [record for record in records if record.seq <= seq])
                _compare_fold(log, stores, state, observe, pace)
        before, log.state = log.state.next_seq, fold(log.state, records)
        if hole is not None and not (
            hole.seq > before and hole.seq == seqs[-1] and hole.seq + 1 < end
        ):
            if _pass_over(log, stores, ids, listings, newer, observe, pace):
                continue
            log.hole = hole
            break
        # A hole at a window's last position is read again as the first one of the next window:
        # there the record after it is seen too, and may decide it.
    if log.hole is not None and log.hole.seq in newer:
        # No store has a readable record there, and at least one holds a newer release's record.
        raise newer[log.hole.seq]
    return log


def _pass_over(
    log: LogFindings,
    stores: Mapping[int, Backend],
    ids: Mapping[int, str],
    listings: Mapping[int, _Listing],
    newer: dict[int, FormatVersionError],
    observe: CopyObserver,
    pace: MaintenancePace,
) -> bool:
    """Go on at the first fold behind a hole that readers would start from; whether there is one.

    The records before it are found backwards from the one that it ends with, and compared as all
    others; those that no store has are ``lost``. Below a lost one the fold tells which record
    counted; where it does not know, that is told as not known, and nothing is copied.
    """
    low = log.state.next_seq
    state = _fold_behind(stores, listings, log.state.job, low)
    if state is None:
        return False
    digests: dict[int, str] = {}
    faults = [RecordFaults() for _ in log.faults]
    expected, top = state.head_digest, state.next_seq
    while top > low:
        seqs = range(max(low, top - WINDOW), top)
        copies = {
            number: _read_records(
                stores[number], ids.get(number, ""), listings[number], seqs, newer, pace
            )
            for number in stores
        }
        for seq in reversed(seqs):
            record = next(
                (
                    record
                    for copy in copies.values()
                    if isinstance(copy, StoreRecords)
                    for record in copy.all_at(seq)
                    if _is_counted(record, expected, state)
                ),
                None,
            )
            if record is None:
                is_known = bool(expected) or state.write_id_at(seq) is not None
                _note_absent(log, copies, seq, is_known, observe)
                digests[seq] = expected
                expected = ""  # nothing names the record before it
                continue
            digests[seq], expected = record.digest, record.prev
            for number, copy in copies.items():
                _compare_record(faults[number], number, copy, record, observe)
        top = seqs.start
    unknown = "0" * 2 * DIGEST_BYTES
    for seq in range(low, state.next_seq):
        log.digests += bytes.fromhex(digests[seq] or unknown)
    for number, found in enumerate(faults):
        log.faults[number].first.extend(reversed(found.first))
        log.faults[number].second.extend(reversed(found.second))
    _compare_fold(log, stores, state, observe, pace)
    log.state = state
    return True


def _fold_behind(
    stores: Mapping[int, Backend], listings: Mapping[int, _Listing], job: str, low: int
) -> LogState | None:
    """The first fold at or behind ``low`` that verifies by the record that it ends with."""
    seqs = {seq for listing in listings.values() for seq in listing.folds if seq >= low}
    for seq in sorted(seqs):
        for store in stores.values():
            try:
                state = decode_fold(read_alone(store, keys.fold_key(seq), bytes_max=FOLD_BYTES_MAX))
            except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
                continue
            if (state.job, state.next_seq) == (job, seq + 1) and any(
                _has_record(other, seq, state.head_digest) for other in stores.values()
            ):
                return state
    return None


def _has_record(store: Backend, seq: int, digest: str) -> bool:
    try:
        return right_record(store, seq, digest) is not None
    except UnavailableError:
        return False


def _is_counted(record: Record, expected: str, state: LogState) -> bool:
    """Whether ``record`` counted below a fold; ``expected``: its digest, "" below a lost record."""
    if expected:
        return record.digest == expected
    if record.job != state.job:
        return False
    # A record that lost a race at this position has another write id.
    write_id = state.write_id_at(record.seq)
    if write_id is not None:
        return record.write_id == write_id
    return state.stores is None  # one store gave out the positions: no record lost a race


def _note_absent(
    log: LogFindings,
    copies: Mapping[int, StoreRecords | NoAnswer],
    seq: int,
    is_known: bool,
    observe: CopyObserver,
) -> None:
    """Note that no store has the record that counted at ``seq``, or that none can be proven to have
    counted: unless ``is_known``, one that is held there may be it."""
    key = keys.log_key(seq)
    read = [copy for copy in copies.values() if isinstance(copy, StoreRecords)]
    unproven = not is_known and any(any(copy.all_at(seq)) for copy in read)
    if not unproven:
        log.lost.add(seq)
    for number, copy in copies.items():
        if isinstance(copy, NoAnswer):
            observe(number, key, CopyStatus.UNREADABLE, copy.reason)
        elif unproven:
            observe(number, key, CopyStatus.UNREADABLE, UNPROVEN)
        elif seq in copy.damaged or any(copy.all_at(seq)):
            observe(number, key, CopyStatus.DAMAGED, INVALID)
        else:
            observe(number, key, CopyStatus.MISSING, "it is not there")


def right_record(store: Backend, seq: int, digest: str) -> bytes | None:
    """The bytes of the record with this digest, from either of its keys; None if it has neither."""
    for settled in (False, True):
        try:
            data = read_at(store, seq, settled=settled)
        except (NotFoundError, IntegrityError):
            continue
        if is_record(data, digest):
            return data
    # No vote: the caller knows which record counts.
    second = second_record(store, seq)
    return second.encode() if second is not None and second.digest == digest else None


def is_record(data: bytes, digest: str) -> bool:
    """Whether ``data`` is the record with this digest."""
    try:
        return decode_record(data).digest == digest
    except (IntegrityError, FormatVersionError):
        return False


@dataclass(frozen=True, slots=True)
class _CountedRecords:
    merged: MergedLog
    chain: list[Record]


def _counted_records(
    state: LogState,
    copies: Sequence[StoreRecords | NoAnswer],
    urls: Sequence[str],
    stop: int,
    counted_record: CountedRecord | None,
) -> tuple[_CountedRecords, Hole | None]:
    """The records below ``stop`` that count, in order, and the hole that ends them, if any."""
    merged = merge_stores(state, _without_doubt(state, copies), urls)
    chain = _chain(state, merged.state, copies)
    hole, next_seq = merged.state.hole, merged.state.next_seq
    members = merged.state.stores
    if (
        hole is None
        and next_seq < stop
        # With several stores it was decided above whether what is damaged may have counted: a vote
        # that reached too few is none.
        and (members is None or len(members.ids) == 1)
        and any(isinstance(copy, StoreRecords) and next_seq in copy.damaged for copy in copies)
    ):
        hole = Hole(next_seq, "no store has a readable record there.")
    if counted_record is not None and next_seq < stop:
        record = _record_of_caller(merged.state.without_hole(), counted_record)
        if record is not None:
            return _CountedRecords(merged, [*chain, record]), None
    return _CountedRecords(merged, chain), hole


def _without_doubt(
    state: LogState, copies: Sequence[StoreRecords | NoAnswer]
) -> list[StoreRecords | NoAnswer]:
    """``copies`` without the damaged positions that cannot hide a vote.

    While the log is in one store, its replicas hold only what counted there. So any valid record at
    a position is the right one, whatever became of the other copies. From the first record that
    names several stores on, a damaged copy may have been another record's vote.
    """
    if state.stores is not None:
        return list(copies)
    stores_seqs = [
        seq
        for copy in copies
        if isinstance(copy, StoreRecords)
        for seq, record in (*copy.records.items(), *copy.settled.items())
        if isinstance(record.body, Stores)
    ]
    first = min(stores_seqs, default=None)
    return [
        replace(
            copy,
            damaged=frozenset(seq for seq in copy.damaged if first is not None and seq >= first),
        )
        if isinstance(copy, StoreRecords)
        else copy
        for copy in copies
    ]


def _chain(
    before: LogState, after: LogState, copies: Sequence[StoreRecords | NoAnswer]
) -> list[Record]:
    """The records from ``before`` to ``after``, found backwards along their ``prev`` digests."""
    expected = after.head_digest
    chain: list[Record] = []
    for seq in range(after.next_seq - 1, before.next_seq - 1, -1):
        record = next(
            record
            for copy in copies
            if isinstance(copy, StoreRecords)
            for record in copy.all_at(seq)
            if record.digest == expected
        )
        chain.append(record)
        expected = record.prev
    chain.reverse()
    return chain


def _record_of_caller(state: LogState, counted_record: CountedRecord) -> Record | None:
    data = counted_record(state.next_seq)
    if data is None:
        return None
    try:
        record = decode_record(data)
    except IntegrityError:
        return None
    return record if fold(state, [record]).hole is None else None


def _is_open(
    tail: LastRecord | None, records: Sequence[Record], counted_record: CountedRecord | None
) -> bool:
    """Whether the last record is on too few stores to be final, and the caller does not know it."""
    if tail is None or not records or records[-1] is not tail.record or tail.is_final:
        return False
    return counted_record is None or counted_record(tail.record.seq) != tail.record.encode()


def _compare_record(
    faults: RecordFaults,
    number: int,
    copy: StoreRecords | NoAnswer,
    record: Record,
    observe: CopyObserver,
) -> None:
    """Compare one store's copies with the record that counts, and add what is to be written."""
    seq, key = record.seq, keys.log_key(record.seq)
    settled_key = keys.settled_key(seq)
    if isinstance(copy, NoAnswer):
        observe(number, key, CopyStatus.UNREADABLE, copy.reason)
        return
    first, second = copy.records.get(seq), copy.settled.get(seq)
    if record.digest in (first and first.digest, second and second.digest):
        if seq not in copy.damaged:
            observe(number, key, CopyStatus.OK, "")
        elif first is None:
            faults.first.append(seq)
            observe(number, key, CopyStatus.DAMAGED, INVALID)
        else:
            faults.second.append(seq)
            observe(number, settled_key, CopyStatus.DAMAGED, INVALID)
    elif first is not None:
        # The first key is created once, and its record may be the store's vote: it stays.
        faults.second.append(seq)
        message = f"another record is at the first key. seq={seq}"
        observe(number, settled_key, CopyStatus.MISSING, message)
    elif seq in copy.damaged:
        faults.first.append(seq)
        observe(number, key, CopyStatus.DAMAGED, INVALID)
    else:
        faults.first.append(seq)
        observe(number, key, CopyStatus.MISSING, "it is not there")


def _compare_fold(
    log: LogFindings,
    stores: Mapping[int, Backend],
    state: LogState,
    observe: CopyObserver,
    pace: MaintenancePace,
) -> None:
    expected = encode_fold(state)
    key = keys.fold_key(state.next_seq - 1)
    right: list[int] = []
    wrong: list[int] = []
    checks: dict[int, tuple[CopyStatus, str, bool]] = {}
    for number, store in stores.items():
        pace.take(len(expected))
        checks[number] = _check_fold(store, key, expected, state)
    any_right = any(status is CopyStatus.OK for status, _, _ in checks.values())
    for number, (status, message, newer) in checks.items():
        if newer and not any_right:
            continue  # a newer release may have written it, so it may be right
        observe(number, key, status, message)
        if status is CopyStatus.OK:
            right.append(number)
        elif status is not CopyStatus.UNREADABLE:
            wrong.append(number)
    if wrong:
        kept = None if right or len(expected) > FOLD_KEPT_BYTES_MAX else expected
        log.folds.append(FoldFaults(state.next_seq - 1, tuple(right), tuple(wrong), kept))


def _check_fold(
    store: Backend, key: str, expected: bytes, state: LogState
) -> tuple[CopyStatus, str, bool]:
    """The status of the store's fold, a message, and whether it names a newer format."""
    try:
        data = read_alone(store, key, bytes_max=FOLD_BYTES_MAX)
        # Another release may encode the same state in other bytes: that is right too.
        same = data == expected or decode_fold(data) == state
    except NotFoundError:
        return CopyStatus.MISSING, "it is not there", False
    except UnavailableError as error:
        return CopyStatus.UNREADABLE, str(error), False
    except FormatVersionError as error:
        return CopyStatus.DAMAGED, str(error), True
    except IntegrityError as error:
        return CopyStatus.DAMAGED, str(error), False
    if same:
        return CopyStatus.OK, "", False
    return CopyStatus.DAMAGED, "it is not the fold of the records before it", False


def _listing(store: Backend) -> _Listing:
    first: set[int] = set()
    second: set[int] = set()
    later: list[LogObject] = []
    for found in log_objects(store, 0):
        if found.round:
            later.append(found)
        else:
            (first if found.round is None else second).add(found.seq)
    return _Listing(frozenset(first), frozenset(second), frozenset(fold_seqs(store)), later)


def _read_records(
    store: Backend,
    store_id: str,
    listing: _Listing,
    seqs: range,
    newer: dict[int, FormatVersionError],
    pace: MaintenancePace,
) -> StoreRecords | NoAnswer:
    """The records of ``store`` at ``seqs``.

    A record of a newer format counts as damaged, in case another store has a readable one; its
    error is kept in ``newer``.
    """
    record_keys = [(seq, False) for seq in seqs if seq in listing.first]
    record_keys += [(seq, True) for seq in seqs if seq in listing.second]

    def read(record_key: tuple[int, bool]) -> Record | CkptError:
        pace.check()
        return _read(store, *record_key)

    records: dict[int, Record] = {}
    settled: dict[int, Record] = {}
    damaged: set[int] = set()
    results = read_all(record_keys, read)
    for (seq, second), result in zip(record_keys, results, strict=True):
        if isinstance(result, Record):
            (settled if second else records)[seq] = result
        elif isinstance(result, UnavailableError):
            return NoAnswer(str(result))
        elif isinstance(result, IntegrityError | FormatVersionError):
            damaged.add(seq)
            if isinstance(result, FormatVersionError):
                newer[seq] = result
    later: dict[int, tuple[int, Record]] = {}
    for found in listing.later:
        if found.seq in seqs and found.round:
            try:
                content = listed_content(store, found)
            except UnavailableError as error:
                return NoAnswer(str(error))
            except (IntegrityError, FormatVersionError, NotFoundError):
                damaged.add(found.seq)
                continue
            if isinstance(content, Record) and content.seq == found.seq:
                later[found.seq] = found.round, content
    return StoreRecords(store_id, records, settled, frozenset(damaged), later=later)


def _read(store: Backend, seq: int, settled: bool) -> Record | CkptError:
    try:
        data = read_at(store, seq, settled=settled)
        record = decode_settled(data) if settled else decode_record(data)
        if isinstance(record, Closed):
            return NotFoundError(f"the round is closed, without a record. seq={seq}")
    except (IntegrityError, FormatVersionError, NotFoundError, UnavailableError) as error:
        return error
    if record.seq != seq:
        key = keys.settled_key(seq) if settled else keys.log_key(seq)
        return IntegrityError(f"record of another position. key={key} seq={record.seq}")
    return record
