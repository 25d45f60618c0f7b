"""Reading one snapshot's leaves and structure without torch: whole, rows, boxes, or as a stream in
bounded memory.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt.backends.base import Backend
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import DataclassNode, NamedTupleNode, Ref, StateNode, decode_object
from ckpt.restore.fetch import BUDGET_BYTES, ChunkPlacesOf, Fetcher, OnProgress
from ckpt.restore.plan import Want, plan_reads, split_flat, unknown_leaf
from ckpt.values import CHUNK_BYTES, DTYPE_BYTES, Box, Digest, Leaf, LeafKind

_NUMPY = frozenset(
    (
        *("float64", "float32", "float16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
)


@dataclass(frozen=True, slots=True)
class LeafValues:
    """A leaf's values. ``dtype`` is torch's name.

    If numpy has no such type (``bfloat16``, the 8-bit floats), ``array`` holds the raw bits as
    unsigned integers of the same width.
    """

    array: NDArray[np.generic]
    dtype: str


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """Some bytes of a streamed leaf: ``number`` is its place in the request. ``data`` is valid
    until the next piece.
    """

    number: int
    offset_bytes: int
    data: memoryview


def numpy_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy type whose arrays hold torch's ``dtype`` bit for bit: the same one, or unsigned
    integers of its width.
    """
    return np.dtype(dtype) if dtype in _NUMPY else np.dtype(f"u{DTYPE_BYTES[dtype]}")


class SnapshotReader:
    """Reads leaves of one snapshot from one store, every byte verified. Use as a context manager,
    or close it.

    ``budget_bytes`` bounds scratch memory beside what is returned. ``places_of`` says where else a
    chunk is stored, for one whose own place is damaged. Not for use by several threads at once.
    """

    def __init__(
        self,
        backend: Backend,
        index: SnapshotIndex,
        *,
        threads: int | None = None,
        budget_bytes: int = BUDGET_BYTES,
        places_of: ChunkPlacesOf | None = None,
    ) -> None:
        self._index = index
        self._fetcher = Fetcher(
            backend, threads=threads, budget_bytes=budget_bytes, places_of=places_of
        )
        self._coalesce_bytes = min(
            backend.capabilities().read_bytes_best, max(CHUNK_BYTES, budget_bytes // 4)
        )
        self._snapshot = str(index.manifest.snapshot)

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free workers and scratch memory; the backend stays open. Idempotent."""
        self._fetcher.close()

    @property
    def index(self) -> SnapshotIndex:
        """What the snapshot holds."""
        return self._index

    @property
    def read_elsewhere(self) -> Mapping[Digest, str]:
        """The chunks so far whose own place was damaged, and how."""
        return self._fetcher.read_elsewhere

    def leaf(self, name: str, *, rank: int = 0) -> Leaf:
        """The leaf as ``rank`` sees it: the shared one, else that rank's own. Raises NotFoundError
        naming close names.
        """
        leaf = self._index.leaf(name, None) or self._index.leaf(name, rank)
        if leaf is None:
            raise unknown_leaf(self._index, name, rank)
        return leaf

    def read(self, name: str, *, rank: int = 0, rows: slice | None = None) -> LeafValues:
        """A leaf, or the half-open range ``rows`` of its first dimension, reading no more chunks
        than hold them.

        Raises NotFoundError, UsageError for rows with a step or of a leaf without dimensions,
        IntegrityError for damage.
        """
        leaf = self.leaf(name, rank=rank)
        box = Box.whole(leaf.shape) if rows is None else _row_box(leaf, rows)
        data = self.read_bytes(name, leaf.rank, box)
        return LeafValues(
            np.frombuffer(data, numpy_dtype(leaf.dtype)).reshape(box.sizes), leaf.dtype
        )

    def read_bytes(self, name: str, rank: int | None, box: Box) -> bytearray:
        """The bytes of ``box`` of a leaf, C order. ``rank`` is None for a shared leaf, exactly as
        it is recorded.
        """
        plan = plan_reads(
            self._index,
            [Want(name, rank, box)],
            coalesce_bytes=self._coalesce_bytes,
            snapshot=self._snapshot,
        )
        out = bytearray(plan.output_bytes[0])
        self._fetcher.fetch(plan, [memoryview(out)])
        return out

    def read_object(self, name: str, *, rank: int = 0) -> object:
        """An object leaf's value in plain types and the nodes of ``ckpt.format.objects``; nothing
        is unpickled.
        """
        leaf = self.leaf(name, rank=rank)
        if leaf.kind is not LeafKind.OBJECT:
            raise UsageError(
                f"the leaf is a tensor, not an object. leaf={name} dtype={leaf.dtype}; read it "
                "with read()"
            )
        data = self.read_bytes(name, leaf.rank, Box.whole(leaf.shape))
        try:
            return with_tensors(decode_object(data), lambda ref: ref)
        except IntegrityError as error:
            raise IntegrityError(
                f"an object does not decode. leaf={name} snapshot={self._snapshot}: {error}"
            ) from error

    def stream(
        self, leaves: Sequence[Leaf], *, window_bytes: int, on_progress: OnProgress | None = None
    ) -> Iterator[StreamPiece]:
        """All bytes of ``leaves`` in order, in pieces, through one reused window of
        ``window_bytes`` (at least 4 MiB).

        A whole window is verified before its pieces are given. A leaf without elements gives no
        piece. Small leaves share a window, so that they share requests.
        """
        window_bytes = max(CHUNK_BYTES, window_bytes // CHUNK_BYTES * CHUNK_BYTES)
        window = memoryview(mmap.mmap(-1, window_bytes))
        for segments in _windows(leaves, window_bytes):
            wants: list[Want] = []
            outputs: list[memoryview] = []
            pieces: list[StreamPiece] = []
            at = 0
            for number, start, stop in segments:
                leaf = leaves[number]
                itemsize = DTYPE_BYTES[leaf.dtype]
                pieces.append(StreamPiece(number, start, window[at : at + stop - start]))
                for box in split_flat(leaf.shape, start // itemsize, stop // itemsize):
                    size = box.elements * itemsize
                    wants.append(Want(leaf.name, leaf.rank, box))
                    outputs.append(window[at : at + size])
                    at += size
            plan = plan_reads(
                self._index, wants, coalesce_bytes=self._coalesce_bytes, snapshot=self._snapshot
            )
            self._fetcher.fetch(plan, outputs, on_progress=on_progress)
            yield from pieces


def size_bytes(leaf: Leaf) -> int:
    """The raw bytes of a whole leaf."""
    return Box.whole(leaf.shape).elements * DTYPE_BYTES[leaf.dtype]


def _windows(leaves: Sequence[Leaf], window_bytes: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut the leaves' bytes into windows of ``(leaf number, start, stop)``; cuts inside a leaf are
    on the chunk grid.
    """
    segments: list[tuple[int, int, int]] = []
    room_bytes = window_bytes
    for number, leaf in enumerate(leaves):
        start, size = 0, size_bytes(leaf)
        while start < size:
            take = min(
                size - start,
                room_bytes
                if size - start <= room_bytes
                else room_bytes // CHUNK_BYTES * CHUNK_BYTES,
            )
            if take:
                segments.append((number, start, start + take))
                start += take
                room_bytes -= take
            if start < size:
                yield segments
                segments, room_bytes = [], window_bytes
    if segments:
        yield segments


def _row_box(leaf: Leaf, rows: slice) -> Box:
    if not leaf.shape or rows.step not in (None, 1):
        raise UsageError(
            f"rows are a plain range of the first dimension. leaf={leaf.name} "
            f"shape={list(leaf.shape)} rows={rows}"
        )
    start, stop, _ = rows.indices(leaf.shape[0])
    rest = leaf.shape[1:]
    return Box((start,) + (0,) * len(rest), (max(0, stop - start), *rest))


# ---- structure: an item's skeleton without its live objects, for reading and listing

T = TypeVar("T")

ReadWants = Callable[[Sequence[Want], Sequence[memoryview]], None]
"""Fills each output with its want's elements in C order; raises IntegrityError if bytes differ from
their digest.
"""


def captured_rank(index: SnapshotIndex, rank: int) -> int:
    """The old rank whose leaves a rank takes: its own number modulo the size of the
    captured world.
    """
    return rank % index.manifest.world_size


def find_leaf(index: SnapshotIndex, name: str, rank: int) -> Leaf | None:
    """The leaf that all ranks share, else the one that ``rank`` takes, else None."""
    return index.leaf(name, None) or index.leaf(name, captured_rank(index, rank))


def item_names(index: SnapshotIndex) -> list[str]:
    """The tracked items of a snapshot, which are the first components of its leaves' names."""
    return list(dict.fromkeys(leaf.name.split("/", 1)[0] for leaf in index.leaves()))


def read_objects(
    index: SnapshotIndex, names: Sequence[str], *, rank: int, read: ReadWants
) -> dict[str, object]:
    """The skeletons of those items that the snapshot has, in one read. An item that is a tensor has
    its Ref as skeleton.

    Raises IntegrityError if bytes differ from their digest.
    """
    leaf_by_name = {
        name: leaf for name in names if (leaf := find_leaf(index, name, rank)) is not None
    }
    leaves = {name: leaf for name, leaf in leaf_by_name.items() if leaf.kind is not LeafKind.TENSOR}
    for name, leaf in leaves.items():
        if len(leaf.shape) != 1:
            raise IntegrityError(f"item's structure is not an object. item={name!r} leaf={leaf}")
    buffers = {name: bytearray(leaf.shape[0]) for name, leaf in leaves.items()}
    wants = [Want(name, leaf.rank, Box.whole(leaf.shape)) for name, leaf in leaves.items()]
    read(wants, [memoryview(buffer) for buffer in buffers.values()])
    return {
        name: decode_object(buffers[name]) if name in buffers else Ref(name)
        for name in leaf_by_name
    }


def read_object_of_all_ranks(index: SnapshotIndex, name: str, *, read: ReadWants) -> list[object]:
    """The skeletons that an item has on each rank of the snapshot, in one read; equal bytes are
    read once. Ranks without it, and those whose item is a tensor, are left out.

    Raises IntegrityError if bytes differ from their digest.
    """
    found: dict[int, tuple[Digest, ...]] = {}
    wants: dict[tuple[Digest, ...], Want] = {}
    for rank in index.ranks:
        leaf = find_leaf(index, name, rank)
        if leaf is None or leaf.kind is LeafKind.TENSOR:
            continue
        shards = index.shards(name, leaf.rank)
        found[rank] = tuple(digest for shard in shards for digest in shard.digests)
        wants.setdefault(found[rank], Want(name, leaf.rank, Box.whole(leaf.shape)))
    buffers = {digests: bytearray(math.prod(want.box.sizes)) for digests, want in wants.items()}
    read(list(wants.values()), [memoryview(buffer) for buffer in buffers.values()])
    skeletons = {digests: decode_object(buffer) for digests, buffer in buffers.items()}
    return [skeletons[digests] for digests in found.values()]


def rebuild(
    index: SnapshotIndex, name: str, *, read: ReadWants, tensors: Callable[[Ref], T], rank: int = 0
) -> object:
    """The item's value in plain Python, each tensor replaced by what ``tensors`` gives for it.

    ``name`` is the item's escaped name. Instances of user classes stay nodes; nothing is imported.
    Raises NotFoundError if there is no such item.
    """
    skeletons = read_objects(index, [name], rank=rank, read=read)
    if name not in skeletons:
        raise NotFoundError(f"snapshot has no such item. item={name!r} items={item_names(index)}")
    return with_tensors(skeletons[name], tensors)


def with_tensors(node: object, tensors: Callable[[Ref], T]) -> object:
    """The skeleton with each ``Ref`` replaced, containers made anew, states without the names of
    their classes.
    """
    match node:
        case StateNode():
            return with_tensors(node.state, tensors)
        case Ref():
            return tensors(node)
        case dict():
            pairs = {key: with_tensors(item, tensors) for key, item in node.items()}
            if isinstance(node, Counter):
                return Counter(pairs)
            return OrderedDict(pairs) if isinstance(node, OrderedDict) else pairs
        case deque():
            return deque((with_tensors(item, tensors) for item in node), node.maxlen)
        case list():
            return [with_tensors(item, tensors) for item in node]
        case tuple():
            return tuple(with_tensors(item, tensors) for item in node)
        case DataclassNode():
            return DataclassNode(
                node.type_name,
                {key: with_tensors(item, tensors) for key, item in node.fields.items()},
            )
        case NamedTupleNode():
            return NamedTupleNode(
                node.type_name,
                node.names,
                tuple(with_tensors(item, tensors) for item in node.values),
            )
        case _:
            return node
