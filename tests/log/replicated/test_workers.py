"""Stores asked by real threads: nobody waits for one that hangs, each store gets its calls in
order, an exit waits for none."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ckpt.backends.base import Stat
from ckpt.backends.memory import MemoryBackend
from ckpt.format import keys
from ckpt.format.store import JobRecord
from ckpt.log import replicas as lanes_room
from ckpt.log.quorum import StoreRecords
from ckpt.log.replicas import NO_ANSWER_YET, LogReplicas, ThreadWorkers
from ckpt.testing.faults import CountingBackend

WAIT_S = 30.0
"""Longer than anything here takes: whoever waits so long waits for ever."""


class Gate:
    """A store that answers once it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.calls: list[int] = []

    def call(self, answer: int) -> int:
        self.entered.set()
        assert self.open.wait(WAIT_S)
        self.calls.append(answer)
        return answer


@pytest.fixture
def gate() -> Gate:
    return Gate()


def two(answers: object) -> bool:
    assert isinstance(answers, dict)
    return len(answers) >= 2


@pytest.mark.slow
def test_a_store_that_hangs_delays_no_answer_once_enough_have_answered(gate: Gate) -> None:
    lanes = ThreadWorkers()
    for _ in range(3):
        found = lanes.ask({0: lambda: 10, 1: lambda: gate.call(11), 2: lambda: 12}, two)
        assert found == {0: 10, 2: 12}
    gate.open.set()


@pytest.mark.slow
def test_what_a_slow_store_is_asked_waits_in_order_and_is_done_when_it_recovers(gate: Gate) -> None:
    lanes = ThreadWorkers()
    for number in range(5):
        lanes.ask({0: lambda: 0, 1: lambda number=number: gate.call(number), 2: lambda: 2}, two)
    assert gate.calls == []
    gate.open.set()
    found = lanes.ask(
        {0: lambda: 0, 1: lambda: gate.call(5), 2: lambda: 2}, lambda answers: len(answers) == 3
    )
    assert found[1] == 5
    assert gate.calls == [0, 1, 2, 3, 4, 5]


def test_where_too_few_answered_the_others_are_waited_for(gate: Gate) -> None:
    lanes = ThreadWorkers()
    answers: list[dict[int, int]] = []

    def ask() -> None:
        answers.append(lanes.ask({0: lambda: 0, 1: lambda: gate.call(1)}, two))

    asking = threading.Thread(target=ask)
    asking.start()
    assert gate.entered.wait(WAIT_S)
    assert not answers
    gate.open.set()
    asking.join(WAIT_S)
    assert answers == [{0: 0, 1: 1}]


def test_a_lane_that_has_not_moved_for_long_is_not_waited_for_at_all(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = ThreadWorkers()
    lanes.ask({0: lambda: 0, 1: lambda: gate.call(1), 2: lambda: 2}, two)
    monkeypatch.setattr(lanes_room, "STUCK_S", 0.0)
    monkeypatch.setattr(lanes_room, "GRACE_S_MIN", 10 * WAIT_S)
    monkeypatch.setattr(lanes_room, "GRACE_S_MAX", 10 * WAIT_S)
    began_s = time.monotonic()
    assert lanes.ask({0: lambda: 0, 1: lambda: gate.call(2), 2: lambda: 2}, two) == {0: 0, 2: 2}
    assert time.monotonic() - began_s < 5 * WAIT_S, (
        "it would have waited twenty times as long as this may take"
    )
    gate.open.set()


@pytest.mark.slow
def test_a_lane_takes_no_more_than_its_limit_and_goes_on_when_there_is_room(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_room, "WAITING_MAX", 3)
    lanes = ThreadWorkers()
    lanes.ask({0: lambda: 0, 1: lambda: gate.call(0), 2: lambda: 2}, two)
    assert gate.entered.wait(WAIT_S), "the first one is being made, and waits no more"
    for number in range(1, 9):
        lanes.ask({0: lambda: 0, 1: lambda number=number: gate.call(number), 2: lambda: 2}, two)
    gate.open.set()
    while True:  # what comes after there is room again is done after what waited
        found = lanes.ask({1: lambda: gate.call(99)}, lambda answers: len(answers) == 1)
        if found:
            break
    assert gate.calls == [0, 1, 2, 3, 99]


def test_a_call_that_raises_is_raised_to_who_asked() -> None:
    def fail() -> int:
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        ThreadWorkers().ask({0: fail}, lambda answers: len(answers) == 1)


def test_threads_end_with_their_work() -> None:
    lanes = ThreadWorkers()
    lanes.ask({n: lambda: 1 for n in range(3)}, lambda answers: len(answers) == 3)
    for thread in threading.enumerate():
        if thread.name.startswith("ckpt-log-"):
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_loser_of_a_vote_waits_for_no_store_that_hangs(gate: Gate) -> None:
    class Hanging(CountingBackend):
        def put(self, key: str, data: object, *, create_only: bool = False) -> None:
            gate.call(0)

    stores = [MemoryBackend("0"), MemoryBackend("1"), Hanging(MemoryBackend("2"))]
    ids = {number: f"{number:032x}" for number in range(3)}
    for number, store in enumerate(stores[:2]):
        store.put(keys.JOB_KEY, [JobRecord(job="j", store_id=ids[number]).encode()])
        store.put("log/x", [b"theirs"])
    found = LogReplicas(stores).create("log/x", b"mine", ids, 2)
    gate.open.set()
    assert (found[0], found[1], found[2]) == (b"theirs", b"theirs", NO_ANSWER_YET)


@pytest.mark.slow
def test_a_store_that_came_back_empty_is_no_reason_to_do_without_one_that_is_slow(
    gate: Gate,
) -> None:
    class Slow(CountingBackend):
        def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
            gate.call(0)
            return super().list(prefix, after=after)

    stores = [MemoryBackend("empty"), MemoryBackend("1"), Slow(MemoryBackend("2"))]
    for number, store in enumerate(stores[1:], 1):
        store.put(
            keys.JOB_KEY, [JobRecord(job="j", store_id=f"{number:032x}", log_id="0" * 32).encode()]
        )
    opening = threading.Timer(3 * lanes_room.GRACE_S_MIN, gate.open.set)
    opening.start()
    found = LogReplicas(stores).read_logs(
        -1, "0" * 32, of=[f"{number:032x}" for number in range(3)]
    )
    opening.join()
    assert [one.store_id for one in found if isinstance(one, StoreRecords)] == [
        "",
        f"{1:032x}",
        f"{2:032x}",
    ]


EXIT = """
import threading
from ckpt.log.quorum import StoreRecords
from ckpt.log.replicas import ThreadWorkers
lanes = ThreadWorkers()
found = lanes.ask({0: lambda: 0, 1: lambda: threading.Event().wait(), 2: lambda: 2}, lambda answers: len(answers) >= 2)
print(sorted(found), flush=True)
"""


def test_an_exit_waits_for_no_lane() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=WAIT_S * 4, check=True
    )
    assert done.stdout.strip() == "[0, 2]"
