"""Putting only what changed: which ranges of an object are sent, and which are those of its base. Pure.

The table of ranges leads such a body: for each its offset and its length, 8 bytes each, big-endian. The ranges' bytes follow in
order. Everything between them is the base's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Buffer
from ckpt.cluster.peermem.wire import MalformedError
from ckpt.errors import NotFoundError

RANGE_BYTES = 16
"""One entry of the table."""

RANGES_MAX = 4096
"""Most ranges of one put: a table of 64 KiB, well inside what a connection may take."""

Range = tuple[int, int]
"""Offset and length in bytes."""


class BaseGoneError(NotFoundError):
    """The peer does not have the base any more, or has another content of it: put the whole object."""

    code = "base-gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One content of a key in a peer's memory, as the peer named it when that was put.

    ``version`` tells it from all others of one start of the peer's server, which is ``boot``.
    """

    key: str
    size_bytes: int
    version: int
    boot: str


def spell_ranges(ranges: Sequence[Range]) -> bytes:
    """The table of ``ranges``, in which ``ranges_problem`` finds nothing wrong."""
    return struct.pack(f">{2 * len(ranges)}Q", *(number for one in ranges for number in one))


def read_ranges(table: bytes | bytearray, *, size_bytes: int, sent_bytes: int) -> list[Range]:
    """The ranges in ``table``, of an object of ``size_bytes`` of which ``sent_bytes`` follow. Raises MalformedError."""
    numbers = struct.unpack(f">{len(table) // 8}Q", table)
    ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
    why = ranges_problem(ranges, size_bytes=size_bytes)
    if why is None and sum(length for _, length in ranges) != sent_bytes:
        why = f"the ranges are not as long as what follows. sent_bytes={sent_bytes}"
    if why is not None:
        raise MalformedError(why)
    return ranges


def ranges_problem(ranges: Sequence[Range], *, size_bytes: int) -> str | None:
    """What makes ``ranges`` unfit for an object of ``size_bytes``, or None. None may be empty; they ascend without overlap."""
    if len(ranges) > RANGES_MAX:
        return f"too many ranges. count={len(ranges)} limit={RANGES_MAX}"
    end = 0
    for offset, length in ranges:
        if length < 1 or offset < end or offset + length > size_bytes:
            return f"a range is empty, out of order or outside. offset={offset} length={length} size_bytes={size_bytes}"
        end = offset + length
    return None


def between(ranges: Sequence[Range], *, size_bytes: int) -> Iterator[tuple[Range, Range]]:
    """What is kept before each range, and that range; last what is kept behind all of them, and an empty range."""
    at = 0
    for offset, length in (*ranges, (size_bytes, 0)):
        yield (at, offset - at), (offset, length)
        at = offset + length


def pieces_of(data: Sequence[Buffer], ranges: Sequence[Range]) -> list[memoryview]:
    """Views of what ``ranges`` hold of the concatenation of ``data``; nothing is copied."""
    pieces: list[memoryview] = []
    views = [memoryview(one).cast("B") for one in data]
    place, begin = 0, 0  # of the buffer in which the next byte lies, and where that buffer begins
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            while offset >= begin + len(views[place]):
                begin += len(views[place])
                place += 1
            piece = views[place][offset - begin : end - begin]
            pieces.append(piece)
            offset += len(piece)
    return pieces
