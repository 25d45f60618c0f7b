"""What a sweep has to know first: what each snapshot refers to, and which were dropped a short while ago."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.checked import Check, read_alone, read_object
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError
from ckpt.format import keys
from ckpt.format.digest import digest_hex
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest, PartRef
from ckpt.format.part import decode_part
from ckpt.format.records import RECORD_BYTES_MAX, Commit, Drop, Record, decode_record
from ckpt.log.reader import read_all
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import Referred
from ckpt.values import SnapshotId

WINDOW = 1024
"""How many records are listed and read at once while the log is walked back through the grace."""


@dataclass(frozen=True, slots=True)
class Answering:
    """One store that answers: alone, and what its own clock says now."""

    store: Backend
    now_unix_s: float


def referred(backend: Backend, state: LogState) -> list[Referred]:
    """What each snapshot of ``state`` refers to, in log order. Reads every manifest and part, several at once.

    Records that can't be read from any copy are told in ``problem``. Raises UnavailableError where a store that may have one
    does not answer.
    """
    wanted = [(entry.snapshot, entry.manifest_digest) for entry in state.snapshots]
    return read_all(wanted, lambda one: _referred(backend, state.job, *one))


def dropped_within(
    backend: Backend, state: LogState, answering: Sequence[Answering], *, grace_s: float, write_quorum: int
) -> list[Referred]:
    """What snapshots refer to that were dropped less than ``grace_s`` ago by the stores' clocks, as far as it is still there.

    Walks the log back from its head, along the digests, to the first record that is old enough: one list and one read a
    record. The age of a record is that by which a write quorum had it, so that a copy made late does not make it young.
    """
    drops: set[SnapshotId] = set()
    digests: dict[SnapshotId, str] = {}
    expected, top = state.head_digest, state.next_seq - 1
    while top >= 0:
        low = max(0, top - WINDOW + 1)
        young = _young(answering, low, top, grace_s=grace_s, write_quorum=write_quorum)
        for record in _chain(answering, young, expected):
            expected = record.prev
            match record.body:
                case Drop(snapshots, _):
                    drops.update(snapshots)
                case Commit(snapshot, digest, _):
                    digests.setdefault(snapshot, digest)
                case _:
                    pass
        if len(young) < top - low + 1:
            break
        top = low - 1
    exist = {entry.snapshot for entry in state.snapshots}  # a drop that did not count took nothing
    gone = sorted(drops - exist)
    return [_dropped(backend, state.job, answering, pair, digests.get(pair)) for pair in gone]


def _referred(backend: Backend, job: str, snapshot: SnapshotId, digest: str, *, exists: bool = True) -> Referred:
    """What one snapshot refers to. Of one that does not exist any more, what is missing was swept, with a shorter grace."""
    key = keys.manifest_key(snapshot, digest)
    try:
        data = read_object(backend, key, _is(digest), bytes_max=MANIFEST_BYTES_MAX)
        manifest = Manifest.decode(data)
        if (manifest.job, manifest.snapshot) != (job, snapshot):
            raise IntegrityError(f"manifest of another job or snapshot. key={key}")
    except NotFoundError as error:
        return Referred(snapshot, frozenset((key,)), str(error) if exists else "")
    except (IntegrityError, FormatVersionError) as error:
        return Referred(snapshot, frozenset((key,)), str(error))
    found = {key, *(ref.key for ref in manifest.parts)}
    for ref in manifest.parts:
        try:
            found |= _packs(backend, ref)
        except NotFoundError as error:
            if exists:
                return Referred(snapshot, frozenset(found), str(error))
        except (IntegrityError, FormatVersionError) as error:
            return Referred(snapshot, frozenset(found), str(error))
    return Referred(snapshot, frozenset(found))


def _packs(backend: Backend, ref: PartRef) -> set[str]:
    part = decode_part(read_object(backend, ref.key, _is(ref.digest), bytes_max=PART_STORED_BYTES_MAX))
    return {place.pack for shard in part.shards for place in shard.locations}


def _is(digest: str) -> Check:
    return lambda data: None if digest_hex(data) == digest else "the bytes differ from their digest"


def _dropped(
    backend: Backend, job: str, answering: Sequence[Answering], snapshot: SnapshotId, digest: str | None
) -> Referred:
    """What a dropped snapshot refers to. Where its commit is older than what was read, every manifest of the pair counts."""
    digests = {digest} if digest is not None else _manifests(answering, snapshot)
    found = [_referred(backend, job, snapshot, one, exists=False) for one in sorted(digests)]
    problems = [one.problem for one in found if one.problem]
    return Referred(snapshot, frozenset(key for one in found for key in one.keys), problems[0] if problems else "")


def _manifests(answering: Sequence[Answering], snapshot: SnapshotId) -> set[str]:
    prefix = f"{keys.MANIFESTS}{snapshot.key}-"
    listed = [keys.parse_manifest_key(stat.key) for one in answering for stat in one.store.list(prefix)]
    return {parsed[1] for parsed in listed if parsed is not None}


def _young(answering: Sequence[Answering], low: int, top: int, *, grace_s: float, write_quorum: int) -> list[int]:
    """The seqs from ``top`` down that are younger than the grace, up to the first that is not, ``low`` at most."""
    ages = _ages(answering, low, top)
    young: list[int] = []
    for seq in range(top, low - 1, -1):
        found = sorted(ages.get(seq, ()), reverse=True)
        age = found[min(write_quorum, len(answering)) - 1] if len(found) >= min(write_quorum, len(answering)) else 0.0
        if age >= grace_s:
            break
        young.append(seq)
    return young


def _ages(answering: Sequence[Answering], low: int, top: int) -> Mapping[int, list[float]]:
    """How old the copies of each record are. Where writers had split the stores, the record is as old as its settling."""
    plain: dict[int, list[float]] = {}
    settled: dict[int, list[float]] = {}
    for one in answering:
        for stat in one.store.list(keys.LOG, after=keys.log_key(low - 1) if low else ""):
            age = max(0.0, one.now_unix_s - stat.modified_unix_s)
            if (seq := keys.parse_log_key(stat.key)) is not None:
                if seq > top:
                    break
                plain.setdefault(seq, []).append(age)
            elif (seq := keys.parse_settled_key(stat.key)) is not None:
                settled.setdefault(seq, []).append(age)
    return plain | settled


def _chain(answering: Sequence[Answering], seqs: Sequence[int], expected: str) -> list[Record]:
    """The records at ``seqs``, descending, each the one that the next names; ``expected`` is the digest of the first."""
    found: list[Record] = []
    for guess, seq in zip(read_all(seqs, lambda seq: next(_copies(answering, seq), None)), seqs, strict=True):
        record = guess if guess is not None and guess.digest == expected else None
        record = record or next((one for one in _copies(answering, seq) if one.digest == expected), None)
        if record is None:
            raise IntegrityError(
                f"a record of the log can't be found again. key={keys.log_key(seq)} digest={expected}; run this again, and "
                "look at the stores with ckpt doctor"
            )
        found.append(record)
        expected = record.prev
    return found


def _copies(answering: Sequence[Answering], seq: int) -> Iterator[Record]:
    for one in answering:
        for key in (keys.log_key(seq), keys.settled_key(seq)):
            try:
                record = decode_record(read_alone(one.store, key, bytes_max=RECORD_BYTES_MAX))
            except (IntegrityError, NotFoundError):
                continue
            if record.seq == seq:
                yield record
