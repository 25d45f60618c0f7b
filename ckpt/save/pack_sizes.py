"""How large stored packs are: what a persister wrote itself it knows, of others it asks once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckpt.backends.base import Backend
from ckpt.errors import CkptError


class PackSizes:
    """Remembers the sizes of packs of one store. For one thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._sizes: dict[str, int] = {}

    def of(self, packs: Iterable[str]) -> Mapping[str, int]:
        """The sizes of ``packs``, and no others are remembered from now on. One request for each that is new.

        A pack that can't be asked for now is left out: whoever tidies passes it over, and asks again next time.
        """
        found: dict[str, int] = {}
        for pack in dict.fromkeys(packs):
            size = self._sizes.get(pack)
            if size is None:
                size = self._ask(pack)
            if size is not None:
                found[pack] = size
        self._sizes = found
        return found

    def note(self, sizes: Mapping[str, int]) -> None:
        """Remember packs that were just written."""
        self._sizes |= sizes

    def _ask(self, pack: str) -> int | None:
        try:
            stat = self._backend.stat(pack)
        except CkptError:
            return None  # tidying is no reason for a save to fail
        return None if stat is None else stat.size_bytes
