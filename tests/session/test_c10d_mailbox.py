"""Meetings over torch's own stores, which may hold what dead attempts left; ranks are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import UnavailableError, UsageError
from ckpt.ipc.mailbox import SoloMailbox, wait_for_message
from ckpt.session.c10d_mailbox import StoreMailbox, connect_ranks, join_handshake, world_of_process


@pytest.fixture(params=["hash", "tcp"])
def stores(request: pytest.FixtureRequest) -> Callable[[], dist.Store]:
    """Gives each rank its handle on one fresh store."""
    if request.param == "hash":
        store = dist.HashStore()
        return lambda: store
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    handles = [server]  # the server lives as long as the test

    def handle() -> dist.Store:
        made = dist.TCPStore(
            "127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20)
        )
        handles.append(made)
        return made

    return handle


def _meet_all(stores, size: int, *, name: str = "job") -> list[StoreMailbox]:
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(
                lambda rank: join_handshake(
                    stores(), rank=rank, size=size, name=name, timeout_s=20
                ),
                range(size),
            )
        )


def _same_room(channels: list[StoreMailbox]) -> bool:
    channels[0].post("hello", b"from rank 0")
    return all(channel.peek("hello") == b"from rank 0" for channel in channels)


def test_ranks_meet_in_one_room(stores) -> None:
    channels = _meet_all(stores, 4)
    assert [channel.rank for channel in channels] == [0, 1, 2, 3]
    assert _same_room(channels)


def test_two_meetings_under_one_name_have_rooms_of_their_own(stores) -> None:
    first = _meet_all(stores, 3)
    first[0].post("key", b"old")
    second = _meet_all(stores, 3)
    assert _same_room(second)
    assert all(channel.peek("key") is None for channel in second)
    assert all(channel.peek("key") == b"old" for channel in first)


def test_stale_badges_of_a_dead_attempt_are_not_waited_for(stores) -> None:
    store = stores()
    for rank in range(3):
        store.set(f"ckpt/lobby/job/badge/{rank}", f"dead{rank}")
    store.set("ckpt/lobby/job/to/dead1", '{"room":"dead","guests":[]}')
    channels = _meet_all(stores, 3)
    assert _same_room(channels)


def test_rank_that_comes_late_after_its_stale_badge_was_invited_enters_the_same_room(
    stores,
) -> None:
    store = stores()
    store.set("ckpt/lobby/job/badge/1", "dead")
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(join_handshake, stores(), rank=0, size=2, name="job", timeout_s=20)
        _until(lambda: store.check(["ckpt/lobby/job/to/dead"]))
        one = join_handshake(stores(), rank=1, size=2, name="job", timeout_s=20)
        assert _same_room([zero.result(20), one])


def test_rank_that_dies_while_others_wait_is_replaced(stores) -> None:
    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(UnavailableError, match="not all ranks joined"):
            join_handshake(
                stores(), rank=1, size=3, name="job", timeout_s=0.0
            )  # shows its badge, then dies
        zero = pool.submit(join_handshake, stores(), rank=0, size=3, name="job", timeout_s=20)
        two = pool.submit(join_handshake, stores(), rank=2, size=3, name="job", timeout_s=20)
        one = pool.submit(join_handshake, stores(), rank=1, size=3, name="job", timeout_s=20)
        assert _same_room([zero.result(20), one.result(20), two.result(20)])


def test_rank_0_that_dies_and_comes_again_gathers_those_who_still_wait(stores) -> None:
    with pytest.raises(UnavailableError):
        join_handshake(stores(), rank=0, size=2, name="job", timeout_s=0.0)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(join_handshake, stores(), rank=1, size=2, name="job", timeout_s=20)
        zero = pool.submit(join_handshake, stores(), rank=0, size=2, name="job", timeout_s=20)
        assert _same_room([zero.result(20), one.result(20)])


def test_missing_rank_ends_the_wait_with_what_to_do() -> None:
    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(
            UnavailableError, match=rf"name=job rank={rank} world_size=3 timeout_s=0.01; every rank"
        ):
            join_handshake(store, rank=rank, size=3, name="job", timeout_s=0.01)


def test_names_keep_meetings_apart(stores) -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [(rank, name) for name in ("a", "b") for rank in (0, 1)]
        made = list(
            pool.map(
                lambda call: join_handshake(
                    stores(), rank=call[0], size=2, name=call[1], timeout_s=20
                ),
                calls,
            )
        )
    made[0].post("key", b"a")
    assert made[1].peek("key") == b"a"
    assert made[2].peek("key") is None
    assert made[3].peek("key") is None


def test_every_byte_survives(stores) -> None:
    a, b = _meet_all(stores, 2)
    every = bytes(range(256))
    a.post("bytes", every)
    a.post("empty", b"")
    a.post("long", every * 4096)
    for key, value in (("bytes", every), ("empty", b""), ("long", every * 4096)):
        # A TCP store acknowledges no post, so another connection may be quicker.
        assert wait_for_message(b, key, timeout_s=20, awaited=key) == value


@given(st.binary(max_size=64))
def test_any_message_survives(message: bytes) -> None:
    channel = StoreMailbox(dist.HashStore(), rank=0, size=1, prefix="r")
    channel.post("key", message)
    assert channel.peek("key") == message


def test_counters_add_up_and_forgotten_messages_are_gone(stores) -> None:
    a, b = _meet_all(stores, 2)
    assert a.count("n") == 0
    assert a.count("n", 2) == 2
    assert b.count("n", 3) == 5
    assert a.count("n") == 5
    a.post("key", b"x")
    b.forget("key")
    a.forget("never was")
    assert a.peek("key") is None


def test_waiting_ends_when_the_message_comes(stores) -> None:
    a, b = _meet_all(stores, 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_message, b, "word", timeout_s=20, awaited="a word")
        a.post("word", b"now")
        assert waiting.result(20) == b"now"


def test_plain_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_of_process() == (0, 1)
    assert isinstance(connect_ranks(name="job"), SoloMailbox)


def test_several_ranks_without_any_way_to_speak_are_told_to_make_a_process_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(
        UsageError, match=r"rank=1; call torch\.distributed\.init_process_group\(\)"
    ):
        connect_ranks(name="job")


def test_ranks_under_a_launcher_meet_through_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(join_handshake, server, rank=0, size=2, name="job", timeout_s=20)
        one = connect_ranks(name="job")
        zero.result(20).post("key", b"x")
    assert one.rank == 1
    assert one.peek("key") == b"x"


def _until(condition: Callable[[], bool], *, wait_s: float = 20.0) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        pause.wait(0.002)
