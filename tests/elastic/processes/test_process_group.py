"""A rank that looks for rank 0's listener instead of dialling into the void."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch.distributed as dist

from ckpt.elastic.processes import trainer
from ckpt.elastic.processes.trainer import (
    is_listening,
    rank0_is_local,
    wait_for_listener,
    watch_process_group,
)


def bound() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    return made


def test_only_a_listener_counts() -> None:
    with bound() as one:
        port = one.getsockname()[1]
        assert is_listening(port) is False
        one.listen()
        assert is_listening(port) is True
    assert is_listening(port) is False


def test_waiting_ends_as_soon_as_somebody_listens() -> None:
    with bound() as one:
        timer = threading.Timer(0.05, one.listen)
        timer.start()
        began_s = time.monotonic()
        assert wait_for_listener(one.getsockname()[1], timeout_s=60)
        assert time.monotonic() - began_s < 30
        timer.join()


@pytest.mark.parametrize(("look_s", "looks_max"), [(0.0002, 1500), (0.05, 700)])
def test_long_wait_looks_seldom_and_is_hardly_later_for_it(
    monkeypatch, look_s: float, looks_max: int
) -> None:
    now_s, looks = [0.0], [0]
    listens_s = 120.0

    def look(port: int) -> bool:
        now_s[0] += look_s  # a table of many connections takes long to read
        looks[0] += 1
        return now_s[0] > listens_s

    monkeypatch.setattr(trainer, "is_listening", look)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(
        trainer.time, "sleep", lambda wait_s: now_s.__setitem__(0, now_s[0] + wait_s)
    )
    assert wait_for_listener(1)
    assert looks[0] <= looks_max
    assert looks[0] * look_s < 0.3 * listens_s
    assert now_s[0] < listens_s + 0.5


def test_waiting_ends_where_nobody_comes_and_without_a_port() -> None:
    with bound() as one:
        assert not wait_for_listener(one.getsockname()[1], timeout_s=0.01)
    assert not wait_for_listener(0)


def test_the_users_call_is_made_as_it_is_and_noted(monkeypatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **kwargs: seen.append((args, kwargs))
    )
    monkeypatch.setenv("RANK", "0")
    made: list[bool] = []
    watch_process_group(lambda: made.append(True))
    dist.init_process_group("gloo", world_size=1)
    assert seen == [(("gloo",), {"world_size": 1})]
    assert made == [True]


@pytest.mark.parametrize(
    ("said", "looks"),
    [
        ({"RANK": "1", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"RANK": "1", "MASTER_ADDR": "localhost", "GROUP_RANK": "1"}, True),
        ({"RANK": "1", "MASTER_ADDR": "10.0.0.7", "GROUP_RANK": "0"}, True),
        ({"RANK": "1", "MASTER_ADDR": "10.0.0.7", "GROUP_RANK": "1"}, False),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, False),
        ({}, False),
    ],
)
def test_rank_zero_is_looked_for_only_where_it_is_on_this_machine(
    said: dict[str, str], looks: bool
) -> None:
    assert rank0_is_local(said) is looks
