"""Copies from CUDA devices into a slot: on a side stream of each device, into registered (pinned) memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ckpt.staging.slot import Slot


class HostCopies:
    """Starts copies from CUDA tensors; costs nothing where there are none. Not thread-safe.

    A slot is registered with CUDA at its first copy and unregistered before it is freed. Where registering is refused (a
    limit on locked memory) the copies still happen, slower, through CUDA's own buffers.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def running(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], slot: Slot) -> Iterator[None]:
        """Start copying each CUDA tensor into its view of ``slot``, after what its device's current stream has queued.

        All bytes are in the slot when the block ends, however it ends. Raises RuntimeError where a device failed.
        """
        used: dict[torch.device, torch.cuda.Stream] = {}
        try:
            for source, target in pairs:
                device = source.device
                if device not in used:
                    register(slot)
                    used[device] = self._stream(device)
                    used[device].wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(used[device]):
                    target.copy_(source, non_blocking=True)
            yield
        finally:
            for stream in used.values():
                stream.synchronize()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


def register(slot: Slot) -> None:
    """Have CUDA lock the slot's pages once, until the slot is freed."""
    if slot.registered:
        return
    slot.registered = True
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = slot.address
    if int(runtime.cudaHostRegister(address, len(slot.data), 0)) == 0:
        slot.on_free(lambda: runtime.cudaHostUnregister(address))
