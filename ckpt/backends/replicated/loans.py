"""The caller's memory, lent to stores for as long as its put lasts.

A call that hangs in a store cannot be ended, and what it reads after the caller took its memory back is anything. Such bytes
may reach a temporary file; they must not get the object's name. A store that can look just before that takes the memory
itself, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from ckpt.backends.base import Backend, Buffer
from ckpt.errors import UnavailableError


@runtime_checkable
class Borrower(Protocol):
    """A store that can be lent memory. A wrapper around one is none unless it says so: it may have copied too late."""

    def put_lent(
        self, key: str, data: Sequence[Buffer], still_lent: Callable[[], None], *, create_only: bool = False
    ) -> None:
        """As ``put``, of buffers whose owner may take them back and change them at any moment.

        ``still_lent`` is called once all bytes are read (or copied) and before the object can be seen under its key. Where it
        raises, nothing is stored and ``put_lent`` raises the same.
        """
        ...


def borrower_of(store: Backend) -> Borrower | None:
    """``store`` as one that can be lent memory. One whose class overrides ``put`` alone is none: it means to see every put."""
    if not isinstance(store, Borrower):
        return None
    owners = [cls for cls in type(store).__mro__ if "put" in vars(cls) or "put_lent" in vars(cls)]
    return store if owners and "put_lent" in vars(owners[0]) else None


class TakenBackError(UnavailableError):
    """The memory was taken back before the store had read it all; nothing was stored."""

    code = "taken-back"


class Loan:
    """One put's memory. The owner takes it back before anybody may write to it again."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._over = False

    @property
    def over(self) -> bool:
        """Whether it was taken back."""
        return self._over

    def take_back(self) -> None:
        """From now on no store may use what it reads."""
        self._over = True

    def still_lent(self) -> None:
        """Raise TakenBackError where the memory was taken back: then what was read is not what was meant.

        All that was read before a call that returns was right: the owner takes back first and writes afterwards.
        """
        if self._over:
            raise TakenBackError(f"the put is over, and its memory is used anew. key={self._key}; nothing was stored")


def immutable(data: Sequence[Buffer]) -> bool:
    """Whether nobody can change what ``data`` holds."""
    return all(isinstance(one.obj if isinstance(one, memoryview) else one, bytes) for one in data)
