"""Pairing tensors, live or still to be made, with the stored leaves that fill them; selection and
differences; filling.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.capture.tensors import (
    UNSHARED,
    describe,
    is_dtensor,
    is_expanded,
    local_of,
    with_aliases,
)
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import Ref
from ckpt.restore.plan import Want
from ckpt.restore.reader import ReadWants, find_leaf
from ckpt.values import Box, Leaf, LeafKind

# ---- filling: straight into contiguous CPU memory, else through a scratch buffer

SCRATCH_BYTES = 512 << 20
"""Scratch memory used at a time (more if one tensor alone is larger)."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype for each element size that copies bits as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorFill:
    """A want and the tensor that takes its bytes, in full."""

    want: Want
    tensor: torch.Tensor


@torch.no_grad()
def fill_tensors(fills: Sequence[TensorFill], read: ReadWants) -> None:
    """Read all wants and put them into their tensors, bit by bit; autograd's version counters
    advance.

    ``read``'s errors pass through; memory may then hold a part of the new bytes.
    """
    direct: list[tuple[Want, memoryview]] = []
    others: list[TensorFill] = []
    for fill in fills:
        local = local_of(fill.tensor)
        if not local.numel():
            continue
        if is_direct(local):
            direct.append((fill.want, bytes_of(local)))
        else:
            others.append(fill)
    if direct:
        read([want for want, _ in direct], [view for _, view in direct])
    for batch in _batches(others):
        scratch = [np.empty(_nbytes(local_of(fill.tensor)), np.uint8) for fill in batch]
        read([fill.want for fill in batch], [fill.data for fill in scratch])
        for fill, data in zip(batch, scratch, strict=True):
            _copy(local_of(fill.tensor), data)
    for fill in fills:
        _bump(fill.tensor)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def is_direct(tensor: torch.Tensor) -> bool:
    """Whether bytes can be read straight into the tensor's memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor for which ``is_direct`` holds, as bytes."""
    # Over the storage rather than view(): this works for every dtype and for 0-d tensors.
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
    for fill in fills:
        size = _nbytes(local_of(fill.tensor))
        if batch and used + size > SCRATCH_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(fill)
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


# ---- selection (``only=``) and differences

PROBLEMS_SHOWN_MAX = 20
"""Differences that one error lists."""

NAMES_SHOWN_MAX = 3
"""Names of parameters or entries that one difference lists."""


class Coverage(Enum):
    """How much of what is at and below a path is selected."""

    NONE = 0
    PART = 1
    ALL = 2


class Selection:
    """Prefixes of paths, by whole components; None selects everything."""

    def __init__(self, only: Sequence[str] | None) -> None:
        self._only = None if only is None else tuple(prefix.strip("/") for prefix in only)
        self._used: set[str] = set()

    @property
    def everything(self) -> bool:
        """Whether no selection was given."""
        return self._only is None

    def cover(self, path: str) -> Coverage:
        """What is selected of ``path``."""
        if self._only is None:
            return Coverage.ALL
        if inside := [
            prefix for prefix in self._only if path == prefix or path.startswith(prefix + "/")
        ]:
            self._used.update(inside)
            return Coverage.ALL
        return (
            Coverage.PART
            if any(prefix.startswith(path + "/") for prefix in self._only)
            else Coverage.NONE
        )

    def unused(self) -> list[str]:
        """The prefixes that no path had."""
        return [prefix for prefix in self._only or () if prefix not in self._used]


class RestoreProblems:
    """Differences between live objects and a snapshot, collected so that one error lists
    them all.
    """

    def __init__(self, *, keep_missing: bool) -> None:
        self._keep_missing = keep_missing
        self._found: list[str] = []
        self.kept: list[str] = []
        """Paths that keep their live value because the snapshot lacks them."""

    def add(self, fact: str, path: str, remedy: str = "") -> None:
        """Add a difference."""
        self._found.append(f"{fact} path={path!r}{'; ' + remedy if remedy else ''}")

    def missing(self, path: str) -> None:
        """Something live that the snapshot does not have: a difference, unless it keeps its
        value.
        """
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
        """Raise UsageError listing all differences, if there are any. Nothing is written before
        that.
        """
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

    ``like`` gives memory format and, if it is distributed, mesh and placements (``placements``
    overrides those).
    """

    leaf: Leaf
    device: torch.device
    like: torch.Tensor | None = None
    placements: str = ""

    def make(self) -> torch.Tensor:
        """Allocate it, uninitialised."""
        dtype = getattr(torch, self.leaf.dtype)
        like = self.like
        if like is None:
            return torch.empty(self.leaf.shape, dtype=dtype, device=self.device)
        if not is_dtensor(like):
            return torch.empty_like(like, dtype=dtype, device=self.device, requires_grad=False)
        api = sys.modules["torch.distributed.tensor"]
        placements = like.placements
        if self.placements:
            parts = self.placements.split(",")
            placements = tuple(
                api.Replicate() if part == "R" else api.Shard(int(part[1:])) for part in parts
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
    """A tensor's place in the plan: filled by the time the plan's values are put in place."""

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
        """The leaf that a reference of this rank's structure names. Raises IntegrityError if there
        is none.
        """
        leaf = find_leaf(self._index, ref.leaf, self._world.rank)
        if leaf is None or leaf.kind is not LeafKind.TENSOR:
            raise IntegrityError(
                "item's structure refers to a tensor that the snapshot doesn't have. "
                f"leaf={ref.leaf!r}"
            )
        return leaf

    def is_one_number(self, leaf: Leaf) -> bool:
        """Whether a leaf is one element that all ranks have alike. O(ranks)."""
        if math.prod(leaf.shape) != 1:
            return False
        if leaf.rank is None:
            return True
        own = [self._index.leaf(leaf.name, rank) for rank in self._index.ranks]
        first = self._bytes(leaf)
        return all(one is not None and self._bytes(one) == first for one in own)

    @property
    def in_world_of_same_size(self) -> bool:
        """Whether the snapshot has as many ranks as this job."""
        return self._index.manifest.world_size == self._world.size

    def salt_of_new_rank(self) -> bytes | None:
        """What a rank that the snapshot's world did not have folds into its generators' states.
        None for the old ranks.

        The same for all new ranks that together take the states of one copy of the old world, so
        that ranks that drew alike, as those of one tensor-parallel group, still do.
        """
        manifest = self._index.manifest
        number = self._world.rank // manifest.world_size
        if number == 0:
            return None
        return f"{number} {manifest.snapshot.epoch} {manifest.snapshot.step}".encode()

    def piece_of(self, live: torch.Tensor, path: str) -> Box:
        """This rank's region of a live tensor."""
        return describe(path, live, world=self._world, sharing=UNSHARED).box

    def into(self, live: torch.Tensor, ref: Ref, path: str) -> PlannedTensor:
        """Plan to fill a live tensor in place; a difference in shape or dtype is a problem."""
        slot = PlannedTensor(path, ref, tensor=live)
        leaf = self.stored(ref)
        try:
            live_leaf = describe(path, live, world=self._world, sharing=UNSHARED)
        except UsageError as error:
            self._problems.add(f"live tensor can't be restored: {error}", path)
            return slot
        if leaf.shape != live_leaf.leaf.shape:
            self._problems.add(
                f"shapes differ. stored={leaf.shape} live={live_leaf.leaf.shape}", path
            )
        elif leaf.dtype != live_leaf.leaf.dtype:
            self._problems.add(
                f"dtypes differ. stored={leaf.dtype} live={live_leaf.leaf.dtype}",
                path,
                "convert the live tensor",
            )
        elif is_expanded(live_leaf.tensor):
            self._problems.add(
                "live tensor is expanded: its elements share memory.",
                path,
                "clone() it before tracking it",
            )
        else:
            self._slots.append((slot, leaf))
            self._live.append(live_leaf)
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

    def content(self, ref: Ref) -> str:
        """What a stored tensor is, by value: equal for two that a restore makes equal."""
        leaf = self.stored(ref)
        return f"{leaf.dtype} {leaf.shape} {self._bytes(leaf)}"

    def check_ties(self) -> None:
        """Live tensors that share one memory must be stored as equal bytes."""
        refs = {slot.path: leaf for slot, leaf in self._slots if slot.tensor is not None}
        for tied in with_aliases(self._live):
            if tied.leaf.alias_of is None:
                continue
            own_leaf, first = refs[tied.leaf.name], refs[tied.leaf.alias_of]
            if own_leaf.name != first.name and self._bytes(own_leaf) != self._bytes(first):
                self._problems.add(
                    f"one live tensor, but stored as two that differ. other={tied.leaf.alias_of!r}",
                    tied.leaf.name,
                    "untie them, or name the one to restore with only=[...]",
                )

    def fills(self) -> list[TensorFill]:
        """What to read; new tensors are made here. Memory that several names share is read once."""
        fills: list[TensorFill] = []
        aliases = {
            tensor_leaf.leaf.name
            for tensor_leaf in with_aliases(self._live)
            if tensor_leaf.leaf.alias_of is not None
        }
        boxes = {tensor_leaf.leaf.name: tensor_leaf.box for tensor_leaf in self._live}
        for slot, leaf in self._slots:
            if slot.tensor is None and slot.new is not None:
                slot.tensor = slot.new.make()
            elif slot.path in aliases:
                continue
            box = boxes.get(slot.path) or describe(slot.path, slot.value(), world=self._world).box
            fills.append(TensorFill(Want(leaf.name, leaf.rank, box), slot.value()))
        return fills

    def _bytes(self, leaf: Leaf) -> list[tuple[Box, tuple[bytes, ...]]]:
        return sorted(
            ((shard.box, shard.digests) for shard in self._index.shards(leaf.name, leaf.rank)),
            key=lambda entry: entry[0].offsets,
        )
