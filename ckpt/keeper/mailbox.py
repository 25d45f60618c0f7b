"""The messages between the ranks of one attempt: each is posted once and may be read by all.

A mailbox is at one keeper, that of rank 0's node; other keepers ask it (``nodes.remote_mailbox``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ckpt.errors import UsageError

WAIT_S_MAX = 3600.0
"""The longest that a question waits for a message."""

COUNT_MAX = 2**62
"""The largest sum of a counter: integers of messages have 64 bits."""

ValueCallback = Callable[["bytes | None"], object]
"""Gets the value of a key, or None if it was not posted in time; called in the keeper's loop."""


class KeeperMailbox(Protocol):
    """What a keeper does for a trainer's messages. All in the loop, and without blocking it."""

    def post(self, key: str, value: bytes) -> None:
        """Publish a value."""
        ...

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        """Call ``answer`` with the value as soon as it is there. The question ends with
        ``owner``."""
        ...

    def count(self, key: str, amount: int, *, answer: Callable[[int], object]) -> None:
        """Add to a counter, and call ``answer`` with the sum."""
        ...

    def forget(self, key: str) -> None:
        """Free a message."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    owner: object
    answer: ValueCallback
    until_s: float


class LocalMailbox:
    """A ``KeeperMailbox`` in this keeper."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, list[_Question]] = {}

    def clear(self) -> None:
        """Drop all messages and questions: a new attempt or launch begins with an empty mailbox."""
        self._values.clear()
        self._counts.clear()
        self._waiting.clear()

    def post(self, key: str, value: bytes) -> None:
        self._values[key] = value
        # Popped before answering: an answer may post or ask again.
        for question in self._waiting.pop(key, ()):
            question.answer(value)

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        value = self._values.get(key)
        if value is not None or wait_s <= 0:
            answer(value)
            return
        until_s = time.monotonic() + min(wait_s, WAIT_S_MAX)
        self._waiting.setdefault(key, []).append(_Question(owner, answer, until_s))

    def count(self, key: str, amount: int, *, answer: Callable[[int], object]) -> None:
        """Raises UsageError if the sum exceeds what a message can carry."""
        total = self._counts.get(key, 0) + amount
        if abs(total) > COUNT_MAX:
            raise UsageError(f"counter overflow. key={key} amount={amount} limit={COUNT_MAX}")
        self._counts[key] = total
        answer(total)

    def forget(self, key: str) -> None:
        self._values.pop(key, None)

    def tick(self, now_s: float) -> float:
        """Answer the questions whose time is up; returns the seconds until the next is."""
        left_s = WAIT_S_MAX
        for key, waiting in list(self._waiting.items()):
            for question in list(waiting):
                if question.until_s <= now_s:
                    waiting.remove(question)
                    question.answer(None)
                else:
                    left_s = min(left_s, question.until_s - now_s)
            if not waiting:
                del self._waiting[key]
        return left_s

    def cancel(self, owner: object) -> None:
        """Drop the questions of ``owner``."""
        for waiting in self._waiting.values():
            waiting[:] = [question for question in waiting if question.owner is not owner]
