"""Retention policies: small rules that say which snapshots to keep, and their text form. Pure.

``keep_last(5) | keep_every(1000) | keep_best("loss", 3)`` keeps what any of them keeps. The newest
snapshot and tagged ones are kept whatever a policy says (``gc.plan``). A policy travels as its
text, which reads back as an equal policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ckpt.errors import UsageError
from ckpt.values import SnapshotId, SnapshotInfo

Mode = Literal["min", "max"]
SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
"""Units of durations, largest first."""
PAUSE_S_MAX = 86400.0
"""A longer pause between snapshots may be a clock that was set; see ``KeepPolicy.pause_doubt``."""
DIGITS_MAX = 15
"""Digits of a rule's number at most; a step has no more."""


@dataclass(frozen=True, slots=True)
class Last:
    """The ``n`` newest snapshots of the newest lineage; if it has none, of all.

    Only the newest lineage counts, so that an abandoned branch with greater ids cannot push its
    snapshots out. Damaged snapshots do not count.
    """

    n: int

    def __post_init__(self) -> None:
        _at_least_one("last", self.n)

    def __str__(self) -> str:
        return f"last={self.n}"


@dataclass(frozen=True, slots=True)
class Every:
    """Snapshots of any lineage whose step is a multiple of ``steps``."""

    steps: int

    def __post_init__(self) -> None:
        _at_least_one("every", self.steps)

    def __str__(self) -> str:
        return f"every={self.steps}"


@dataclass(frozen=True, slots=True)
class Tagged:
    """Snapshots with a tag. They are kept in any case; the rule only makes it explicit."""

    def __str__(self) -> str:
        return "tagged"


@dataclass(frozen=True, slots=True)
class Best:
    """The ``n`` snapshots of any lineage whose metadata has the least (or greatest) ``metric``.

    A snapshot counts only if the metric is a number, not NaN. Of equal ones only the oldest counts:
    a value that is logged after each validation goes with every snapshot until the next one, and
    the first of these snapshots is nearest to the state that was validated.
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
    """Snapshots of any lineage that were made at most ``seconds`` ago."""

    seconds: int

    def __post_init__(self) -> None:
        _at_least_one("for", self.seconds)

    def __str__(self) -> str:
        return f"for={duration_text(self.seconds)}"


Rule = Last | Every | Tagged | Best | For
_RULE_ORDER: tuple[type[Rule], ...] = (Last, Every, Tagged, Best, For)


@dataclass(frozen=True, slots=True)
class KeepPolicy:
    """A set of rules; a snapshot is kept if any of them keeps it.

    Made with the functions below and ``|``. The order of the rules does not matter.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise UsageError(
                "a policy without rules would keep nothing. use keep_last(1) for only the newest"
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
        self,
        infos: Sequence[SnapshotInfo],
        *,
        line: Sequence[SnapshotId],
        ages_s: Mapping[SnapshotId, float],
    ) -> dict[SnapshotId, tuple[str, ...]]:
        """The texts of the rules that keep each snapshot; a snapshot without any has no entry.

        ``line`` is the newest lineage, newest first. ``ages_s``: how old each snapshot is; one
        whose age is not known counts as new. O(rules * snapshots log snapshots).
        """
        reasons: dict[SnapshotId, tuple[str, ...]] = {}
        for rule in self.rules:
            for snapshot in _kept(rule, infos, line, ages_s):
                reasons[snapshot] = (*reasons.get(snapshot, ()), str(rule))
        return reasons

    @property
    def by_age(self) -> bool:
        """Whether a rule looks at the age of snapshots."""
        return any(isinstance(rule, For) for rule in self.rules)

    def pause_doubt(self, infos: Sequence[SnapshotInfo], ages_s: Mapping[SnapshotId, float]) -> str:
        """Why the clock may have been set forward, if a rule goes by age; "" if there is no sign.

        A folder and this machine have one clock, so nothing else contradicts it. The sign is a
        pause longer than the rule's time, than a day and than twice any pause before, right before
        all that the rule keeps. A first real pause looks the same; its doubt ends when snapshots
        were made for the rule's time, and a job that runs now and then has had such pauses.
        """
        ages = [ages_s[info.id] for info in infos if info.problem is None and info.id in ages_s]
        for rule in self.rules:
            if not isinstance(rule, For):
                continue
            older = sorted(age_s for age_s in ages if age_s > rule.seconds)
            kept = [age_s for age_s in ages if age_s <= rule.seconds]
            pause_s = min(older, default=0.0) - max(kept, default=0.0)
            usual_s = max((b - a for a, b in pairwise(older)), default=0.0)
            if older and pause_s > max(rule.seconds, PAUSE_S_MAX, 2 * usual_s):
                return (
                    "no snapshot was made for long before those that a rule keeps by age, so the "
                    f"clock may have been set, and nothing is dropped. rule={rule} "
                    f"pause={duration_text(int(pause_s))}; check the clock; if it is right, keep "
                    "by last=N, or wait for newer snapshots"
                )
        return ""

    def missing_metric(self, infos: Sequence[SnapshotInfo]) -> str | None:
        """A metric that a rule keeps by and that no snapshot has, or None.

        That rule can't tell what is good: a wrong name would let everything good be dropped.
        """
        metrics = metrics_of(infos)
        return next(
            (
                rule.metric
                for rule in self.rules
                if isinstance(rule, Best) and rule.metric not in metrics
            ),
            None,
        )


def keep_last(n: int) -> KeepPolicy:
    """Keep the ``n`` newest snapshots of the newest lineage."""
    return KeepPolicy((Last(n),))


def keep_every(steps: int) -> KeepPolicy:
    """Keep snapshots whose step is a multiple of ``steps``."""
    return KeepPolicy((Every(steps),))


def keep_tagged() -> KeepPolicy:
    """Keep tagged snapshots; alone, it keeps only them and the newest."""
    return KeepPolicy((Tagged(),))


def keep_best(metric: str, n: int = 1, mode: Mode = "min") -> KeepPolicy:
    """Keep the ``n`` snapshots whose metadata has the least ``metric`` (``mode="max"``: greatest).

    Of equal ones only the oldest counts. Metadata is what ``Run.log`` was given last, or the
    ``metadata`` of ``Checkpointer.save``.
    """
    return KeepPolicy((Best(metric, n, mode),))


def keep_for(length: str | int) -> KeepPolicy:
    """Keep snapshots made within this time: ``"7d"``, ``"36h"`` (w, d, h, m, s), or seconds."""
    return KeepPolicy((For(duration_s(length) if isinstance(length, str) else length),))


def duration_s(text: str) -> int:
    """The seconds in ``"90s"``, ``"24h"``, ``"7d"``, ``"0"``. Raises UsageError for other text."""
    number, unit = text[:-1], text[-1:]
    if text == "0":
        return 0
    if unit not in SECONDS or not is_number(number):
        raise UsageError(
            f"not a duration. text={text!r} write a whole number and one of {', '.join(SECONDS)}"
        )
    return int(number) * SECONDS[unit]


def is_number(text: str) -> bool:
    """Whether ``text`` is a whole number, not negative, of at most DIGITS_MAX digits."""
    return text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX


def duration_text(seconds: int) -> str:
    """The text of a duration in the largest unit that divides it; the inverse of ``duration_s``."""
    unit = next(name for name, size in SECONDS.items() if seconds % size == 0)
    return f"{seconds // SECONDS[unit]}{unit}"


def _kept(
    rule: Rule,
    infos: Sequence[SnapshotInfo],
    line: Sequence[SnapshotId],
    ages_s: Mapping[SnapshotId, float],
) -> Iterable[SnapshotId]:
    undamaged = [info for info in infos if info.problem is None]
    match rule:
        case Last(n):
            usable = {info.id for info in undamaged}
            # The newest lineage is empty if a job started afresh and has not committed yet.
            candidates = line or sorted(usable, reverse=True)
            return [snapshot for snapshot in candidates if snapshot in usable][:n]
        case Every(steps):
            return [info.id for info in infos if info.step % steps == 0]
        case Tagged():
            return [info.id for info in infos if info.tags]
        case Best(metric, n, mode):
            return _best(undamaged, n, _value_of(metric, mode))
        case For(seconds):
            return [info.id for info in undamaged if ages_s.get(info.id, 0.0) <= seconds]


def _best(
    infos: Sequence[SnapshotInfo], n: int, value: Callable[[SnapshotInfo], float | None]
) -> list[SnapshotId]:
    first: dict[float, SnapshotId] = {}
    for info in infos:
        if (score := value(info)) is not None:
            first[score] = min(first.get(score, info.id), info.id)
    return [first[score] for score in sorted(first)[:n]]


def metrics_of(infos: Sequence[SnapshotInfo]) -> tuple[str, ...]:
    """The names under which undamaged snapshots have a number in their metadata, sorted."""
    return tuple(
        sorted(
            {
                name
                for info in infos
                if info.problem is None
                for name, entry in info.metadata.items()
                if _number_in(entry) is not None
            }
        )
    )


def _value_of(metric: str, mode: Mode) -> Callable[[SnapshotInfo], float | None]:
    def value(info: SnapshotInfo) -> float | None:
        entry = _number_in(info.metadata.get(metric))
        return entry if entry is None or mode == "min" else -entry

    return value


def _number_in(entry: object) -> float | None:
    if isinstance(entry, bool) or not isinstance(entry, int | float) or math.isnan(entry):
        return None
    return entry


def _at_least_one(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"a rule needs a whole number from 1 on. rule={name} number={number!r}")
    if number >= 10**DIGITS_MAX:
        raise UsageError(f"a rule's number has at most {DIGITS_MAX} digits. rule={name}")


# ---- policies as text: ``last=5,every=1000,tagged,best=loss:3,best=acc:3:max,for=7d``

KNOWN = "last=N, every=STEPS, tagged, best=METRIC:N or best=METRIC:N:max, for=7d"
"""The syntax of all rules."""


def parse_policy(text: str) -> KeepPolicy:
    """The policy in ``text``, rules separated by commas; the inverse of ``str(policy)``.

    Raises UsageError for an unknown or incomplete rule, and names all rules.
    """
    return KeepPolicy(tuple(_rule(rule.strip(), text) for rule in text.split(",")))


def _rule(rule: str, text: str) -> Rule:
    name, equals, value = rule.partition("=")
    match name, bool(equals):
        case "last", True:
            return Last(_number(value, rule))
        case "every", True:
            return Every(_number(value, rule))
        case "tagged", False:
            return Tagged()
        case "best", True:
            return _best_of_text(value, rule)
        case "for", True:
            return For(duration_s(value))
        case _:
            raise UsageError(f"not a keep rule. rule={rule!r} policy={text!r} known: {KNOWN}")


def _best_of_text(value: str, rule: str) -> Best:
    match value.split(":"):
        case [metric]:
            return Best(metric)
        case [metric, n]:
            return Best(metric, _number(n, rule))
        case [metric, n, ("min" | "max") as mode]:
            return Best(metric, _number(n, rule), "max" if mode == "max" else "min")
        case _:
            raise UsageError(
                f"not a keep rule. rule={rule!r} write best=METRIC:N or best=METRIC:N:max"
            )


def _number(text: str, rule: str) -> int:
    if not is_number(text):
        raise UsageError(f"not a whole number. rule={rule!r} known: {KNOWN}")
    return int(text)
