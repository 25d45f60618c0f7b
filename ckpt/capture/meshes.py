"""Who holds the same piece of a distributed tensor, also beside the mesh that it lies on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch

from ckpt.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether it is a distributed tensor. Imports nothing: without the module there are none."""
    if (
        type(value) is torch.Tensor or type(value) is torch.nn.Parameter
    ):  # nearly all are, and isinstance is slow for torch
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def mesh_dims(tensors: Iterable[torch.Tensor]) -> frozenset[str]:
    """The names of all mesh dimensions that any of a module's tensors lies on."""
    return frozenset(name for one in tensors if is_dtensor(one) for name in one.device_mesh.mesh_dim_names or ())


def holders(
    mesh: DeviceMesh, placements: Sequence[Placement] | None, dims: frozenset[str], name: str
) -> tuple[int, ...]:
    """The global ranks, ascending, that hold what this rank holds; with ``placements`` None, all that the mesh spans.

    ``dims`` are the mesh dimensions of the whole module. A tensor that lies on a slice of a mesh is replicated along those of
    them that its slice lacks (a norm in a model that is both tensor-parallel and sharded). Dimensions that no tensor of the
    module lies on (pipeline stages) hold other modules and don't count.
    """
    split = {dim for dim, place in enumerate(placements or ()) if not place.is_replicate()}
    names = mesh.mesh_dim_names or ()
    extra = dims.difference(names)
    if not extra:
        return _select(mesh, split)
    root = _root_of(mesh)
    known = root.mesh_dim_names or ()
    if not set(names) <= set(known):
        raise UsageError(
            f"can't tell which ranks hold equal pieces of a tensor. leaf={name!r} mesh={names} module_meshes={sorted(dims)}; "
            f"place it as Replicate() on the other dimensions (parallelize_module) before sharding it"
        )
    fixed = {dim for dim, one in enumerate(known) if one not in names and one not in extra}
    return _select(root, fixed | {known.index(names[dim]) for dim in split})


def _select(mesh: DeviceMesh, fixed: set[int]) -> tuple[int, ...]:
    """The ranks that share this rank's coordinate in the ``fixed`` dimensions."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(f"this rank is not part of a tensor's mesh. mesh={mesh}; track only what this rank holds")
    at = tuple(coordinate[dim] if dim in fixed else slice(None) for dim in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[at].flatten().tolist()))


def _root_of(mesh: DeviceMesh) -> DeviceMesh:
    root: DeviceMesh
    if hasattr(mesh, "_get_root_mesh"):
        root = mesh._get_root_mesh()
    else:  # before torch 2.9
        root = sys.modules["torch.distributed.device_mesh"]._mesh_resources.get_root_mesh(mesh)
    return root
