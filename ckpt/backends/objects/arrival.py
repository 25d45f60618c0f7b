"""Whether an object arrived as it was sent.

A server that is told no digest, or compares none, stores what a network card, a proxy or its own
memory made of a body. It answers with an ETag, which most stores compute from the bytes that they
have: the MD5 of a body that was sent in one request, or that of the parts' MD5s and their number.
So each ETag is compared with what was sent. One that differs may belong to a store whose ETags are
something else (encryption with a key of the customer's): then the object is read back, and so is
every later one of that store.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

from ckpt.backends.base import Buffer
from ckpt.errors import UnavailableError

PUTS_MAX = 3
"""How often one object is stored that does not arrive as it was sent."""

READ_BACK_BYTES = 16 << 20
"""Bytes that are read back and compared at once."""

Put = Callable[[bool], "str | None"]
"""Stores the object; the ETag, or None. The argument: only if there is none yet."""

ReadBack = Callable[[int, memoryview], int]
"""Reads from an offset on into memory; the number of bytes that there were."""


def md5_etag(data: Sequence[Buffer], *, part_bytes: int = 0) -> str:
    """The ETag of ``data`` in a store that computes it as S3 does; ``part_bytes``: sent in parts of
    that size (0: in one request). About 1.5 s a GiB; releases the GIL.
    """
    if not part_bytes:
        whole = hashlib.md5(usedforsecurity=False)
        for buffer in data:
            whole.update(memoryview(buffer).cast("B"))
        return whole.hexdigest()
    digests, part, left = [], hashlib.md5(usedforsecurity=False), part_bytes
    for buffer in data:
        view = memoryview(buffer).cast("B")
        while view:
            part.update(view[:left])
            taken = min(left, len(view))
            view, left = view[taken:], left - taken
            if not left:
                digests.append(part.digest())
                part, left = hashlib.md5(usedforsecurity=False), part_bytes
    if left < part_bytes:
        digests.append(part.digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


class ArrivalCheck:
    """How one store tells that objects arrived as they were sent; it is learnt from the first
    objects. Thread-safe.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._etags: bool | None = None
        """Whether ETags are digests of the content; None while that is not known."""

    @property
    def how(self) -> str:
        """``etag``, ``read back``, or ``unknown`` before the first object."""
        return {None: "unknown", True: "etag", False: "read back"}[self._etags]

    def put(
        self,
        key: str,
        data: Sequence[Buffer],
        store: Put,
        read_back: ReadBack,
        *,
        create_only: bool,
        part_bytes: int = 0,
    ) -> None:
        """Store an object until it has arrived as it was sent; ``part_bytes`` as in ``md5_etag``.

        Raises what ``store`` raises, and UnavailableError if it never arrives right.
        """
        for number in range(PUTS_MAX):
            # Only the first time: an object that this call created is its own, and wrong.
            etag = store(create_only and number == 0)
            if self._arrived(data, etag, read_back, part_bytes):
                return
        raise UnavailableError(
            f"an object arrives otherwise than it was sent. key={key} store={self._where} "
            f"puts={PUTS_MAX}; look for a faulty network card, memory or proxy"
        )

    def _arrived(
        self, data: Sequence[Buffer], etag: str | None, read_back: ReadBack, part_bytes: int
    ) -> bool:
        if (
            self._etags is not False
            and etag is not None
            and etag.strip('"').lower() == md5_etag(data, part_bytes=part_bytes)
        ):
            with self._lock:
                self._etags = True
            return True
        right = _equal(data, read_back)
        if right:
            with self._lock:
                # Once ETags were digests, one that is none is that of one object.
                self._etags = False if self._etags is None else self._etags
        return right


def _equal(data: Sequence[Buffer], read_back: ReadBack) -> bool:
    """Whether the store has exactly these bytes."""
    views = [memoryview(buffer).cast("B") for buffer in data]
    # One byte at least: it shows that the object ends where it should.
    longest = max((len(view) for view in views), default=0)
    at, memory = 0, memoryview(bytearray(max(1, min(longest, READ_BACK_BYTES))))
    for view in views:
        while view:
            size_bytes = min(len(view), READ_BACK_BYTES)
            out = memory[:size_bytes]
            if read_back(at, out) != size_bytes or out != view[:size_bytes]:
                return False
            view, at = view[size_bytes:], at + size_bytes
    return read_back(at, memory[:1]) == 0
