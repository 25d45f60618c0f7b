"""Options taken out of mappings one by one, so that whatever nobody asked about is noticed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class OtherError(Exception):
    """Ends a translation: the text names what is not understood."""


class Given:
    """Options that are taken out one by one; what is left at the end was not understood."""

    def __init__(self, options: Mapping[str, object], what: str) -> None:
        self._left = {name: value for name, value in options.items() if value is not None}
        self._what = what

    def ignore(self, names: Iterable[str]) -> None:
        """Take out what changes nothing."""
        for name in names:
            self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A text; None where it is absent or empty."""
        value = self._left.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise OtherError(f"{self._what} {name} is no text")
        return value or None

    def flag(self, name: str, default: bool = False) -> bool:
        """True or False."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise OtherError(f"{self._what} {name} is neither True nor False")
        return value

    def number(self, name: str, default: float) -> float:
        """A number from 0 on."""
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise OtherError(f"{self._what} {name} is no number")
        return value

    def mapping(self, name: str) -> dict[str, object]:
        """Options inside an option; empty where it is absent."""
        value = self._left.pop(name, {})
        if not isinstance(value, Mapping):
            raise OtherError(f"{self._what} {name} is no mapping")
        return {str(key): entry for key, entry in value.items()}

    def take(self, name: str) -> object:
        """Whatever was given, or None."""
        return self._left.pop(name, None)

    def end(self) -> None:
        """Raise OtherError where something is left."""
        if self._left:
            raise OtherError(f"{self._what} {min(self._left)}")
