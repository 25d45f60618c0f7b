"""One snapshot's leaves and the locations of their bytes, from its manifest and parts. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.errors import IntegrityError
from ckpt.format import keys
from ckpt.format.manifest import Manifest
from ckpt.format.part import Part, StoredShard
from ckpt.format.part_rules import cover_problem
from ckpt.values import ChunkLocation, Digest, Leaf

LeafKey = tuple[str, int | None]


class SnapshotIndex:
    """What a restore plans from. Immutable, so threads may share it.

    ``parts`` are in the order of ``manifest.parts``. Raises IntegrityError if a part is missing or
    of another snapshot, if parts disagree on a leaf, if the shards of a leaf do not cover it
    exactly once, or if an alias leads nowhere. Costs one pass over shards, not over chunks.
    """

    __slots__ = ("_leaves", "_manifest", "_parts", "_shards", "_targets")

    def __init__(self, manifest: Manifest, parts: Sequence[Part]) -> None:
        _check_parts(manifest, parts)
        self._manifest = manifest
        self._parts = tuple(parts)
        self._leaves: dict[LeafKey, Leaf] = {}
        shards: dict[LeafKey, list[StoredShard]] = {}
        for part in parts:
            for shard in part.shards:
                self._add(shard.leaf)
                shards.setdefault(_key(shard.leaf), []).append(shard)
            for alias in part.aliases:
                self._add(alias)
        self._shards = {key: tuple(stored) for key, stored in shards.items()}
        for key, stored in self._shards.items():
            if problem := cover_problem(self._leaves[key].shape, [shard.box for shard in stored]):
                raise IntegrityError(
                    f"{problem} leaf={key[0]!r} rank={key[1]} snapshot={manifest.snapshot}"
                )
        self._targets = {
            key: self._resolve(leaf)
            for key, leaf in self._leaves.items()
            if leaf.alias_of is not None
        }

    @property
    def manifest(self) -> Manifest:
        """The manifest that the index was made from."""
        return self._manifest

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in rank order."""
        return self._parts

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that took part, ascending."""
        return tuple(range(self._manifest.world_size))

    def leaves(self) -> list[Leaf]:
        """Every leaf, aliases included, by name; a shared leaf before per-rank ones, these by
        rank."""
        return sorted(
            self._leaves.values(),
            key=lambda leaf: (leaf.name, -1 if leaf.rank is None else leaf.rank),
        )

    def leaf(self, name: str, rank: int | None = None) -> Leaf | None:
        """The leaf of that name and exactly that rank (None: the shared one), or None."""
        return self._leaves.get((name, rank))

    def target(self, name: str, rank: int | None = None) -> Leaf | None:
        """The leaf that holds the bytes: the leaf itself, or the target of its alias."""
        key = (name, rank)
        return self._leaves.get(self._targets.get(key, key))

    def shards(self, name: str, rank: int | None = None) -> tuple[StoredShard, ...]:
        """The stored shards of that leaf or of its alias's target, in rank order; empty without a
        leaf."""
        key = (name, rank)
        return self._shards.get(self._targets.get(key, key), ())

    def locations(self) -> dict[Digest, ChunkLocation]:
        """Every stored chunk by digest: what the next snapshot may refer to. O(chunks)."""
        locations: dict[Digest, ChunkLocation] = {}
        for part in self._parts:
            for shard in part.shards:
                locations.update(zip(shard.digests, shard.locations, strict=True))
        return locations

    def packs(self) -> frozenset[str]:
        """The keys of all packs that the snapshot refers to. O(chunks)."""
        return frozenset(
            location.pack
            for part in self._parts
            for shard in part.shards
            for location in shard.locations
        )

    def _add(self, leaf: Leaf) -> None:
        recorded = self._leaves.setdefault(_key(leaf), leaf)
        if recorded != leaf:
            raise IntegrityError(
                f"parts disagree on a leaf. snapshot={self._manifest.snapshot} one={recorded} "
                f"other={leaf}"
            )

    def _resolve(self, leaf: Leaf) -> LeafKey:
        visited = {_key(leaf)}
        current = leaf
        while current.alias_of is not None:
            key = (current.alias_of, current.rank)
            named = self._leaves.get(key)
            if named is None or key in visited:
                problem = "a cycle" if key in visited else "no such leaf"
                raise IntegrityError(
                    f"alias leads nowhere: {problem}. leaf={leaf.name!r} rank={leaf.rank} "
                    f"to={key[0]!r}"
                )
            if (named.kind, named.dtype, named.shape) != (leaf.kind, leaf.dtype, leaf.shape):
                raise IntegrityError(
                    f"alias differs from what it names. leaf={leaf} target={named}"
                )
            visited.add(key)
            current = named
        return _key(current)


def _key(leaf: Leaf) -> LeafKey:
    return (leaf.name, leaf.rank)


def _check_parts(manifest: Manifest, parts: Sequence[Part]) -> None:
    if len(parts) != len(manifest.parts):
        raise IntegrityError(
            f"not all parts are here. snapshot={manifest.snapshot} expected={len(manifest.parts)} "
            f"found={len(parts)}"
        )
    for ref, part in zip(manifest.parts, parts, strict=True):
        expected = (manifest.snapshot, ref.rank, ref.ranks, manifest.world_size, ref.key)
        key = keys.part_key(part.snapshot, part.writer)
        if (part.snapshot, part.rank, part.ranks, part.world_size, key) != expected:
            raise IntegrityError(
                f"part of another snapshot, rank, world or writer. key={ref.key} "
                f"snapshot={part.snapshot} "
                f"rank={part.rank} ranks={part.ranks} world_size={part.world_size} "
                f"writer={part.writer}"
            )
