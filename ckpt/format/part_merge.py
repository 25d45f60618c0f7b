"""One part of several: what the ranks of a node stored, as one list. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.errors import UsageError
from ckpt.format.part import Part
from ckpt.values import Leaf


def merge_parts(parts: Sequence[Part], *, writer: str) -> Part:
    """The part of all ranks of ``parts``, which follow each other, in the name of ``writer``.

    Shards stay in the order of ranks. Each alias of a leaf that all ranks share is in every rank's part, and in this one once.
    Raises UsageError where the parts are of several snapshots or worlds, or their ranks do not follow each other. O(shards).
    """
    if not parts:
        raise UsageError("a part of no rank.")
    first = parts[0]
    rank = first.rank
    aliases: dict[Leaf, None] = {}
    for part in parts:
        if (part.snapshot, part.world_size, part.rank) != (first.snapshot, first.world_size, rank):
            raise UsageError(
                f"parts that make no part together. snapshot={part.snapshot} rank={part.rank} world_size={part.world_size} "
                f"expected={first.snapshot} rank {rank} of {first.world_size}"
            )
        rank += part.ranks
        aliases.update(dict.fromkeys(part.aliases))
    return Part(
        snapshot=first.snapshot, writer=writer, rank=first.rank, ranks=rank - first.rank, world_size=first.world_size,
        shards=tuple(shard for part in parts for shard in part.shards), aliases=tuple(aliases),
    )  # fmt: skip
