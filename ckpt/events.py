"""Events: what happened, told once, in one form.

An event is a kebab-case kind, a sentence for people and flat facts for programs. Rooms that have
something to tell take a ``Tell`` callable; the session passes one that writes to Python's
``logging`` under the name ``ckpt``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``alarm`` marks what a person should look at."""

    kind: str
    text: str
    facts: Mapping[str, Fact] = field(default_factory=dict)
    alarm: bool = False


Emit = Callable[[Event], None]
"""Receives events; must be quick and must not raise."""


def emit_to_logging(rank: int) -> Emit:
    """A ``Tell`` that writes to the logger ``ckpt``: alarms as warnings, the rest as info, facts as
    ``key=value``."""
    logger = logging.getLogger("ckpt")

    def tell(event: Event) -> None:
        level = logging.WARNING if event.alarm else logging.INFO
        if not logger.isEnabledFor(level):
            return
        facts = " ".join(f"{key}={value}" for key, value in event.facts.items())
        logger.log(level, "[rank %d] %s%s", rank, event.text, f" ({facts})" if facts else "")

    return tell
