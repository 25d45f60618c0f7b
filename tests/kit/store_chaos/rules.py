"""What a proxy does to requests while a fault lasts, and what happens when it has seen so many."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable

from ckpt.testing.crashes import OpCall
from kit.servers.rules import (
    Answer,
    Delay,
    Fault,
    Flip,
    Request,
    ResetAfter,
    ResetBefore,
    Rule,
    Truncate,
)

HANG_S = 2.2
"""Longer than clients wait, their repetition included: what hung so is done when nobody waits for
it any more."""


class Spoiler:
    """The rule of one proxy for a whole run. ``rule`` may be changed at any time; ``when_seen``
    calls once, then forgets."""

    def __init__(self) -> None:
        self.rule: Rule | None = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._seen = 0

    def __call__(self, request: Request) -> Fault | None:
        """See Rule."""
        with self._lock:
            self._seen += 1
            self._call(self._seen)
        rule = self.rule
        return rule(request) if rule is not None else None

    def when_seen(self, count: int, call: Callable[[], None]) -> None:
        """Have ``call`` made once so many more requests came."""
        with self._lock:
            self._waiting.append((self._seen + count, call))

    def hasten(self) -> None:
        """Make now what waits still, and return when all calls were made."""
        with self._lock:
            self._call(max((count for count, _ in self._waiting), default=0))

    def _call(self, upto: int) -> None:
        due, self._waiting = (
            [call for count, call in self._waiting if count <= upto],
            [one for one in self._waiting if one[0] > upto],
        )
        for call in due:
            call()


def _sometimes(seed: int, draw: Callable[[random.Random], Fault], *, reads: bool = False) -> Rule:
    """A fault now and then, more or less often, by the order of arrival. ``reads``: in answers that
    bring an object alone."""
    dice = random.Random(seed)
    chance = dice.choice((0.1, 0.3, 0.6, 1.0))

    def choose(request: Request) -> Fault | None:
        if reads and (request.method != "GET" or "list-type" in request.query):
            return None
        return draw(dice) if dice.random() < chance else None

    return choose


def _error(dice: random.Random) -> Fault:
    return dice.choice(
        (Answer(503, "SlowDown"), Answer(500, "InternalError"), Answer(502, "BadGateway"))
    )


def _flip(dice: random.Random) -> Fault:
    return Flip(int(2 ** dice.uniform(0, 14)))


def _cut(dice: random.Random) -> Fault:
    return Truncate(int(2 ** dice.uniform(0, 14)) - 1)


def _slow(dice: random.Random) -> Fault:
    return Delay(dice.uniform(0.01, 0.15))


def _hang(dice: random.Random) -> Fault:
    return Delay(HANG_S, dice.choice((None, None, ResetBefore(), ResetAfter())))


def _any(dice: random.Random) -> Fault:
    return dice.choice(
        (_error, _cut, _slow, _hang, lambda _: ResetBefore(), lambda _: ResetAfter())
    )(dice)


DiskFault = Callable[[OpCall], None]


def _failing(seed: int, numbers: tuple[int, ...], names: frozenset[str] = frozenset()) -> DiskFault:
    """System calls of these names, all where there are none, fail now and then."""
    dice = random.Random(seed)
    chance = dice.choice((0.05, 0.3, 1.0))

    def fail(call: OpCall) -> None:
        if (not names or call.name in names) and dice.random() < chance:
            number = dice.choice(numbers)
            raise OSError(number, os.strerror(number))

    return fail


def _crawling(seed: int) -> DiskFault:
    dice = random.Random(seed)
    return lambda call: time.sleep(dice.uniform(0.0, 0.1))


DISK: dict[str, Callable[[int], DiskFault]] = {
    "full": lambda seed: _failing(
        seed, (errno.ENOSPC, errno.EDQUOT), frozenset({"preallocate", "write", "mkdir"})
    ),
    "ailing": lambda seed: _failing(seed, (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)),
    "read-only": lambda seed: _failing(seed, (errno.EROFS,)),
    "crawling": _crawling,
}
"""What the disk of a folder does."""

RULES: dict[str, Callable[[int], Rule]] = {
    "errors": lambda seed: _sometimes(seed, _error),
    "denied": lambda seed: lambda request: Answer(403, "AccessDenied"),
    "no-writes": lambda seed: (
        lambda request: Answer(403, "AccessDenied") if request.method == "PUT" else None
    ),
    "resets-before": lambda seed: _sometimes(seed, lambda _: ResetBefore()),
    "resets-after": lambda seed: _sometimes(seed, lambda _: ResetAfter()),
    "cuts": lambda seed: _sometimes(seed, _cut),
    "slow": lambda seed: _sometimes(seed, _slow),
    "hangs": lambda seed: _sometimes(seed, _hang),
    "storm": lambda seed: _sometimes(seed, _any),
    "flips": lambda seed: _sometimes(seed, _flip, reads=True),
}
