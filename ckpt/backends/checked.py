"""Reading what must have a known digest, from one store or from several that hold the same objects.

A store alone gives what it has, and the check decides. Where several hold the same key, a copy that
is wrong or missing sends the reader to the next one, and the good copy goes back to where the bad
one was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from ckpt.backends.base import Backend
from ckpt.errors import IntegrityError, NotFoundError

Check = Callable[[memoryview], "str | None"]
"""What is wrong with the bytes that were read, in words; None where they are right. May be called
more than once."""


@runtime_checkable
class MultiStoreBackend(Backend, Protocol):
    """What a backend over several stores has beside the six operations."""

    @property
    def stores(self) -> tuple[Backend, ...]:
        """Each store alone, in the user's order."""
        ...

    @property
    def write_quorum(self) -> int:
        """On how many of them an object must be before ``put`` returns."""
        ...

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        """From now on only the stores at these places count, and are written to.

        Another one may be a disk that isn't mounted, or be filled at this moment: it gets
        everything before it counts. ``silent``: those that counted and do not answer now. They are
        written to, and what they take counts; what they lack says nothing.
        """
        ...

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        """As ``read_into``, of the first copy that ``check`` finds right; bad copies met on the way
        are mended.

        Raises IntegrityError where every store that answered has none that is right,
        UnavailableError where one that did not answer might.
        """
        ...

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        """The whole of a small object, of the first copy that ``check`` finds right; copies may
        differ in length."""
        ...


def stores_of(backend: Backend) -> tuple[Backend, ...]:
    """The stores behind ``backend``, each alone."""
    return backend.stores if isinstance(backend, MultiStoreBackend) else (backend,)


def write_quorum_of(backend: Backend) -> int:
    """On how many stores an object must be to be durable."""
    return backend.write_quorum if isinstance(backend, MultiStoreBackend) else 1


def read_checked(
    backend: Backend, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
) -> None:
    """Fill ``out`` with bytes that ``check`` finds right, from whichever copy.

    Raises NotFoundError where no store has the key, IntegrityError with the check's words where no
    copy is right.
    """
    if isinstance(backend, MultiStoreBackend):
        backend.read_checked(key, out, check, offset_bytes=offset_bytes)
        return
    backend.read_into(key, out, offset_bytes=offset_bytes)
    if (why := check(out)) is not None:
        raise IntegrityError(f"{why}. key={key} store={backend.url}")


def read_object(backend: Backend, key: str, check: Check, *, bytes_max: int) -> bytes:
    """The whole of a small object, of a copy that ``check`` finds right.

    Raises as ``read_checked``, and IntegrityError above ``bytes_max``.
    """
    if isinstance(backend, MultiStoreBackend):
        return backend.read_object(key, check, bytes_max=bytes_max)
    data = read_alone(backend, key, bytes_max=bytes_max)
    if (why := check(memoryview(data))) is not None:
        raise IntegrityError(f"{why}. key={key} store={backend.url}")
    return data


def read_alone(store: Backend, key: str, *, bytes_max: int) -> bytes:
    """The whole object of one store, as it is.

    Raises NotFoundError, UnavailableError, and IntegrityError above ``bytes_max``.
    """
    stat = store.stat(key)
    if stat is None:
        raise NotFoundError(f"no such object. key={key} store={store.url}")
    if stat.size_bytes > bytes_max:
        raise IntegrityError(
            f"too large to be read. key={key} size_bytes={stat.size_bytes} limit_bytes={bytes_max} "
            f"store={store.url}"
        )
    out = bytearray(stat.size_bytes)
    if out:
        store.read_into(key, memoryview(out))
    return bytes(out)
