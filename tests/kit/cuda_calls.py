"""CUDA as far as ckpt calls it, without a device: streams that run late, contexts, errors that
stay, graphs that are captured.

Host tensors stand for tensors on devices (``FakeCuda.on``). What is queued happens only when
someone waits for it, so whoever does not wait reads what was there before.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ckpt.staging.devices import CudaCalls

OUT_OF_MEMORY = 2
CAPTURE_GLOBAL = 0
CAPTURE_RELAXED = 2


class FakeStream:
    """A queue of work of one device."""

    def __init__(self, cuda: FakeCuda, device: torch.device) -> None:
        self._cuda = cuda
        self.device = device
        self.queue: deque[Callable[[], object]] = deque()
        cuda.streams.append(self)

    def launch(self, work: Callable[[], object]) -> None:
        """Queue work."""
        self.queue.append(work)

    def wait_stream(self, other: FakeStream) -> None:
        """What is queued from now on runs after what ``other`` has queued by now."""
        before = list(other.queue)
        self.queue.append(lambda: [other.run_one() for work in before if work in other.queue])

    def run_one(self) -> None:
        self.queue.popleft()()

    def synchronize(self) -> None:
        """Let everything happen. Raises RuntimeError on a device that broke."""
        if self.device in self._cuda.broken:
            self.queue.clear()
            raise RuntimeError(f"CUDA error: unspecified launch failure. device={self.device}")
        while self.queue:
            self.run_one()


class FakeCuda:
    """Stands for the module ``torch.cuda`` and for the runtime's library."""

    def __init__(self, devices: int = 2, *, lockable_bytes: int = 1 << 40) -> None:
        self._devices = devices
        self._lockable_bytes = lockable_bytes
        self._thread = threading.local()
        self._homes: dict[int, torch.device] = {}
        self.initialized = True
        self.streams: list[FakeStream] = []
        self.opened: set[int] = set()
        self.broken: set[torch.device] = set()
        self.registered: dict[int, tuple[int, torch.device]] = {}
        self.register_threads: list[str] = []
        self.capturing = False
        self.capture_broken = False
        self._current = {
            torch.device("cuda", index): FakeStream(self, torch.device("cuda", index))
            for index in range(devices)
        }

    def on(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Let ``tensor`` count as one on a device."""
        self.opened.add(index)
        self._homes[tensor.untyped_storage().data_ptr()] = torch.device("cuda", index)
        return tensor

    def home(self, tensor: torch.Tensor) -> torch.device | None:
        return self._homes.get(tensor.untyped_storage().data_ptr())

    def check(self) -> None:
        """What follows each kernel of a user: raises the last error of this thread."""
        if code := self.cudaGetLastError():
            raise RuntimeError(f"CUDA error: code {code}")

    # ---- torch.cuda

    def is_initialized(self) -> bool:
        return self.initialized

    def device_count(self) -> int:
        return self._devices

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream(self, device)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self._current[device]

    def synchronize(self, device: torch.device) -> None:
        self.opened.add(device.index)
        errors = []
        for stream in self.streams:
            if stream.device == device:
                try:
                    stream.synchronize()
                except RuntimeError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self._index()
        self._thread.index = device.index
        try:
            yield
        finally:
            self._thread.index = before

    def cudart(self) -> FakeCuda:
        return self

    # ---- the runtime

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1, "pinned for all devices"
        self.register_threads.append(threading.current_thread().name)
        self._unsafe_call()
        used = sum(size for size, _ in self.registered.values())
        if used + size_bytes > self._lockable_bytes:
            self._thread.error = OUT_OF_MEMORY
            return OUT_OF_MEMORY
        self.registered[address] = (size_bytes, torch.device("cuda", self._index()))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self._unsafe_call()
        if self.registered.pop(address, None) is None:
            self._thread.error = 1
            return 1
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {OUT_OF_MEMORY: "out of memory"}.get(code, "invalid argument")

    def cudaGetLastError(self) -> int:  # noqa: N802
        code: int = getattr(self._thread, "error", 0)
        self._thread.error = 0
        return code

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        before = self._mode()
        self._thread.mode = mode._obj.value
        mode._obj.value = before
        return 0

    def _unsafe_call(self) -> None:
        self.opened.add(self._index())
        if self.capturing and self._mode() != CAPTURE_RELAXED:
            self.capture_broken = True

    def _index(self) -> int:
        return getattr(self._thread, "index", 0)

    def _mode(self) -> int:
        return getattr(self._thread, "mode", CAPTURE_GLOBAL)


class FakeCalls(CudaCalls):
    """The real calls over a ``FakeCuda``; only where a tensor lives is looked up."""

    def __init__(self, cuda: FakeCuda, *, runtime: object | None = None) -> None:
        super().__init__(cuda, runtime=cuda if runtime is None else runtime)
        self._prefix = "cuda"
        self.fake = cuda

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        return self.fake.home(tensor)

    def _opened(self, index: int) -> bool:
        return index in self.fake.opened

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        stream.launch(lambda: target.copy_(source))
