"""Stored bytes into live memory: straight where it is contiguous CPU memory, else through a scratch buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ckpt.capture.meshes import is_dtensor
from ckpt.capture.tensors import local_of
from ckpt.restore.plan import Want
from ckpt.restore.rebuild import Read

SCRATCH_BYTES = 512 << 20
"""How much scratch memory is used at a time (more where one tensor alone is larger)."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype for each element size that copies bits as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A want and the tensor that takes its bytes, in full."""

    want: Want
    tensor: torch.Tensor


@torch.no_grad()
def fill(fills: Sequence[Fill], read: Read) -> None:
    """Read all wants and put them into their tensors, bit by bit; autograd's version counters move on.

    ``read``'s errors pass through; memory may then hold a part of the new bytes.
    """
    direct: list[tuple[Want, memoryview]] = []
    others: list[Fill] = []
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
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    # Over the storage rather than view(): that works for every dtype and for 0-d tensors.
    base = torch.empty(0, dtype=torch.uint8)
    base.set_(tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size(), (_nbytes(tensor),), (1,))
    return base.numpy().data


def _batches(fills: Sequence[Fill]) -> Iterator[list[Fill]]:
    batch: list[Fill] = []
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
    return bits.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _bump(tensor: torch.Tensor) -> None:
    if is_dtensor(tensor):
        _bump(tensor._local_tensor)
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
