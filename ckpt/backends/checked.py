"""Verified reads from one store, or from several that hold the same objects.

With one store the check decides whether its bytes are accepted. With several stores, a wrong or
missing copy makes the reader try the next store, and the right bytes later replace the bad copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from ckpt.backends.base import Backend
from ckpt.errors import IntegrityError, NotFoundError

Check = Callable[[memoryview], "str | None"]
"""What is wrong with the bytes that were read, as text; None if they are right. May be called more
than once per read.
"""


@runtime_checkable
class MultiStoreBackend(Backend, Protocol):
    """What a backend over several stores offers besides the six operations."""

    @property
    def stores(self) -> tuple[Backend, ...]:
        """The single stores, in the user's order."""
        ...

    @property
    def write_quorum(self) -> int:
        """Number of stores that must hold an object before ``put`` returns."""
        ...

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        """From now on count only the stores with the indexes ``full``, and write to no others.

        Any other store may be an unmounted disk, or may still be filling; it receives all objects
        before it counts. ``silent``: stores that counted and do not answer now. They are written
        to, and what they acknowledge counts; that they lack an object proves nothing.
        """
        ...

    def await_caught_up(
        self, timeout_s: float, *, of: frozenset[int] | None = None, least: int | None = None
    ) -> bool:
        """Wait until ``least`` of the stores with the indexes ``of`` (None: all) have every object
        that this process has put.

        False if they have not after ``timeout_s``, or if that can't be known.
        """
        ...

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        """As ``read_into``, from the first copy that ``check`` accepts. Repairs bad copies that it
        meets.

        Raises IntegrityError if every store that answered has wrong bytes, and UnavailableError if
        a store that did not answer might have right ones.
        """
        ...

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        """The whole of a small object, from the first copy that ``check`` accepts.

        Copies may differ in length.
        """
        ...


T = TypeVar("T")


def read_again(read: Callable[[], T]) -> T:
    """What ``read`` returns; it is called a second time if it raises IntegrityError.

    Bits flip in memory and on networks too, so bytes that read wrong may be stored right. A second
    request tells, and costs less than an older snapshot that is restored in place of this one.
    """
    try:
        return read()
    except IntegrityError:
        return read()


def stores_of(backend: Backend) -> tuple[Backend, ...]:
    """The single stores behind ``backend``."""
    return backend.stores if isinstance(backend, MultiStoreBackend) else (backend,)


def write_quorum_of(backend: Backend) -> int:
    """Number of stores that must hold an object for it to be durable."""
    return backend.write_quorum if isinstance(backend, MultiStoreBackend) else 1


def read_checked(
    backend: Backend, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
) -> None:
    """Fill ``out`` with bytes that ``check`` accepts, from any copy.

    What reads wrong is read once more. Raises NotFoundError if no store has the key, and
    IntegrityError with the check's text if no copy is right.
    """

    def read() -> None:
        if isinstance(backend, MultiStoreBackend):
            backend.read_checked(key, out, check, offset_bytes=offset_bytes)
            return
        backend.read_into(key, out, offset_bytes=offset_bytes)
        if (problem := check(out)) is not None:
            raise IntegrityError(f"{problem}. key={key} store={backend.url}")

    read_again(read)


def read_object(backend: Backend, key: str, check: Check, *, bytes_max: int) -> bytes:
    """The whole of a small object, from a copy that ``check`` accepts.

    Raises as ``read_checked``, and IntegrityError if the object is longer than ``bytes_max``.
    """

    def read() -> bytes:
        if isinstance(backend, MultiStoreBackend):
            return backend.read_object(key, check, bytes_max=bytes_max)
        data = read_alone(backend, key, bytes_max=bytes_max)
        if (problem := check(memoryview(data))) is not None:
            raise IntegrityError(f"{problem}. key={key} store={backend.url}")
        return data

    return read_again(read)


def read_alone(store: Backend, key: str, *, bytes_max: int) -> bytes:
    """The whole object of one store, unchecked.

    Raises NotFoundError, UnavailableError, and IntegrityError if it is longer than ``bytes_max``.
    """
    stat = store.stat(key)
    if stat is None:
        raise NotFoundError(f"no such object. key={key} store={store.url}")
    if stat.size_bytes > bytes_max:
        raise IntegrityError(
            f"too large to read. key={key} size_bytes={stat.size_bytes} limit_bytes={bytes_max} "
            f"store={store.url}"
        )
    out = bytearray(stat.size_bytes)
    if out:
        store.read_into(key, memoryview(out))
    return bytes(out)
