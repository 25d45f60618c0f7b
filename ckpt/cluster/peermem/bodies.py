"""What a put sends: buffers in a row, or a stretch of a file that the kernel sends by itself."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt.backends.base import Buffer
from ckpt.cluster.peermem.body_mac import BodyMac
from ckpt.cluster.peermem.channel import PIECES_MAX, Channel
from ckpt.errors import UsageError
from ckpt.rate_limit import RateCap


@dataclass(frozen=True, slots=True)
class Extent:
    """``size_bytes`` of a file or memfd from ``offset_bytes`` on. The descriptor stays the caller's."""

    fd: int
    offset_bytes: int
    size_bytes: int


class Body(Protocol):
    """The bytes of one put. May be sent more than once."""

    @property
    def size_bytes(self) -> int:
        """How many."""
        ...

    @property
    def pieces(self) -> Sequence[memoryview]:
        """All of them in order, where they are few pieces; else empty."""
        ...

    def send(self, channel: Channel, mac: BodyMac, cap: RateCap | None) -> None:
        """Send and digest them."""
        ...


class Buffers:
    """Buffers in a row; none is copied."""

    __slots__ = ("_views", "size_bytes")

    def __init__(self, data: Sequence[Buffer]) -> None:
        self._views = [memoryview(one).cast("B") for one in data]
        self.size_bytes = sum(len(view) for view in self._views)

    @property
    def pieces(self) -> Sequence[memoryview]:
        """See Body."""
        return self._views if len(self._views) < PIECES_MAX else ()

    def send(self, channel: Channel, mac: BodyMac, cap: RateCap | None) -> None:
        """See Body."""
        channel.write_body(self._views, mac, cap)


class MappedExtent:
    """An extent, mapped to be digested."""

    __slots__ = ("_extent", "_view", "pieces", "size_bytes")

    def __init__(self, extent: Extent, view: memoryview) -> None:
        self._extent = extent
        self._view = view
        self.size_bytes = extent.size_bytes
        self.pieces: Sequence[memoryview] = ()

    def send(self, channel: Channel, mac: BodyMac, cap: RateCap | None) -> None:
        """See Body."""
        channel.write_extent(self._view, self._extent.fd, self._extent.offset_bytes, mac, cap)


@contextlib.contextmanager
def mapped(extent: Extent) -> Iterator[Body]:
    """``extent`` as a body. Raises UsageError where the file doesn't reach so far or can't be mapped."""
    if extent.size_bytes == 0:
        yield Buffers([])
        return
    start = extent.offset_bytes - extent.offset_bytes % mmap.ALLOCATIONGRANULARITY
    length = extent.offset_bytes + extent.size_bytes - start
    try:
        memory = mmap.mmap(extent.fd, length, prot=mmap.PROT_READ, offset=start)
    except (ValueError, OSError, OverflowError) as error:
        raise UsageError(
            f"an extent can't be mapped. offset_bytes={extent.offset_bytes} size_bytes={extent.size_bytes} cause={error}"
        ) from error
    with memory, memoryview(memory) as whole, whole[extent.offset_bytes - start :] as view:
        yield MappedExtent(extent, view)
