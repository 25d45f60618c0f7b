"""obstore in the process that used it first, s3fs in children of a fork: obstore's threads are not copied into them.

A call into obstore would wait there for ever.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat


class HereOrForked:
    """A store that is ``here`` in the process where obstore's threads run, and ``forked()`` in children of it."""

    def __init__(self, here: Backend, forked: Callable[[], Backend]) -> None:
        self._here = here
        self._forked = forked
        self._other: Backend | None = None

    @property
    def url(self) -> str:
        """See Backend."""
        return self._here.url

    @property
    def client(self) -> str:
        """The name of the library in use, for reports."""
        return "obstore" if _home() == os.getpid() else "s3fs"

    def capabilities(self) -> Capabilities:
        """See Backend."""
        return self._store().capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend."""
        self._store().put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend."""
        self._store().read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        """See Backend."""
        return self._store().stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend."""
        return self._store().list(prefix, after=after)

    def delete(self, key: str) -> None:
        """See Backend."""
        self._store().delete(key)

    def close(self) -> None:
        """See Backend."""
        (self._other or self._here).close()

    def _store(self) -> Backend:
        if _home() == os.getpid():
            return self._here
        if self._other is None:
            self._other = self._forked()
        return self._other


@functools.cache
def _home() -> int:
    """The process where obstore's threads run: the first that asked, and what a child of it is told too."""
    return os.getpid()
