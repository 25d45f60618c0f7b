"""Lanes, mailboxes, memory and loans: what lets a call hang without holding anybody up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.replicated.stores import WAIT_S, Lending, wait_until

from ckpt.backends.base import Buffer
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated import store_threads as lanes
from ckpt.backends.replicated.buffers import (
    REUSED_BYTES_MIN,
    Borrower,
    Loan,
    ReplicaMemory,
    TakenBackError,
    borrower_of,
    is_immutable,
)
from ckpt.backends.replicated.group import AnswerQueue
from ckpt.backends.replicated.store_threads import StoreThreads
from ckpt.testing.faults import CountingBackend, FaultyBackend


def test_jobs_run_side_by_side_up_to_the_number_of_threads() -> None:
    lane = StoreThreads("lane", threads_max=3, jobs_max=100)
    gate, inside = threading.Event(), threading.Semaphore(0)
    done: list[int] = []

    def job(number: int) -> None:
        inside.release()
        gate.wait(WAIT_S)
        done.append(number)

    for number in range(7):
        assert lane.submit(lambda number=number: job(number))
    for _ in range(3):
        assert inside.acquire(timeout=WAIT_S)
    assert not inside.acquire(timeout=0.05)
    gate.set()
    assert lane.close(WAIT_S)
    assert sorted(done) == list(range(7))


def test_jobs_of_one_key_keep_their_order_and_do_not_hold_up_others() -> None:
    lane = StoreThreads("lane", threads_max=4, jobs_max=100)
    gate, done = threading.Event(), []
    lane.submit(lambda: (gate.wait(WAIT_S), done.append("a0"))[0], key="a")
    for number in (1, 2):
        lane.submit(lambda number=number: done.append(f"a{number}"), key="a")
    other = threading.Event()
    lane.submit(other.set, key="b")
    assert other.wait(WAIT_S)
    assert done == []
    gate.set()
    assert lane.close(WAIT_S)
    assert done == ["a0", "a1", "a2"]


def test_full_or_closed_lane_refuses() -> None:
    lane = StoreThreads("lane", threads_max=1, jobs_max=2)
    gate = threading.Event()
    assert lane.submit(lambda: gate.wait(WAIT_S) and None)
    assert lane.submit(lambda: None)
    assert not lane.has_room
    assert not lane.submit(lambda: None)
    gate.set()
    assert lane.close(WAIT_S)
    assert not lane.submit(lambda: None)


def test_close_does_not_wait_for_a_hanging_job_longer_than_told() -> None:
    lane, gate = StoreThreads("lane", threads_max=1, jobs_max=2), threading.Event()
    lane.submit(lambda: gate.wait(WAIT_S) and None)
    assert not lane.close(0.01)
    gate.set()
    assert lane.close(WAIT_S)


def test_calls_that_never_come_back_do_not_use_up_the_threads() -> None:
    lane, gate = StoreThreads("lane", threads_max=2, jobs_max=99), threading.Event()
    for _ in range(2):
        lane.submit(lambda: gate.wait(WAIT_S) and None)
    done = threading.Event()
    lane.submit(done.set)
    assert not done.wait(0.05)
    lane.thread_lost()
    assert done.wait(WAIT_S)
    lane.thread_lost()
    together = threading.Barrier(3)
    for _ in range(2):
        lane.submit(lambda: together.wait(WAIT_S) and None)
    together.wait(WAIT_S)
    gate.set()
    for _ in range(2):
        lane.thread_back()
    wait_until(lambda: lane._threads <= 4)
    for _ in range(9):
        lane.submit(lambda: None)
    assert lane.close(WAIT_S)


def test_idle_threads_end_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "IDLE_S", 0.01)
    lane = StoreThreads("idle-lane", threads_max=2, jobs_max=9)
    for _ in range(3):
        done = threading.Event()
        lane.submit(done.set)
        assert done.wait(WAIT_S)
        wait_until(lambda: not any(thread.name == "idle-lane" for thread in threading.enumerate()))


def test_job_runs_here_where_no_thread_starts_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    lane, seen = StoreThreads("lane", threads_max=2, jobs_max=9), []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert lane.submit(lambda: seen.append(threading.current_thread()), key="a")
    assert lane.submit(lambda: seen.append(threading.current_thread()), key="a")
    assert seen == [threading.current_thread()] * 2


def test_lane_under_many_submitters_loses_nothing() -> None:
    lane, done = StoreThreads("lane", threads_max=4, jobs_max=10_000), []
    orders: dict[str, list[int]] = {f"k{n}": [] for n in range(5)}
    lock = threading.Lock()

    def submit(me: int) -> None:
        for turn in range(200):
            key = f"k{turn % 5}"
            with lock:
                orders[key].append(me * 1000 + turn)
                lane.submit(lambda key=key, it=me * 1000 + turn: done.append((key, it)), key=key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(submit, range(4)))
    assert lane.close(WAIT_S)
    assert len(done) == 800
    assert all([it for key, it in done if key == name] == order for name, order in orders.items())


def test_mailbox_gives_back_what_comes_too_late() -> None:
    mailbox: AnswerQueue[int] = AnswerQueue()
    assert mailbox.get(0.0) is None
    assert mailbox.put(1)
    assert mailbox.put(2)
    assert mailbox.get(WAIT_S) == 1
    assert mailbox.close() == [2]
    assert mailbox.closed()
    assert not mailbox.put(3)
    assert mailbox.close() == []


def test_each_store_has_its_own_share_and_one_buffer_always_fits() -> None:
    memory = ReplicaMemory(2, budget_bytes=100)
    assert memory.claim(0, 1000)
    assert not memory.claim(0, 1)
    assert memory.claim(1, 30)
    assert memory.claim(1, 20)
    assert not memory.claim(1, 1)
    assert memory.used_bytes == 1050
    memory.free(0, 1000)
    assert memory.claim(0, 1)


def test_claim_waits_for_what_is_freed_or_until_it_is_given_up() -> None:
    memory = ReplicaMemory(1, budget_bytes=10)
    assert memory.claim(0, 10)
    threading.Timer(0.05, lambda: memory.free(0, 10)).start()
    assert memory.claim(0, 10, until_s=time.monotonic() + WAIT_S)
    assert not memory.claim(0, 10, until_s=time.monotonic() + WAIT_S, given_up=lambda: True)


def test_buffers_are_reused_page_aligned_and_never_shared() -> None:
    memory = ReplicaMemory(1, budget_bytes=40 << 20)
    first = memory.buffer(1 << 20)
    second = memory.buffer(1 << 20)
    assert first.region is not second.region
    memory.recycle(first)
    again = memory.buffer((1 << 20) - 5)
    assert again.region is first.region
    assert len(again.view) == (1 << 20) - 5
    assert memory.buffer(1 << 20).region is not first.region
    small = memory.buffer(REUSED_BYTES_MIN - 1)
    assert small.region is None
    memory.recycle(small)
    for _ in range(30):
        memory.recycle(memory.buffer(9 << 20))
    assert memory._kept_bytes <= 10 << 20
    assert len(memory.buffer(0).view) == 0


def test_loan_that_was_taken_back_is_refused() -> None:
    loan = Loan("k")
    loan.still_lent()
    loan.take_back()
    assert loan.over
    with pytest.raises(TakenBackError, match="key=k"):
        loan.still_lent()


def test_only_bytes_and_views_of_bytes_are_immutable() -> None:
    assert is_immutable([])
    assert is_immutable([b"x", memoryview(b"xyz")[1:]])
    assert not is_immutable([b"x", bytearray(b"y")])
    assert not is_immutable([memoryview(bytearray(b"y")).toreadonly()])


def test_wrapper_around_a_borrower_is_no_borrower() -> None:
    lender = Lending(MemoryBackend())
    assert isinstance(lender, Borrower)
    assert borrower_of(lender) is lender
    assert borrower_of(CountingBackend(lender)) is None
    assert borrower_of(FaultyBackend(lender, [])) is None


def test_class_that_overrides_put_alone_is_no_borrower() -> None:
    class Watching(Lending):
        def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None: ...

    class WatchingBoth(Watching):
        def put_lent(
            self,
            key: str,
            data: Sequence[Buffer],
            still_lent: Callable[[], None],
            *,
            create_only: bool = False,
        ) -> None: ...

    class Below(WatchingBoth):
        pass

    assert borrower_of(Watching(MemoryBackend())) is None
    assert borrower_of(WatchingBoth(MemoryBackend())) is not None
    assert borrower_of(Below(MemoryBackend())) is not None
