"""Pair live tensors, and tensors still to be made, with the stored leaves that fill them. Decides;
reads nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.capture.tensors import UNSHARED, describe, is_dtensor, local_of, with_aliases
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import Ref
from ckpt.restore.plan import Want
from ckpt.restore.reader import ReadWants, find_leaf
from ckpt.values import Box, Leaf, LeafKind

# Stored bytes into live memory: straight where it is contiguous CPU memory, else through a
# scratch buffer.

SCRATCH_BYTES = 512 << 20
"""How much scratch memory is used at a time (more where one tensor alone is larger)."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype for each element size that copies bits as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorFill:
    """A want and the tensor that takes its bytes, in full."""

    want: Want
    tensor: torch.Tensor


@torch.no_grad()
def fill_tensors(fills: Sequence[TensorFill], read: ReadWants) -> None:
    """Read all wants and put them into their tensors, bit by bit; autograd's version counters move
    on.

    ``read``'s errors pass through; memory may then hold a part of the new bytes.
    """
    direct: list[tuple[Want, memoryview]] = []
    others: list[TensorFill] = []
    for one in fills:
        local = local_of(one.tensor)
        if not local.numel():
            continue
        if _is_direct(local):
            direct.append((one.want, _bytes_of(local)))
        else:
            others.append(one)
    if direct:
        read([want for want, _ in direct], [view for _, view in direct])
    for batch in _batches(others):
        scratch = [np.empty(_nbytes(local_of(one.tensor)), np.uint8) for one in batch]
        read([one.want for one in batch], [one.data for one in scratch])
        for one, data in zip(batch, scratch, strict=True):
            _copy(local_of(one.tensor), data)
    for one in fills:
        _bump(one.tensor)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_direct(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    # Over the storage rather than view(): that works for every dtype and for 0-d tensors.
    base = torch.empty(0, dtype=torch.uint8)
    base.set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * tensor.element_size(),
        (_nbytes(tensor),),
        (1,),
    )
    return base.numpy().data


def _batches(fills: Sequence[TensorFill]) -> Iterator[list[TensorFill]]:
    batch: list[TensorFill] = []
    used = 0
    for one in fills:
        size = _nbytes(local_of(one.tensor))
        if batch and used + size > SCRATCH_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(one)
        used += size
    if batch:
        yield batch


def _copy(target: torch.Tensor, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    source = torch.empty(0, dtype=target.dtype)
    dense = torch.empty(target.shape, device="meta").stride()
    source.set_(torch.from_numpy(data).untyped_storage(), 0, target.shape, dense)
    if target.is_conj() or target.is_neg():
        target.copy_(source)
    else:
        _bits(target).copy_(_bits(source))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    dtype = _BITS[tensor.element_size()]
    bits = torch.empty(0, dtype=dtype, device=tensor.device)
    return bits.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _bump(tensor: torch.Tensor) -> None:
    if is_dtensor(tensor):
        _bump(tensor._local_tensor)
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


# Which paths a restore touches (``only=``), and the differences it found.

PROBLEMS_SHOWN_MAX = 20
"""How many differences one error lists."""


class Coverage(Enum):
    """How much of what lies at and below a path is selected."""

    NONE = 0
    PART = 1
    ALL = 2


class Selection:
    """Prefixes of paths, by whole components; None selects everything."""

    def __init__(self, only: Sequence[str] | None) -> None:
        self._only = None if only is None else tuple(one.strip("/") for one in only)
        self._used: set[str] = set()

    @property
    def everything(self) -> bool:
        """Whether no selection was given."""
        return self._only is None

    def cover(self, path: str) -> Coverage:
        """What is selected of ``path``."""
        if self._only is None:
            return Coverage.ALL
        if inside := [one for one in self._only if path == one or path.startswith(one + "/")]:
            self._used.update(inside)
            return Coverage.ALL
        return (
            Coverage.PART
            if any(one.startswith(path + "/") for one in self._only)
            else Coverage.NONE
        )

    def unused(self) -> list[str]:
        """The prefixes that no path had."""
        return [one for one in self._only or () if one not in self._used]


class RestoreProblems:
    """Differences between live objects and a snapshot, gathered so that one error lists them
    all."""

    def __init__(self, *, keep_missing: bool) -> None:
        self._keep_missing = keep_missing
        self._found: list[str] = []
        self.kept: list[str] = []
        """Paths that keep their live value because the snapshot lacks them."""

    def add(self, fact: str, path: str, remedy: str = "") -> None:
        """One more difference."""
        self._found.append(f"{fact} path={path!r}{'; ' + remedy if remedy else ''}")

    def missing(self, path: str) -> None:
        """Something live that the snapshot doesn't have: a difference, unless it is to keep its
        value."""
        if self._keep_missing:
            self.kept.append(path)
        else:
            self.add("missing in the snapshot.", path, 'pass missing="keep" to keep its live value')

    def unexpected(self, path: str) -> None:
        """Something in the snapshot that is not live."""
        self.add(
            "in the snapshot, but not live.",
            path,
            "track it, or name what to restore with only=[...]",
        )

    def check(self) -> None:
        """Raise UsageError listing what was found, if anything was. Nothing was written until
        then."""
        if not self._found:
            return
        shown = "\n  ".join(self._found[:PROBLEMS_SHOWN_MAX])
        more = len(self._found) - PROBLEMS_SHOWN_MAX
        rest = f"\n  ... and {more} more" if more > 0 else ""
        raise UsageError(
            "live objects and snapshot don't fit; nothing was changed. "
            f"differences={len(self._found)}\n  {shown}{rest}"
        )


_PLACEMENTS = re.compile(r"(R|S[0-9]{1,2})(,(R|S[0-9]{1,2}))*")


@dataclass(frozen=True, slots=True, eq=False)
class NewTensor:
    """A tensor to make: a plain one, or one laid out like a parameter.

    ``like`` gives memory format and, where it is distributed, mesh and placements (``placements``
    overrides those).
    """

    leaf: Leaf
    device: torch.device
    like: torch.Tensor | None = None
    placements: str = ""

    def make(self) -> torch.Tensor:
        """Allocate it; the contents are whatever was there."""
        dtype = getattr(torch, self.leaf.dtype)
        like = self.like
        if like is None:
            return torch.empty(self.leaf.shape, dtype=dtype, device=self.device)
        if not is_dtensor(like):
            return torch.empty_like(like, dtype=dtype, device=self.device, requires_grad=False)
        api = sys.modules["torch.distributed.tensor"]
        placements = like.placements
        if self.placements:
            words = self.placements.split(",")
            placements = tuple(
                api.Replicate() if word == "R" else api.Shard(int(word[1:])) for word in words
            )
        compute = sys.modules[
            "torch.distributed.tensor._utils"
        ].compute_local_shape_and_global_offset
        sizes, _ = compute(self.leaf.shape, like.device_mesh, placements)
        shape = torch.Size(self.leaf.shape)
        made: torch.Tensor = api.DTensor.from_local(
            torch.empty(sizes, dtype=dtype, device=self.device),
            like.device_mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return made


class PlannedTensor:
    """A tensor's place in the plan: filled by the time that the plan's values are put in place."""

    __slots__ = ("new", "path", "ref", "tensor")

    def __init__(
        self,
        path: str,
        ref: Ref,
        *,
        tensor: torch.Tensor | None = None,
        new: NewTensor | None = None,
    ) -> None:
        self.path = path
        self.ref = ref
        self.tensor = tensor
        self.new = new

    def value(self) -> torch.Tensor:
        """The tensor; made by ``TensorTargets.fills``."""
        if self.tensor is None:
            raise AssertionError(self.path)
        return self.tensor


class TensorTargets:
    """All tensors of one restore, each with its stored leaf."""

    def __init__(self, index: SnapshotIndex, world: World, problems: RestoreProblems) -> None:
        self._index = index
        self._world = world
        self._problems = problems
        self._slots: list[tuple[PlannedTensor, Leaf]] = []
        self._live: list[TensorLeaf] = []

    def stored(self, ref: Ref) -> Leaf:
        """The leaf that a reference of this rank's structure leads to. Raises IntegrityError where
        there is none."""
        leaf = find_leaf(self._index, ref.leaf, self._world.rank)
        if leaf is None or leaf.kind is not LeafKind.TENSOR:
            raise IntegrityError(
                "item's structure refers to a tensor that the snapshot doesn't have. "
                f"leaf={ref.leaf!r}"
            )
        return leaf

    def into(self, live: torch.Tensor, ref: Ref, path: str) -> PlannedTensor:
        """Plan to fill a live tensor in place; a difference in shape or dtype is a problem."""
        slot = PlannedTensor(path, ref, tensor=live)
        leaf = self.stored(ref)
        try:
            mine = describe(path, live, world=self._world, sharing=UNSHARED)
        except UsageError as error:
            self._problems.add(f"live tensor can't be restored: {error}", path)
            return slot
        if leaf.shape != mine.leaf.shape:
            self._problems.add(f"shapes differ. stored={leaf.shape} live={mine.leaf.shape}", path)
        elif leaf.dtype != mine.leaf.dtype:
            self._problems.add(
                f"dtypes differ. stored={leaf.dtype} live={mine.leaf.dtype}",
                path,
                "convert the live tensor",
            )
        elif any(
            step == 0 and size > 1
            for step, size in zip(mine.tensor.stride(), mine.tensor.shape, strict=True)
        ):
            self._problems.add(
                "live tensor is expanded: its elements share memory.",
                path,
                "clone() it before tracking it",
            )
        else:
            self._slots.append((slot, leaf))
            self._live.append(mine)
        return slot

    def fresh(self, new: NewTensor, ref: Ref, path: str) -> PlannedTensor:
        """Plan to make a tensor."""
        slot = PlannedTensor(path, ref, new=new)
        if not isinstance(getattr(torch, new.leaf.dtype, None), torch.dtype):
            self._problems.add(
                f"this torch has no such dtype. dtype={new.leaf.dtype} torch={torch.__version__}",
                path,
            )
        if new.placements and not _PLACEMENTS.fullmatch(new.placements):
            raise IntegrityError(
                f"stored placements can't be read. leaf={ref.leaf!r} placements={new.placements!r}"
            )
        self._slots.append((slot, new.leaf))
        return slot

    def check_ties(self) -> None:
        """Live tensors that are one memory must be stored as equal bytes."""
        refs = {slot.path: leaf for slot, leaf in self._slots if slot.tensor is not None}
        for one in with_aliases(self._live):
            if one.leaf.alias_of is None:
                continue
            mine, first = refs[one.leaf.name], refs[one.leaf.alias_of]
            if mine.name != first.name and self._bytes(mine) != self._bytes(first):
                self._problems.add(
                    f"one live tensor, but stored as two that differ. other={one.leaf.alias_of!r}",
                    one.leaf.name,
                    "untie them, or name the one to restore with only=[...]",
                )

    def fills(self) -> list[TensorFill]:
        """What to read, new tensors made. Memory that several names share is read once."""
        found: list[TensorFill] = []
        aliases = {
            one.leaf.name for one in with_aliases(self._live) if one.leaf.alias_of is not None
        }
        boxes = {one.leaf.name: one.box for one in self._live}
        for slot, leaf in self._slots:
            if slot.tensor is None and slot.new is not None:
                slot.tensor = slot.new.make()
            elif slot.path in aliases:
                continue
            box = boxes.get(slot.path) or describe(slot.path, slot.value(), world=self._world).box
            found.append(TensorFill(Want(leaf.name, leaf.rank, box), slot.value()))
        return found

    def _bytes(self, leaf: Leaf) -> list[tuple[Box, tuple[bytes, ...]]]:
        return sorted(
            ((shard.box, shard.digests) for shard in self._index.shards(leaf.name, leaf.rank)),
            key=lambda one: one[0].offsets,
        )
