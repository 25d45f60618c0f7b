"""Copying a log's records and folds to a replica, in order, each proven by the digest that the
record after it names."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import read_alone, read_checked, read_object, stores_of
from ckpt.errors import (
    ConflictError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
)
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import PART_STORED_BYTES_MAX
from ckpt.format.records import RECORD_BYTES_MAX, Record, decode_record
from ckpt.log.reader import read_all
from ckpt.log.sequencers import PUT_TRIES_MAX, KeyTaken, WriteUnknown, create_once
from ckpt.log.state import LogState
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold
from ckpt.maintenance.copies import ChunkRef, CopyStatus, Pack, WholeObject
from ckpt.maintenance.copy_io import (
    ListingWalk,
    MaintenancePace,
    check_pack,
    check_whole,
    chunk_problem,
    first_wrong_chunk,
)
from ckpt.maintenance.replica import MemoryBudget
from ckpt.maintenance.scrub.log import right_record
from ckpt.save.chunks import PACK_BYTES_MAX
from ckpt.values import DIGEST_BYTES

WINDOW = 256
"""How many records are read at once."""


@dataclass(frozen=True, slots=True)
class RecordChain:
    """The digests of the records ``low`` to the head of a state, 16 bytes each. ``prev``: of the
    record before ``low``."""

    low: int
    prev: str
    digests: bytearray

    def digest(self, seq: int) -> str:
        """The digest of the record at ``seq``, which must not lie below ``low - 1``."""
        if seq == self.low - 1:
            return self.prev
        at = (seq - self.low) * DIGEST_BYTES
        return self.digests[at : at + DIGEST_BYTES].hex()


@dataclass(frozen=True, slots=True)
class LogPrefix:
    """What a replica lists of a log: the first ``length`` places without a gap, and whether
    anything lies behind them."""

    length: int
    beyond: frozenset[int]


def read_chain(source: Backend, state: LogState, low: int, *, pace: MaintenancePace) -> RecordChain:
    """Walk back from the head of ``state``, which is known, to ``low``: each record proves the one
    before it.

    Raises IntegrityError where ``source`` has a record nowhere rightly. Reads each record once.
    """
    digests = bytearray((state.next_seq - low) * DIGEST_BYTES)
    expected = state.head_digest
    for stop in range(state.next_seq, low, -WINDOW):
        seqs = range(max(low, stop - WINDOW), stop)
        pace.check()
        found = read_all(list(seqs), lambda seq: _any_record(source, seq))
        for seq, record in zip(reversed(seqs), reversed(found), strict=True):
            if record is None or record.digest != expected:
                record = decode_record(read_record(source, seq, expected))
            digests[(seq - low) * DIGEST_BYTES : (seq - low + 1) * DIGEST_BYTES] = bytes.fromhex(
                record.digest
            )
            expected = record.prev
    return RecordChain(low, expected, digests)


def read_record(source: Backend, seq: int, digest: str) -> bytes:
    """The record's bytes, from whichever store has it at either of its keys. Raises IntegrityError
    where none that answers has.

    Each store is asked by itself: reading through several at once would mend the others' copies,
    and what another store holds at a place of the log may be a record that lost a race, which
    stays. Raises UnavailableError where one that is silent may have it.
    """
    silent: UnavailableError | None = None
    for store in stores_of(source):
        try:
            found = right_record(store, seq, digest)
        except UnavailableError as error:
            silent = error
            continue
        if found is not None:
            return found
    if silent is not None:
        raise silent
    raise IntegrityError(
        f"a log record is nowhere right. seq={seq} store={source.url} run ckpt scrub there"
    )


def log_prefix_of(store: Backend) -> LogPrefix:
    """What ``store`` lists of its log. One list."""
    seqs: set[int] = set()
    for stat in store.list(keys.LOG):
        seq = keys.parse_log_key(stat.key)
        seq = keys.parse_settled_key(stat.key) if seq is None else seq
        if seq is not None:
            seqs.add(seq)
    length = 0
    while length in seqs:
        length += 1
    return LogPrefix(length, frozenset(seq for seq in seqs if seq > length))


def check_history(
    store: Backend, prefix: LogPrefix, state: LogState, chain: RecordChain, *, member: bool
) -> None:
    """Raises ConflictError where ``store`` holds records that the source's log does not. Reads what
    is above ``chain.low``.

    ``member``: it is one of the log's stores; then it may hold records that lost a race, and one
    that is not decided yet.
    """
    known = state.next_seq + member
    ahead = max((seq for seq in (prefix.length - 1, *prefix.beyond) if seq >= known), default=None)
    if ahead is not None:
        raise ConflictError(
            f"the replica's log goes further than the source's. store={store.url} seq={ahead} "
            f"source_next_seq={state.next_seq} sync the other way, or make the source whole with "
            "ckpt scrub first"
        )
    if member:
        return
    for seq in (*range(chain.low, prefix.length), *sorted(prefix.beyond)):
        if seq >= chain.low and _sound_other(store, seq, chain.digest(seq)):
            raise ConflictError(
                "the replica holds another record than the source at one place, so it has a "
                "history of its own. "
                f"store={store.url} key={keys.log_key(seq)} use an empty place"
            )


def copy_record(source: Backend, store: Backend, seq: int, digest: str, *, listed: bool) -> bool:
    """Make ``store`` hold the record; whether it had to be written. ``there``: its listing names
    the place.

    A damaged record is replaced. A sound one that lost a race stays: what counts goes to the
    place's second key.
    """
    if listed and right_record(store, seq, digest) is not None:
        return False
    data = read_record(source, seq, digest)
    key = keys.log_key(seq)
    if listed and _sound_other(store, seq, digest):
        store.put(keys.settled_key(seq), [data])
        return True
    if listed or not store.capabilities().create_only:
        store.put(key, [data])
        return True
    match create_once(store, key, data, bytes_max=RECORD_BYTES_MAX):
        case KeyTaken(found) if found != data:
            raise ConflictError(
                f"somebody else writes into the replica. store={store.url} key={key} end that "
                "writer, then repeat"
            )
        case WriteUnknown(why):
            raise UnavailableError(
                f"the replica did not answer. store={store.url} key={key} tries={PUT_TRIES_MAX} "
                f"why={why} repeat later"
            )
        case _:
            return True


def copy_folds(source: Backend, store: Backend, next_seq: int, *, pace: MaintenancePace) -> int:
    """Copy the folds below ``next_seq`` that ``store`` lacks; how many. One that is not of
    ``store``'s records is left out."""
    have = set(_folds(store))
    written = 0
    for seq in _folds(source):
        if seq in have or seq >= next_seq:
            continue
        pace.check()
        last = _any_record(store, seq)
        if last is None:
            continue
        data = next(
            (data for one in stores_of(source) if (data := _fold(one, seq, last)) is not None), None
        )
        if data is not None:  # readers do without it
            store.put(keys.fold_key(seq), [data])
            written += 1
    return written


def _fold(store: Backend, seq: int, last: Record) -> bytes | None:
    """The fold up to ``seq`` where ``store`` has one that ends with ``last``."""
    try:
        data = read_alone(store, keys.fold_key(seq), bytes_max=FOLD_BYTES_MAX)
        state = decode_fold(data)
    except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
        return None
    right = (state.job, state.next_seq, state.head_digest) == (last.job, last.seq + 1, last.digest)
    return data if right else None


def _folds(store: Backend) -> Sequence[int]:
    return [
        seq for stat in store.list(keys.FOLDS) if (seq := keys.parse_fold_key(stat.key)) is not None
    ]


def _any_record(source: Backend, seq: int) -> Record | None:
    """Some sound record at the place's first key, of the first store that has one; not yet known to
    be the one that counts."""
    for store in stores_of(source):
        try:
            record = decode_record(read_alone(store, keys.log_key(seq), bytes_max=RECORD_BYTES_MAX))
        except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
            continue
        if record.seq == seq:
            return record
    return None


def _sound_other(store: Backend, seq: int, digest: str) -> bool:
    if right_record(store, seq, digest) is not None:
        return False
    try:
        decode_record(read_alone(store, keys.log_key(seq), bytes_max=RECORD_BYTES_MAX))
    except (IntegrityError, NotFoundError):
        return False
    return True


# Copying manifests, parts and packs to a replica: what isn't there, verified on the way, never
# damage.

WantedObject = WholeObject | Pack


def missing_objects(
    store: Backend,
    wanted: Sequence[WantedObject],
    *,
    deep: bool = False,
    pace: MaintenancePace | None = None,
) -> list[WantedObject]:
    """What of ``wanted`` (in order of its keys) ``store`` does not list with the right length, or,
    ``deep``, not hold rightly.

    Quick: one list for each prefix, and nothing is read. A pack of unknown length counts as there
    where it is long enough. Deep reads everything that is there. Raises UnavailableError.
    """
    pace = pace or MaintenancePace()
    missing: list[WantedObject] = []
    for prefix, group in groupby(wanted, key=lambda want: want.key.partition("/")[0] + "/"):
        some = list(group)
        # The first key without its last sign is just before it, whatever else there is.
        walk = ListingWalk(
            store, prefix, after=some[0].key[:-1] if len(some[0].key) > len(prefix) + 1 else ""
        )
        for want in some:
            stat = walk.take(want.key)
            if stat is None or not fits(want, stat) or (deep and not _right(store, want, pace)):
                missing.append(want)
    return missing


def fits(want: WantedObject, stat: Stat) -> bool:
    """Whether an object of that length can be what is wanted. Pure."""
    if want.size_bytes is not None:
        return stat.size_bytes == want.size_bytes
    return stat.size_bytes >= want.end_bytes if isinstance(want, Pack) else stat.size_bytes > 0


def copy_object(
    source: Backend,
    store: Backend,
    want: WantedObject,
    *,
    budget: MemoryBudget,
    pace: MaintenancePace,
) -> int:
    """Copy one object, all of it that has a digest verified in memory first; its length.

    Raises IntegrityError where ``source`` has it nowhere rightly, what either store raises, and
    Stopped.
    """
    if isinstance(want, WholeObject):
        data = read_object(
            source,
            want.key,
            lambda found: (
                None if digest_hex(found) == want.digest else "its bytes differ from their digest"
            ),
            bytes_max=want.size_bytes or PART_STORED_BYTES_MAX,
        )
        pace.take(2 * len(data))
        store.put(want.key, [data])
        return len(data)
    stat = source.stat(want.key)
    if stat is None:
        raise NotFoundError(f"no such object. key={want.key} store={source.url}")
    size_bytes = max(want.end_bytes, stat.size_bytes if stat.size_bytes <= PACK_BYTES_MAX else 0)
    with budget.reserve(size_bytes):
        memory = memoryview(mmap.mmap(-1, max(size_bytes, 1)))[:size_bytes]
        pace.take(2 * size_bytes)
        _read_pack(source, want, memory, min(stat.size_bytes, size_bytes))
        store.put(want.key, [memory])
    return size_bytes


def _read_pack(source: Backend, pack: Pack, memory: memoryview, there: int) -> None:
    """Fill ``memory`` with a copy of the pack that is right as a whole, or else with each chunk
    from wherever it is right."""

    def check(found: memoryview) -> str | None:
        if len(found) < pack.end_bytes:
            return "it ends too early"
        bad = first_wrong_chunk(found, pack)
        return None if bad is None else f"a chunk is not right. offset_bytes={bad[1].offset_bytes}"

    try:
        read_checked(source, pack.key, memory[:there], check)
    except IntegrityError:
        for place in pack.chunks:
            at = place[1]
            piece = memory[at.offset_bytes : at.offset_bytes + at.stored_bytes]
            read_checked(source, pack.key, piece, _chunk_check(place), offset_bytes=at.offset_bytes)


def _chunk_check(place: ChunkRef) -> Callable[[memoryview], str | None]:
    return lambda stored: chunk_problem(stored, place)


def _right(store: Backend, want: WantedObject, pace: MaintenancePace) -> bool:
    if isinstance(want, Pack):
        return check_pack(store, want, pace=pace).status is CopyStatus.OK
    return (
        check_whole(store, want, bytes_max=want.size_bytes or PART_STORED_BYTES_MAX, pace=pace)[
            0
        ].status
        is CopyStatus.OK
    )
