"""The log as every store holds it, place by place: which record belongs there, who has it, who has
something else.

What counts is decided where all readers decide it (``commit.gather``); here each store's copy is
held against that.
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
from ckpt.format.records import RECORD_BYTES_MAX, Record, Stores, decode_record
from ckpt.log.fold import empty, fold
from ckpt.log.quorum import LastRecord, MergedLog, NoAnswer, StoreRecords, merge_stores
from ckpt.log.reader import read_all
from ckpt.log.state import Hole, LogState
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold, encode_fold, fold_due
from ckpt.maintenance.copies import CopyStatus
from ckpt.maintenance.copy_io import MaintenancePace
from ckpt.values import DIGEST_BYTES

WINDOW = 1024
"""How many places are held in memory at once."""
FOLD_KEPT_BYTES_MAX = 16 << 20
"""A fold that no store has rightly is kept in memory until it is written, up to this size; larger
ones are left to writers."""

CountedRecord = Callable[[int], "bytes | None"]
"""The bytes of the record that counts at a place, where the caller can tell; else None."""


@dataclass(slots=True)
class RecordFaults:
    """What one store has wrong in the log. ``first``: places whose record is to be written at the
    first key; ``second``: at the second, because a sound record that lost a race lies at the first.
    Both ascend."""

    first: array[int] = field(default_factory=lambda: array("Q"))
    second: array[int] = field(default_factory=lambda: array("Q"))


@dataclass(frozen=True, slots=True)
class FoldFaults:
    """One fold that not all stores have: who has it, and where it is to be written. ``data``: it,
    where nobody has it."""

    seq: int
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    data: bytes | None = None


@dataclass(slots=True)
class LogFindings:
    """The log in which all stores were compared. ``digests`` holds 16 bytes for each place of
    ``state``, from 0.

    ``open_tail``: the last record is on too few stores to be sure that it counts, so that it may
    not be copied yet.
    """

    state: LogState
    digests: bytearray
    faults: list[RecordFaults]
    folds: list[FoldFaults]
    open_tail: bool = False
    hole: Hole | None = None
    silent: dict[int, str] = field(default_factory=dict)
    """Stores that could not even be listed, and why."""

    def digest(self, seq: int) -> str:
        """The digest of the record at ``seq``, which must be below ``state.next_seq``."""
        return self.digests[seq * DIGEST_BYTES : (seq + 1) * DIGEST_BYTES].hex()


CopyObserver = Callable[[int, str, CopyStatus, str], None]
"""Told of each copy: the store's number, key, what it is, and a message."""


@dataclass(frozen=True, slots=True)
class _Listing:
    """What one store lists: places with a record, places with a settled one, and folds. None where
    it did not answer."""

    first: frozenset[int]
    second: frozenset[int]
    folds: frozenset[int]


def compare_logs(
    stores: Mapping[int, Backend],
    ids: Mapping[int, str],
    job: str,
    *,
    observe: CopyObserver,
    pace: MaintenancePace,
    counted_record: CountedRecord | None = None,
) -> LogFindings:
    """Read every record and fold of ``stores`` (by number; ``ids`` has theirs, "" where unknown),
    and compare.

    Stops at a hole that ``truth`` can't fill. Raises FormatVersionError and Stopped. Cost: two
    lists and every small object a store; memory for 1,024 places and 16 bytes for each.
    """
    size = 1 + max(stores, default=-1)
    log = LogFindings(empty(job), bytearray(), [RecordFaults() for _ in range(size)], [])
    names: dict[int, _Listing] = {}
    newer: dict[int, FormatVersionError] = {}
    for number, store in stores.items():
        try:
            names[number] = _names(store)
        except UnavailableError as error:
            log.silent[number] = str(error)
    away = [NoAnswer(why) for why in log.silent.values()]
    urls = [stores[number].url for number in (*names, *log.silent)]
    stores = {number: stores[number] for number in names}
    end = 1 + max((seq for one in names.values() for seq in one.first | one.second), default=-1)
    while log.state.next_seq < end:
        low = log.state.next_seq
        seqs = range(low, min(end, low + WINDOW + 1))
        held = {
            number: _held(stores[number], ids.get(number, ""), names[number], seqs, newer, pace)
            for number in stores
        }
        found, hole = _taken(log.state, [*held.values(), *away], urls, seqs.stop, counted_record)
        records = found.chain
        if not records and hole is None:
            break
        log.open_tail = seqs[-1] + 1 >= end and _open(found.gathered.tail, records, counted_record)
        for record in records:
            log.digests += bytes.fromhex(record.digest)
            unproven = log.open_tail and record is records[-1]
            for number, one in held.items():
                _note_record(log.faults[number], number, one, record, None if unproven else observe)
        for seq in (record.seq for record in records):
            if fold_due(seq) and any(seq in one.folds for one in names.values()):
                state = fold(log.state, [record for record in records if record.seq <= seq])
                _compare_fold(log, stores, state, observe, pace)
        before, log.state = log.state.next_seq, fold(log.state, records)
        if hole is not None and not (
            hole.seq > before and hole.seq == seqs[-1] and hole.seq + 1 < end
        ):
            # At a window's end the next record, which may tell, was not seen: there it is looked at
            # once more.
            log.hole = hole
            break
    if log.hole is not None and log.hole.seq in newer:
        # Nobody has a record there that this release can read, and somebody's says that a newer one
        # wrote it.
        raise newer[log.hole.seq]
    return log


def right_record(store: Backend, seq: int, digest: str) -> bytes | None:
    """The bytes of the record with this digest, from either of its keys; None where the store has
    it at neither."""
    for key in (keys.log_key(seq), keys.settled_key(seq)):
        try:
            data = read_alone(store, key, bytes_max=RECORD_BYTES_MAX)
        except (NotFoundError, IntegrityError):
            continue
        if is_record(data, digest):
            return data
    return None


def is_record(data: bytes, digest: str) -> bool:
    """Whether ``data`` is the record with this digest."""
    try:
        return decode_record(data).digest == digest
    except (IntegrityError, FormatVersionError):
        return False


@dataclass(frozen=True, slots=True)
class _CountedRecords:
    gathered: MergedLog
    chain: list[Record]


def _taken(
    state: LogState,
    held: Sequence[StoreRecords | NoAnswer],
    urls: Sequence[str],
    stop: int,
    truth: CountedRecord | None,
) -> tuple[_CountedRecords, Hole | None]:
    """The records below ``stop`` that count, in order, and the hole that ends them, if one does."""
    found = merge_stores(state, _without_doubt(state, held), urls)
    chain = _chain(state, found.state, held)
    hole, at = found.state.hole, found.state.next_seq
    if (
        hole is None
        and at < stop
        and any(isinstance(one, StoreRecords) and at in one.damaged for one in held)
    ):
        hole = Hole(at, "no store has a readable record there.")
    if truth is not None and found.state.next_seq < stop:
        told = _told(found.state.without_hole(), truth)
        if told is not None:
            return _CountedRecords(found, [*chain, told]), None
    return _CountedRecords(found, chain), hole


def _without_doubt(
    state: LogState, held: Sequence[StoreRecords | NoAnswer]
) -> list[StoreRecords | NoAnswer]:
    """``held``, in which damage hides no vote as long as the log is in one store.

    Replicas of such a log hold only what counted already, so one sound record at a place is the
    one, whatever became of the others. From the first record on that names several stores, a
    damaged copy may have been another record's.
    """
    if state.stores is not None:
        return list(held)
    naming = [
        seq
        for one in held
        if isinstance(one, StoreRecords)
        for seq, record in (*one.records.items(), *one.settled.items())
        if isinstance(record.body, Stores)
    ]
    first = min(naming, default=None)
    return [
        replace(
            one, damaged=frozenset(seq for seq in one.damaged if first is not None and seq >= first)
        )
        if isinstance(one, StoreRecords)
        else one
        for one in held
    ]


def _chain(
    before: LogState, after: LogState, held: Sequence[StoreRecords | NoAnswer]
) -> list[Record]:
    """The records from ``before`` to ``after``: each names the digest of the one before it."""
    expected = after.head_digest
    chain: list[Record] = []
    for seq in range(after.next_seq - 1, before.next_seq - 1, -1):
        found = next(
            record
            for one in held
            if isinstance(one, StoreRecords)
            for record in (one.records.get(seq), one.settled.get(seq))
            if record is not None and record.digest == expected
        )
        chain.append(found)
        expected = found.prev
    chain.reverse()
    return chain


def _told(state: LogState, truth: CountedRecord) -> Record | None:
    data = truth(state.next_seq)
    if data is None:
        return None
    try:
        record = decode_record(data)
    except IntegrityError:
        return None
    return record if fold(state, [record]).hole is None else None


def _open(tail: LastRecord | None, records: Sequence[Record], truth: CountedRecord | None) -> bool:
    """Whether the last record is on too few stores to be sure of it, and nobody else is."""
    if (
        tail is None
        or not records
        or records[-1] is not tail.record
        or tail.copies >= tail.members.write_quorum
    ):
        return False
    return truth is None or truth(tail.record.seq) != tail.record.encode()


def _note_record(
    faults: RecordFaults,
    number: int,
    held: StoreRecords | NoAnswer,
    record: Record,
    note: CopyObserver | None,
) -> None:
    """Tell what a store has of a record; nothing where ``note`` is None, for a record that may not
    count."""
    if note is None:
        return
    seq, key = record.seq, keys.log_key(record.seq)
    if isinstance(held, NoAnswer):
        note(number, key, CopyStatus.UNREADABLE, held.reason)
        return
    first, second = held.records.get(seq), held.settled.get(seq)
    if record.digest in (first and first.digest, second and second.digest):
        if seq not in held.damaged:
            note(number, key, CopyStatus.OK, "")
        elif first is None:
            faults.first.append(seq)
            note(number, key, CopyStatus.DAMAGED, "it is no valid record of this place")
        else:
            faults.second.append(seq)
            note(
                number,
                keys.settled_key(seq),
                CopyStatus.DAMAGED,
                "it is no valid record of this place",
            )
    elif first is not None:
        # It was created once and lost: it stays, and what counts goes to the second key.
        faults.second.append(seq)
        note(
            number,
            keys.settled_key(seq),
            CopyStatus.MISSING,
            f"another record lies at the first key. seq={seq}",
        )
    elif seq in held.damaged:
        faults.first.append(seq)
        note(number, key, CopyStatus.DAMAGED, "it is no valid record of this place")
    else:
        faults.first.append(seq)
        note(number, key, CopyStatus.MISSING, "it is not there")


def _compare_fold(
    log: LogFindings,
    stores: Mapping[int, Backend],
    state: LogState,
    note: CopyObserver,
    pace: MaintenancePace,
) -> None:
    expected = encode_fold(state)
    key = keys.fold_key(state.next_seq - 1)
    right: list[int] = []
    wrong: list[int] = []
    found: dict[int, tuple[CopyStatus, str, bool]] = {}
    for number, store in stores.items():
        pace.take(len(expected))
        found[number] = _look_fold(store, key, expected, state)
    known = any(what is CopyStatus.OK for what, _, _ in found.values())
    for number, (what, why, newer) in found.items():
        if newer and not known:
            continue  # a newer release may have written it: it is not ours to judge
        note(number, key, what, why)
        if what is CopyStatus.OK:
            right.append(number)
        elif what is not CopyStatus.UNREADABLE:
            wrong.append(number)
    if wrong:
        kept = None if right or len(expected) > FOLD_KEPT_BYTES_MAX else expected
        log.folds.append(FoldFaults(state.next_seq - 1, tuple(right), tuple(wrong), kept))


def _look_fold(
    store: Backend, key: str, expected: bytes, state: LogState
) -> tuple[CopyStatus, str, bool]:
    """What the fold is there, why, and whether it says that another release wrote it."""
    try:
        data = read_alone(store, key, bytes_max=FOLD_BYTES_MAX)
        # Another release may spell the same state otherwise: that is right too.
        same = data == expected or decode_fold(data) == state
    except NotFoundError:
        return CopyStatus.MISSING, "it is not there", False
    except UnavailableError as error:
        return CopyStatus.UNREADABLE, str(error), False
    except FormatVersionError as error:
        return CopyStatus.DAMAGED, str(error), True
    except IntegrityError as error:
        return CopyStatus.DAMAGED, str(error), False
    return (
        (CopyStatus.OK, "", False)
        if same
        else (CopyStatus.DAMAGED, "it is not the fold of the records before it", False)
    )


def _names(store: Backend) -> _Listing:
    first: set[int] = set()
    second: set[int] = set()
    for stat in store.list(keys.LOG):
        if (seq := keys.parse_log_key(stat.key)) is not None:
            first.add(seq)
        elif (seq := keys.parse_settled_key(stat.key)) is not None:
            second.add(seq)
    folds = {
        seq for stat in store.list(keys.FOLDS) if (seq := keys.parse_fold_key(stat.key)) is not None
    }
    return _Listing(frozenset(first), frozenset(second), frozenset(folds))


def _held(
    store: Backend,
    store_id: str,
    names: _Listing,
    seqs: range,
    newer: dict[int, FormatVersionError],
    pace: MaintenancePace,
) -> StoreRecords | NoAnswer:
    """What ``store`` has at ``seqs``. A record of another format version is damage as long as
    another store has a sound one; it is noted in ``newer``."""
    places = [(keys.log_key(seq), seq, False) for seq in seqs if seq in names.first]
    places += [(keys.settled_key(seq), seq, True) for seq in seqs if seq in names.second]

    def read(place: tuple[str, int, bool]) -> Record | CkptError:
        pace.check()
        return _read(store, place[0], place[1])

    records: dict[int, Record] = {}
    settled: dict[int, Record] = {}
    damaged: set[int] = set()
    for (_, seq, second), found in zip(places, read_all(places, read), strict=True):
        if isinstance(found, Record):
            (settled if second else records)[seq] = found
        elif isinstance(found, UnavailableError):
            return NoAnswer(str(found))
        elif isinstance(found, IntegrityError | FormatVersionError):
            damaged.add(seq)
            if isinstance(found, FormatVersionError):
                newer[seq] = found
    return StoreRecords(store_id, records, settled, frozenset(damaged))


def _read(store: Backend, key: str, seq: int) -> Record | CkptError:
    try:
        record = decode_record(read_alone(store, key, bytes_max=RECORD_BYTES_MAX))
    except (IntegrityError, FormatVersionError, NotFoundError, UnavailableError) as error:
        return error
    return (
        record
        if record.seq == seq
        else IntegrityError(f"record of another place. key={key} seq={record.seq}")
    )
