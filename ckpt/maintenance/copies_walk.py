"""A store's listing met with what ought to be there, both in key order: what is there too, and what is only there."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt.backends.base import Backend, Stat


class Walk:
    """The objects below ``prefix`` from after ``after`` on. Ask in ascending order; those passed over are counted as strays."""

    def __init__(self, store: Backend, prefix: str, *, after: str = "") -> None:
        self._entries: Iterator[Stat] = iter(store.list(prefix, after=after))
        self._next: Stat | None = None
        self._ended = False
        self.strays = 0
        self.stray_bytes = 0

    def take(self, key: str) -> Stat | None:
        """The entry of ``key``, or None where the listing has none."""
        self.skip(key)
        if self._next is None or self._next.key != key:
            return None
        found, self._next = self._next, None
        return found

    def skip(self, key: str | None, *, count: bool = True) -> None:
        """Pass over everything before ``key`` (None: all that is left), and ``count`` it as strays."""
        while (entry := self._peek()) is not None and (key is None or entry.key < key):
            self.strays += count
            self.stray_bytes += entry.size_bytes if count else 0
            self._next = None

    def _peek(self) -> Stat | None:
        if self._next is None and not self._ended:
            self._next = next(self._entries, None)
            self._ended = self._next is None
        return self._next
