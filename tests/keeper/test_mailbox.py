"""The messages of an attempt's ranks, here and at another keeper."""

from __future__ import annotations

import time
from collections import deque

import pytest

from ckpt.cluster.mesh import messages as said
from ckpt.errors import UsageError
from ckpt.keeper.mailbox import COUNT_MAX, LocalMailbox
from ckpt.keeper.nodes.remote_mailbox import (
    EARLY_MAX,
    RemoteMailbox,
    RemoteMailboxes,
    attempt_mailbox,
    uploads_mailbox,
)


class Answers:
    """What was answered, in order."""

    def __init__(self) -> None:
        self.got: list[object] = []

    def __call__(self, value: object) -> None:
        self.got.append(value)


def test_value_is_there_at_once_or_as_soon_as_it_is_posted() -> None:
    room, answers = LocalMailbox(), Answers()
    room.peek("k", wait_s=0.0, owner=None, answer=answers)
    room.peek("k", wait_s=9.0, owner=None, answer=answers)
    assert answers.got == [None]
    room.post("k", b"v")
    room.peek("k", wait_s=9.0, owner=None, answer=answers)
    assert answers.got == [None, b"v", b"v"]


def test_question_ends_when_its_time_is_over_or_its_owner_gone() -> None:
    room, answers, owner = LocalMailbox(), Answers(), object()
    room.peek("k", wait_s=5.0, owner=None, answer=answers)
    room.peek("k", wait_s=5.0, owner=owner, answer=answers)
    room.cancel(owner)
    now_s = time.monotonic()
    assert 4.0 < room.tick(now_s) <= 5.0
    room.tick(now_s + 6.0)
    assert answers.got == [None]


def test_counters_add_up_and_forgotten_values_are_gone() -> None:
    room, answers = LocalMailbox(), Answers()
    room.count("n", 2, answer=answers)
    room.count("n", 3, answer=answers)
    room.post("k", b"v")
    room.forget("k")
    room.peek("k", wait_s=0.0, owner=None, answer=answers)
    room.post("k", b"w")
    room.clear()
    room.peek("k", wait_s=0.0, owner=None, answer=answers)
    room.count("n", 1, answer=answers)
    assert answers.got == [2, 5, None, None, 1]


def test_counter_that_would_run_over_is_refused_and_counts_on() -> None:
    room, answers = LocalMailbox(), Answers()
    room.count("n", COUNT_MAX, answer=answers)
    for amount in (1, 2**64 - 1, -(2**63) - COUNT_MAX):
        with pytest.raises(UsageError, match="overflow"):
            room.count("n", amount, answer=answers)
    room.count("n", -5, answer=answers)
    assert answers.got == [COUNT_MAX, COUNT_MAX - 5]


class Net:
    """Two keepers' rooms, and what is on its way between them."""

    def __init__(self) -> None:
        self.on_the_way: deque[tuple[str, str, said.MeshMessage]] = deque()
        self.up = True
        self.ends = {
            name: RemoteMailboxes(lambda to, word, name=name: self._say(name, to, word))
            for name in ("root", "far")
        }

    def _say(self, source: str, target: str, word: said.MeshMessage) -> bool:
        if self.up:
            self.on_the_way.append((source, target, word))
        return self.up

    def carry(self) -> None:
        while self.on_the_way:
            source, target, word = self.on_the_way.popleft()
            self.ends[target].receive(source, word)  # type: ignore[arg-type]


@pytest.fixture
def net() -> Net:
    return Net()


def test_far_room_is_the_same_room(net: Net) -> None:
    own, answers = LocalMailbox(), Answers()
    net.ends["root"].serve(attempt_mailbox(3), own)
    far = RemoteMailbox(net.ends["far"], attempt_mailbox(3), "root")
    far.peek("late", wait_s=9.0, owner=None, answer=answers)
    far.post("k", b"v")
    far.peek("k", wait_s=0.0, owner=None, answer=answers)
    far.count("n", 4, answer=answers)
    net.carry()
    assert answers.got == [b"v", 4]
    own.post("late", b"x")
    net.carry()
    far.forget("k")
    far.peek("k", wait_s=0.0, owner=None, answer=answers)
    net.carry()
    assert answers.got == [b"v", 4, b"x", None]


def test_words_of_a_room_that_is_not_open_yet_wait_for_it_in_order(net: Net) -> None:
    own, answers = LocalMailbox(), Answers()
    far = RemoteMailbox(net.ends["far"], attempt_mailbox(4), "root")
    far.post("k", b"1")
    far.post("k", b"2")
    far.peek("k", wait_s=0.0, owner=None, answer=answers)
    net.carry()
    net.ends["root"].serve(attempt_mailbox(4), own)
    net.carry()
    assert answers.got == [b"2"]


def test_words_of_a_dead_attempt_reach_no_later_room(net: Net) -> None:
    first, second, answers = LocalMailbox(), LocalMailbox(), Answers()
    net.ends["root"].serve(attempt_mailbox(1), first)
    old = RemoteMailbox(net.ends["far"], attempt_mailbox(1), "root")
    old.post("k", b"old")
    old.peek("never", wait_s=60.0, owner=None, answer=answers)
    net.ends["root"].new_epoch(2, generation=1)
    net.ends["far"].new_epoch(2, generation=1)
    net.ends["root"].serve(attempt_mailbox(2), second)
    net.carry()
    first.post("never", b"x")
    net.carry()
    RemoteMailbox(net.ends["far"], attempt_mailbox(2), "root").peek(
        "k", wait_s=0.0, owner=None, answer=answers
    )
    net.carry()
    assert answers.got == [None]


def test_room_of_uploads_outlives_attempts(net: Net) -> None:
    own, answers = LocalMailbox(), Answers()
    net.ends["root"].serve("uploads/1", own)
    far = RemoteMailbox(net.ends["far"], "uploads/1", "root")
    far.peek("receipt", wait_s=60.0, owner=None, answer=answers)
    net.carry()
    net.ends["far"].new_epoch(2, generation=1)
    net.ends["root"].new_epoch(2, generation=1)
    own.post("receipt", b"r")
    net.carry()
    assert answers.got == [b"r"]


def test_room_of_uploads_ends_with_its_era(net: Net) -> None:
    own, answers = LocalMailbox(), Answers()
    net.ends["root"].serve(uploads_mailbox(1), own)
    far = RemoteMailbox(net.ends["far"], uploads_mailbox(1), "root")
    far.peek("receipt", wait_s=60.0, owner=None, answer=answers)
    net.carry()
    for end in net.ends.values():
        end.new_epoch(3, generation=3)
    own.post("receipt", b"r")
    net.carry()
    assert answers.got == []


@pytest.mark.slow
def test_early_words_are_bounded(net: Net) -> None:
    far = RemoteMailbox(net.ends["far"], attempt_mailbox(9), "root")
    for n in range(EARLY_MAX + 5):
        far.post(str(n), b"")
    net.carry()
    own, answers = LocalMailbox(), Answers()
    net.ends["root"].serve(attempt_mailbox(9), own)
    own.peek(str(EARLY_MAX), wait_s=0.0, owner=None, answer=answers)
    own.peek(str(EARLY_MAX - 1), wait_s=0.0, owner=None, answer=answers)
    assert answers.got == [None, b""]
