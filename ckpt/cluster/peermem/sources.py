"""What a server serves beside its vault: memory of its own node, read-only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from ckpt.backends.base import Stat


def always() -> bool:
    """For bytes that nobody changes."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An object's bytes while somebody sends them. Where ``fd`` is given, ``view`` is a mapping of it at
    ``offset_bytes``, and the kernel sends its pages: they must not be used for anything else soon, or the reader gets an error.

    ``unchanged`` is asked when all were sent: where it says no, the reader gets an error. ``version`` tells one content of a
    key from the next, within one start of the server.
    """

    view: memoryview
    fd: int | None
    offset_bytes: int
    version: int
    modified_unix_s: float
    unchanged: Callable[[], bool] = field(default=always)


class Source(Protocol):
    """Objects below one prefix that others may read: a node's slots, for one. Thread-safe."""

    @property
    def prefix(self) -> str:
        """All its keys begin so, and no other source's or vault object's do."""
        ...

    def reading(self, key: str) -> AbstractContextManager[Held]:
        """The object, pinned until the end where the source can. Raises NotFoundError."""
        ...

    def stat(self, key: str) -> Stat | None:
        """The object's facts, or None."""
        ...

    def list(self) -> list[Stat]:
        """All objects, in key order; few."""
        ...
