"""Whole objects to S3 through s3fs: one request, or a multipart upload with few copies in memory
and a limit on every wait.

s3fs's own ``pipe_file`` waits for ever where a server takes the connection and then hangs: neither
the wait for "100 Continue" nor sending a body has a timeout in the HTTP library below it. Its parts
are sent in batches that all wait for the slowest.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Protocol, TypeVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ckpt.backends.base import Backend, Buffer
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError

# Work in fsspec's event loop thread, waited for from any other.

T = TypeVar("T")


def run_in_loop(work: Coroutine[object, object, T], loop: asyncio.AbstractEventLoop) -> T:
    """The result of ``work``, done in the thread of ``loop``.

    Where the wait is interrupted, the work is ended first: it touches no memory of the caller's any
    more.
    """
    over = threading.Event()
    tasks: list[asyncio.Task[T]] = []

    def begin() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(finish)

    def finish(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # or the loop would report one that an interrupted wait leaves unasked
        over.set()

    def end() -> None:
        # The loop does what it is handed in order, so a work without a task was never handed over.
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
"""Size of one part of a multipart upload; S3 takes 10,000 parts, so objects up to 156 GiB."""

MULTIPART_BYTES_MIN = 2 * PART_BYTES
"""Smaller objects go up in one request."""

PARTS_MAX = 3
"""Parts of one object on their way at once. Each is copied first, and the event loop copies what
the socket does not take yet: 384 MiB at most for the four packs that persisting writes at once,
which fill the link anyway."""

_SLOWEST_BYTES_PER_S = 512 << 10
"""A link slower than this for one request counts as a store that does not answer."""

_READ_TIMEOUTS = 4
"""How many times the client's own limit for one silence a request may take, repetitions
included."""


class S3Writer:
    """The way objects get into S3 through s3fs. See ``Writes``."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs
        self._silence_s = _READ_TIMEOUTS * float(
            fs.config_kwargs.get("read_timeout", fs.read_timeout)
        )

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. Large objects go up in parts that are copied one by one, not joined."""
        joined = JoinedBuffers(data)
        work = self._in_parts if len(joined) >= MULTIPART_BYTES_MIN else self._in_one
        run_in_loop(work(path, joined), self._fs.loop)

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. Always one request: conditions on multipart uploads are newer than on puts,
        and not probed."""
        run_in_loop(self._in_one(path, JoinedBuffers(data), IfNoneMatch="*"), self._fs.loop)

    async def _in_one(self, path: str, data: JoinedBuffers, **condition: str) -> None:
        bucket, key, _ = self._fs.split_path(path)
        await self._call("put_object", len(data), Bucket=bucket, Key=key, Body=data[:], **condition)

    async def _in_parts(self, path: str, data: JoinedBuffers) -> None:
        bucket, key, _ = self._fs.split_path(path)
        place = {"Bucket": bucket, "Key": key}
        begun = await self._call("create_multipart_upload", 0, **place)
        upload = {**place, "UploadId": str(begun["UploadId"])}
        try:
            parts = await self._send(upload, data)
            # Its answer may come late: the server joins the parts first.
            await self._call(
                "complete_multipart_upload", len(data), **upload, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            await self._abort(upload)
            raise

    async def _send(
        self, upload: Mapping[str, str], data: JoinedBuffers
    ) -> list[dict[str, object]]:
        """Send all parts, at most PARTS_MAX at once; the first that fails ends the others before it
        is raised."""
        room = asyncio.Semaphore(PARTS_MAX)

        async def send(number: int) -> dict[str, object]:
            async with room:
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
            for one in sending:
                one.cancel()
            await asyncio.wait(sending)

    async def _abort(self, upload: Mapping[str, str]) -> None:
        """Let the server drop the parts, as far as it answers; else they stay until its own rule
        for such uploads."""
        try:
            await self._call("abort_multipart_upload", 0, **upload)
        except Exception:  # noqa: BLE001  what failed before is what gets raised
            return

    async def _call(self, method: str, size_bytes: int, **request: object) -> Mapping[str, object]:
        limit_s = self._silence_s + size_bytes / _SLOWEST_BYTES_PER_S
        reply: Mapping[str, object] = await asyncio.wait_for(
            self._fs._call_s3(method, **request), limit_s
        )
        return reply


class JoinedBuffers:
    """The concatenation of buffers, joined slice by slice as an uploader asks for its parts."""

    def __init__(self, data: Sequence[Buffer]) -> None:
        self._pieces = [memoryview(buffer).cast("B") for buffer in data]
        self._size_bytes = sum(len(piece) for piece in self._pieces)

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, cut: slice) -> bytes:
        start, stop, step = cut.indices(self._size_bytes)
        assert step == 1, "uploaders cut contiguous parts"
        parts = []
        at = 0
        for piece in self._pieces:
            low, high = max(start - at, 0), min(stop - at, len(piece))
            if low < high:
                parts.append(piece[low:high])
            at += len(piece)
        return b"".join(parts)


# How a whole object gets into a store behind fsspec, by what that store is able to do.
#
# Object stores take a put as one atomic request and decide "create only if absent" themselves.
# fsspec's memory store lives in this process. All others (sftp, hdfs, a local folder ...) write
# under the final name byte by byte, so they get a temporary name first and a rename after; none
# of them can create once through fsspec.

ATOMIC_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
"""Stores in which an object appears whole or not at all, and which decide creation on their
side."""


class ObjectWriter(Protocol):
    """One way to store an object. ``path`` is fsspec's, without protocol."""

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """Store the concatenation of ``data``, visible whole or not at all."""
        ...

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """The same where there is nothing yet; FileExistsError where there is, NotImplementedError
        where it cannot tell."""
        ...


def writer_for(fs: fsspec.AbstractFileSystem, temps: str) -> ObjectWriter:
    """The way that suits ``fs``. ``temps`` is a folder for temporary names in the same store."""
    protocols = protocols_of(fs)
    if protocols & S3_PROTOCOLS:
        return S3Writer(fs)
    if protocols & ATOMIC_PROTOCOLS:
        return OneRequestWriter(fs)
    if isinstance(fs, MemoryFileSystem):
        return FsspecMemoryWriter(fs)
    return RenameWriter(fs, temps)


class OneRequestWriter:
    """One put request an object; the server decides whether a key is free."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes."""
        self._fs.pipe_file(path, _join(data))

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes."""
        self._fs.pipe_file(path, _join(data), mode="create")


class FsspecMemoryWriter:
    """fsspec's memory store: a dictionary of this process, where one dictionary operation is the
    atomic step."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        self._fs = fs

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes."""
        self._fs.pipe_file(path, _join(data))

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. The file system's own create looks first and stores then, so two threads
        could both win."""
        mine = MemoryFile(self._fs, path, _join(data))
        if self._fs.store.setdefault(path, mine) is not mine:
            raise FileExistsError(path)


class RenameWriter:
    """File systems whose files grow under their name: a temporary name first, then a rename."""

    def __init__(self, fs: fsspec.AbstractFileSystem, temps: str) -> None:
        self._fs = fs
        self._temps = temps

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. As durable as the file system's own close and rename."""
        temp = f"{self._temps}/{secrets.token_hex(8)}"
        self._fs.makedirs(self._temps, exist_ok=True)
        try:
            with self._fs.open(temp, "wb") as file:
                for buffer in data:
                    file.write(buffer)
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.mv(temp, path)
        except BaseException:
            if self._fs.exists(temp):
                self._fs.rm_file(temp)
            raise

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes: cannot."""
        raise NotImplementedError("a rename through fsspec replaces what is there")


def _join(data: Sequence[Buffer]) -> bytes:
    return data[0] if len(data) == 1 and isinstance(data[0], bytes) else b"".join(data)


def protocols_of(fs: fsspec.AbstractFileSystem) -> frozenset[str]:
    """The URL schemes that ``fs`` answers to."""
    protocol: str | tuple[str, ...] = fs.protocol
    return frozenset((protocol,) if isinstance(protocol, str) else protocol)


# Ranged reads through fsspec. On S3 they stream into the caller's memory, so that no reply is
# held beside it.
#
# fsspec's own ``cat_file`` gathers a reply's pieces and joins them: twice the range in memory for
# each read in flight.

_READ_BYTES_MAX = 16 << 20
"""Bytes fetched by one request where the reply is held in memory beside the caller's buffer."""

_PIECE_BYTES = 1 << 20
"""At most so much is taken from the connection's buffer at once."""

_BREAKS_MAX = 5
"""Replies in a row that may break off without a new byte; s3fs repeats requests as often."""

_BREAK_S = 0.1
"""Pause after the first of them, then twice as long each time."""


class BufferFiller:
    """Memory that is filled piece by piece."""

    def __init__(self, out: memoryview) -> None:
        self._out = out
        self.filled_bytes = 0

    def add(self, piece: bytes) -> None:
        """Put ``piece`` behind what came before; what does not fit is left out."""
        stop = min(self.filled_bytes + len(piece), len(self._out))
        self._out[self.filled_bytes : stop] = piece[: stop - self.filled_bytes]
        self.filled_bytes = stop


def read_exactly(
    store: Backend, key: str, out: memoryview, offset_bytes: int, fill: Callable[[memoryview], int]
) -> None:
    """What ``read_into`` does around ``fill``, which says how many bytes of ``out`` there were.
    Raises as it does."""
    if offset_bytes < 0:
        raise UsageError(
            f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
        )
    got = fill(out) if out else 0
    if out and got == len(out):
        return
    found = store.stat(key)
    if found is None:
        raise NotFoundError(f"no such object. key={key} store={store.url}; list the store's keys")
    if got < len(out):
        raise IntegrityError(
            f"the object ends too early. key={key} store={store.url} offset_bytes={offset_bytes} "
            f"wanted_bytes={len(out)} got_bytes={got} size_bytes={found.size_bytes}; read another "
            "copy"
        )


def read_range(fs: fsspec.AbstractFileSystem, path: str, out: memoryview, offset_bytes: int) -> int:
    """Fill ``out`` from an object; how many bytes there were. Raises what the client library
    raises.

    On S3 a reply that breaks off is asked for again from where it ended. ``out`` is not touched
    after return, nor after an interrupt.
    """
    if protocols_of(fs) & S3_PROTOCOLS:
        return run_in_loop(_fill(fs, path, out, offset_bytes), fs.loop) if out else 0
    got = 0
    while got < len(out):
        start = offset_bytes + got
        part: bytes = fs.cat_file(
            path, start=start, end=min(start + _READ_BYTES_MAX, offset_bytes + len(out))
        )
        if not part:
            break
        out[got : got + len(part)] = part
        got += len(part)
    return got


async def _fill(
    fs: fsspec.AbstractFileSystem, path: str, out: memoryview, offset_bytes: int
) -> int:
    bucket, key, _ = fs.split_path(path)
    got, breaks = 0, 0
    while got < len(out):
        first, last = offset_bytes + got, offset_bytes + len(out) - 1
        reply = await fs._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last}"
        )
        if first and not str(reply.get("ContentRange", "")).startswith(f"bytes {first}-"):
            raise UnavailableError(
                f"the store ignores the range of a read. bucket={bucket} offset_bytes={first} "
                f"content_range={reply.get('ContentRange')}; use a server that answers range "
                "requests"
            )
        before = got
        try:
            async with reply["Body"] as body:
                while got < len(out) and (
                    piece := await body.read(min(_PIECE_BYTES, len(out) - got))
                ):
                    out[got : got + len(piece)] = piece
                    got += len(piece)
        except Exception:
            # Whatever the HTTP library calls a reply that ended early; what came is the object's,
            # in order.
            breaks = breaks + 1 if got == before else 0
            if breaks >= _BREAKS_MAX:
                raise
            await asyncio.sleep(_BREAK_S * 2**breaks)
        else:
            return got
    return got
