"""Policies as text: ``last=5,every=1000,tagged,best=loss:3,best=acc:3:max,for=7d``. Pure."""

from __future__ import annotations

from ckpt.errors import UsageError
from ckpt.maintenance.retention import Best, Every, For, KeepPolicy, Last, Rule, Tagged, duration_s, is_number

KNOWN = "last=N, every=STEPS, tagged, best=METRIC:N or best=METRIC:N:max, for=7d"
"""Every rule that can be written."""


def parse_policy(text: str) -> KeepPolicy:
    """The policy that ``text`` spells, rules separated by commas; ``str(policy)`` gives such a text back.

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
            raise UsageError(f"not a rule for what to keep. rule={word!r} policy={text!r} known: {KNOWN}")


def _best_of_text(value: str, word: str) -> Best:
    match value.split(":"):
        case [metric]:
            return Best(metric)
        case [metric, n]:
            return Best(metric, _number(n, word))
        case [metric, n, ("min" | "max") as mode]:
            return Best(metric, _number(n, word), "max" if mode == "max" else "min")
        case _:
            raise UsageError(f"not a rule for what to keep. rule={word!r} write best=METRIC:N or best=METRIC:N:max")


def _number(text: str, word: str) -> int:
    if not is_number(text):
        raise UsageError(f"not a whole number. rule={word!r} known: {KNOWN}")
    return int(text)
