"""Copies to a replica: log records and folds in order, and the objects that snapshots need.

Nothing unverified is written. A record is proven by the digest that the record after it names, a
manifest, part or chunk by the digest that the log leads to.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import read_alone, read_checked, stores_of
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
from ckpt.log.catalog import read_committed
from ckpt.log.reader import fold_seqs, positions, prune_folds, read_all, read_at
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
"""Records read at once."""


@dataclass(frozen=True, slots=True)
class RecordChain:
    """The digests of the records from ``low`` to the head of a state, 16 bytes each.

    ``prev``: the digest of the record before ``low``.
    """

    low: int
    prev: str
    digests: bytearray

    def digest(self, seq: int) -> str:
        """The digest of the record at ``seq``, which is at least ``low - 1``."""
        if seq == self.low - 1:
            return self.prev
        at = (seq - self.low) * DIGEST_BYTES
        return self.digests[at : at + DIGEST_BYTES].hex()


@dataclass(frozen=True, slots=True)
class LogPrefix:
    """What a replica lists of a log: positions 0 to ``length - 1``, and those ``beyond`` a gap."""

    length: int
    beyond: frozenset[int]


def read_chain(source: Backend, state: LogState, low: int, *, pace: MaintenancePace) -> RecordChain:
    """The chain from the head of ``state`` back to ``low``; each record proves the one before it.

    Reads each record once. Raises IntegrityError if ``source`` has no right copy of a record.
    """
    digests = bytearray((state.next_seq - low) * DIGEST_BYTES)
    expected = state.head_digest
    for stop in range(state.next_seq, low, -WINDOW):
        seqs = range(max(low, stop - WINDOW), stop)
        pace.check()
        # Read ahead without proof, then walk back: a guess that fails its digest is read again.
        guesses = read_all(list(seqs), lambda seq: _any_record(source, seq))
        for seq, record in zip(reversed(seqs), reversed(guesses), strict=True):
            if record is None or record.digest != expected:
                record = decode_record(read_record(source, seq, expected))
            digests[(seq - low) * DIGEST_BYTES : (seq - low + 1) * DIGEST_BYTES] = bytes.fromhex(
                record.digest
            )
            expected = record.prev
    return RecordChain(low, expected, digests)


def read_record(source: Backend, seq: int, digest: str) -> bytes:
    """The record's bytes, from the first store that has it at either of its keys.

    Raises IntegrityError if all stores answer and none has it, UnavailableError if one that does
    not answer may have it.
    """
    # Each store by itself: a read through the replicated backend would repair the other copies, and
    # another record at this position may be one that lost a race, which must stay.
    silent: UnavailableError | None = None
    for store in stores_of(source):
        try:
            data = right_record(store, seq, digest)
        except UnavailableError as error:
            silent = error
            continue
        if data is not None:
            return data
    if silent is not None:
        raise silent
    raise IntegrityError(
        f"a log record is nowhere right. seq={seq} store={source.url} run ckpt scrub there"
    )


def log_prefix_of(store: Backend) -> LogPrefix:
    """What ``store`` lists of its log. Cost: one list."""
    seqs = {seq for seq, _ in positions(store, 0)}
    length = 0
    while length in seqs:
        length += 1
    return LogPrefix(length, frozenset(seq for seq in seqs if seq > length))


def check_history(
    store: Backend, prefix: LogPrefix, state: LogState, chain: RecordChain, *, member: bool
) -> None:
    """Raises ConflictError if ``store`` holds records that the source's log does not have.

    Reads the records from ``chain.low`` on. ``member``: ``store`` is one of the log's stores.

    A member may hold one record more, which is not decided yet, and records that lost a race. So
    may a store that lost everything under a writer that went on writing to it: then it has no
    beginning of the log, and each of its records names the source's record before it.
    """
    strays = prefix.beyond if not member and prefix.length == 0 else frozenset()
    end = state.next_seq + (
        member or (state.next_seq in strays and _follows(store, state.next_seq, state.head_digest))
    )
    ahead = max((seq for seq in (prefix.length - 1, *prefix.beyond) if seq >= end), default=None)
    if ahead is not None:
        raise ConflictError(
            f"the replica's log goes further than the source's. store={store.url} seq={ahead} "
            f"source_next_seq={state.next_seq} sync the other way, or make the source whole with "
            "ckpt scrub first"
        )
    if member:
        return
    for seq in (*range(chain.low, prefix.length), *sorted(prefix.beyond)):
        if not chain.low <= seq < state.next_seq:
            continue
        if _holds_other_record(store, seq, chain.digest(seq)) and not (
            seq in strays and _follows(store, seq, chain.digest(seq - 1))
        ):
            raise ConflictError(
                "the replica holds another record than the source at one position, so it has a "
                "history of its own. "
                f"store={store.url} key={keys.log_key(seq)} use an empty place"
            )


def copy_record(source: Backend, store: Backend, seq: int, digest: str, *, listed: bool) -> bool:
    """Write the record to ``store`` if it lacks it; whether it was written.

    ``listed``: the store's listing has the position. A damaged record is replaced. A valid one that
    lost a race stays, because it may be the store's vote: the right record goes to the second key.
    """
    if listed and right_record(store, seq, digest) is not None:
        return False
    data = read_record(source, seq, digest)
    key = keys.log_key(seq)
    if listed and _holds_other_record(store, seq, digest):
        store.put(keys.settled_key(seq), [data])
        return True
    if listed or not store.capabilities().create_only:
        store.put(key, [data])
        return True
    match create_once(store, key, data, bytes_max=RECORD_BYTES_MAX):
        case KeyTaken(found) if found != data:
            raise ConflictError(
                f"another writer is writing to the replica. store={store.url} key={key} end that "
                "writer, then repeat"
            )
        case WriteUnknown(reason):
            raise UnavailableError(
                f"the replica did not answer. store={store.url} key={key} tries={PUT_TRIES_MAX} "
                f"why={reason} repeat later"
            )
        case _:
            return True


def copy_folds(source: Backend, store: Backend, next_seq: int, *, pace: MaintenancePace) -> int:
    """Copy the folds below ``next_seq`` that ``store`` lacks; how many were copied.

    A fold of other records than the store's is skipped.
    """
    have = set(fold_seqs(store))
    written = 0
    for seq in fold_seqs(source):
        if seq in have or seq >= next_seq:
            continue
        pace.check()
        last = _any_record(store, seq)
        if last is None:
            continue
        data = next(
            (data for other in stores_of(source) if (data := _fold(other, seq, last)) is not None),
            None,
        )
        if data is not None:  # readers can do without a fold
            store.put(keys.fold_key(seq), [data])
            written += 1
    if written:
        prune_folds(store)
    return written


def _fold(store: Backend, seq: int, last: Record) -> bytes | None:
    """The store's fold up to ``seq``, if it ends with the record ``last``."""
    try:
        data = read_alone(store, keys.fold_key(seq), bytes_max=FOLD_BYTES_MAX)
        state = decode_fold(data)
    except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
        return None
    right = (state.job, state.next_seq, state.head_digest) == (last.job, last.seq + 1, last.digest)
    return data if right else None


def _any_record(source: Backend, seq: int) -> Record | None:
    """A valid record at the position's first key, from the first store that has one.

    It may be a record that lost a race: the caller compares its digest.
    """
    for store in stores_of(source):
        try:
            record = decode_record(read_at(store, seq, settled=False))
        except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
            continue
        if record.seq == seq:
            return record
    return None


def _follows(store: Backend, seq: int, prev: str) -> bool:
    """Whether the record that ``store`` holds at ``seq`` names ``prev`` as the one before it."""
    try:
        return decode_record(read_at(store, seq, settled=False)).prev == prev
    except (IntegrityError, NotFoundError):
        return False


def _holds_other_record(store: Backend, seq: int, digest: str) -> bool:
    if right_record(store, seq, digest) is not None:
        return False
    try:
        decode_record(read_at(store, seq, settled=False))
    except (IntegrityError, NotFoundError):
        return False
    return True


# ---- manifests, parts and packs: copied if they are missing, verified in memory first

WantedObject = WholeObject | Pack


def missing_objects(
    store: Backend,
    wanted: Sequence[WantedObject],
    *,
    deep: bool = False,
    pace: MaintenancePace | None = None,
) -> list[WantedObject]:
    """The objects of ``wanted`` (sorted by key) that ``store`` does not list with the right length.

    Cost: one list for each prefix. A pack of unknown length counts as present if it is long enough.
    ``deep``: present objects are read and compared too. Raises UnavailableError.
    """
    pace = pace or MaintenancePace()
    missing: list[WantedObject] = []
    for prefix, group in groupby(wanted, key=lambda want: want.key.partition("/")[0] + "/"):
        batch = list(group)
        # Start the listing at the first key: that key without its last character sorts before it.
        walk = ListingWalk(
            store, prefix, after=batch[0].key[:-1] if len(batch[0].key) > len(prefix) + 1 else ""
        )
        for want in batch:
            stat = walk.take(want.key)
            if stat is None or not fits(want, stat) or (deep and not _right(store, want, pace)):
                missing.append(want)
    return missing


def fits(want: WantedObject, stat: Stat) -> bool:
    """Whether an object of that length can be the wanted one."""
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
    """Copy one object and return its length. All bytes with a digest are verified before the write.

    Raises IntegrityError if ``source`` has no right copy, what either store raises, and Stopped.
    """
    if isinstance(want, WholeObject):
        data = read_committed(
            source,
            want.key,
            lambda stored: (
                None if digest_hex(stored) == want.digest else "its bytes differ from their digest"
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
    # The whole pack is verified in memory before the put: damage is never copied.
    with budget.reserve(size_bytes):
        memory = memoryview(mmap.mmap(-1, max(size_bytes, 1)))[:size_bytes]
        pace.take(2 * size_bytes)
        _read_pack(source, want, memory, min(stat.size_bytes, size_bytes))
        store.put(want.key, [memory])
    return size_bytes


def _read_pack(source: Backend, pack: Pack, memory: memoryview, stored_bytes: int) -> None:
    """Fill ``memory`` with a right copy of the pack, or each chunk from a store that has it."""

    def check(stored: memoryview) -> str | None:
        if len(stored) < pack.end_bytes:
            return "it ends too early"
        wrong = first_wrong_chunk(stored, pack)
        if wrong is None:
            return None
        return f"a chunk is not right. offset_bytes={wrong[1].offset_bytes}"

    try:
        read_checked(source, pack.key, memory[:stored_bytes], check)
    except IntegrityError:
        # No copy is right as a whole: take each chunk from any store that has it right.
        for chunk in pack.chunks:
            at = chunk[1]
            piece = memory[at.offset_bytes : at.offset_bytes + at.stored_bytes]
            read_checked(source, pack.key, piece, _chunk_check(chunk), offset_bytes=at.offset_bytes)


def _chunk_check(chunk: ChunkRef) -> Callable[[memoryview], str | None]:
    return lambda stored: chunk_problem(stored, chunk)


def _right(store: Backend, want: WantedObject, pace: MaintenancePace) -> bool:
    if isinstance(want, Pack):
        return check_pack(store, want, pace=pace).status is CopyStatus.OK
    bytes_max = want.size_bytes or PART_STORED_BYTES_MAX
    check, _ = check_whole(store, want, bytes_max=bytes_max, pace=pace)
    return check.status is CopyStatus.OK
