"""Which stored bytes to read, and where each of them goes. Pure.

Needed boxes meet stored boxes here. A *chunk* is read whole, because only whole chunks have
digests; a chunk that several wants need is read once; chunks that are side by side in a pack are
joined into one request.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.part import StoredShard
from ckpt.values import CHUNK_BYTES, DTYPE_BYTES, Box, ChunkLocation, Digest, Leaf

GAP_BYTES_MAX = 64 << 10
"""Unneeded bytes between two chunks that are worth reading to save a request: what a fast link
carries in a round trip.
"""

CLOSE_NAMES_MAX = 3
"""Similar leaf names that an error offers."""


class PlanIndex(Protocol):
    """What planning asks of a snapshot's index."""

    def leaves(self) -> Sequence[Leaf]:
        """Every leaf of the snapshot."""
        ...

    def leaf(self, name: str, rank: int | None) -> Leaf | None:
        """The leaf of that name, shared (``rank`` None) or one rank's, or None."""
        ...

    def shards(self, name: str, rank: int | None) -> tuple[StoredShard, ...]:
        """Where the leaf's boxes are stored; an alias has those of the leaf that it shares memory
        with.
        """
        ...


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a leaf that is needed, in elements. ``rank`` is None for a leaf that all ranks
    share.
    """

    leaf: str
    rank: int | None
    box: Box


@dataclass(frozen=True, slots=True)
class ChunkCopy:
    """A part of one raw chunk and its place in one output, as numpy describes strided memory.

    ``shape`` is in elements of ``itemsize_bytes``, outermost first, with neighbouring dimensions
    merged if both sides allow it, and never empty. Offsets and strides are in bytes, from the start
    of the raw chunk and of the output.
    """

    output: int
    shape: tuple[int, ...]
    source_offset_bytes: int
    source_strides_bytes: tuple[int, ...]
    target_offset_bytes: int
    target_strides_bytes: tuple[int, ...]
    itemsize_bytes: int

    @property
    def contiguous(self) -> bool:
        """Whether the bytes are one run on both sides."""
        dense = (self.itemsize_bytes,)
        return self.source_strides_bytes == dense and self.target_strides_bytes == dense

    @property
    def size_bytes(self) -> int:
        """Number of bytes that it moves."""
        return math.prod(self.shape) * self.itemsize_bytes


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """One chunk to read, its digest, and every place its bytes go. ``leaf`` and ``rank`` name it in
    errors.
    """

    digest: Digest
    location: ChunkLocation
    leaf: str
    rank: int | None
    copies: tuple[ChunkCopy, ...]


@dataclass(frozen=True, slots=True)
class PackRead:
    """One request to the store: a byte range of one pack and the chunks in it, in order of their
    offset.
    """

    pack: str
    offset_bytes: int
    size_bytes: int
    chunks: tuple[ChunkRead, ...]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What to read for some wants. ``output_bytes[i]`` is the length of want i's output, C order,
    no padding.
    """

    snapshot: str
    output_bytes: tuple[int, ...]
    reads: tuple[PackRead, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes that the requests carry in all."""
        return sum(read.size_bytes for read in self.reads)


def plan_reads(
    index: PlanIndex,
    wants: Sequence[Want],
    *,
    coalesce_bytes: int,
    snapshot: str = "",
    chunk_bytes: int = CHUNK_BYTES,
) -> ReadPlan:
    """Plan the reads that fill one output per want with that want's box.

    ``coalesce_bytes`` is the largest request made by joining neighbours; 0 joins nothing.
    ``snapshot`` goes into error messages. ``chunk_bytes`` is the grid that the shards were cut on.
    Raises NotFoundError for a leaf that the snapshot does not have, UsageError for a box outside
    its shape, and IntegrityError if no shard covers a wanted element. O(wants x shards of their
    leaf + chunks); no I/O.
    """
    places: dict[Digest, tuple[StoredShard, int, list[ChunkCopy]]] = {}
    sizes: list[int] = []
    for output, want in enumerate(wants):
        leaf = _find(index, want)
        itemsize = DTYPE_BYTES[leaf.dtype]
        sizes.append(want.box.elements * itemsize)
        covered = 0
        for shard in index.shards(want.leaf, want.rank):
            common = want.box.intersect(shard.box)
            if common is None:
                continue
            covered += common.elements
            for number, copy in _chunk_copies(
                common, shard, want.box, output, itemsize, chunk_bytes
            ):
                places.setdefault(shard.digests[number], (shard, number, []))[2].append(copy)
        if covered != want.box.elements:
            raise IntegrityError(
                f"the snapshot's shards do not cover what is wanted. leaf={want.leaf} "
                f"rank={want.rank} "
                f"snapshot={snapshot} wanted_elements={want.box.elements} "
                f"covered_elements={covered}"
            )
    chunks = [
        ChunkRead(digest, shard.locations[number], shard.leaf.name, shard.leaf.rank, tuple(copies))
        for digest, (shard, number, copies) in places.items()
    ]
    return ReadPlan(snapshot, tuple(sizes), tuple(join_reads(chunks, coalesce_bytes)))


def plan_verify(
    shards: Iterable[StoredShard],
    *,
    coalesce_bytes: int,
    snapshot: str = "",
    skip: Container[tuple[Digest, ChunkLocation]] = frozenset(),
) -> ReadPlan:
    """Plan the reading of every stored byte of ``shards``, each distinct location once, delivering
    nothing.

    ``skip`` holds the digests and locations that need not be read.
    """
    places: dict[tuple[Digest, ChunkLocation], ChunkRead] = {}
    for shard in shards:
        for key in zip(shard.digests, shard.locations, strict=True):
            if key not in places and key not in skip:
                places[key] = ChunkRead(*key, shard.leaf.name, shard.leaf.rank, ())
    return ReadPlan(snapshot, (), tuple(join_reads(places.values(), coalesce_bytes)))


def join_reads(chunks: Iterable[ChunkRead], coalesce_bytes: int) -> Iterator[PackRead]:
    """Join near neighbours in the same pack into requests of at most ``coalesce_bytes``, in pack
    order.
    """
    run: list[ChunkRead] = []
    start = end = 0
    for chunk in sorted(
        chunks, key=lambda entry: (entry.location.pack, entry.location.offset_bytes)
    ):
        at = chunk.location
        stop = at.offset_bytes + at.stored_bytes
        near = (
            bool(run)
            and at.pack == run[0].location.pack
            and 0 <= at.offset_bytes - end <= GAP_BYTES_MAX
        )
        if not near or stop - start > coalesce_bytes:
            if run:
                yield PackRead(run[0].location.pack, start, end - start, tuple(run))
            run, start = [], at.offset_bytes
        run.append(chunk)
        end = stop
    if run:
        yield PackRead(run[0].location.pack, start, end - start, tuple(run))


def split_flat(sizes: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
    """The boxes that hold the elements ``start`` to ``stop`` (half-open) of a C-ordered box of
    ``sizes``, in that order.

    At most ``2 * len(sizes) - 1`` boxes: a ragged head, whole rows, a ragged tail, in each
    dimension.
    """
    if start >= stop:
        return ()
    if not sizes:
        return (Box((), ()),)
    row = math.prod(sizes[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _rows(first, split_flat(sizes[1:], start - first * row, stop - first * row))
    boxes: list[Box] = []
    if start > first * row:
        boxes += _rows(first, split_flat(sizes[1:], start - first * row, row))
        first += 1
    tail = stop - last * row
    whole = last + 1 if tail == row else last
    if whole > first:
        boxes.append(Box((first,) + (0,) * (len(sizes) - 1), (whole - first, *sizes[1:])))
    if tail != row:
        boxes += _rows(last, split_flat(sizes[1:], 0, tail))
    return tuple(boxes)


def _rows(row: int, boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    return tuple(Box((row, *box.offsets), (1, *box.sizes)) for box in boxes)


def _find(index: PlanIndex, want: Want) -> Leaf:
    leaf = index.leaf(want.leaf, want.rank)
    if leaf is None:
        raise unknown_leaf(index, want.leaf, want.rank)
    box = want.box
    fits = len(box.offsets) == len(box.sizes) == len(leaf.shape) and all(
        offset >= 0 and size >= 0 and offset + size <= whole
        for offset, size, whole in zip(box.offsets, box.sizes, leaf.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"the wanted box is not inside the leaf. leaf={want.leaf} "
            f"shape={list(leaf.shape)} "
            f"offsets={list(box.offsets)} sizes={list(box.sizes)}"
        )
    return leaf


def unknown_leaf(index: PlanIndex, name: str, rank: int | None) -> NotFoundError:
    """The error for a leaf that the snapshot does not have: names the leaf's other ranks, or leaves
    with a similar name.
    """
    ranks: Mapping[int | None, None] = {
        leaf.rank: None for leaf in index.leaves() if leaf.name == name
    }
    if ranks:
        owners = (
            "shared by all ranks"
            if None in ranks
            else f"held by ranks {sorted(r for r in ranks if r is not None)}"
        )
        return NotFoundError(
            f"the leaf exists, but not for this rank; it is {owners}. leaf={name} rank={rank}"
        )
    names = list(dict.fromkeys(leaf.name for leaf in index.leaves()))
    close = difflib.get_close_matches(name, names, n=CLOSE_NAMES_MAX)
    hint = f"; close names: {', '.join(close)}" if close else ""
    return NotFoundError(f"no such leaf in the snapshot. leaf={name} rank={rank}{hint}")


def _chunk_copies(
    common: Box, shard: StoredShard, wanted: Box, output: int, itemsize: int, chunk_bytes: int
) -> Iterator[tuple[int, ChunkCopy]]:
    """For each chunk of ``shard`` that holds elements of ``common``: its number and a copy
    of them.
    """
    per_chunk = chunk_bytes // itemsize
    source, target = _flat_range(common, shard.box), _flat_range(common, wanted)
    if source is not None and target is not None:
        start, stop = source
        for number in range(start // per_chunk, (stop - 1) // per_chunk + 1):
            low, high = max(start, number * per_chunk), min(stop, (number + 1) * per_chunk)
            yield (
                number,
                _dense(
                    output, low - number * per_chunk, target[0] + low - start, high - low, itemsize
                ),
            )
        return
    first, last = _flat_offset(common, shard.box), _flat_offset_last(common, shard.box)
    elements = shard.box.elements
    for number in range(first // per_chunk, last // per_chunk + 1):
        low = number * per_chunk
        for piece in split_flat(shard.box.sizes, low, min(elements, low + per_chunk)):
            overlap = common.intersect(Box(_add(piece.offsets, shard.box.offsets), piece.sizes))
            if overlap is not None:
                yield number, _strided(overlap, shard.box, wanted, output, itemsize, low)


def _dense(output: int, source: int, target: int, elements: int, itemsize: int) -> ChunkCopy:
    strides = (itemsize,)
    return ChunkCopy(
        output, (elements,), source * itemsize, strides, target * itemsize, strides, itemsize
    )


def _strided(
    overlap: Box, stored: Box, wanted: Box, output: int, itemsize: int, chunk_start: int
) -> ChunkCopy:
    shape: list[int] = []
    source_strides: list[int] = []
    target_strides: list[int] = []
    dims = zip(
        overlap.sizes,
        _strides(stored.sizes, itemsize),
        _strides(wanted.sizes, itemsize),
        strict=True,
    )
    for size, source, target in dims:
        if size == 1:
            continue
        if shape and source_strides[-1] == size * source and target_strides[-1] == size * target:
            shape[-1] *= size
            source_strides[-1], target_strides[-1] = source, target
        else:
            shape.append(size)
            source_strides.append(source)
            target_strides.append(target)
    return ChunkCopy(
        output,
        tuple(shape) or (1,),
        (_flat_offset(overlap, stored) - chunk_start) * itemsize,
        tuple(source_strides) or (itemsize,),
        _flat_offset(overlap, wanted) * itemsize,
        tuple(target_strides) or (itemsize,),
        itemsize,
    )


def _flat_range(inner: Box, outer: Box) -> tuple[int, int] | None:
    """The half-open range of ``outer``'s C-ordered elements that ``inner`` fills, or None if it is
    not a single range.
    """
    if inner == outer:
        return 0, inner.elements
    ragged = False
    for inside, whole in zip(inner.sizes, outer.sizes, strict=True):
        if ragged and inside != whole:
            return None
        ragged = ragged or inside > 1
    start = _flat_offset(inner, outer)
    return start, start + inner.elements


def _flat_offset(inner: Box, outer: Box) -> int:
    steps = _strides(outer.sizes, 1)
    return sum(
        (a - b) * step for a, b, step in zip(inner.offsets, outer.offsets, steps, strict=True)
    )


def _flat_offset_last(inner: Box, outer: Box) -> int:
    steps = _strides(outer.sizes, 1)
    reach = sum((size - 1) * step for size, step in zip(inner.sizes, steps, strict=True))
    return _flat_offset(inner, outer) + reach


def _strides(sizes: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    step = itemsize
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
