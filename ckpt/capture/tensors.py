"""From one live tensor to its leaf: which memory, which region of which global tensor, held by
which ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.nn.parameter import is_lazy

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.errors import UsageError
from ckpt.values import DTYPE_BYTES, Box, Leaf, LeafKind

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether it is a distributed tensor. Imports nothing: without the module there are none."""
    # Nearly all are one of these two, and isinstance is slow for torch's types.
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def mesh_dims(tensors: Iterable[torch.Tensor]) -> frozenset[str]:
    """The names of all mesh dimensions that any of a module's tensors is on."""
    return frozenset(
        name
        for tensor in tensors
        if is_dtensor(tensor)
        for name in tensor.device_mesh.mesh_dim_names or ()
    )


def holders(
    mesh: DeviceMesh, placements: Sequence[Placement] | None, dims: frozenset[str], name: str
) -> tuple[int, ...]:
    """The global ranks, ascending, that hold what this rank holds; with ``placements`` None, all
    that the mesh spans.

    ``dims`` are the mesh dimensions of the whole module. A tensor on a slice of a mesh is
    replicated along those of them that its slice lacks (a norm in a model that is both
    tensor-parallel and sharded). Dimensions that no tensor of the module is on (pipeline stages)
    hold other modules and don't count.
    """
    split = {dim for dim, placement in enumerate(placements or ()) if not placement.is_replicate()}
    names = mesh.mesh_dim_names or ()
    extra = dims.difference(names)
    if not extra:
        return _select(mesh, split)
    root = _root_of(mesh)
    root_names = root.mesh_dim_names or ()
    if not set(names) <= set(root_names):
        raise UsageError(
            f"can't tell which ranks hold equal pieces of a tensor. leaf={name!r} mesh={names} "
            f"module_meshes={sorted(dims)}; "
            "place it as Replicate() on the other dimensions (parallelize_module) before sharding "
            "it"
        )
    fixed = {
        dim
        for dim, dim_name in enumerate(root_names)
        if dim_name not in names and dim_name not in extra
    }
    return _select(root, fixed | {root_names.index(names[dim]) for dim in split})


def _select(mesh: DeviceMesh, fixed: set[int]) -> tuple[int, ...]:
    """The ranks that share this rank's coordinate in the ``fixed`` dimensions."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(
            f"this rank is not part of a tensor's mesh. mesh={mesh}; track only what this rank "
            "holds"
        )
    at = tuple(coordinate[dim] if dim in fixed else slice(None) for dim in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[at].flatten().tolist()))


def _root_of(mesh: DeviceMesh) -> DeviceMesh:
    root: DeviceMesh
    if hasattr(mesh, "_get_root_mesh"):
        root = mesh._get_root_mesh()
    else:  # before torch 2.9
        root = sys.modules["torch.distributed.device_mesh"]._mesh_resources.get_root_mesh(mesh)
    return root


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which ranks hold a plain (not distributed) tensor together; None: each rank has its own.

    ``scalars`` is for 0-d tensors, ``tensors`` for all others. ``dims`` are the mesh dimensions of
    the module around.
    """

    tensors: tuple[int, ...] | None = None
    scalars: tuple[int, ...] | None = None
    dims: frozenset[str] = frozenset()


UNSHARED = Sharing()
"""Every tensor is the rank's own."""


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without the prefix."""
    return str(dtype).removeprefix("torch.")


def unsupported_reason(tensor: torch.Tensor) -> str | None:
    """Why a tensor can't be stored, with the remedy; None if it can."""
    if not is_dtensor(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return _unsupported_plain(tensor)
    if not _keeps_dispatch(tensor, sys.modules["torch.distributed.tensor"].DTensor):
        return _subclass_reason(tensor)
    # The bytes that are stored are the local tensor's, whatever the distributed one promises.
    local = tensor._local_tensor
    if type(local).__name__ == "AsyncCollectiveTensor":
        return (
            "tensor's collective has not ended. type=AsyncCollectiveTensor; wait() for it before "
            "capturing"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return _unsupported_plain(local)


def _unsupported_plain(tensor: torch.Tensor) -> str | None:
    if is_lazy(tensor):
        return "tensor has no shape yet; run one forward pass before tracking or capturing it"
    if tensor.is_meta:
        return (
            "tensor is on the meta device and holds no data; "
            "materialise it first (to_empty, then initialise)"
        )
    if tensor.is_nested:
        return "nested tensors are not stored; track values() and offsets() instead"
    if tensor.is_quantized:
        return "quantized tensors are not stored; track int_repr() and the scales instead"
    if tensor.layout != torch.strided:
        return (
            f"tensor is not strided. layout={tensor.layout}; "
            "track its indices and values, or to_dense()"
        )
    if dtype_name(tensor.dtype) not in DTYPE_BYTES:
        return f"dtype is not stored. dtype={tensor.dtype}; view or convert the tensor to another"
    if not _keeps_dispatch(tensor, torch.Tensor):
        return _subclass_reason(tensor)
    if not _has_memory(tensor):
        return (
            "tensor has no memory for all of its elements: it was freed, or the tensor exists only "
            "inside a function transform; capture outside of it, after the memory is back"
        )
    return None


def _subclass_reason(tensor: torch.Tensor) -> str:
    return (
        f"tensor subclass is not stored. type={type(tensor).__qualname__}; "
        "track the plain tensors inside it"
    )


def _keeps_dispatch(tensor: torch.Tensor, base: type[torch.Tensor]) -> bool:
    """Whether its class keeps data as ``base`` does: a subclass that overrides dispatch may not."""
    own, inherited = type(tensor).__torch_dispatch__, base.__torch_dispatch__
    return getattr(own, "__func__", own) is getattr(inherited, "__func__", inherited)


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether all elements are in memory that can be read at its address."""
    if not tensor.numel():
        return True
    try:
        address, storage_bytes = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:  # a transform's wrapper has neither
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    return address != 0 and (last + 1) * tensor.element_size() <= storage_bytes


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether elements of a local tensor share memory along a dimension."""
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def check_can_be_filled(leaf: TensorLeaf) -> None:
    """Raise UsageError, naming the leaf, if a restore could not put bytes into the tensor."""
    if is_expanded(leaf.tensor):
        raise UsageError(
            "tensor is expanded: its elements share memory, so it could not be restored in place; "
            f"clone() it before tracking it. leaf={leaf.leaf.name!r}"
        )


ATTRIBUTES_DEPTH_MAX = 3
"""How many levels of objects a subclass's attributes are searched for tensors."""


def check_carries_nothing(name: str, tensor: torch.Tensor) -> None:
    """Raise UsageError, naming the leaf, if a subclass carries tensors in its attributes: they
    would be left out, and the bytes mean nothing without them (scales of a quantized weight).
    """
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter or is_dtensor(tensor):
        return
    with torch._C.DisableTorchFunctionSubclass():
        carried = sorted(
            attribute
            for attribute, value in vars(tensor).items()
            if _holds_tensor(value, ATTRIBUTES_DEPTH_MAX)
        )
    if carried:
        raise UsageError(
            "tensor subclass carries a tensor in an attribute, which is not stored. "
            f"type={type(tensor).__qualname__} attributes={carried}; track those tensors beside a "
            f"plain one, or store them in the module's own state-dict entries. leaf={name!r}"
        )


def _holds_tensor(value: object, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if not depth or isinstance(value, (type, torch.nn.Module)):
        return False
    match value:
        case dict():
            inner = list(value.values())
        case list() | tuple():
            inner = list(value)
        case _:
            inner = list(getattr(value, "__dict__", {}).values())
    return any(_holds_tensor(one, depth - 1) for one in inner)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory as a plain, detached tensor; an alias, never a copy."""
    if is_dtensor(tensor):
        return tensor._local_tensor.detach()
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def describe(
    name: str, tensor: torch.Tensor, *, world: World, sharing: Sharing = UNSHARED
) -> TensorLeaf:
    """The leaf of one tensor. Raises UsageError naming the leaf if the tensor can't be stored."""
    if reason := unsupported_reason(tensor):
        raise UsageError(f"{reason}. leaf={name!r}")
    local = local_of(tensor)
    shape = tuple(tensor.shape)
    if is_dtensor(tensor):
        box, replicas = _layout(name, tensor, sharing.dims)
        rank = None
    else:
        ranks = sharing.tensors if shape else sharing.scalars
        box, replicas, rank = (
            Box.whole(shape),
            ranks or (world.rank,),
            None if ranks else world.rank,
        )
    leaf = Leaf(
        name=name, kind=LeafKind.TENSOR, dtype=dtype_name(local.dtype), shape=shape, rank=rank
    )
    return TensorLeaf(leaf, box, local, replicas)


def with_bits_resolved(leaf: TensorLeaf) -> TensorLeaf:
    """The leaf with lazily conjugated or negated memory written out; itself if there is nothing to
    resolve.
    """
    tensor = leaf.tensor
    if not (tensor.is_conj() or tensor.is_neg()):
        return leaf
    return dataclasses.replace(leaf, tensor=tensor.resolve_conj().resolve_neg())


def layout_text(tensor: torch.Tensor) -> str:
    """A distributed tensor's placements as ``Ref.placements`` keeps them; "" for a plain tensor."""
    if not is_dtensor(tensor):
        return ""
    dims = (getattr(placement, "dim", None) for placement in tensor.placements)
    return ",".join("R" if dim is None else f"S{dim}" for dim in dims)


def _layout(name: str, tensor: DTensor, dims: frozenset[str]) -> tuple[Box, tuple[int, ...]]:
    mesh, placements = tensor.device_mesh, tensor.placements
    for dim, placement in enumerate(placements):
        factor = getattr(placement, "split_factor", None)
        if placement.is_partial():
            raise UsageError(
                f"tensor is a partial sum, not a value. leaf={name!r}; redistribute() it before "
                "capturing"
            )
        if factor is not None and factor != _later_shards(tensor, dim):
            raise UsageError(
                f"tensor's shard is not one box. leaf={name!r} placements={placements}; "
                "redistribute() it before capturing"
            )
    compute = sys.modules["torch.distributed.tensor._utils"].compute_local_shape_and_global_offset
    sizes, offsets = compute(tensor.shape, mesh, placements)
    if tuple(sizes) != tuple(tensor._local_tensor.shape):
        raise UsageError(
            f"tensor's local shape is not what its placements say. leaf={name!r} "
            f"local={tuple(tensor._local_tensor.shape)} "
            f"expected={tuple(sizes)} placements={placements}"
        )
    return Box(tuple(offsets), tuple(sizes)), holders(mesh, placements, dims, name)


def _later_shards(tensor: DTensor, dim: int) -> int:
    """Over how many ranks later mesh dimensions shard the same tensor dimension."""
    tensor_dim = getattr(tensor.placements[dim], "dim", None)
    ways = 1
    for later in range(dim + 1, len(tensor.placements)):
        if getattr(tensor.placements[later], "dim", None) == tensor_dim:
            ways *= tensor.device_mesh.size(later)
    return ways


def with_aliases(leaves: Iterable[TensorLeaf]) -> tuple[TensorLeaf, ...]:
    """The leaves in order; one that shares another's memory exactly (address, shape, strides,
    dtype) names it as alias.

    Views that share memory in part are stored by value. O(leaves).
    """
    first_names: dict[object, str] = {}
    result: list[TensorLeaf] = []
    for item in leaves:
        tensor, leaf = item.tensor, item.leaf
        if tensor.numel():
            key = (
                tensor.data_ptr(),
                tensor.device,
                leaf.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
                leaf.rank,
                leaf.shape,
                item.box,
                item.replicas,
            )
            first = first_names.setdefault(key, leaf.name)
            if first != leaf.name:
                item = dataclasses.replace(item, leaf=dataclasses.replace(leaf, alias_of=first))
        result.append(item)
    return tuple(result)


class MemoryWatch:
    """Live tensors beside the memory that they had. Holds that memory, so that its address can't be
    reused.
    """

    __slots__ = ("_distributed", "_distributed_seen", "_plain", "_plain_seen")

    def __init__(self) -> None:
        self._plain: list[torch.Tensor] = []
        self._plain_seen: list[torch.Tensor] = []
        self._distributed: list[torch.Tensor] = []
        self._distributed_seen: list[torch.Tensor] = []

    def add(self, live: torch.Tensor, leaf: TensorLeaf) -> None:
        """Watch one live tensor, described by ``leaf``."""
        if is_dtensor(live):
            self._distributed.append(live)
            self._distributed_seen.append(leaf.tensor)
        else:
            self._plain.append(live)
            self._plain_seen.append(leaf.tensor)

    def moved(self) -> bool:
        """Whether any storage, offset, shape or stride differs. About 0.2 us a tensor; waits for no
        device.
        """
        same = torch.Tensor.is_set_to
        try:
            with torch._C.DisableTorchFunctionSubclass():
                if not all(map(same, self._plain, self._plain_seen)):
                    return True
                local = [live._local_tensor for live in self._distributed if is_dtensor(live)]
                return not all(map(same, local, self._distributed_seen))
        except RuntimeError:  # the tensor moved to another device, where they can't be compared
            return True


def same_memory(live: torch.Tensor, leaf: TensorLeaf) -> bool:
    """Whether one live tensor still is the memory that ``leaf`` describes."""
    watch = MemoryWatch()
    watch.add(live, leaf)
    return not watch.moved()
