"""Calls that are repeated after a pause because a store did not answer. Each new reason is reported
once. For the loop alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ckpt.errors import CkptError
from ckpt.events import Emit, Event
from ckpt.keeper.uploads.store_log import RETRY_FIRST_S, RETRY_LAST_S


@dataclass(slots=True)
class _Wait:
    pause_s: float
    reported: str = ""
    timers: set[threading.Timer] = field(default_factory=set)


class Retries:
    """Pending calls by kind, which is also the kind of the events. Pauses double from the first to
    RETRY_LAST_S."""

    def __init__(
        self,
        post: Callable[[Callable[[], object]], None],
        emit: Emit,
        *,
        retry_first_s: float = RETRY_FIRST_S,
    ) -> None:
        self._post = post
        self._emit = emit
        self._retry_first_s = retry_first_s
        self._retries: dict[str, _Wait] = {}

    def __len__(self) -> int:
        return sum(len(wait.timers) for wait in self._retries.values())

    def schedule(
        self, kind: str, text: str, error: CkptError | None, call: Callable[[], object]
    ) -> None:
        """Make ``call`` after a pause. ``what`` says for people what waits; without an ``error``
        nothing is reported."""
        wait = self._retries.setdefault(kind, _Wait(self._retry_first_s))
        # Once per reason: a store that is away for an hour would else fill the log.
        if error is not None and str(error) != wait.reported:
            wait.reported = str(error)
            self._emit(Event(kind, f"{text}: {error}", {"code": error.code}, alarm=True))

        def due() -> None:
            if timer in wait.timers:  # else it was stopped meanwhile
                wait.timers.discard(timer)
                call()

        timer = threading.Timer(wait.pause_s, lambda: self._post(due))
        timer.daemon = True
        wait.timers.add(timer)
        wait.pause_s = min(2 * wait.pause_s, RETRY_LAST_S)
        timer.start()

    def succeeded(self, kind: str) -> None:
        """The store answered: the next pause is the first again, and the same reason is reported
        anew."""
        if kind in self._retries:
            self._retries[kind].pause_s, self._retries[kind].reported = self._retry_first_s, ""

    def cancel(self, kind: str) -> None:
        """Drop the pending calls of a kind."""
        wait = self._retries.pop(kind, None)
        for timer in wait.timers if wait is not None else ():
            timer.cancel()
        if wait is not None:
            wait.timers.clear()

    def stop(self) -> None:
        """Drop all pending calls."""
        for kind in list(self._retries):
            self.cancel(kind)
