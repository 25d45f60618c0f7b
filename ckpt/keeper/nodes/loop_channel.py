"""How threads of a keeper speak to the ranks of other nodes: through a room that only its loop may touch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeoutError

from ckpt.keeper.mailbox import Room

ANSWER_S = 10.0
"""A question waits so long for its message. One that is not answered by so long after that was lost; it is asked again."""

NOBODY_S = 0.05
"""Pause after a question that found nothing."""

REPEATED_MAX = 256
"""So many of the last messages are posted again where a line was broken. Only those of the last few snapshots matter."""

Post = Callable[[Callable[[], object]], None]


class LoopChannel:
    """The channel of one rank over ``room``, which is asked for each time: None once that is over. Thread-safe.

    See ``persist.channel.Messages``. What is lost on its way is said again, which counters would not bear.
    """

    stays = True
    """A rank leaves with its node, and that ends the era for all."""

    def __init__(self, post: Post, room: Callable[[], Room | None], *, rank: int, size: int) -> None:
        self._call = post
        self._room = room
        self.rank = rank
        self.size = size
        self._posted: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[Future[bytes | None], float]] = {}
        """Questions on their way and until when they are: who asks again waits for the same answer."""

    def post(self, key: str, value: bytes) -> None:
        """See Messages."""

        def do() -> None:
            self._posted[key] = value
            if len(self._posted) > REPEATED_MAX:
                del self._posted[next(iter(self._posted))]
            if (room := self._room()) is not None:
                room.post(key, value)

        self._call(do)

    def peek(self, key: str) -> bytes | None:
        """See Messages."""
        try:
            return self._ask(key, 0.0).result(ANSWER_S)
        except WaitTimeoutError:
            return None

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """See Waiting."""
        now_s = time.monotonic()
        with self._lock:
            found, until_s = self._asked.get(key, (None, 0.0))
            if found is None or now_s >= until_s:
                found = self._ask(key, ANSWER_S)
                self._asked[key] = (found, now_s + 2 * ANSWER_S)
        try:
            value = found.result(timeout_s)
        except WaitTimeoutError:
            return None
        with self._lock:
            if self._asked.get(key, (None, 0.0))[0] is found:
                del self._asked[key]
        if value is None:
            time.sleep(min(timeout_s, NOBODY_S))  # the room is over, or there is nothing yet
        return value

    def _ask(self, key: str, wait_s: float) -> Future[bytes | None]:
        found: Future[bytes | None] = Future()

        def do() -> None:
            room = self._room()
            if room is None:
                _answer(found, None)
            else:
                room.peek(key, wait_s=wait_s, owner=self, answer=lambda value: _answer(found, value))

        self._call(do)
        return found

    def forget(self, key: str) -> None:
        """See Messages."""

        def do() -> None:
            self._posted.pop(key, None)
            if (room := self._room()) is not None:
                room.forget(key)

        self._call(do)

    def repeat(self) -> None:
        """In the loop: a line is up again, on which something may have been lost."""
        if (room := self._room()) is not None:
            for key, value in self._posted.items():
                room.post(key, value)


def _answer(found: Future[bytes | None], value: bytes | None) -> None:
    if not found.done():
        found.set_result(value)
