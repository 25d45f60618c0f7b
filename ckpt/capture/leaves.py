"""What a capture is: live tensors and encoded objects, each with the leaf it is recorded as."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckpt.values import Box, Leaf


@dataclass(frozen=True, slots=True)
class World:
    """This process's rank and the number of ranks, as the captured state sees them."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorLeaf:
    """One tensor as it is now: no copy was made, so the bytes are those of training until training goes on.

    ``tensor`` is this rank's local memory, detached (any device, any strides; conjugate and negative views are resolved).
    ``box`` is its region of the global tensor, in elements. ``replicas`` are the global ranks that hold exactly this box,
    ascending, this rank among them. ``leaf.rank`` is None for a tensor that is one for all ranks.
    """

    leaf: Leaf
    box: Box
    tensor: torch.Tensor
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ObjectLeaf:
    """One tracked item's structure: what ``encode_object`` made of it, with ``Ref`` nodes where its tensors were."""

    leaf: Leaf
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """Everything that was tracked, at one moment.

    ``tensors`` holds aliases too (``leaf.alias_of`` set). Where nothing moved since the last capture of the same plan it is
    the very same tuple, so a copy plan made for it still fits.
    """

    tensors: tuple[TensorLeaf, ...]
    objects: tuple[ObjectLeaf, ...]
