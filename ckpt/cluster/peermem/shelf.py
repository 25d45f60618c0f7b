"""A vault and the sources beside it, as one flat map of keys."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import chain

from ckpt.backends.base import Stat
from ckpt.backends.keys import check_prefix
from ckpt.cluster.peermem.sources import Held, Source
from ckpt.cluster.peermem.vault import Vault
from ckpt.errors import UsageError

PAGE_ENTRIES_MAX = 1000
"""Entries of one answer to a listing."""


class Shelf:
    """Reads come from the source whose prefix a key has, or from the vault; writes go to the vault alone. Thread-safe."""

    def __init__(self, vault: Vault, sources: Sequence[Source] = ()) -> None:
        for source in sources:
            check_prefix(source.prefix)
            if not source.prefix:
                raise UsageError("a source without a prefix would hide the vault.")
        self.vault = vault
        self._sources = tuple(sources)

    def read_only(self, key: str) -> bool:
        """Whether the key is a source's."""
        return self._source(key) is not None

    def reading(self, key: str) -> AbstractContextManager[Held]:
        """See Vault and Source."""
        source = self._source(key)
        return self.vault.reading(key) if source is None else source.reading(key)

    def stat(self, key: str) -> Stat | None:
        """See Vault and Source."""
        source = self._source(key)
        return self.vault.stat(key) if source is None else source.stat(key)

    def page(self, prefix: str, after: str) -> tuple[list[Stat], bool]:
        """The next entries behind ``after`` in key order, PAGE_ENTRIES_MAX at most, and whether there are more."""
        most = PAGE_ENTRIES_MAX + 1
        held = self.vault.list(prefix, after=after, entries_max=most)
        others = [
            [one for one in source.list() if one.key.startswith(prefix) and one.key > after]
            for source in self._sources
            if source.prefix.startswith(prefix) or prefix.startswith(source.prefix)
        ]
        found = sorted(chain(held, *others), key=lambda one: one.key)
        return found[:PAGE_ENTRIES_MAX], len(found) >= most

    def _source(self, key: str) -> Source | None:
        return next((source for source in self._sources if key.startswith(source.prefix)), None)
