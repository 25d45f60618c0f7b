"""Whether the shares that the ranks staged make one whole snapshot. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.format.cover import cover_problem
from ckpt.values import Box, Leaf, StagedIndex


def shares_problem(indexes: Sequence[StagedIndex]) -> str | None:
    """What keeps ``indexes`` from being one snapshot, one index a rank in rank order, as ``fact. key=value``; or None.

    For slots that are handed in by somebody else than the ranks themselves, who would have compared their replicas before.
    """
    snapshots = {index.snapshot for index in indexes}
    if len(snapshots) != 1:
        return f"the ranks hold different snapshots. snapshots={', '.join(map(str, sorted(snapshots))) or 'none'}"
    if len({index.origin for index in indexes}) != 1:
        return "the ranks hold an epoch of the same number that was opened twice."
    if [(index.rank, index.world_size) for index in indexes] != [(rank, len(indexes)) for rank in range(len(indexes))]:
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
