"""Waiting for messages, and the channels of ranks that live in one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckpt.errors import UnavailableError
from ckpt.ipc.mailbox import (
    InProcessMailbox,
    InProcessRoom,
    SoloMailbox,
    WaitingMailbox,
    wait_for_message,
)

WAIT_S = 60.0


def test_waiting_too_long_names_what_was_waited_for() -> None:
    with pytest.raises(
        UnavailableError,
        match=r"waiting for rank 3's answer\. rank=0 timeout_s=0.01; a rank is dead",
    ):
        wait_for_message(SoloMailbox(), "never", timeout_s=0.01, awaited="rank 3's answer")


def test_waiting_stops_when_told() -> None:
    told = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            wait_for_message,
            SoloMailbox(),
            "never",
            timeout_s=None,
            awaited="a word",
            stop=told.is_set,
        )
        told.set()
        with pytest.raises(UnavailableError, match="stopped while waiting for a word"):
            waiting.result(WAIT_S)


def test_message_that_is_there_counts_even_when_told_to_stop() -> None:
    channel = SoloMailbox()
    channel.post("key", b"x")
    assert (
        wait_for_message(channel, "key", timeout_s=0.0, awaited="a word", stop=lambda: True) == b"x"
    )


def test_solo_channel_keeps_messages_and_counts() -> None:
    channel = SoloMailbox()
    assert channel.peek("key") is None
    channel.post("key", b"x")
    assert channel.peek("key") == b"x"
    channel.forget("key")
    channel.forget("key")
    assert channel.peek("key") is None
    assert [channel.count("n", 2), channel.count("n")] == [2, 2]


def test_ranks_in_one_room_share_messages_and_counts() -> None:
    room = InProcessRoom()
    one, other = (InProcessMailbox(room, rank=rank, size=2) for rank in range(2))
    one.post("key", b"x")
    assert other.peek("key") == b"x"
    other.forget("key")
    other.forget("key")
    assert one.peek("key") is None
    assert [one.count("n", 2), other.count("n", 3), one.count("n")] == [2, 5, 5]
    assert InProcessMailbox(InProcessRoom(), rank=0, size=2).count("n") == 0


def test_waiting_in_a_room_ends_with_the_message_and_asks_no_more_than_once() -> None:
    room = InProcessRoom()
    channel = InProcessMailbox(room, rank=0, size=2)
    assert isinstance(channel, WaitingMailbox)
    assert not isinstance(SoloMailbox(), WaitingMailbox)
    assert channel.wait("key", 0.0) is None
    asked = threading.Event()

    def wait() -> bytes:
        asked.set()
        return wait_for_message(channel, "key", timeout_s=WAIT_S, awaited="a word")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        assert asked.wait(WAIT_S)
        InProcessMailbox(room, rank=1, size=2).post("other", b"no")
        InProcessMailbox(room, rank=1, size=2).post("key", b"yes")
        assert waiting.result(WAIT_S) == b"yes"


@pytest.mark.slow
def test_waiting_in_a_room_stops_when_told() -> None:
    told = threading.Event()
    channel = InProcessMailbox(InProcessRoom(), rank=1, size=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            wait_for_message, channel, "never", timeout_s=None, awaited="a word", stop=told.is_set
        )
        told.set()
        with pytest.raises(UnavailableError, match="stopped while waiting for a word"):
            waiting.result(WAIT_S)
