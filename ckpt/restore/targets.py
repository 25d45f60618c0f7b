"""Pair live tensors, and tensors still to be made, with the stored leaves that fill them. Decides; reads nothing."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import torch

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.capture.meshes import is_dtensor
from ckpt.capture.tensors import ALONE, describe, with_aliases
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.manifest_objects import Ref
from ckpt.restore.apply_fill import Fill
from ckpt.restore.apply_select import Problems
from ckpt.restore.plan import Want
from ckpt.restore.rebuild import find
from ckpt.values import Box, Leaf, LeafKind

_PLACEMENTS = re.compile(r"(R|S[0-9]{1,2})(,(R|S[0-9]{1,2}))*")


@dataclass(frozen=True, slots=True, eq=False)
class New:
    """A tensor to make: a plain one, or one laid out like a parameter.

    ``like`` gives memory format and, where it is distributed, mesh and placements (``placements`` overrides those).
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
            placements = tuple(api.Replicate() if word == "R" else api.Shard(int(word[1:])) for word in words)
        compute = sys.modules["torch.distributed.tensor._utils"].compute_local_shape_and_global_offset
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


class Slot:
    """A tensor's place in the plan: filled by the time that the plan's values are put in place."""

    __slots__ = ("new", "path", "ref", "tensor")

    def __init__(self, path: str, ref: Ref, *, tensor: torch.Tensor | None = None, new: New | None = None) -> None:
        self.path = path
        self.ref = ref
        self.tensor = tensor
        self.new = new

    def value(self) -> torch.Tensor:
        """The tensor; made by ``Targets.fills``."""
        if self.tensor is None:
            raise AssertionError(self.path)
        return self.tensor


class Targets:
    """All tensors of one restore, each with its stored leaf."""

    def __init__(self, index: SnapshotIndex, world: World, problems: Problems) -> None:
        self._index = index
        self._world = world
        self._problems = problems
        self._slots: list[tuple[Slot, Leaf]] = []
        self._live: list[TensorLeaf] = []

    def stored(self, ref: Ref) -> Leaf:
        """The leaf that a reference of this rank's structure leads to. Raises IntegrityError where there is none."""
        leaf = find(self._index, ref.leaf, self._world.rank)
        if leaf is None or leaf.kind is not LeafKind.TENSOR:
            raise IntegrityError(
                f"item's structure refers to a tensor that the snapshot doesn't have. leaf={ref.leaf!r}"
            )
        return leaf

    def into(self, live: torch.Tensor, ref: Ref, path: str) -> Slot:
        """Plan to fill a live tensor in place; a difference in shape or dtype is a problem."""
        slot = Slot(path, ref, tensor=live)
        leaf = self.stored(ref)
        try:
            mine = describe(path, live, world=self._world, sharing=ALONE)
        except UsageError as error:
            self._problems.add(f"live tensor can't be restored: {error}", path)
            return slot
        if leaf.shape != mine.leaf.shape:
            self._problems.add(f"shapes differ. stored={leaf.shape} live={mine.leaf.shape}", path)
        elif leaf.dtype != mine.leaf.dtype:
            self._problems.add(
                f"dtypes differ. stored={leaf.dtype} live={mine.leaf.dtype}", path, "convert the live tensor"
            )
        elif any(step == 0 and size > 1 for step, size in zip(mine.tensor.stride(), mine.tensor.shape, strict=True)):
            self._problems.add(
                "live tensor is expanded: its elements share memory.", path, "clone() it before tracking it"
            )
        else:
            self._slots.append((slot, leaf))
            self._live.append(mine)
        return slot

    def fresh(self, new: New, ref: Ref, path: str) -> Slot:
        """Plan to make a tensor."""
        slot = Slot(path, ref, new=new)
        if not isinstance(getattr(torch, new.leaf.dtype, None), torch.dtype):
            self._problems.add(f"this torch has no such dtype. dtype={new.leaf.dtype} torch={torch.__version__}", path)
        if new.placements and not _PLACEMENTS.fullmatch(new.placements):
            raise IntegrityError(f"stored placements can't be read. leaf={ref.leaf!r} placements={new.placements!r}")
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

    def fills(self) -> list[Fill]:
        """What to read, new tensors made. Memory that several names share is read once."""
        found: list[Fill] = []
        aliases = {one.leaf.name for one in with_aliases(self._live) if one.leaf.alias_of is not None}
        boxes = {one.leaf.name: one.box for one in self._live}
        for slot, leaf in self._slots:
            if slot.tensor is None and slot.new is not None:
                slot.tensor = slot.new.make()
            elif slot.path in aliases:
                continue
            box = boxes.get(slot.path) or describe(slot.path, slot.value(), world=self._world).box
            found.append(Fill(Want(leaf.name, leaf.rank, box), slot.value()))
        return found

    def _bytes(self, leaf: Leaf) -> list[tuple[Box, tuple[bytes, ...]]]:
        return sorted(
            ((shard.box, shard.digests) for shard in self._index.shards(leaf.name, leaf.rank)),
            key=lambda one: one[0].offsets,
        )
