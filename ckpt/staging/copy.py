"""Copying live tensors into a slot at memory speed, and digesting each block while it is in
cache.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace

import torch
import xxhash

from ckpt.errors import InternalError, UsageError
from ckpt.format.part_rules import leaf_problem
from ckpt.staging.devices import HostCopies
from ckpt.staging.header import HEADER_BYTES_DEFAULT
from ckpt.staging.layout import lay_out
from ckpt.staging.memory import round_to_pages
from ckpt.staging.slot import Slot
from ckpt.values import CHUNK_BYTES, DTYPE_BYTES, Box, Digest, Leaf, StagedShard

BLOCK_BYTES = 512 << 10
"""Copied, then digested while still in cache; blocks of 4 MiB took 1.3 times as long."""

BATCH_BYTES = 16 << 20
"""Bytes of chunks that a thread takes at a time: few hand-overs, and no thread has much left at the
end.
"""

TINY_BYTES = 64 << 10
"""Shards up to this size are copied while holding the GIL: taking it back would cost more than the
copy.
"""

THREADS_DEFAULT = 2
"""Two threads reach 1.3 to 1.4 times the speed of one; more take cores from training for no
gain.
"""

OBJECT_GROWTH_BYTES = 64 << 10
"""What objects may grow by, beside doubling, before a slot is too small for them."""

_memmove = ctypes.memmove
_memmove_tiny = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)

# One chunk: its address (0: in the slot already), its offset in the data area, its length, and the
# index of its digest.
_Chunk = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class CopySource:
    """One leaf's bytes on this rank.

    ``source`` is the live local tensor (any strides and device) that holds ``box`` of the leaf, or
    an object's bytes. ``owned`` is the part of ``box``, in the leaf's coordinates, that this rank
    stages; None: all of it.
    """

    leaf: Leaf
    box: Box
    source: torch.Tensor | bytes
    owned: Box | None = None


@dataclass(frozen=True, slots=True)
class _PlannedShard:
    """A shard before its digests are known. ``first`` is the index of its first digest."""

    leaf: Leaf
    box: Box
    offset_bytes: int
    size_bytes: int
    first: int

    def staged(self, digests: Sequence[Digest]) -> StagedShard:
        count = -(-self.size_bytes // CHUNK_BYTES)
        return StagedShard(
            leaf=self.leaf,
            box=self.box,
            offset_bytes=self.offset_bytes,
            size_bytes=self.size_bytes,
            digests=tuple(digests[self.first : self.first + count]),
        )


class CopyPlan:
    """Where every byte goes in a slot, fixed once and run for each snapshot. Not thread-safe.

    The plan keeps its tensors alive and remembers their addresses; if one moves the plan must be
    built anew. Objects, whose length varies, follow the tensors and are laid out at each run.
    """

    def __init__(self, sources: Sequence[CopySource], copies: HostCopies | None = None) -> None:
        self._host_copies = HostCopies() if copies is None else copies
        self._objects = [source for source in sources if isinstance(source.source, bytes)]
        shapes, tensors = _shards(
            [source for source in sources if not isinstance(source.source, bytes)]
        )
        self._shapes = shapes
        self._tensors = tensors
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._tensor_bytes = max((s.offset_bytes + s.size_bytes for s in shapes), default=0)
        self._digest_count = sum(-(-s.size_bytes // CHUNK_BYTES) for s in shapes)
        self._host_copies.expect(tensors)
        plain = [
            _is_plain(tensor) and not self._host_copies.is_device(tensor) for tensor in tensors
        ]
        self._via_torch = [i for i, shape in enumerate(shapes) if shape.size_bytes and not plain[i]]
        self._batches = _batches(
            (shape, pointer)
            for shape, pointer, is_plain in zip(shapes, self._pointers, plain, strict=True)
            if is_plain
        )
        self._late_batches = _batches((shapes[i], 0) for i in self._via_torch)
        self._views: weakref.WeakKeyDictionary[Slot, list[torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )

    @classmethod
    def build(cls, sources: Sequence[CopySource], copies: HostCopies | None = None) -> CopyPlan:
        """Lay ``sources`` out; ``copies`` copies what is on CUDA devices. Raises UsageError for a
        dtype that is not recorded or a box that its tensor does not fill.

        O(sources + chunks); reads no tensor memory.
        """
        return cls(sources, copies)

    @property
    def data_bytes(self) -> int:
        """Data area that a slot needs: tensors, the objects given to ``build``, and room for these
        to double.
        """
        objects = [_data(source) for source in self._objects]
        return round_to_pages(
            self.needed_bytes(objects) + sum(map(len, objects)) + OBJECT_GROWTH_BYTES
        )

    @property
    def header_bytes(self) -> int:
        """Header area that a slot needs for this plan's index, user metadata, and an alias for each
        leaf. An upper bound.
        """
        leaves = [shape.leaf for shape in self._shapes] + [source.leaf for source in self._objects]
        index = (
            sum(400 + 4 * len(leaf.name) + 40 * len(leaf.shape) for leaf in leaves)
            + 20 * self._digest_count
        )
        return max(HEADER_BYTES_DEFAULT, round_to_pages(2 * index + (4 << 20)))

    def needed_bytes(self, objects: Sequence[bytes]) -> int:
        """Data area that a run with these objects needs."""
        return round_to_pages(
            max(1, lay_out([len(data) for data in objects], start=self._tensor_bytes)[1])
        )

    def run(
        self,
        slot: Slot,
        *,
        objects: Sequence[CopySource] | None = None,
        executor: Executor | None = None,
        threads: int = THREADS_DEFAULT,
    ) -> tuple[StagedShard, ...]:
        """Copy everything into a begun ``slot`` and digest it; tensors first, in the order given,
        then objects.

        ``objects`` replaces those given to ``build``. The caller's thread works, with up to
        ``threads - 1`` of ``executor`` (none without one), after all that CUDA devices have queued.
        Raises UsageError if the slot is too small (nothing is written then) and InternalError if a
        tensor moved since the plan was built.
        """
        sources = self._objects if objects is None else list(objects)
        needed = self.needed_bytes([_data(source) for source in sources])
        if needed > len(slot.data):
            raise UsageError(
                f"the slot is too small. needed_bytes={needed} slot_bytes={len(slot.data)} resize "
                "the pool to the plan"
            )
        if slot.valid or not slot.writing:
            raise InternalError(f"the slot to copy into was not begun. slot={slot.number}")
        self._check_pointers()
        digests: list[Digest] = [b""] * self._digest_count
        workers = _CopyWorkers(executor, min(threads, os.cpu_count() or 1))
        # Not only what will be copied from devices waits for them: a step may have queued a copy of
        # its own into pinned memory of the host, on any stream.
        self._host_copies.settle()
        with self._host_copies.running(self._pairs(slot, device=True)):
            workers.run(lambda batches: _copy_batches(slot, batches, digests), self._batches)
            for source, target in self._pairs(slot, device=False):
                target.copy_(source)
        workers.run(lambda batches: _copy_batches(slot, batches, digests), self._late_batches)
        return (
            *(shape.staged(digests) for shape in self._shapes),
            *self._copy_objects(slot, sources),
        )

    def _check_pointers(self) -> None:
        now = [tensor.data_ptr() for tensor in self._tensors]
        if now != self._pointers:
            moved = [
                s.leaf.name
                for s, a, b in zip(self._shapes, now, self._pointers, strict=True)
                if a != b
            ]
            raise InternalError(
                f"tensors moved after the copy was planned. leaves={moved[:5]} count={len(moved)}"
            )

    def _pairs(self, slot: Slot, *, device: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What torch must copy, as (live tensor, view of the slot): from CUDA devices, or from
        anywhere else.
        """
        if not self._via_torch:
            return
        if slot not in self._views:
            self._views[slot] = [
                _view(slot, self._shapes[i], self._tensors[i]) for i in self._via_torch
            ]
        for i, target in zip(self._via_torch, self._views[slot], strict=True):
            if self._host_copies.is_device(self._tensors[i]) == device:
                yield _bits(self._tensors[i]), target

    def _copy_objects(self, slot: Slot, objects: Sequence[CopySource]) -> Iterator[StagedShard]:
        offsets, _ = lay_out([len(_data(source)) for source in objects], start=self._tensor_bytes)
        for source, offset in zip(objects, offsets, strict=True):
            data = memoryview(_data(source))
            digests = []
            for start in range(0, len(data), CHUNK_BYTES):
                piece = data[start : start + CHUNK_BYTES]
                slot.data[offset + start : offset + start + len(piece)] = piece
                digests.append(
                    xxhash.xxh3_128_digest(slot.data[offset + start : offset + start + len(piece)])
                )
            leaf = replace(source.leaf, dtype="uint8", shape=(len(data),))
            box = Box.whole(leaf.shape)
            yield StagedShard(
                leaf=leaf,
                box=box,
                offset_bytes=offset,
                size_bytes=len(data),
                digests=tuple(digests),
            )


def _shards(sources: Sequence[CopySource]) -> tuple[list[_PlannedShard], list[torch.Tensor]]:
    tensors = [_owned_tensor(source) for source in sources]
    sizes = [
        tensor.numel() * DTYPE_BYTES[source.leaf.dtype]
        for source, tensor in zip(sources, tensors, strict=True)
    ]
    offsets, _ = lay_out(sizes)
    firsts = itertools.accumulate((-(-size // CHUNK_BYTES) for size in sizes), initial=0)
    shapes = [
        _PlannedShard(source.leaf, source.owned or source.box, offset, size, first)
        for source, offset, size, first in zip(sources, offsets, sizes, firsts, strict=False)
    ]
    return shapes, tensors


def _owned_tensor(source: CopySource) -> torch.Tensor:
    tensor, leaf, box = source.source, source.leaf, source.box
    assert isinstance(tensor, torch.Tensor), "objects are laid out apart"
    itemsize = DTYPE_BYTES.get(leaf.dtype)
    if (
        itemsize is None
        or tensor.dtype != getattr(torch, leaf.dtype, None)
        or tensor.element_size() != itemsize
    ):
        raise UsageError(
            f"a dtype that cannot be staged. leaf={leaf.name!r} dtype={tensor.dtype} "
            f"recorded={leaf.dtype}"
        )
    if tuple(tensor.shape) != box.sizes or tensor.layout != torch.strided:
        raise UsageError(
            f"the tensor does not fill its box. leaf={leaf.name!r} shape={tuple(tensor.shape)} "
            f"box={box.sizes} "
            f"layout={tensor.layout}"
        )
    whole = zip(box.offsets, box.sizes, leaf.shape, strict=False)
    problem = leaf_problem(leaf, world_size=(leaf.rank or 0) + 1, alias=False)
    if (
        problem
        or len(box.sizes) != len(leaf.shape)
        or any(at < 0 or at + size > most for at, size, most in whole)
    ):
        raise UsageError(
            "a leaf that cannot be recorded. "
            f"{problem or f'box outside its leaf. leaf={leaf} box={box}'}"
        )
    if tensor.numel() and not tensor.data_ptr():
        # Address 0 says that bytes are in the slot already: they would be what it held before.
        raise UsageError(
            f"a tensor without memory of its own. leaf={leaf.name!r} type={type(tensor).__name__}"
        )
    tensor = tensor.detach()
    if source.owned is not None:
        for dim, (start, size) in enumerate(
            zip(source.owned.offsets, source.owned.sizes, strict=True)
        ):
            tensor = tensor.narrow(dim, start - box.offsets[dim], size)
    return tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes in host memory are the bytes to store."""
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of the same size, so that a copy keeps every bit; lazy conj and neg
    need arithmetic and stay.
    """
    kind = _SAME_SIZE_INT.get(tensor.element_size())
    return tensor if kind is None or tensor.is_conj() or tensor.is_neg() else tensor.view(kind)


def _view(slot: Slot, shape: _PlannedShard, tensor: torch.Tensor) -> torch.Tensor:
    kind = _bits(tensor).dtype
    flat = torch.frombuffer(slot.data, dtype=kind, count=tensor.numel(), offset=shape.offset_bytes)
    return flat.view(tensor.shape)


def _data(source: CopySource) -> bytes:
    if not isinstance(source.source, bytes):
        raise InternalError(f"a tensor is given as an object. leaf={source.leaf.name!r}")
    return source.source


def _batches(sources: Iterable[tuple[_PlannedShard, int]]) -> list[list[_Chunk]]:
    """The chunks of shards with the addresses of their bytes (0: in the slot already), in batches.

    All tiny shards make one batch, the first.
    """
    tiny: list[_Chunk] = []
    batches: list[list[_Chunk]] = [[]]
    filled = 0
    for shape, address in sources:
        for number, start in enumerate(range(0, shape.size_bytes, CHUNK_BYTES)):
            length = min(CHUNK_BYTES, shape.size_bytes - start)
            chunk = (
                address and address + start,
                shape.offset_bytes + start,
                length,
                shape.first + number,
            )
            if shape.size_bytes <= TINY_BYTES:
                tiny.append(chunk)
                continue
            if filled >= BATCH_BYTES:
                batches.append([])
                filled = 0
            batches[-1].append(chunk)
            filled += length
    return [batch for batch in (tiny, *batches) if batch]


@dataclass(frozen=True, slots=True)
class _CopyWorkers:
    """This thread and up to ``threads - 1`` of the executor, all taking batches from one list."""

    executor: Executor | None
    threads: int

    def run(
        self, worker: Callable[[Iterator[list[_Chunk]]], None], work: list[list[_Chunk]]
    ) -> None:
        shared = iter(work)  # a list iterator gives each batch to one thread only
        helpers: list[Future[None]] = []
        if self.executor is not None:
            helpers = [
                self.executor.submit(worker, shared)
                for _ in range(min(self.threads, len(work)) - 1)
            ]
        try:
            worker(shared)
        finally:
            running = [helper for helper in helpers if not helper.cancel()]
            wait(running)
        for helper in running:
            helper.result()


def _copy_batches(slot: Slot, batches: Iterator[list[_Chunk]], digests: list[Digest]) -> None:
    view, base = slot.data, slot.address
    one_shot, streaming = xxhash.xxh3_128_digest, xxhash.xxh3_128
    for batch in batches:
        for source, offset, length, digest_index in batch:
            if length <= BLOCK_BYTES:
                if source:
                    (_memmove_tiny if length <= TINY_BYTES else _memmove)(
                        base + offset, source, length
                    )
                digests[digest_index] = one_shot(view[offset : offset + length])
                continue
            hasher = streaming()
            for start in range(0, length, BLOCK_BYTES):
                size = min(BLOCK_BYTES, length - start)
                at = offset + start
                if source:
                    _memmove(base + at, source + start, size)
                hasher.update(view[at : at + size])
            digests[digest_index] = hasher.digest()
