"""Limits: on how fast this node sends, as token buckets and rates as people write them; and on how
often an alarm is told.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt.errors import UsageError
from ckpt.events import Emit, Event

BURST_S = 0.05
"""How many seconds' worth of bytes may be sent at once."""


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """A token bucket as an immutable value: ``free_bytes`` may be sent at ``at_s``.

    ``free_bytes`` is negative if more was sent than was free; sending then waits until it is 0
    again. ``rate`` is in bytes a second; None: no limit.
    """

    rate: float | None
    at_s: float
    free_bytes: float = 0.0

    def at(self, now_s: float) -> TokenBucket:
        """The bucket at a later time, filled at its rate up to BURST_S of it.

        A clock that goes backwards adds nothing.
        """
        if self.rate is None:
            return replace(self, at_s=now_s, free_bytes=0.0)
        earned_bytes = max(0.0, now_s - self.at_s) * self.rate
        free_bytes = min(self.free_bytes + earned_bytes, self.rate * BURST_S)
        return replace(self, at_s=max(now_s, self.at_s), free_bytes=free_bytes)

    def with_rate(self, rate: float | None) -> TokenBucket:
        """The bucket with another rate from now on. What is owed stays owed."""
        return replace(self, rate=rate)

    def taken(self, size_bytes: int) -> TokenBucket:
        """The bucket after ``size_bytes`` were sent."""
        return self if self.rate is None else replace(self, free_bytes=self.free_bytes - size_bytes)

    @property
    def wait_s(self) -> float:
        """How long to wait before sending. A block larger than a burst is sent whole."""
        return 0.0 if self.rate is None or self.free_bytes >= 0 else -self.free_bytes / self.rate


RATE_BYTES_MIN = 1 << 20
"""Lowest rate of a limit, in bytes a second: below it servers would close the connection as
stalled."""

BLOCK_BYTES_MIN = 64 << 10


class RateLimit:
    """A limit in bytes a second for all senders that share it. None: no limit. Thread-safe."""

    def __init__(
        self, bytes_per_s: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._change = threading.Condition()
        self._bucket = TokenBucket(_checked(bytes_per_s), clock())

    @property
    def bytes_per_s(self) -> float | None:
        """The limit in force."""
        return self._bucket.rate

    def set(self, bytes_per_s: float | None) -> None:
        """Change the limit, also for senders that are waiting now. Raises UsageError."""
        with self._change:
            self._bucket = self._bucket.at(self._clock()).with_rate(_checked(bytes_per_s))
            self._change.notify_all()

    def block_bytes(self, most: int) -> int:
        """How much to send at once, at most ``most``, so that the rate is even."""
        rate = self._bucket.rate
        return most if rate is None else min(most, max(BLOCK_BYTES_MIN, int(rate * BURST_S)))

    def take(self, size_bytes: int) -> float:
        """Wait until ``size_bytes`` may be sent; returns the seconds waited.

        A block larger than a burst is sent as soon as nothing is owed.
        """
        began_s = self._clock()
        with self._change:
            while (wait_s := self._now().wait_s) > 0:
                self._change.wait(wait_s)
            self._bucket = self._bucket.taken(size_bytes)
        return self._clock() - began_s

    def _now(self) -> TokenBucket:
        self._bucket = self._bucket.at(self._clock())
        return self._bucket


def _checked(bytes_per_s: float | None) -> float | None:
    if bytes_per_s is not None and not bytes_per_s >= RATE_BYTES_MIN:
        raise UsageError(
            f"rate limit too low. bytes_per_s={bytes_per_s} min={RATE_BYTES_MIN}; pass None for no "
            "limit"
        )
    return bytes_per_s


# ---- rates as people write them

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_rate(text: str) -> float:
    """Bytes a second from text such as ``50MiB``. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"not a rate. rate={text}; write 50MiB for 50 MiB a second")
    return float(match[1]) * 2.0 ** _POWERS[match[2].upper()]


# ---- alarms that come again and again

REPEAT_S = 60.0
"""How often an alarm that comes again and again is repeated."""

ALARMS_KNOWN_MAX = 256

_NUMBER = re.compile(r"[0-9]+")


@dataclass(slots=True)
class _Repetition:
    """One alarm that comes again: when it was passed on last, and how often it came since."""

    passed_s: float
    held_back: int = 0


class AlarmLimiter:
    """An ``Emit`` that passes an alarm on once and its repetitions once in ``repeat_s`` seconds,
    with their number.

    Two alarms of a kind are the same if they have one error code and one store, or, without a
    code, if their texts differ in numbers only. Other events pass. Thread-safe.
    """

    def __init__(
        self,
        emit: Emit,
        *,
        repeat_s: float = REPEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._emit = emit
        self._repeat_s = repeat_s
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], _Repetition] = {}

    def __call__(self, event: Event) -> None:
        passed = self._passed(event) if event.alarm else event
        if passed is not None:
            self._emit(passed)

    def _passed(self, event: Event) -> Event | None:
        code, store = event.facts.get("code"), event.facts.get("store")
        same = _NUMBER.sub("#", event.text) if code is None else f"{code} {store}"
        key, now_s = (event.kind, same), self._clock()
        with self._lock:
            known = self._known.get(key)
            if known is not None and now_s - known.passed_s < self._repeat_s:
                known.held_back += 1
                return None
            self._known.pop(key, None)  # the newest are last
            self._known[key] = _Repetition(now_s)
            if len(self._known) > ALARMS_KNOWN_MAX:
                self._known.pop(next(iter(self._known)))
        if known is None or not known.held_back:
            return event
        waited_s = now_s - known.passed_s
        return replace(
            event, text=f"{event.text} ({known.held_back} more of these in {waited_s:.0f} s)"
        )
