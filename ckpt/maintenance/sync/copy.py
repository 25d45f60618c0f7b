"""Copying a log's records and folds to a replica, in order, each proven by the digest that the record after it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone, stores_of
from ckpt.errors import ConflictError, FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, Record, decode_record
from ckpt.log.reader import read_all
from ckpt.log.sequencer import CLAIM_TRIES_MAX, Lost, Unknown, create_once
from ckpt.log.state import LogState
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold
from ckpt.maintenance.copies_pace import Pace
from ckpt.maintenance.scrub.log import right_record
from ckpt.values import DIGEST_BYTES

WINDOW = 256
"""How many records are read at once."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The digests of the records ``low`` to the head of a state, 16 bytes each. ``prev``: of the record before ``low``."""

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
class Prefix:
    """What a replica lists of a log: the first ``length`` places without a gap, and whether anything lies behind them."""

    length: int
    beyond: frozenset[int]


def read_chain(source: Backend, state: LogState, low: int, *, pace: Pace) -> Chain:
    """Walk back from the head of ``state``, which is known, to ``low``: each record proves the one before it.

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
            digests[(seq - low) * DIGEST_BYTES : (seq - low + 1) * DIGEST_BYTES] = bytes.fromhex(record.digest)
            expected = record.prev
    return Chain(low, expected, digests)


def read_record(source: Backend, seq: int, digest: str) -> bytes:
    """The record's bytes, from whichever store has it at either of its keys. Raises IntegrityError where none that answers has.

    Each store is asked by itself: reading through several at once would mend the others' copies, and what another store holds
    at a place of the log may be a record that lost a race, which stays. Raises UnavailableError where one that is silent may
    have it.
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
    raise IntegrityError(f"a log record is nowhere right. seq={seq} store={source.url} run ckpt scrub there")


def prefix_of(store: Backend) -> Prefix:
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
    return Prefix(length, frozenset(seq for seq in seqs if seq > length))


def check_history(store: Backend, prefix: Prefix, state: LogState, chain: Chain, *, member: bool) -> None:
    """Raises ConflictError where ``store`` holds records that the source's log does not. Reads what is above ``chain.low``.

    ``member``: it is one of the log's stores; then it may hold records that lost a race, and one that is not decided yet.
    """
    known = state.next_seq + member
    ahead = max((seq for seq in (prefix.length - 1, *prefix.beyond) if seq >= known), default=None)
    if ahead is not None:
        raise ConflictError(
            f"the replica's log goes further than the source's. store={store.url} seq={ahead} "
            f"source_next_seq={state.next_seq} sync the other way, or make the source whole with ckpt scrub first"
        )
    if member:
        return
    for seq in (*range(chain.low, prefix.length), *sorted(prefix.beyond)):
        if seq >= chain.low and _sound_other(store, seq, chain.digest(seq)):
            raise ConflictError(
                f"the replica holds another record than the source at one place, so it has a history of its own. "
                f"store={store.url} key={keys.log_key(seq)} use an empty place"
            )


def copy_record(source: Backend, store: Backend, seq: int, digest: str, *, there: bool) -> bool:
    """Make ``store`` hold the record; whether it had to be written. ``there``: its listing names the place.

    A damaged record is replaced. A sound one that lost a race stays: what counts goes to the place's second key.
    """
    if there and right_record(store, seq, digest) is not None:
        return False
    data = read_record(source, seq, digest)
    key = keys.log_key(seq)
    if there and _sound_other(store, seq, digest):
        store.put(keys.settled_key(seq), [data])
        return True
    if there or not store.capabilities().create_only:
        store.put(key, [data])
        return True
    match create_once(store, key, data, bytes_max=RECORD_BYTES_MAX):
        case Lost(found) if found != data:
            raise ConflictError(
                f"somebody else writes into the replica. store={store.url} key={key} end that writer, then repeat"
            )
        case Unknown(why):
            raise UnavailableError(
                f"the replica did not answer. store={store.url} key={key} tries={CLAIM_TRIES_MAX} why={why} repeat later"
            )
        case _:
            return True


def copy_folds(source: Backend, store: Backend, next_seq: int, *, pace: Pace) -> int:
    """Copy the folds below ``next_seq`` that ``store`` lacks; how many. One that is not of ``store``'s records is left out."""
    have = set(_folds(store))
    written = 0
    for seq in _folds(source):
        if seq in have or seq >= next_seq:
            continue
        pace.check()
        last = _any_record(store, seq)
        if last is None:
            continue
        data = next((data for one in stores_of(source) if (data := _fold(one, seq, last)) is not None), None)
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
    return [seq for stat in store.list(keys.FOLDS) if (seq := keys.parse_fold_key(stat.key)) is not None]


def _any_record(source: Backend, seq: int) -> Record | None:
    """Some sound record at the place's first key, of the first store that has one; not yet known to be the one that counts."""
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
