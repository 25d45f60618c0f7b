"""Which snapshots to keep: small rules that compose. Pure.

``keep_last(5) | keep_every(1000) | keep_best("loss", 3)`` keeps what any of them keeps. The newest
snapshot and tagged ones are kept whatever a policy says (``gc_plan``). ``retain_text`` reads and
spells policies as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import UsageError
from ckpt.values import SnapshotId, SnapshotInfo

Mode = Literal["min", "max"]
SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
"""Units of a length of time, largest first."""
DIGITS_MAX = 15
"""Digits of a rule's number: as many as a step has at most."""


@dataclass(frozen=True, slots=True)
class Last:
    """The ``n`` newest snapshots of the newest line (where it holds none: of all). Damaged ones are
    not counted."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one("last", self.n)

    def __str__(self) -> str:
        return f"last={self.n}"


@dataclass(frozen=True, slots=True)
class Every:
    """Snapshots, on the line or off it, whose step ``steps`` divides."""

    steps: int

    def __post_init__(self) -> None:
        _at_least_one("every", self.steps)

    def __str__(self) -> str:
        return f"every={self.steps}"


@dataclass(frozen=True, slots=True)
class Tagged:
    """Snapshots with a tag. They are kept in any case; the rule says so in words."""

    def __str__(self) -> str:
        return "tagged"


@dataclass(frozen=True, slots=True)
class Best:
    """The ``n`` snapshots, on the line or off it, whose metadata has the least (or greatest)
    ``metric``.

    One without the metric, or where it is NaN or no number, is never among them. Of equal ones the
    oldest alone counts: what is logged now and then, after a validation say, goes with every
    snapshot until the next, and the first is nearest to it.
    """

    metric: str
    n: int = 1
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _at_least_one("best", self.n)
        if (
            not self.metric
            or not self.metric.isprintable()
            or any(mark in self.metric for mark in ":,")
        ):
            raise UsageError(
                f"not a metric's name: printable, without ':' and ','. metric={self.metric!r}"
            )
        if self.mode not in ("min", "max"):
            raise UsageError(f"best is min or max. mode={self.mode!r} metric={self.metric!r}")

    def __str__(self) -> str:
        return f"best={self.metric}:{self.n}" + (":max" if self.mode == "max" else "")


@dataclass(frozen=True, slots=True)
class For:
    """Snapshots, on the line or off it, that were made at most ``seconds`` ago."""

    seconds: int

    def __post_init__(self) -> None:
        _at_least_one("for", self.seconds)

    def __str__(self) -> str:
        return f"for={duration_text(self.seconds)}"


Rule = Last | Every | Tagged | Best | For
_RULE_ORDER: tuple[type[Rule], ...] = (Last, Every, Tagged, Best, For)


@dataclass(frozen=True, slots=True)
class KeepPolicy:
    """Rules of which any keeps a snapshot. Made with the functions below and ``|``; equal whatever
    the order."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise UsageError(
                "a policy without rules would keep nothing. use keep_last(1) for the newest alone"
            )
        ordered = sorted(
            set(self.rules), key=lambda rule: (_RULE_ORDER.index(type(rule)), str(rule))
        )
        object.__setattr__(self, "rules", tuple(ordered))

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return KeepPolicy((*self.rules, *other.rules))

    def __str__(self) -> str:
        return ",".join(map(str, self.rules))

    def reasons(
        self, infos: Sequence[SnapshotInfo], *, line: Sequence[SnapshotId], now_unix_s: float
    ) -> dict[SnapshotId, tuple[str, ...]]:
        """The rules that keep each snapshot, spelled out; a snapshot that none keeps is not there.

        ``line`` is the newest line, newest first. O(rules * snapshots log snapshots).
        """
        found: dict[SnapshotId, tuple[str, ...]] = {}
        for rule in self.rules:
            for pair in _kept(rule, infos, line, now_unix_s):
                found[pair] = (*found.get(pair, ()), str(rule))
        return found


def keep_last(n: int) -> KeepPolicy:
    """Keep the ``n`` newest snapshots of the newest line."""
    return KeepPolicy((Last(n),))


def keep_every(steps: int) -> KeepPolicy:
    """Keep snapshots whose step is a multiple of ``steps``."""
    return KeepPolicy((Every(steps),))


def keep_tagged() -> KeepPolicy:
    """Keep tagged snapshots, and by itself nothing else but the newest."""
    return KeepPolicy((Tagged(),))


def keep_best(metric: str, n: int = 1, mode: Mode = "min") -> KeepPolicy:
    """Keep the ``n`` snapshots whose metadata has the least (``mode="max"``: greatest) ``metric``;
    of equal ones the oldest.

    Metadata is what ``Run.log`` noted last, or the ``metadata`` of ``Checkpointer.save``.
    """
    return KeepPolicy((Best(metric, n, mode),))


def keep_for(length: str | int) -> KeepPolicy:
    """Keep snapshots that were made within this time: ``"7d"``, ``"36h"`` (units w, d, h, m, s), or
    seconds."""
    return KeepPolicy((For(duration_s(length) if isinstance(length, str) else length),))


def duration_s(text: str) -> int:
    """The seconds in ``"90s"``, ``"24h"``, ``"7d"``, or 0 in ``"0"``. Raises UsageError naming the
    units."""
    number, unit = text[:-1], text[-1:]
    if text == "0":
        return 0
    if unit not in SECONDS or not is_number(number):
        raise UsageError(
            f"not a length of time. text={text!r} write a whole number and one of "
            f"{', '.join(SECONDS)}"
        )
    return int(number) * SECONDS[unit]


def is_number(text: str) -> bool:
    """Whether ``text`` is a whole number from 0 on that rules may have."""
    return text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX


def duration_text(seconds: int) -> str:
    """``duration_s`` the other way, in the largest unit that fits."""
    unit = next(name for name, size in SECONDS.items() if seconds % size == 0)
    return f"{seconds // SECONDS[unit]}{unit}"


def _kept(
    rule: Rule, infos: Sequence[SnapshotInfo], line: Sequence[SnapshotId], now_unix_s: float
) -> Iterable[SnapshotId]:
    sound = [info for info in infos if info.problem is None]
    match rule:
        case Last(n):
            usable = {info.id for info in sound}
            return [pair for pair in line or sorted(usable, reverse=True) if pair in usable][:n]
        case Every(steps):
            return [info.id for info in infos if info.step % steps == 0]
        case Tagged():
            return [info.id for info in infos if info.tags]
        case Best(metric, n, mode):
            return _best(sound, n, _value_of(metric, mode))
        case For(seconds):
            return [info.id for info in sound if now_unix_s - info.created_unix_s <= seconds]


def _best(
    infos: Sequence[SnapshotInfo], n: int, value: Callable[[SnapshotInfo], float | None]
) -> list[SnapshotId]:
    first: dict[float, SnapshotId] = {}
    for info in infos:
        if (found := value(info)) is not None:
            first[found] = min(first.get(found, info.id), info.id)
    return [first[found] for found in sorted(first)[:n]]


def _value_of(metric: str, mode: Mode) -> Callable[[SnapshotInfo], float | None]:
    def value(info: SnapshotInfo) -> float | None:
        found = info.metadata.get(metric)
        if isinstance(found, bool) or not isinstance(found, int | float) or math.isnan(found):
            return None
        return found if mode == "min" else -found

    return value


def _at_least_one(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"a rule's number is a whole one from 1 on. rule={name} number={number!r}")
    if number >= 10**DIGITS_MAX:
        raise UsageError(f"a rule's number has {DIGITS_MAX} digits at most. rule={name}")


# Policies as text: ``last=5,every=1000,tagged,best=loss:3,best=acc:3:max,for=7d``. Pure.

KNOWN = "last=N, every=STEPS, tagged, best=METRIC:N or best=METRIC:N:max, for=7d"
"""Every rule that can be written."""


def parse_policy(text: str) -> KeepPolicy:
    """The policy that ``text`` spells, rules separated by commas; ``str(policy)`` gives such a text
    back.

    Raises UsageError for a rule that is unknown or says nothing, naming those that there are.
    """
    return KeepPolicy(tuple(_rule(word.strip(), text) for word in text.split(",")))


def _rule(word: str, text: str) -> Rule:
    name, equals, value = word.partition("=")
    match name, bool(equals):
        case "last", True:
            return Last(_number(value, word))
        case "every", True:
            return Every(_number(value, word))
        case "tagged", False:
            return Tagged()
        case "best", True:
            return _best_of_text(value, word)
        case "for", True:
            return For(duration_s(value))
        case _:
            raise UsageError(
                f"not a rule for what to keep. rule={word!r} policy={text!r} known: {KNOWN}"
            )


def _best_of_text(value: str, word: str) -> Best:
    match value.split(":"):
        case [metric]:
            return Best(metric)
        case [metric, n]:
            return Best(metric, _number(n, word))
        case [metric, n, ("min" | "max") as mode]:
            return Best(metric, _number(n, word), "max" if mode == "max" else "min")
        case _:
            raise UsageError(
                f"not a rule for what to keep. rule={word!r} write best=METRIC:N or "
                "best=METRIC:N:max"
            )


def _number(text: str, word: str) -> int:
    if not is_number(text):
        raise UsageError(f"not a whole number. rule={word!r} known: {KNOWN}")
    return int(text)
