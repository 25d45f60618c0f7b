"""All of one snapshot's leaves and where their bytes lie, from its manifest and parts."""

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
    """What a restore plans from. Immutable after construction, safe to share between threads.

    ``parts`` are in the order of ``manifest.parts``. Raises IntegrityError where a part is missing
    or is of another snapshot, where parts disagree on a leaf, where the shards of a leaf don't
    cover it exactly once, and where an alias ends nowhere. Costs one pass over shards, not over
    chunks.
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
        self._shards = {key: tuple(found) for key, found in shards.items()}
        for key, found in self._shards.items():
            if why := cover_problem(self._leaves[key].shape, [shard.box for shard in found]):
                raise IntegrityError(
                    f"{why} leaf={key[0]!r} rank={key[1]} snapshot={manifest.snapshot}"
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
        """Every leaf, aliases too, by name, the shared one before per-rank ones in rank order."""
        return sorted(
            self._leaves.values(),
            key=lambda leaf: (leaf.name, -1 if leaf.rank is None else leaf.rank),
        )

    def leaf(self, name: str, rank: int | None = None) -> Leaf | None:
        """The leaf of that name and exactly that rank (None: the one shared by all), or None."""
        return self._leaves.get((name, rank))

    def target(self, name: str, rank: int | None = None) -> Leaf | None:
        """The leaf that holds the bytes: the leaf itself, or what its alias leads to."""
        key = (name, rank)
        return self._leaves.get(self._targets.get(key, key))

    def shards(self, name: str, rank: int | None = None) -> tuple[StoredShard, ...]:
        """The stored shards of that leaf (of its target, for an alias), in rank order; empty where
        there is no leaf."""
        key = (name, rank)
        return self._shards.get(self._targets.get(key, key), ())

    def locations(self) -> dict[Digest, ChunkLocation]:
        """Every stored chunk by digest: what the next snapshot may refer to. O(chunks)."""
        found: dict[Digest, ChunkLocation] = {}
        for part in self._parts:
            for shard in part.shards:
                found.update(zip(shard.digests, shard.locations, strict=True))
        return found

    def packs(self) -> frozenset[str]:
        """The keys of all packs that the snapshot refers to. O(chunks)."""
        return frozenset(
            place.pack for part in self._parts for shard in part.shards for place in shard.locations
        )

    def _add(self, leaf: Leaf) -> None:
        known = self._leaves.setdefault(_key(leaf), leaf)
        if known != leaf:
            raise IntegrityError(
                f"parts disagree on a leaf. snapshot={self._manifest.snapshot} one={known} "
                f"other={leaf}"
            )

    def _resolve(self, leaf: Leaf) -> LeafKey:
        seen = {_key(leaf)}
        at = leaf
        while at.alias_of is not None:
            key = (at.alias_of, at.rank)
            found = self._leaves.get(key)
            if found is None or key in seen:
                why = "a cycle" if key in seen else "no such leaf"
                raise IntegrityError(
                    f"alias leads nowhere: {why}. leaf={leaf.name!r} rank={leaf.rank} to={key[0]!r}"
                )
            if (found.kind, found.dtype, found.shape) != (leaf.kind, leaf.dtype, leaf.shape):
                raise IntegrityError(
                    f"alias differs from what it names. leaf={leaf} target={found}"
                )
            seen.add(key)
            at = found
        return _key(at)


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
