"""Receipts: what ranks report of their shares of one snapshot, and how several are merged. Pure.

Receipts of ranks merge to their node's, and receipts of nodes to the job's, by the same
``merge_receipts``. The order of merging changes neither whether there is an error nor, without one,
the result.
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
"""How many groups of ranks an error names if ranks captured different steps."""


class ReplicaGroup(msgspec.Struct, frozen=True, array_like=True):
    """One group of replicas: its size, a digest of what each holds, and how many members report
    it."""

    size: int
    digest: str
    members: int = 1


class ReplicaSample(msgspec.Struct, frozen=True, array_like=True):
    """A sample of one group's elements: what it is of, its digest, the first rank that has it so,
    and how many do."""

    label: str
    digest: str
    rank: int
    members: int = 1


SAMPLES_MAX = 8
"""How many different samples of one group are kept."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ranks`` ranks, from ``rank`` on, wrote of a snapshot, or the first error of one of
    them.

    ``snapshot``: the pair that they captured, the least if they captured several. ``refs``: their
    parts, in rank order. ``base``: the snapshot whose chunks they refer to. ``shared``: their
    groups of replicas; ``complete``: whether all of them reported these. ``passed``: whether all
    are known to have passed that step. ``stores``: the ids of the stores that took the objects, a
    tuple for each different set of them. ``samples``: digests of a part of each group's elements.
    ``repeats``: whether all of them can write everything anew if rank 0 asks for it.
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
    stores: tuple[tuple[str, ...], ...] = ()
    samples: Mapping[str, tuple[ReplicaSample, ...]] = {}
    repeats: bool = False


class SaveOutcome(msgspec.Struct, frozen=True):
    """The result of a save: the snapshot's facts, or an error."""

    info: SnapshotInfo | None = None
    error: RemoteError | None = None
    """Why there is no ``info``; if there is, why the durable snapshot lacks a tag."""
    again: bool = False
    """The base was dropped meanwhile: all ranks write everything anew, and one more outcome
    follows."""


prepare_decoders(Receipt, SaveOutcome)


def failed_receipt(snapshot: SnapshotId, rank: int, error: CkptError) -> Receipt:
    """The receipt of a rank that has no share."""
    return Receipt(snapshot=snapshot, rank=rank, error=from_error(error, rank=rank))


def replica_groups(shared: Mapping[str, tuple[int, str]] | None) -> Mapping[str, ReplicaGroup]:
    """One rank's ``SealedSlot.shared`` in the form of receipts."""
    return {group: ReplicaGroup(size, digest) for group, (size, digest) in (shared or {}).items()}


def merge_receipts(receipts: Sequence[Receipt]) -> Receipt:
    """One receipt for all ranks of ``receipts``; an error of one, or between them, is the error of
    all.

    At least one, in rank order. Raises InternalError if their ranks do not follow each other.
    """
    first, rank = receipts[0], receipts[0].rank
    for receipt in receipts:
        if receipt.rank != rank or receipt.ranks < 1:
            raise InternalError(
                f"receipts that don't follow each other. rank={receipt.rank} expected_rank={rank}"
            )
        rank += receipt.ranks
    merged = Receipt(
        snapshot=min(receipt.snapshot for receipt in receipts),
        rank=first.rank,
        ranks=rank - first.rank,
        refs=tuple(ref for receipt in receipts for ref in receipt.refs),
        size_bytes=sum(receipt.size_bytes for receipt in receipts),
        new_bytes=sum(receipt.new_bytes for receipt in receipts),
        complete=all(receipt.complete for receipt in receipts),
        passed=all(receipt.passed for receipt in receipts),
        stores=_proven(receipts),
        samples=_samples(receipts),
        repeats=all(receipt.repeats for receipt in receipts),
    )
    error = next((receipt.error for receipt in receipts if receipt.error is not None), None)
    if error is not None:
        # Bases and groups of a failed snapshot need not fit together.
        return structs.replace(merged, error=error)
    try:
        _check_captured(receipts)
        return structs.replace(
            merged,
            base=common_base([receipt.base for receipt in receipts]),
            shared=_shared(receipts),
        )
    except CkptError as conflict:
        return structs.replace(merged, error=from_error(conflict, rank=first.rank))


def replica_samples(
    samples: Mapping[str, tuple[str, str]], rank: int
) -> Mapping[str, tuple[ReplicaSample, ...]]:
    """One rank's ``SealedSlot.samples`` in the form of receipts."""
    return {
        group: (ReplicaSample(label, digest, rank),) for group, (label, digest) in samples.items()
    }


def diverged(whole: Receipt) -> str:
    """Which replicas differ in what, for people; "" if no sample does."""
    found: list[str] = []
    for samples in whole.samples.values():
        by_label: dict[str, list[ReplicaSample]] = {}
        for sample in samples:
            by_label.setdefault(sample.label, []).append(sample)
        for label, different in by_label.items():
            if len(different) > 1:
                ranks = " and ".join(_holders(sample) for sample in different)
                found.append(f"{label} (ranks {ranks})")
    return ", ".join(found[:DIFFERENT_MAX])


def _holders(sample: ReplicaSample) -> str:
    more = f" with {sample.members - 1} more" if sample.members > 1 else ""
    return f"{sample.rank}{more}"


def _samples(receipts: Sequence[Receipt]) -> Mapping[str, tuple[ReplicaSample, ...]]:
    """Equal samples counted together, the lowest rank of each kept."""
    groups: dict[str, dict[tuple[str, str], ReplicaSample]] = {}
    for receipt in receipts:
        for name, samples in receipt.samples.items():
            known = groups.setdefault(name, {})
            for sample in samples:
                key = (sample.label, sample.digest)
                before = known.get(key)
                if before is None:
                    known[key] = sample
                else:
                    rank, members = min(before.rank, sample.rank), before.members + sample.members
                    known[key] = structs.replace(before, rank=rank, members=members)
    return {
        name: tuple(sorted(known.values(), key=lambda one: one.rank)[:SAMPLES_MAX])
        for name, known in groups.items()
    }


def check_groups(whole: Receipt) -> Receipt:
    """The receipt of a whole world, with an error if a group of replicas lacks a member."""
    try:
        if whole.error is None and whole.complete:
            for group in whole.shared.values():
                _check(group.members == group.size, group, group)
    except UsageError as error:
        return structs.replace(whole, error=from_error(error, rank=whole.rank))
    return whole


def common_base(bases: Sequence[SnapshotId | None]) -> SnapshotId | None:
    """The snapshot whose chunks the ranks refer to; None if none does. Raises ConflictError.

    A commit names one base. If ranks referred to several, chunks of another one could be deleted
    before the commit without making it void.
    """
    different = {base for base in bases if base is not None}
    if len(different) > 1:
        raise ConflictError(
            "the ranks refer to chunks of different snapshots. "
            f"bases={', '.join(map(str, sorted(different)))}; the next snapshot refers to none"
        )
    return next(iter(different), None)


def _proven(receipts: Sequence[Receipt]) -> tuple[tuple[str, ...], ...]:
    """The different sets of stores. A part whose receipt names none is on stores that nobody
    proved."""
    sets = {ids for receipt in receipts for ids in receipt.stores}
    if any(receipt.refs and not receipt.stores for receipt in receipts):
        sets.add(())
    return tuple(sorted(sets))


def _check_captured(receipts: Sequence[Receipt]) -> None:
    if len({receipt.snapshot for receipt in receipts}) > 1:
        captured = [f"{_ranks(receipt)}: {receipt.snapshot}" for receipt in receipts]
        more = (
            f", and {len(captured) - DIFFERENT_MAX} more" if len(captured) > DIFFERENT_MAX else ""
        )
        raise ConflictError(
            "the ranks captured different steps, which never make one snapshot. captured_by_rank="
            f"{', '.join(captured[:DIFFERENT_MAX])}{more}; every rank must run and save the same "
            "steps"
        )


def _shared(receipts: Sequence[Receipt]) -> Mapping[str, ReplicaGroup]:
    """All groups of replicas. Raises UsageError if two members hold different leaves or another
    order.

    Each rank stores its share of a group, computed from what it holds itself. If members differed,
    their shares would overlap or leave gaps, and the snapshot could not be read.
    """
    groups: dict[str, ReplicaGroup] = {}
    for receipt in receipts:
        for name, group in receipt.shared.items():
            before = groups.get(name)
            if before is None:
                groups[name] = group
                continue
            _check((before.size, before.digest) == (group.size, group.digest), before, group)
            groups[name] = ReplicaGroup(group.size, group.digest, before.members + group.members)
    return groups


def _check(fits: bool, one: ReplicaGroup, other: ReplicaGroup) -> None:
    if not fits:
        raise UsageError(
            "replicas hold different leaves, so their shares do not fit together. "
            f"replicas={other.size} ranks_with_any={one.members} one={one.digest[:8]} "
            f"other={other.digest[:8]}; keep the same optimizer state on each"
        )


def _ranks(receipt: Receipt) -> str:
    return (
        str(receipt.rank)
        if receipt.ranks == 1
        else f"{receipt.rank} to {receipt.rank + receipt.ranks - 1}"
    )


# ---- staged shares: whether they make one snapshot


def shares_problem(indexes: Sequence[StagedIndex]) -> str | None:
    """Why ``indexes`` (one a rank, in rank order) are not one snapshot, as ``fact. key=value``, or
    None.

    For slots that another process submits for the ranks: the ranks themselves compare replicas
    before.
    """
    snapshots = {index.snapshot for index in indexes}
    if len(snapshots) != 1:
        listing = ", ".join(map(str, sorted(snapshots))) or "none"
        return f"the ranks hold different snapshots. snapshots={listing}"
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
    for key, leaf_boxes in boxes.items():
        if problem := cover_problem(leaves[key].shape, leaf_boxes):
            return f"{problem} leaf={key[0]!r}"
    return None
