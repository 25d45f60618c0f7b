"""What ranks say of their shares of one snapshot, and what several of them say together. Pure.

A rank's receipt becomes part of its node's, and the nodes' become that of the job, by the same
``merge``. Which are merged first makes no difference to whether there is an error, nor to anything
where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import structs

from ckpt.errors import CkptError, ConflictError, InternalError, UsageError
from ckpt.format.canonical import prepare_decoders
from ckpt.format.manifest import PartRef
from ckpt.format.part_rules import cover_problem
from ckpt.ipc.messages import RemoteError, from_error
from ckpt.values import Box, Leaf, SnapshotId, SnapshotInfo, StagedIndex

DIFFERENT_MAX = 8
"""So many groups of ranks are named where they captured different steps."""


class ReplicaGroup(msgspec.Struct, frozen=True, array_like=True):
    """What members of one group of replicas hold: of how many there are, a digest of what each
    holds, and how many say so."""

    size: int
    digest: str
    members: int = 1


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ranks`` ranks, from ``rank`` on, wrote of a snapshot, or the first error that one of
    them met.

    ``snapshot``: the pair that they captured, the least where they captured several. ``refs``:
    their parts, in rank order. ``base``: the snapshot whose chunks they refer to. ``shared``: what
    they hold of each group of replicas; ``complete``: whether all of them said so. ``passed``:
    whether all of them are known to have passed that step.
    """

    snapshot: SnapshotId
    rank: int
    ranks: int = 1
    refs: tuple[PartRef, ...] = ()
    size_bytes: int = 0
    new_bytes: int = 0
    error: RemoteError | None = None
    base: SnapshotId | None = None
    shared: Mapping[str, ReplicaGroup] = {}
    complete: bool = True
    passed: bool = True


class SaveOutcome(msgspec.Struct, frozen=True):
    """What became of a snapshot: its facts, or an error."""

    info: SnapshotInfo | None = None
    error: RemoteError | None = None
    """Why there is no ``info``; or beside one, why the snapshot, durable as it is, lacks a tag."""


prepare_decoders(Receipt, SaveOutcome)


def failed_receipt(snapshot: SnapshotId, rank: int, error: CkptError) -> Receipt:
    """The receipt of a rank that has no share to give."""
    return Receipt(snapshot=snapshot, rank=rank, error=from_error(error, rank=rank))


def replica_groups(shared: Mapping[str, tuple[int, str]] | None) -> Mapping[str, ReplicaGroup]:
    """One rank's ``SealedSlot.shared``, as receipts have it."""
    return {group: ReplicaGroup(size, digest) for group, (size, digest) in (shared or {}).items()}


def merge_receipts(receipts: Sequence[Receipt]) -> Receipt:
    """What all of them say together; an error of one, or between them, is that of all. At least
    one; in rank order.

    Raises InternalError where the ranks of one don't follow those of the one before.
    """
    first, rank = receipts[0], receipts[0].rank
    for one in receipts:
        if one.rank != rank or one.ranks < 1:
            raise InternalError(
                f"receipts that don't follow each other. rank={one.rank} expected_rank={rank}"
            )
        rank += one.ranks
    both = Receipt(
        snapshot=min(one.snapshot for one in receipts),
        rank=first.rank,
        ranks=rank - first.rank,
        refs=tuple(ref for one in receipts for ref in one.refs),
        size_bytes=sum(one.size_bytes for one in receipts),
        new_bytes=sum(one.new_bytes for one in receipts),
        complete=all(one.complete for one in receipts),
        passed=all(one.passed for one in receipts),
    )
    error = next((one.error for one in receipts if one.error is not None), None)
    if error is not None:
        return structs.replace(both, error=error)
    try:
        _check_captured(receipts)
        return structs.replace(
            both, base=common_base([one.base for one in receipts]), shared=_shared(receipts)
        )
    except CkptError as found:
        return structs.replace(both, error=from_error(found, rank=first.rank))


def check_groups(whole: Receipt) -> Receipt:
    """The receipt of all ranks of a world; one with an error where a group of replicas misses a
    member."""
    try:
        if whole.error is None and whole.complete:
            for held in whole.shared.values():
                _check(held.members == held.size, held, held)
    except UsageError as error:
        return structs.replace(whole, error=from_error(error, rank=whole.rank))
    return whole


def common_base(bases: Sequence[SnapshotId | None]) -> SnapshotId | None:
    """The snapshot that the ranks refer to chunks of; None: no rank refers to any. Raises
    ConflictError where they differ.

    A commit names one base. Chunks of another could be deleted before it, with nobody the wiser.
    """
    found = {base for base in bases if base is not None}
    if len(found) > 1:
        raise ConflictError(
            "the ranks refer to chunks of different snapshots. "
            f"bases={', '.join(map(str, sorted(found)))}; the next snapshot "
            "refers to none"
        )
    return next(iter(found), None)


def _check_captured(receipts: Sequence[Receipt]) -> None:
    if len({one.snapshot for one in receipts}) > 1:
        told = [f"{_ranks(one)}: {one.snapshot}" for one in receipts]
        more = f", and {len(told) - DIFFERENT_MAX} more" if len(told) > DIFFERENT_MAX else ""
        raise ConflictError(
            "the ranks captured different steps, which never make one snapshot. captured_by_rank="
            f"{', '.join(told[:DIFFERENT_MAX])}{more}; every rank must run and save the same steps"
        )


def _shared(receipts: Sequence[Receipt]) -> Mapping[str, ReplicaGroup]:
    """What they hold of each group together. Raises UsageError where two hold different leaves, or
    in another order.

    Each rank stores its share of them, computed from what it holds itself; were the sets different,
    the shares would overlap or leave gaps, and the snapshot could not be read.
    """
    found: dict[str, ReplicaGroup] = {}
    for one in receipts:
        for group, held in one.shared.items():
            before = found.get(group)
            if before is None:
                found[group] = held
                continue
            _check((before.size, before.digest) == (held.size, held.digest), before, held)
            found[group] = ReplicaGroup(held.size, held.digest, before.members + held.members)
    return found


def _check(fits: bool, one: ReplicaGroup, other: ReplicaGroup) -> None:
    if not fits:
        raise UsageError(
            "replicas hold different leaves, so their shares don't fit together. "
            f"replicas={other.size} "
            f"ranks_with_any={one.members} one={one.digest[:8]} other={other.digest[:8]}; keep the "
            "same optimizer state on each"
        )


def _ranks(receipt: Receipt) -> str:
    return (
        str(receipt.rank)
        if receipt.ranks == 1
        else f"{receipt.rank} to {receipt.rank + receipt.ranks - 1}"
    )


# Whether the shares that the ranks staged make one whole snapshot. Pure.


def shares_problem(indexes: Sequence[StagedIndex]) -> str | None:
    """What keeps ``indexes`` from being one snapshot, one index a rank in rank order, as ``fact.
    key=value``; or None.

    For slots that are handed in by somebody else than the ranks themselves, who would have compared
    their replicas before.
    """
    snapshots = {index.snapshot for index in indexes}
    if len(snapshots) != 1:
        return f"the ranks hold different snapshots. snapshots={', '.join(map(str, sorted(snapshots))) or 'none'}"
    if len({index.origin for index in indexes}) != 1:
        return "the ranks hold an epoch of the same number that was opened twice."
    if [(index.rank, index.world_size) for index in indexes] != [
        (rank, len(indexes)) for rank in range(len(indexes))
    ]:
        return f"slots of other ranks or of a world of another size. ranks={len(indexes)}"
    leaves: dict[tuple[str, int | None], Leaf] = {}
    boxes: dict[tuple[str, int | None], list[Box]] = {}
    for index in indexes:
        for shard in index.shards:
            key = (shard.leaf.name, shard.leaf.rank)
            if leaves.setdefault(key, shard.leaf) != shard.leaf:
                return f"the ranks disagree on a leaf. leaf={key[0]!r}"
            boxes.setdefault(key, []).append(shard.box)
    for key, found in boxes.items():
        if why := cover_problem(leaves[key].shape, found):
            return f"{why} leaf={key[0]!r}"
    return None
