"""Whole-object writes and ranged reads through fsspec, with few copies and a limit on every wait.

s3fs's own ``pipe_file`` waits for ever if a server accepts the connection and then hangs: neither
the wait for "100 Continue" nor sending a body has a timeout in the HTTP library below it. It also
sends parts in batches, each of which waits for its slowest part.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Protocol, TypeVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ckpt.backends.base import Backend, Buffer
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError

# ---- Event loop: work in fsspec's own thread, with any other thread waiting for it.

T = TypeVar("T")


def run_in_loop(work: Coroutine[object, object, T], loop: asyncio.AbstractEventLoop) -> T:
    """The result of ``work``, done in the thread of ``loop``.

    If the wait is interrupted, the work is ended first, so it no longer touches the caller's
    memory.
    """
    over = threading.Event()
    tasks: list[asyncio.Task[T]] = []

    def begin() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(finish)

    def finish(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved, or the loop would report it after an interrupted wait
        over.set()

    def end() -> None:
        # The loop runs callbacks in order, so work without a task was never submitted.
        if tasks:
            tasks[0].cancel()
        else:
            work.close()
            over.set()

    try:
        loop.call_soon_threadsafe(begin)
        over.wait()
    except BaseException:
        loop.call_soon_threadsafe(end)
        over.wait()
        raise
    return tasks[0].result()


S3_PROTOCOLS = frozenset({"s3", "s3a"})

PART_BYTES = 16 << 20
"""Size of one part of a multipart upload. S3 takes 10,000 parts: objects up to 156 GiB."""

MULTIPART_BYTES_MIN = 2 * PART_BYTES
"""Smaller objects are uploaded in one request."""

PARTS_MAX = 3
"""Parts of one object in flight. Each is copied first, and the event loop copies what the socket
does not accept yet: 384 MiB at most for the four packs that are written at once, which fill the
link anyway.
"""

_SLOWEST_BYTES_PER_S = 512 << 10
"""A request over a slower link than this counts as unanswered."""

_READ_TIMEOUTS = 4
"""Time for one request, as a multiple of the client's read timeout; covers its retries."""


class S3Writer:
    """Writes objects to S3 through s3fs."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs
        self._silence_s = _READ_TIMEOUTS * float(
            fs.config_kwargs.get("read_timeout", fs.read_timeout)
        )

    def part_bytes(self, data: Sequence[Buffer], *, create_only: bool) -> int:
        large = len(JoinedBuffers(data)) >= MULTIPART_BYTES_MIN
        return PART_BYTES if large and not create_only else 0

    def replace(self, path: str, data: Sequence[Buffer]) -> str | None:
        """Large objects are uploaded in parts that are copied one by one, not joined."""
        joined = JoinedBuffers(data)
        work = self._in_parts if len(joined) >= MULTIPART_BYTES_MIN else self._in_one
        return run_in_loop(work(path, joined), self._fs.loop)

    def create(self, path: str, data: Sequence[Buffer]) -> str | None:
        """Always one request.

        Conditions on multipart uploads are newer than on puts, and are not probed.
        """
        return run_in_loop(self._in_one(path, JoinedBuffers(data), IfNoneMatch="*"), self._fs.loop)

    async def _in_one(self, path: str, data: JoinedBuffers, **condition: str) -> str | None:
        bucket, key, _ = self._fs.split_path(path)
        reply = await self._call(
            "put_object", len(data), Bucket=bucket, Key=key, Body=data[:], **condition
        )
        return _etag(reply)

    async def _in_parts(self, path: str, data: JoinedBuffers) -> str | None:
        bucket, key, _ = self._fs.split_path(path)
        target = {"Bucket": bucket, "Key": key}
        reply = await self._call("create_multipart_upload", 0, **target)
        upload = {**target, "UploadId": str(reply["UploadId"])}
        try:
            parts = await self._send(upload, data)
            # Allow time for the whole object: the server joins the parts before it answers.
            reply = await self._call(
                "complete_multipart_upload", len(data), **upload, MultipartUpload={"Parts": parts}
            )
            return _etag(reply)
        except BaseException:
            await self._abort(upload)
            raise

    async def _send(
        self, upload: Mapping[str, str], data: JoinedBuffers
    ) -> list[dict[str, object]]:
        """Send all parts, at most PARTS_MAX at once.

        The first failure ends the other parts before it is raised.
        """
        slots = asyncio.Semaphore(PARTS_MAX)

        async def send(number: int) -> dict[str, object]:
            async with slots:
                body = data[(number - 1) * PART_BYTES : number * PART_BYTES]
                reply = await self._call(
                    "upload_part", len(body), **upload, PartNumber=number, Body=body
                )
            return {"PartNumber": number, "ETag": reply["ETag"]}

        count = -(-len(data) // PART_BYTES)
        sending = [asyncio.ensure_future(send(number)) for number in range(1, count + 1)]
        try:
            return list(await asyncio.gather(*sending))
        finally:
            for task in sending:
                task.cancel()
            await asyncio.wait(sending)

    async def _abort(self, upload: Mapping[str, str]) -> None:
        """Ask the server to drop the parts.

        If it does not answer, they stay until the bucket's own rule for incomplete uploads.
        """
        try:
            await self._call("abort_multipart_upload", 0, **upload)
        except Exception:  # noqa: BLE001  the caller raises the earlier error
            return

    async def _call(self, method: str, size_bytes: int, **request: object) -> Mapping[str, object]:
        limit_s = self._silence_s + size_bytes / _SLOWEST_BYTES_PER_S
        reply: Mapping[str, object] = await asyncio.wait_for(
            self._fs._call_s3(method, **request), limit_s
        )
        return reply


def _etag(reply: Mapping[str, object]) -> str | None:
    etag = reply.get("ETag")
    return etag if isinstance(etag, str) else None


class JoinedBuffers:
    """The concatenation of buffers, joined slice by slice as an uploader reads it."""

    def __init__(self, data: Sequence[Buffer]) -> None:
        self._pieces = [memoryview(buffer).cast("B") for buffer in data]
        self._size_bytes = sum(len(piece) for piece in self._pieces)

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice) -> bytes:
        start, stop, step = part.indices(self._size_bytes)
        assert step == 1, "uploaders cut contiguous parts"
        parts = []
        at = 0
        for piece in self._pieces:
            low, high = max(start - at, 0), min(stop - at, len(piece))
            if low < high:
                parts.append(piece[low:high])
            at += len(piece)
        return b"".join(parts)


# ---- Writers: how a whole object is stored, depending on what the store can do.
#
# Object stores take a put as one atomic request and decide "create only if absent" themselves.
# fsspec's memory store is in this process. All others (sftp, hdfs, a local folder ...) write byte
# by byte under the final name, so a put writes under a temporary name and renames; none of them can
# create a key only once through fsspec.

ATOMIC_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
"""Stores in which an object appears whole or not at all, and which decide creation themselves."""


class ObjectWriter(Protocol):
    """One way to store an object. ``path`` is fsspec's, without protocol."""

    def part_bytes(self, data: Sequence[Buffer], *, create_only: bool) -> int:
        """The size of the parts in which it is sent; 0: in one request."""
        ...

    def replace(self, path: str, data: Sequence[Buffer]) -> str | None:
        """Store the concatenation of ``data``, visible whole or not at all; its ETag, or None."""
        ...

    def create(self, path: str, data: Sequence[Buffer]) -> str | None:
        """As ``replace``, if there is no object yet.

        Raises FileExistsError if there is one, and NotImplementedError if the store cannot tell.
        """
        ...


def writer_for(fs: fsspec.AbstractFileSystem, temps: str) -> ObjectWriter:
    """The writer that suits ``fs``. ``temps`` is a folder for temporary names in the same store."""
    protocols = protocols_of(fs)
    if protocols & S3_PROTOCOLS:
        return S3Writer(fs)
    if protocols & ATOMIC_PROTOCOLS:
        return OneRequestWriter(fs)
    if isinstance(fs, MemoryFileSystem):
        return FsspecMemoryWriter(fs)
    return RenameWriter(fs, temps)


class _WholeWriter:
    """Sends an object in one piece."""

    def part_bytes(self, data: Sequence[Buffer], *, create_only: bool) -> int:
        del data, create_only
        return 0


class OneRequestWriter(_WholeWriter):
    """One put request per object; the server decides whether a key is free."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs

    def replace(self, path: str, data: Sequence[Buffer]) -> str | None:
        self._fs.pipe_file(path, _join(data))
        return self._md5(path)

    def create(self, path: str, data: Sequence[Buffer]) -> str | None:
        self._fs.pipe_file(path, _join(data), mode="create")
        return self._md5(path)

    def _md5(self, path: str) -> str | None:
        """The MD5 that the store computed: Google and Azure keep it with an object."""
        self._fs.invalidate_cache(path.rpartition("/")[0])
        return md5_of(self._fs.info(path))


def md5_of(info: Mapping[str, object]) -> str | None:
    """The MD5 in a description of an object, in hexadecimal; None if it has none."""
    settings = info.get("content_settings")
    found = info.get("md5Hash") or getattr(settings, "content_md5", None)
    if isinstance(settings, Mapping):
        found = found or settings.get("content_md5")
    if isinstance(found, str):
        try:
            found = base64.b64decode(found, validate=True)
        except ValueError:
            return None
    return bytes(found).hex() if isinstance(found, bytes | bytearray) else None


class FsspecMemoryWriter(_WholeWriter):
    """fsspec's memory store: a dictionary of this process with atomic operations."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        self._fs = fs

    def replace(self, path: str, data: Sequence[Buffer]) -> str | None:
        self._fs.pipe_file(path, _join(data))
        return None

    def create(self, path: str, data: Sequence[Buffer]) -> str | None:
        """Does not use the file system's own create, which looks first and stores later.

        With it two threads could both succeed.
        """
        file = MemoryFile(self._fs, path, _join(data))
        if self._fs.store.setdefault(path, file) is not file:
            raise FileExistsError(path)
        return None


class RenameWriter(_WholeWriter):
    """File systems whose files grow under their name: a temporary name, then a rename."""

    def __init__(self, fs: fsspec.AbstractFileSystem, temps: str) -> None:
        self._fs = fs
        self._temps = temps

    def replace(self, path: str, data: Sequence[Buffer]) -> str | None:
        """As durable as the file system's own close and rename."""
        temp = f"{self._temps}/{secrets.token_hex(8)}"
        self._fs.makedirs(self._temps, exist_ok=True)
        try:
            with self._fs.open(temp, "wb") as file:
                for buffer in data:
                    file.write(buffer)
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.mv(temp, path)
            return None
        except BaseException:
            if self._fs.exists(temp):
                self._fs.rm_file(temp)
            raise

    def create(self, path: str, data: Sequence[Buffer]) -> str | None:
        raise NotImplementedError("a rename through fsspec replaces an existing file")


def _join(data: Sequence[Buffer]) -> bytes:
    return data[0] if len(data) == 1 and isinstance(data[0], bytes) else b"".join(data)


def protocols_of(fs: fsspec.AbstractFileSystem) -> frozenset[str]:
    """The URL schemes that ``fs`` answers to."""
    protocol: str | tuple[str, ...] = fs.protocol
    return frozenset((protocol,) if isinstance(protocol, str) else protocol)


# ---- Ranged reads. On S3 they stream into the caller's memory, so no reply is held beside it.
#
# fsspec's own ``cat_file`` gathers a reply's pieces and joins them, which takes twice the range in
# memory for each read in flight.

_READ_BYTES_MAX = 16 << 20
"""Bytes per request if the reply is held in memory besides the caller's buffer."""

_PIECE_BYTES = 1 << 20
"""Bytes taken from the connection's buffer at once."""

_BREAKS_MAX = 5
"""Replies in a row that may break off without a new byte; s3fs repeats requests as often."""

_BREAK_S = 0.1
"""Pause after the first of them, doubled each time."""


class BufferFiller:
    """Memory that is filled piece by piece."""

    def __init__(self, out: memoryview) -> None:
        self._out = out
        self.filled_bytes = 0

    def add(self, piece: bytes) -> None:
        """Append ``piece``; what does not fit is dropped."""
        stop = min(self.filled_bytes + len(piece), len(self._out))
        self._out[self.filled_bytes : stop] = piece[: stop - self.filled_bytes]
        self.filled_bytes = stop


def read_exactly(
    store: Backend, key: str, out: memoryview, offset_bytes: int, fill: Callable[[memoryview], int]
) -> None:
    """Implement ``read_into`` around ``fill``, which returns the number of bytes read into ``out``.

    A short read is explained by ``stat``: NotFoundError or IntegrityError.
    """
    if offset_bytes < 0:
        raise UsageError(
            f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
        )
    filled_bytes = fill(out) if out else 0
    if out and filled_bytes == len(out):
        return
    stat = store.stat(key)
    if stat is None:
        raise NotFoundError(f"no such object. key={key} store={store.url}; list the store's keys")
    if filled_bytes < len(out):
        raise IntegrityError(
            f"the object ends too early. key={key} store={store.url} offset_bytes={offset_bytes} "
            f"wanted_bytes={len(out)} got_bytes={filled_bytes} size_bytes={stat.size_bytes}; read "
            "another copy"
        )


def read_range(fs: fsspec.AbstractFileSystem, path: str, out: memoryview, offset_bytes: int) -> int:
    """Fill ``out`` from an object; returns the number of bytes read.

    Raises what the client library raises. On S3 a reply that breaks off is requested again from
    where it ended. ``out`` is not touched after the return, nor after an interrupt.
    """
    if protocols_of(fs) & S3_PROTOCOLS:
        return run_in_loop(_fill(fs, path, out, offset_bytes), fs.loop) if out else 0
    filled_bytes = 0
    while filled_bytes < len(out):
        start = offset_bytes + filled_bytes
        part: bytes = fs.cat_file(
            path, start=start, end=min(start + _READ_BYTES_MAX, offset_bytes + len(out))
        )
        if not part:
            break
        out[filled_bytes : filled_bytes + len(part)] = part
        filled_bytes += len(part)
    return filled_bytes


async def _fill(
    fs: fsspec.AbstractFileSystem, path: str, out: memoryview, offset_bytes: int
) -> int:
    bucket, key, _ = fs.split_path(path)
    filled_bytes, breaks = 0, 0
    while filled_bytes < len(out):
        first, last = offset_bytes + filled_bytes, offset_bytes + len(out) - 1
        reply = await fs._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last}"
        )
        if first and not str(reply.get("ContentRange", "")).startswith(f"bytes {first}-"):
            raise UnavailableError(
                f"the store ignores the range of a read. bucket={bucket} offset_bytes={first} "
                f"content_range={reply.get('ContentRange')}; use a server that answers range "
                "requests"
            )
        before = filled_bytes
        try:
            async with reply["Body"] as body:
                while filled_bytes < len(out) and (
                    piece := await body.read(min(_PIECE_BYTES, len(out) - filled_bytes))
                ):
                    out[filled_bytes : filled_bytes + len(piece)] = piece
                    filled_bytes += len(piece)
        except Exception:
            # A broad except: any error of the HTTP library means a reply that ended early. The
            # bytes received so far are the object's, in order.
            breaks = breaks + 1 if filled_bytes == before else 0
            if breaks >= _BREAKS_MAX:
                raise
            await asyncio.sleep(_BREAK_S * 2**breaks)
        else:
            return filled_bytes
    return filled_bytes
