"""Calls over one connection find their answers, whoever reads them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckpt.errors import FencedError, IntegrityError, UnavailableError
from ckpt.ipc.client import KeeperClient
from ckpt.ipc.frames import MessageSocket, close_fds
from ckpt.ipc.messages import (
    Bye,
    Done,
    Fenced,
    GetBoard,
    Message,
    Number,
    Peek,
    Post,
    RemoteError,
    SlotCreated,
    Value,
)


@pytest.fixture
def ends_of_a_wire() -> Iterator[tuple[KeeperClient, MessageSocket]]:
    mine, theirs = socket.socketpair()
    calls, keeper = KeeperClient(MessageSocket(mine)), MessageSocket(theirs)
    yield calls, keeper
    calls.close()
    keeper.close()


def served(keeper: MessageSocket, answer: Callable[[Message, list[int]], None]) -> threading.Thread:
    def serve() -> None:
        while (got := keeper.receive()) is not None and not isinstance(got[0], Bye):
            answer(*got)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def take(keeper: MessageSocket) -> Message:
    got = keeper.receive(20)
    assert got is not None
    return got[0]


def test_answers_that_overtake_each_other_find_their_callers(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(calls.ask, Peek(key=str(n)), Value, timeout_s=20) for n in range(8)]
        got = [take(keeper) for _ in range(8)]
        assert sorted(message.id for message in got) == list(range(1, 9))
        for message in reversed(got):
            assert isinstance(message, Peek)
            keeper.send(Value(id=message.id, value=message.key.encode()))
        assert [one.result(20).value for one in asked] == [str(n).encode() for n in range(8)]


def test_many_threads_share_one_connection(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    thread = served(
        keeper, lambda message, _: keeper.send(Value(id=message.id, value=message.key.encode()))
    )

    def ask(name: int) -> None:
        for at in range(200):
            assert calls.ask(Peek(key=f"{name} {at}"), Value).value == f"{name} {at}".encode()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    calls.close()
    thread.join(10)


def test_descriptors_travel_both_ways(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    thread = served(
        keeper, lambda message, fds: (keeper.send(Done(id=message.id), fds), close_fds(fds))[1]
    )
    fd = os.memfd_create("slot")
    os.write(fd, b"slot")
    reply, came = calls.call_fds(SlotCreated(index=0, size_bytes=4), [fd])
    assert isinstance(reply, Done)
    assert os.pread(came[0], 4, 0) == b"slot"
    close_fds(came)
    calls.call(GetBoard(), [fd])  # closes what it isn't asked for
    os.close(fd)
    calls.close()
    thread.join(10)


def test_a_failed_call_raises_the_keepers_error(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(calls.ask, Peek(key="k"), Value)
        keeper.send(
            Done(id=take(keeper).id, error=RemoteError("fenced", "a newer epoch is open.", 2))
        )
        with pytest.raises(FencedError, match="a newer epoch is open"):
            asked.result(20)


def test_an_answer_of_another_kind_is_refused(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(calls.ask, Peek(key="k"), Value)
        keeper.send(Number(id=take(keeper).id, number=1))
        with pytest.raises(IntegrityError, match="wanted=Value received=Number"):
            asked.result(20)


def test_a_call_that_is_given_up_leaves_the_next_one_alone(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with pytest.raises(UnavailableError, match="time limit"):
        calls.call(Peek(key="late"), timeout_s=0.01)
    late = take(keeper)
    fd = os.memfd_create("late")
    keeper.send(Value(id=late.id, value=b"late"), [fd])
    os.close(fd)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(calls.ask, Peek(key="next"), Value)
        keeper.send(Value(id=take(keeper).id, value=b"next"))
        assert asked.result(20).value == b"next"


def test_who_waits_behind_a_reader_gives_up_in_time_too(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(calls.ask, Peek(key="long"), Value)
        message = take(keeper)
        with pytest.raises(UnavailableError, match="time limit"):
            calls.call(Peek(key="short"), timeout_s=0.01)
        keeper.send(Value(id=message.id, value=b"long"))
        assert reader.result(20).value == b"long"


def test_the_next_waiter_reads_when_the_reader_has_its_answer(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(calls.ask, Peek(key="first"), Value)
        one = take(keeper)
        second = pool.submit(calls.ask, Peek(key="second"), Value)
        other = take(keeper)
        keeper.send(Value(id=one.id, value=b"1"))
        assert first.result(20).value == b"1"
        keeper.send(Value(id=other.id, value=b"2"))
        assert second.result(20).value == b"2"


def test_all_calls_fail_when_the_keeper_is_gone(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(calls.call, Peek(key=str(n))) for n in range(4)]
        for _ in asked:
            take(keeper)
        keeper.close()
        for one in asked:
            with pytest.raises(UnavailableError, match="lost"):
                one.result(20)
    with pytest.raises(UnavailableError, match="lost"):
        calls.send(Post(key="k", value=b""))


def test_a_word_of_the_keeper_belongs_elsewhere(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    keeper.send(Fenced(text="newer"))
    with pytest.raises(IntegrityError, match="only replies"):
        calls.call(Peek(key="k"))


def test_closing_says_bye_and_ends_calls(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(calls.call, Peek(key="k"))
        take(keeper)
        calls.close()
        with pytest.raises(UnavailableError):
            asked.result(20)
    assert take(keeper) == Bye()
    assert keeper.receive(20) is None
    calls.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_forgets_without_a_word(ends_of_a_wire) -> None:
    calls, keeper = ends_of_a_wire
    child = os.fork()
    if child == 0:
        calls.forget_after_fork()
        try:
            calls.call(Peek(key="k"))
        except UnavailableError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    calls.send(Post(key="k", value=b"parent"))
    assert take(keeper) == Post(key="k", value=b"parent")
