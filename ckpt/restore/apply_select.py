"""Which paths a restore touches (``only=``), and the differences it found."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ckpt.errors import UsageError

PROBLEMS_SHOWN_MAX = 20
"""How many differences one error lists."""


class Cover(Enum):
    """How much of what lies at and below a path is selected."""

    NONE = 0
    PART = 1
    ALL = 2


class Selection:
    """Prefixes of paths, by whole components; None selects everything."""

    def __init__(self, only: Sequence[str] | None) -> None:
        self._only = None if only is None else tuple(one.strip("/") for one in only)
        self._used: set[str] = set()

    @property
    def everything(self) -> bool:
        """Whether no selection was given."""
        return self._only is None

    def cover(self, path: str) -> Cover:
        """What is selected of ``path``."""
        if self._only is None:
            return Cover.ALL
        if inside := [one for one in self._only if path == one or path.startswith(one + "/")]:
            self._used.update(inside)
            return Cover.ALL
        return Cover.PART if any(one.startswith(path + "/") for one in self._only) else Cover.NONE

    def unused(self) -> list[str]:
        """The prefixes that no path had."""
        return [one for one in self._only or () if one not in self._used]


class Problems:
    """Differences between live objects and a snapshot, gathered so that one error lists them all."""

    def __init__(self, *, keep_missing: bool) -> None:
        self._keep_missing = keep_missing
        self._found: list[str] = []
        self.kept: list[str] = []
        """Paths that keep their live value because the snapshot lacks them."""

    def add(self, fact: str, path: str, remedy: str = "") -> None:
        """One more difference."""
        self._found.append(f"{fact} path={path!r}{'; ' + remedy if remedy else ''}")

    def missing(self, path: str) -> None:
        """Something live that the snapshot doesn't have: a difference, unless it is to keep its value."""
        if self._keep_missing:
            self.kept.append(path)
        else:
            self.add("missing in the snapshot.", path, 'pass missing="keep" to keep its live value')

    def unexpected(self, path: str) -> None:
        """Something in the snapshot that is not live."""
        self.add("in the snapshot, but not live.", path, "track it, or name what to restore with only=[...]")

    def check(self) -> None:
        """Raise UsageError listing what was found, if anything was. Nothing was written until then."""
        if not self._found:
            return
        shown = "\n  ".join(self._found[:PROBLEMS_SHOWN_MAX])
        more = len(self._found) - PROBLEMS_SHOWN_MAX
        rest = f"\n  ... and {more} more" if more > 0 else ""
        raise UsageError(
            f"live objects and snapshot don't fit; nothing was changed. differences={len(self._found)}\n  {shown}{rest}"
        )
