"""Copies from CUDA devices into slots, and the few calls of CUDA that they need.

The calls are in a class of their own, so that tests can run every branch without a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ckpt.staging.slot import Slot

_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every device, not only for the one that registers it."""

_CAPTURE_RELAXED = 2
"""``cudaStreamCaptureModeRelaxed``: calls of this thread don't break a graph that another thread is
capturing.
"""


class CudaCalls:
    """What is called of CUDA (or of HIP, which torch gives the same names). Thread-safe."""

    def __init__(self, cuda: Any = torch.cuda, runtime: Any = None) -> None:
        self._cuda = cuda
        self._runtime = runtime
        self._prefix = "hip" if torch.version.hip else "cuda"

    def in_use(self) -> bool:
        """Whether this process has opened CUDA. Never opens it."""
        return bool(self._cuda.is_initialized())

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """The CUDA device that holds the tensor, or None."""
        return tensor.device if tensor.device.type == "cuda" else None

    def active(self) -> list[torch.device]:
        """The devices that this process has opened. Opens none."""
        return [
            torch.device("cuda", index)
            for index in range(self._cuda.device_count())
            if self._opened(index)
        ]

    def _opened(self, index: int) -> bool:
        opened = getattr(torch._C, "_cuda_hasPrimaryContext", None)
        if opened is None:  # HIP builds of some releases
            return bool(index == self._cuda.current_device())
        return bool(opened(index))

    def new_stream(self, device: torch.device) -> Any:
        """A stream for copies."""
        return self._cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy to the host on ``stream``."""
        with self._cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def current_stream(self, device: torch.device) -> Any:
        """The stream that this thread uses on a device."""
        return self._cuda.current_stream(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait for everything that is queued on a device, by whichever stream. Raises RuntimeError
        if it failed.
        """
        self._cuda.synchronize(device)

    def register(self, device: torch.device, address: int, size_bytes: int) -> str:
        """Have the driver lock memory of the host. Returns why it refused, or "".

        Takes seconds for many gigabytes. Opens no other device than ``device``, and leaves no error
        behind for the next check of this thread.
        """
        with self._cuda.device(device), self._beside_captures():
            runtime = self._cuda.cudart()
            code = runtime.cudaHostRegister(address, size_bytes, _PORTABLE)
            if int(code) == 0:
                return ""
            self._forget_error()
            return f"code={int(code)} error={runtime.cudaGetErrorString(code)}"

    def unregister(self, device: torch.device, address: int) -> None:
        """Undo ``register``."""
        with self._cuda.device(device), self._beside_captures():
            if int(self._cuda.cudart().cudaHostUnregister(address)) != 0:
                self._forget_error()

    @contextmanager
    def _beside_captures(self) -> Iterator[None]:
        exchange = self._call("ThreadExchangeStreamCaptureMode")
        if exchange is None:
            yield
            return
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        exchange(ctypes.byref(mode))
        try:
            yield
        finally:
            exchange(ctypes.byref(mode))

    def _forget_error(self) -> None:
        """The runtime keeps a thread's last error, and the next check of a kernel would raise
        it."""
        if (last_error := self._call("GetLastError")) is not None:
            last_error()

    def _call(self, name: str) -> Any:
        """A function of the runtime that torch does not pass on; None if it can't be found."""
        if self._runtime is None:
            self._runtime = _loaded_runtime("libamdhip64" if self._prefix == "hip" else "libcudart")
        return getattr(self._runtime, self._prefix + name, None)


def _loaded_runtime(stem: str, *, maps: Path = Path("/proc/self/maps")) -> Any:
    """The runtime that this process has loaded already, or an object without functions."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:  # another system
        return object()
    paths = {line.split(maxsplit=5)[5] for line in lines if stem in line.rpartition("/")[2]}
    return ctypes.CDLL(min(paths)) if paths else object()


class HostCopies:
    """Copies CUDA tensors into slots, on a side stream of each device. Costs nothing without CUDA
    tensors.

    ``pin`` has CUDA lock a slot's pages; the pool's background thread calls it. Until then, or if
    it is refused (a limit on locked memory), copies work through CUDA's own buffers, several times
    slower; ``on_slow`` is told the refusal, once. All else is for one thread.
    """

    def __init__(
        self, calls: CudaCalls | None = None, *, on_slow: Callable[[str], None] | None = None
    ) -> None:
        self._calls = calls or CudaCalls()
        self._on_slow = on_slow
        self._streams: dict[torch.device, Any] = {}
        self._device: torch.device | None = None

    def is_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a CUDA device."""
        return self._calls.device_of(tensor) is not None

    def expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Learn from what will be copied whether slots should be pinned, and by which device."""
        if self._device is None:
            devices = (self._calls.device_of(tensor) for tensor in tensors)
            self._device = next((device for device in devices if device is not None), None)

    def wants(self, slot: Slot) -> bool:
        """Whether ``pin`` would do something."""
        return self._device is not None and not slot.registered

    def pin(self, slot: Slot) -> None:
        """Have CUDA lock the slot's pages, once, until the slot is freed. Takes seconds for many
        gigabytes.
        """
        device = self._device
        if device is None or slot.registered:
            return
        slot.registered = True
        address = slot.address
        refusal = self._calls.register(device, address, len(slot.data))
        if not refusal:
            slot.on_free(lambda: self._calls.unregister(device, address))
        elif self._on_slow is not None:
            on_slow, self._on_slow = self._on_slow, None
            on_slow(refusal)

    def settle(self) -> None:
        """Wait until all devices of this process are done with what is queued.

        Then what they write to pinned memory of the host is there too, whichever stream it was
        queued on. Raises RuntimeError if a device failed, after all others are done.
        """
        if self._calls.in_use():
            _wait_for_all(
                [partial(self._calls.synchronize, device) for device in self._calls.active()]
            )

    @contextmanager
    def running(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
        """Start copying each CUDA tensor into its view of a slot.

        All bytes are in the slot when the block ends, and no device writes to it any more, however
        the block ends. Raises RuntimeError if a device failed.
        """
        used: dict[torch.device, Any] = {}
        try:
            for source, target in pairs:
                device = self._calls.device_of(source)
                assert device is not None, "only CUDA tensors are copied here"
                if device not in used:
                    used[device] = self._stream(device)
                    used[device].wait_stream(self._calls.current_stream(device))
                self._copy(target, source, used[device])
            yield
        finally:
            _wait_for_all([stream.synchronize for stream in used.values()])

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue one copy. A tensor that is not contiguous is first made so on its device; without
        memory for that it is copied in halves.
        """
        try:
            self._calls.copy(target, source, stream)
        except torch.OutOfMemoryError:
            dim = max(range(source.dim()), key=lambda at: source.shape[at], default=None)
            if dim is None or source.shape[dim] < 2:
                raise
            half = source.shape[dim] // 2
            for start, length in ((0, half), (half, source.shape[dim] - half)):
                self._copy(
                    target.narrow(dim, start, length), source.narrow(dim, start, length), stream
                )

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = self._calls.new_stream(device)
        return self._streams[device]


def _wait_for_all(waits: Iterable[Callable[[], object]]) -> None:
    """Wait for each, also after one failed: what is not waited for goes on writing."""
    first: RuntimeError | None = None
    for wait in waits:
        try:
            wait()
        except RuntimeError as error:
            first = first or error
    if first is not None:
        raise first
