"""Whole objects to S3 through s3fs: one request, or a multipart upload with few copies in memory and a limit on every wait.

s3fs's own ``pipe_file`` waits for ever where a server takes the connection and then hangs: neither the wait for
"100 Continue" nor sending a body has a timeout in the HTTP library below it. Its parts are sent in batches that all wait for
the slowest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import fsspec

from ckpt.backends.base import Buffer
from ckpt.backends.objects.objectloop import wait_for

S3_PROTOCOLS = frozenset({"s3", "s3a"})

PART_BYTES = 16 << 20
"""Size of one part of a multipart upload; S3 takes 10,000 parts, so objects up to 156 GiB."""

MULTIPART_BYTES_MIN = 2 * PART_BYTES
"""Smaller objects go up in one request."""

PARTS_MAX = 3
"""Parts of one object on their way at once. Each is copied first, and the event loop copies what the socket does not take yet:
384 MiB at most for the four packs that persisting writes at once, which fill the link anyway."""

_SLOWEST_BYTES_PER_S = 512 << 10
"""A link slower than this for one request counts as a store that does not answer."""

_READ_TIMEOUTS = 4
"""How many times the client's own limit for one silence a request may take, repetitions included."""


class S3Writes:
    """The way objects get into S3 through s3fs. See ``Writes``."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs
        self._silence_s = _READ_TIMEOUTS * float(fs.config_kwargs.get("read_timeout", fs.read_timeout))

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. Large objects go up in parts that are copied one by one, not joined."""
        joined = Joined(data)
        work = self._in_parts if len(joined) >= MULTIPART_BYTES_MIN else self._in_one
        wait_for(work(path, joined), self._fs.loop)

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. Always one request: conditions on multipart uploads are newer than on puts, and not probed."""
        wait_for(self._in_one(path, Joined(data), IfNoneMatch="*"), self._fs.loop)

    async def _in_one(self, path: str, data: Joined, **condition: str) -> None:
        bucket, key, _ = self._fs.split_path(path)
        await self._call("put_object", len(data), Bucket=bucket, Key=key, Body=data[:], **condition)

    async def _in_parts(self, path: str, data: Joined) -> None:
        bucket, key, _ = self._fs.split_path(path)
        place = {"Bucket": bucket, "Key": key}
        begun = await self._call("create_multipart_upload", 0, **place)
        upload = {**place, "UploadId": str(begun["UploadId"])}
        try:
            parts = await self._send(upload, data)
            # Its answer may come late: the server joins the parts first.
            await self._call("complete_multipart_upload", len(data), **upload, MultipartUpload={"Parts": parts})
        except BaseException:
            await self._abort(upload)
            raise

    async def _send(self, upload: Mapping[str, str], data: Joined) -> list[dict[str, object]]:
        """Send all parts, at most PARTS_MAX at once; the first that fails ends the others before it is raised."""
        room = asyncio.Semaphore(PARTS_MAX)

        async def send(number: int) -> dict[str, object]:
            async with room:
                body = data[(number - 1) * PART_BYTES : number * PART_BYTES]
                reply = await self._call("upload_part", len(body), **upload, PartNumber=number, Body=body)
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
        """Let the server drop the parts, as far as it answers; else they stay until its own rule for such uploads."""
        try:
            await self._call("abort_multipart_upload", 0, **upload)
        except Exception:  # noqa: BLE001  what failed before is what gets raised
            return

    async def _call(self, method: str, size_bytes: int, **request: object) -> Mapping[str, object]:
        limit_s = self._silence_s + size_bytes / _SLOWEST_BYTES_PER_S
        reply: Mapping[str, object] = await asyncio.wait_for(self._fs._call_s3(method, **request), limit_s)
        return reply


class Joined:
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
