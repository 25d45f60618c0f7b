"""Ranks as threads: every request lands at one boundary that all ranks still had before them."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest

from ckpt.errors import ConflictError, UnavailableError, UsageError
from ckpt.session.agreement import Skip, SnapshotRequest, Take, merge_requests
from ckpt.session.decisions import RankDecisions, SoloDecisions, check_capture_rule

Decide = Callable[[], Take | Skip]


class Loop:
    """One rank's training loop: keeps what was ordered at which boundary."""

    def __init__(
        self, channel, *, decide: Decide = lambda _: Take(), every: int | None = None
    ) -> None:
        self.told: list[tuple[int, str]] = []
        self.orders = RankDecisions(
            channel, decide, lambda boundary, why: self.told.append((boundary, why))
        )
        self.got: dict[int, SnapshotRequest] = {}
        self.every = every

    def run(
        self, total: int, at: Callable[[int], None] = lambda step: None, *, start: int = 0
    ) -> dict[int, SnapshotRequest]:
        """``total`` boundaries, with ``at(step)`` as the body of each step, then the end."""
        try:
            for step in range(start, total):
                at(step)
                due = step + 1 if self.every and (step + 1) % self.every == 0 else None
                self._note(step + 1, self.orders.reached(step + 1, due=due))
                if self.every and (step + 2) % self.every == 0:
                    self.orders.announce(step + 2)
            self._note(total, self.orders.end(total))
        finally:
            self.orders.close()
        return self.got

    def _note(self, boundary: int, order: SnapshotRequest | None) -> None:
        if order is not None:
            self.got[boundary] = merge_requests([self.got.get(boundary, SnapshotRequest()), order])


def _loops(channels, **options: object) -> list[Loop]:
    return [Loop(channel, **options) for channel in channels]


@pytest.mark.parametrize("asker", range(3))
def test_request_from_any_rank_lands_at_one_boundary_of_all(
    make_channels, run_ranks, asker: int
) -> None:
    loops = _loops(make_channels(3))

    def body(rank: int, step: int) -> None:
        if rank == asker and step == 4:
            loops[rank].orders.request(SnapshotRequest(("best",), forced=True))

    got = run_ranks(3, lambda rank: loops[rank].run(12, lambda step: body(rank, step)))
    assert got[0] == got[1] == got[2]
    ((boundary, order),) = got[0].items()
    assert 5 <= boundary <= 12
    assert order == SnapshotRequest(("best",), forced=True)


def test_request_before_the_first_step_lands(make_channels, run_ranks) -> None:
    loops = _loops(make_channels(2))
    loops[1].orders.request(SnapshotRequest(("start",)))
    got = run_ranks(2, lambda rank: loops[rank].run(3))
    assert got[0] == got[1]
    assert [order.tags for order in got[0].values()] == [("start",)]


def test_request_after_the_last_boundary_lands_at_the_end(make_channels, run_ranks) -> None:
    loops = _loops(make_channels(2))

    def run(rank: int) -> dict[int, SnapshotRequest]:
        loop = loops[rank]
        try:
            for step in range(1, 4):
                loop._note(step, loop.orders.reached(step, due=None))
            if rank == 1:
                loop.orders.request(SnapshotRequest(("late",)))
            loop._note(3, loop.orders.end(3))
        finally:
            loop.orders.close()
        return loop.got

    got = run_ranks(2, run)
    assert got[0] == got[1] == {3: SnapshotRequest(("late",))}


def test_request_of_a_rank_while_another_has_already_ended_lands_at_the_end(
    make_channels, run_ranks
) -> None:
    channels = make_channels(2)
    loops = _loops(channels)

    def wait_for_the_end_of_rank_0(step: int) -> None:
        if step == 2:
            _until(lambda: channels[1].peek("ended/0") is not None)
            loops[1].orders.request(SnapshotRequest(("last",)))

    got = run_ranks(
        2,
        lambda rank: loops[rank].run(
            3, wait_for_the_end_of_rank_0 if rank == 1 else lambda step: None
        ),
    )
    assert got[0] == got[1] == {3: SnapshotRequest(("last",))}


def test_two_requests_before_one_boundary_become_one_order(make_channels, run_ranks) -> None:
    loops = _loops(make_channels(2))
    loops[0].orders.request(SnapshotRequest(("a",)))
    loops[1].orders.request(SnapshotRequest(("b",), forced=True))
    got = run_ranks(2, lambda rank: loops[rank].run(8))
    assert got[0] == got[1]
    tags = sorted(tag for order in got[0].values() for tag in order.tags)
    assert tags == ["a", "b"]


def test_ranks_that_end_at_different_steps_conflict_on_all(make_channels, run_ranks) -> None:
    loops = _loops(make_channels(3))
    got = run_ranks(3, lambda rank: loops[rank].run(5 if rank else 4))
    assert all(isinstance(error, ConflictError) for error in got), got
    assert all("0:4(ended),1:5(ended),2:5(ended)" in str(error) for error in got)


def test_request_beside_ends_at_different_steps_conflicts_on_all(make_channels, run_ranks) -> None:
    channels = make_channels(2)
    loops = _loops(channels)

    def body(step: int) -> None:
        if step == 5:
            _until(lambda: channels[1].peek("ended/0") is not None)
            loops[1].orders.request(SnapshotRequest(("late",)))

    got = run_ranks(2, lambda rank: loops[rank].run(8, body) if rank else loops[rank].run(4))
    assert all(isinstance(error, ConflictError) for error in got), got


@pytest.mark.parametrize("longer", [0, 1])
def test_due_boundary_beyond_another_ranks_end_conflicts_on_all(
    make_channels, run_ranks, longer: int
) -> None:
    loops = _loops(make_channels(2), every=5)
    began_s = time.monotonic()
    got = run_ranks(2, lambda rank: loops[rank].run(13 if rank == longer else 7))
    assert all(isinstance(error, ConflictError) for error in got), got
    assert time.monotonic() - began_s < 10


def test_due_boundary_is_taken_or_skipped_by_all_alike(make_channels, run_ranks) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        words: list[bool] = []

        def decide(_: int, rng=rng, words=words) -> Take | Skip:
            words.append(rng.random() < 0.5)
            return Take() if words[-1] else Skip("full")

        loops = _loops(make_channels(3), every=2, decide=decide)
        got = run_ranks(3, lambda rank, loops=loops: loops[rank].run(20))
        assert got[0] == got[1] == got[2]
        taken = [due for due, word in zip(range(2, 21, 2), words, strict=True) if word]
        assert list(got[0]) == taken
        assert [boundary for boundary, _ in loops[0].told] == sorted(
            set(range(2, 21, 2)) - set(taken)
        )
        assert loops[1].told == loops[2].told == []


@pytest.mark.parametrize("seed", range(12))
def test_random_speeds_and_requests_end_with_equal_orders_on_all_ranks(
    make_channels, run_ranks, seed: int
) -> None:
    rng = random.Random(seed)
    size = rng.choice([2, 3, 4])
    total = rng.randrange(1, 40)
    every = rng.choice([None, 1, 3, 7])
    plan = {
        (rng.randrange(size), rng.randrange(total)): f"tag{n}" for n in range(rng.randrange(0, 6))
    }  # who asks in which step
    speeds = [rng.choice([0.0, 0.0002, 0.001]) for _ in range(size)]
    loops = _loops(make_channels(size), every=every)
    pace = threading.Event()

    def body(rank: int, step: int) -> None:
        pace.wait(speeds[rank] * ((step * 7919 + rank) % 5))
        if (tag := plan.get((rank, step))) is not None:
            loops[rank].orders.request(SnapshotRequest((tag,), forced=True))

    got = run_ranks(size, lambda rank: loops[rank].run(total, lambda step: body(rank, step)))
    told = [{boundary: sorted(order.tags) for boundary, order in orders.items()} for orders in got]
    assert all(orders == told[0] for orders in told), told
    landed = {tag: boundary for boundary, order in got[0].items() for tag in order.tags}
    asked = {tag: step for (_, step), tag in plan.items()}
    assert landed.keys() == asked.keys()
    assert all(asked[tag] < boundary <= total for tag, boundary in landed.items())
    if every:
        assert set(range(every, total + 1, every)) <= set(got[0])


def test_fast_rank_waits_only_where_a_decision_is_open(make_channels, run_ranks) -> None:
    loops = _loops(make_channels(2))
    far = threading.Event()

    def run_ahead(step: int) -> None:
        if step == 999:
            far.set()

    def wait(step: int) -> None:
        if step == 0:
            assert far.wait(20), "the fast rank waited for the slow one without need"

    got = run_ranks(2, lambda rank: loops[rank].run(1000, wait if rank else run_ahead))
    assert got == [{}, {}]


def test_dead_message_store_stops_the_loop_at_its_next_boundary(make_channels) -> None:
    class Dead:
        rank, size = 1, 2

        def peek(self, key: str) -> bytes | None:
            raise ConnectionError("the host is gone")

    orders = RankDecisions(Dead(), lambda _: Take(), lambda boundary, why: None)
    orders._thread.join(10)
    with pytest.raises(UnavailableError, match=r"message store is gone\. rank=1"):
        orders.reached(1, due=None)
    orders.close()


def test_closing_ends_the_thread_while_others_never_come(make_channels) -> None:
    channel = make_channels(2)[1]
    orders = RankDecisions(channel, lambda _: Take(), lambda boundary, why: None)
    channel.post("proposal/0", b'{"tags":[],"forced":false}')
    _until(lambda: channel.peek("ack/0/1") is not None)
    orders.close()
    assert not orders._thread.is_alive()


def test_close_twice_is_free(make_channels) -> None:
    orders = RankDecisions(make_channels(2)[0], lambda _: Take(), lambda boundary, why: None)
    orders.close()
    orders.close()


def test_solo_requests_take_effect_at_the_next_boundary_once() -> None:
    orders = SoloDecisions(lambda _: Take(), lambda boundary, why: None)
    orders.request(SnapshotRequest(("a",)))
    orders.request(SnapshotRequest(("b",), forced=True))
    assert orders.reached(1, due=None) == SnapshotRequest(("a", "b"), forced=True)
    assert orders.reached(2, due=None) is None
    orders.request(SnapshotRequest(("end",)))
    assert orders.end(2) == SnapshotRequest(("end",))


def test_solo_request_waits_for_a_slot_and_training_does_not() -> None:
    told: list[tuple[int, str]] = []
    words: list[Take | Skip] = [Skip("full"), Skip("full"), Skip("full"), Take()]
    orders = SoloDecisions(
        lambda _: words.pop(0), lambda boundary, why: told.append((boundary, why))
    )
    assert orders.reached(5, due=5) is None
    assert told == [(5, "full")]
    orders.request(SnapshotRequest(("a",)))
    assert orders.reached(6, due=None) is None
    assert orders.reached(10, due=10) is None
    assert orders.reached(11, due=None) == SnapshotRequest(("a",))
    assert told == [(5, "full"), (10, "full")]


def test_solo_request_of_the_user_is_served_at_the_next_boundary_even_without_a_slot() -> None:
    orders = SoloDecisions(lambda _: Skip("full"), lambda boundary, why: None)
    orders.request(SnapshotRequest(("best",), forced=True))
    assert orders.reached(3, due=None) == SnapshotRequest(("best",), forced=True)


def test_solo_request_that_found_no_slot_is_served_at_the_end() -> None:
    orders = SoloDecisions(lambda _: Skip("full"), lambda boundary, why: None)
    orders.request(SnapshotRequest(("a",)))
    assert orders.reached(1, due=None) is None
    assert orders.end(1) == SnapshotRequest(("a",))


def test_rank_request_that_finds_no_slot_waits_for_one(make_channels) -> None:
    free = threading.Event()
    channels = make_channels(2)
    ranks = [
        RankDecisions(
            channel, lambda _: Take() if free.is_set() else Skip("full"), lambda boundary, why: None
        )
        for channel in channels
    ]
    try:
        ranks[1].request(SnapshotRequest(("late",)))
        for boundary in range(1, 50):
            assert [rank.reached(boundary, due=None) for rank in ranks] == [None, None]
        free.set()
        found: list[list[int]] = [[], []]
        boundary = 50
        deadline = time.monotonic() + 30
        while not (found[0] and found[1]):
            assert time.monotonic() < deadline, "the request was never placed"
            for number, rank in enumerate(ranks):
                if rank.reached(boundary, due=None) is not None:
                    found[number].append(boundary)
            boundary += 1
        assert found[0] == found[1]
    finally:
        for rank in ranks:
            rank.close()


def test_request_placed_between_strides_is_served_at_the_next_boundary(make_channels) -> None:
    channels = make_channels(2)
    ranks = [
        RankDecisions(channel, lambda _: Take(), lambda boundary, why: None) for channel in channels
    ]
    found: list[list[int]] = [[], []]

    def loop(number: int) -> None:
        deadline = time.monotonic() + 30
        for boundary in itertools.count(10, 10):  # ten steps at once
            assert time.monotonic() < deadline, "the request was never placed"
            if ranks[number].reached(boundary, due=None) is not None:
                found[number].append(boundary)
                return

    try:
        threads = [threading.Thread(target=loop, args=(number,)) for number in range(2)]
        ranks[0].request(SnapshotRequest(("best",)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found[0] == found[1] != []
    finally:
        for rank in ranks:
            rank.close()


def _until(condition: Callable[[], bool], *, wait_s: float = 20.0) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        pause.wait(0.002)


def test_request_at_the_last_boundary_before_anyone_ended_is_served_at_the_end(
    make_channels, run_ranks
) -> None:
    loops = _loops(make_channels(2))
    settled = threading.Barrier(2)

    def run(number: int) -> dict[int, SnapshotRequest]:
        orders = loops[number].orders
        try:
            assert orders.reached(5, due=None) is None
            settled.wait(
                30
            )  # both have reached the last boundary, and neither has said that it is the last
            if number == 0:
                orders.request(SnapshotRequest(("best",)))
                deadline = time.monotonic() + 30
                while not orders._placed:
                    assert time.monotonic() < deadline, "the request was never placed"
                    threading.Event().wait(0.001)
            settled.wait(30)
            loops[number]._note(5, orders.end(5))
        finally:
            orders.close()
        return loops[number].got

    assert run_ranks(2, run) == [{5: SnapshotRequest(("best",))}] * 2


def test_rank_with_another_rule_of_snapshots_than_rank_0_is_refused_with_both(
    make_channels, run_ranks
) -> None:
    rules = ["every=5 memory_every=some", "every=7 memory_every=some", "every=5 memory_every=some"]
    channels = make_channels(3)
    first, second, third = run_ranks(
        3, lambda rank: check_capture_rule(channels[rank], rules[rank])
    )
    assert (first, third) == (None, None)
    assert isinstance(second, UsageError)
    assert f"rank_0=({rules[0]}) rank_1=({rules[1]})" in str(second)
