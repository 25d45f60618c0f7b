"""The messages of one attempt's ranks: posted once, looked for by all. The room is at one keeper,
which the others ask."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ckpt.errors import UsageError

WAIT_S_MAX = 3600.0
"""No question waits longer for a message."""

COUNT_MAX = 2**62
"""A counter beyond this could not be told to anybody any more."""

ValueCallback = Callable[["bytes | None"], object]
"""Takes the value of a key, or None where it was not posted in time; in the keeper's loop."""


class KeeperMailbox(Protocol):
    """What a trainer's keeper does for it; all in the loop, which it never holds up."""

    def post(self, key: str, value: bytes) -> None:
        """Publish a value."""
        ...

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        """Have ``answer`` told the value as soon as it is there; ``owner``: with whom the question
        ends."""
        ...

    def count(self, key: str, amount: int, *, answer: Callable[[int], object]) -> None:
        """Add to a counter, and have ``answer`` told the sum."""
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
    """The room where it is: in this keeper."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, list[_Question]] = {}

    def clear(self) -> None:
        """Forget all messages and questions: a new attempt, or launch, starts with an empty
        room."""
        self._values.clear()
        self._counts.clear()
        self._waiting.clear()

    def post(self, key: str, value: bytes) -> None:
        """See Room."""
        self._values[key] = value
        for question in self._waiting.pop(key, ()):
            question.answer(value)

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        """See Room."""
        value = self._values.get(key)
        if value is not None or wait_s <= 0:
            answer(value)
            return
        until_s = time.monotonic() + min(wait_s, WAIT_S_MAX)
        self._waiting.setdefault(key, []).append(_Question(owner, answer, until_s))

    def count(self, key: str, amount: int, *, answer: Callable[[int], object]) -> None:
        """See Room. Raises UsageError for a sum that no message could bring."""
        total = self._counts.get(key, 0) + amount
        if abs(total) > COUNT_MAX:
            raise UsageError(f"a counter runs over. key={key} amount={amount} limit={COUNT_MAX}")
        self._counts[key] = total
        answer(total)

    def forget(self, key: str) -> None:
        """See Room."""
        self._values.pop(key, None)

    def tick(self, now_s: float) -> float:
        """Answer those that have waited long enough; returns seconds until the next has."""
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
        """Nobody waits there any more."""
        for waiting in self._waiting.values():
            waiting[:] = [one for one in waiting if one.owner is not owner]
