"""Ranged reads through fsspec. On S3 they stream into the caller's memory, so that no reply is held beside it.

fsspec's own ``cat_file`` gathers a reply's pieces and joins them: twice the range in memory for each read in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import fsspec

from ckpt.backends.base import Backend
from ckpt.backends.objects.fsspec_io import S3_PROTOCOLS
from ckpt.backends.objects.objectloop import wait_for
from ckpt.backends.objects.objectwrites import protocols_of
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError

_READ_BYTES_MAX = 16 << 20
"""Bytes fetched by one request where the reply is held in memory beside the caller's buffer."""

_PIECE_BYTES = 1 << 20
"""At most so much is taken from the connection's buffer at once."""

_BREAKS_MAX = 5
"""Replies in a row that may break off without a new byte; s3fs repeats requests as often."""

_BREAK_S = 0.1
"""Pause after the first of them, then twice as long each time."""


class Filling:
    """Memory that is filled piece by piece."""

    def __init__(self, out: memoryview) -> None:
        self._out = out
        self.got = 0

    def add(self, piece: bytes) -> None:
        """Put ``piece`` behind what came before; what does not fit is left out."""
        stop = min(self.got + len(piece), len(self._out))
        self._out[self.got : stop] = piece[: stop - self.got]
        self.got = stop


def settle_read(
    store: Backend, key: str, out: memoryview, offset_bytes: int, fill: Callable[[memoryview], int]
) -> None:
    """What ``read_into`` does around ``fill``, which says how many bytes of ``out`` there were. Raises as it does."""
    if offset_bytes < 0:
        raise UsageError(f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more")
    got = fill(out) if out else 0
    if out and got == len(out):
        return
    found = store.stat(key)
    if found is None:
        raise NotFoundError(f"no such object. key={key} store={store.url}; list the store's keys")
    if got < len(out):
        raise IntegrityError(
            f"the object ends too early. key={key} store={store.url} offset_bytes={offset_bytes} "
            f"wanted_bytes={len(out)} got_bytes={got} size_bytes={found.size_bytes}; read another copy"
        )


def read_range(fs: fsspec.AbstractFileSystem, path: str, out: memoryview, offset_bytes: int) -> int:
    """Fill ``out`` from an object; how many bytes there were. Raises what the client library raises.

    On S3 a reply that breaks off is asked for again from where it ended. ``out`` is not touched after return, nor after
    an interrupt.
    """
    if protocols_of(fs) & S3_PROTOCOLS:
        return wait_for(_fill(fs, path, out, offset_bytes), fs.loop) if out else 0
    got = 0
    while got < len(out):
        start = offset_bytes + got
        part: bytes = fs.cat_file(path, start=start, end=min(start + _READ_BYTES_MAX, offset_bytes + len(out)))
        if not part:
            break
        out[got : got + len(part)] = part
        got += len(part)
    return got


async def _fill(fs: fsspec.AbstractFileSystem, path: str, out: memoryview, offset_bytes: int) -> int:
    bucket, key, _ = fs.split_path(path)
    got, breaks = 0, 0
    while got < len(out):
        first, last = offset_bytes + got, offset_bytes + len(out) - 1
        reply = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last}")
        if first and not str(reply.get("ContentRange", "")).startswith(f"bytes {first}-"):
            raise UnavailableError(
                f"the store ignores the range of a read. bucket={bucket} offset_bytes={first} "
                f"content_range={reply.get('ContentRange')}; use a server that answers range requests"
            )
        before = got
        try:
            async with reply["Body"] as body:
                while got < len(out) and (piece := await body.read(min(_PIECE_BYTES, len(out) - got))):
                    out[got : got + len(piece)] = piece
                    got += len(piece)
        except Exception:
            # Whatever the HTTP library calls a reply that ended early; what came is the object's, in order.
            breaks = breaks + 1 if got == before else 0
            if breaks >= _BREAKS_MAX:
                raise
            await asyncio.sleep(_BREAK_S * 2**breaks)
        else:
            return got
    return got
