"""A clock that jumps from event to event, and processes that wait on it for answers. The same order
on every machine."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

Step = Generator[float, "tuple[int, object] | None", None]
"""A process: yields until when it waits; gets an answer, or None when the time is up."""


@dataclass
class Process:
    """One operation under way."""

    step: Step
    turn: int = 0
    over: bool = False
    waiting: bool = False
    answers: list[tuple[int, object]] = field(default_factory=list)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        self.now_s = until_s

    def start(self, step: Callable[[Process], Step]) -> None:
        process = Process(None)  # type: ignore[arg-type]
        process.step = step(process)
        self._resume(process, None)

    def _resume(self, process: Process, answer: tuple[int, object] | None) -> None:
        process.turn += 1
        process.waiting = False
        while True:
            try:
                until_s = process.step.send(answer if process.turn > 1 else None)
            except StopIteration:
                process.over = True
                return
            if process.answers:
                answer = process.answers.pop(0)
                process.turn += 1
                continue
            break
        turn, process.waiting = process.turn, True
        self.at(
            max(until_s, self.now_s),
            lambda: self._resume(process, None) if process.turn == turn else None,
        )

    def answer(self, process: Process, place: int, answer: object) -> None:
        if process.over:
            return
        if process.waiting:
            self._resume(process, (place, answer))
        else:
            process.answers.append((place, answer))
