"""Threads of a keeper ask a room that only its loop touches."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future

from ckpt.keeper.mailbox import LocalMailbox, ValueCallback
from ckpt.keeper.nodes.remote_mailbox import REPEATED_MAX, LoopChannel
from ckpt.threads import start_thread

WAIT_S = 60.0


class Loop:
    """A loop that the test turns, and its room."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.room: LocalMailbox | None = LocalMailbox()
        self.channel = LoopChannel(self.calls.put, lambda: self.room, rank=3, size=4)

    def turn(self) -> None:
        self.calls.get(timeout=WAIT_S)()

    def asked(self, key: str, timeout_s: float) -> Future[bytes | None]:
        return start_thread(lambda: self.channel.wait(key, timeout_s), name="test-wait")


class Counting(LocalMailbox):
    """Counts questions."""

    asked = 0

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        self.asked += 1
        super().peek(key, wait_s=wait_s, owner=owner, answer=answer)


def test_what_is_posted_is_found_by_who_waits() -> None:
    loop = Loop()
    found = loop.asked("a", WAIT_S)
    loop.turn()
    loop.channel.post("a", b"1")
    loop.turn()
    assert found.result(WAIT_S) == b"1"


def test_peek_finds_what_is_there_and_does_not_wait() -> None:
    loop = Loop()
    for value in (None, b"1"):
        found = start_thread(lambda: loop.channel.peek("a"), name="test-peek")
        loop.turn()
        assert found.result(WAIT_S) == value
        loop.channel.post("a", b"1")
        loop.turn()


def test_who_asks_again_waits_for_the_same_answer() -> None:
    loop = Loop()
    loop.room = room = Counting()
    for _ in range(5):
        assert loop.channel.wait("a", 0.001) is None
    loop.turn()
    assert loop.calls.empty()
    room.post("a", b"1")
    assert (loop.channel.wait("a", WAIT_S), room.asked) == (b"1", 1)


def test_room_that_is_over_answers_nothing() -> None:
    loop = Loop()
    loop.room = None
    loop.channel.post("a", b"1")
    loop.channel.forget("b")
    found = loop.asked("a", WAIT_S)
    for _ in range(3):
        loop.turn()
    assert found.result(WAIT_S) is None


def test_last_messages_are_repeated_but_those_that_were_forgotten() -> None:
    loop = Loop()
    for n in range(REPEATED_MAX + 2):
        loop.channel.post(str(n), b"x")
        loop.turn()
    loop.channel.forget("5")
    loop.turn()
    loop.room = room = LocalMailbox()
    loop.channel.repeat()
    there: list[bytes | None] = []
    for key in ("0", "1", "2", "5", str(REPEATED_MAX + 1)):
        room.peek(key, wait_s=0.0, owner=None, answer=there.append)
    assert there == [None, None, b"x", None, b"x"]
