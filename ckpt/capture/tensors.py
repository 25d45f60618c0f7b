"""From one live tensor to its leaf: which memory, which region of which global tensor, held by whom."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.parameter import is_lazy

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.capture.meshes import holders, is_dtensor
from ckpt.errors import UsageError
from ckpt.values import DTYPE_BYTES, Box, Leaf, LeafKind

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which ranks hold a plain (not distributed) tensor together; None: each rank has its own.

    ``scalars`` is for 0-d tensors, ``tensors`` for all others. ``dims`` are the mesh dimensions of the module around.
    """

    tensors: tuple[int, ...] | None = None
    scalars: tuple[int, ...] | None = None
    dims: frozenset[str] = frozenset()


ALONE = Sharing()
"""Every tensor is the rank's own."""


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without the prefix."""
    return str(dtype).removeprefix("torch.")


def refusal(tensor: torch.Tensor) -> str | None:
    """Why a tensor can't be stored, with the remedy; None where it can."""
    if is_lazy(tensor):
        return "tensor has no shape yet; run one forward pass before tracking or capturing it"
    if tensor.is_meta:
        return "tensor is on the meta device and holds no data; materialise it first (to_empty, then initialise)"
    if tensor.is_nested:
        return "nested tensors are not stored; track values() and offsets() instead"
    if tensor.is_quantized:
        return "quantized tensors are not stored; track int_repr() and the scales instead"
    if tensor.layout != torch.strided:
        return f"tensor is not strided. layout={tensor.layout}; track its indices and values, or to_dense()"
    if dtype_name(tensor.dtype) not in DTYPE_BYTES:
        return f"dtype is not stored. dtype={tensor.dtype}; view or convert the tensor to another"
    if not is_dtensor(tensor) and not _is_plain(tensor):
        return f"tensor subclass is not stored. type={type(tensor).__qualname__}; track the plain tensors inside it"
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    # A subclass that doesn't take over dispatch keeps its data where a plain tensor does.
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory as a plain, detached tensor; an alias, never a copy."""
    if is_dtensor(tensor):
        return tensor._local_tensor.detach()
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def describe(name: str, tensor: torch.Tensor, *, world: World, sharing: Sharing = ALONE) -> TensorLeaf:
    """The leaf of one tensor. Raises UsageError that names the leaf where the tensor can't be stored."""
    if why := refusal(tensor):
        raise UsageError(f"{why}. leaf={name!r}")
    local = local_of(tensor)
    shape = tuple(tensor.shape)
    if is_dtensor(tensor):
        box, replicas = _layout(name, tensor, sharing.dims)
        rank = None
    else:
        ranks = sharing.tensors if shape else sharing.scalars
        box, replicas, rank = Box.whole(shape), ranks or (world.rank,), None if ranks else world.rank
    leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype_name(local.dtype), shape=shape, rank=rank)
    return TensorLeaf(leaf, box, local, replicas)


def resolved(leaf: TensorLeaf) -> TensorLeaf:
    """The leaf with lazily conjugated or negated memory written out; itself where there is nothing to resolve."""
    tensor = leaf.tensor
    if not (tensor.is_conj() or tensor.is_neg()):
        return leaf
    return dataclasses.replace(leaf, tensor=tensor.resolve_conj().resolve_neg())


def layout_text(tensor: torch.Tensor) -> str:
    """A distributed tensor's placements as ``Ref.placements`` keeps them; "" for a plain tensor."""
    if not is_dtensor(tensor):
        return ""
    dims = (getattr(place, "dim", None) for place in tensor.placements)
    return ",".join("R" if dim is None else f"S{dim}" for dim in dims)


def _layout(name: str, tensor: DTensor, dims: frozenset[str]) -> tuple[Box, tuple[int, ...]]:
    mesh, placements = tensor.device_mesh, tensor.placements
    for dim, place in enumerate(placements):
        factor = getattr(place, "split_factor", None)
        if place.is_partial():
            raise UsageError(f"tensor is a partial sum, not a value. leaf={name!r}; redistribute() it before capturing")
        if factor is not None and factor != _later_shards(tensor, dim):
            raise UsageError(
                f"tensor's shard is not one box. leaf={name!r} placements={placements}; redistribute() it before capturing"
            )
    compute = sys.modules["torch.distributed.tensor._utils"].compute_local_shape_and_global_offset
    sizes, offsets = compute(tensor.shape, mesh, placements)
    if tuple(sizes) != tuple(tensor._local_tensor.shape):
        raise UsageError(
            f"tensor's local shape is not what its placements say. leaf={name!r} local={tuple(tensor._local_tensor.shape)} "
            f"expected={tuple(sizes)} placements={placements}"
        )
    return Box(tuple(offsets), tuple(sizes)), holders(mesh, placements, dims, name)


def _later_shards(tensor: DTensor, dim: int) -> int:
    """Over how many ranks later mesh dimensions shard the same tensor dimension."""
    mine = getattr(tensor.placements[dim], "dim", None)
    ways = 1
    for later in range(dim + 1, len(tensor.placements)):
        if getattr(tensor.placements[later], "dim", None) == mine:
            ways *= tensor.device_mesh.size(later)
    return ways


def with_aliases(leaves: Iterable[TensorLeaf]) -> tuple[TensorLeaf, ...]:
    """The leaves in order; one that shares another's memory exactly (address, shape, strides, dtype) names it as alias.

    Views that share memory in part are stored by value. O(leaves).
    """
    seen: dict[object, str] = {}
    found: list[TensorLeaf] = []
    for item in leaves:
        tensor, leaf = item.tensor, item.leaf
        if tensor.numel():
            key = (
                tensor.data_ptr(), tensor.device, leaf.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg(),
                leaf.rank, leaf.shape, item.box, item.replicas,
            )  # fmt: skip
            first = seen.setdefault(key, leaf.name)
            if first != leaf.name:
                item = dataclasses.replace(item, leaf=dataclasses.replace(leaf, alias_of=first))
        found.append(item)
    return tuple(found)
