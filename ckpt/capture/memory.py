"""Whether tensors still are where a plan saw them."""

from __future__ import annotations

import torch

from ckpt.capture.leaves import TensorLeaf
from ckpt.capture.meshes import is_dtensor


class Watch:
    """Live tensors beside the memory that was seen. Holds that memory, so that its address can't be given out anew."""

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
        """Whether any storage, offset, shape or stride differs. About 0.2 us a tensor; no device is waited for."""
        same = torch.Tensor.is_set_to
        try:
            with torch._C.DisableTorchFunctionSubclass():
                if not all(map(same, self._plain, self._plain_seen)):
                    return True
                local = [live._local_tensor for live in self._distributed if is_dtensor(live)]
                return not all(map(same, local, self._distributed_seen))
        except RuntimeError:  # the live tensor went to another device, where the two can't be compared
            return True


def same_memory(live: torch.Tensor, leaf: TensorLeaf) -> bool:
    """Whether one live tensor still is the memory that ``leaf`` describes."""
    watch = Watch()
    watch.add(live, leaf)
    return not watch.moved()
