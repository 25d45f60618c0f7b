"""Each policy places a request where its name says, and two choices behave as the model says."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import UsageError
from ckpt.serve.front.policies import (
    POLICIES,
    ReplicaLoad,
    article_loads,
    expected_wait,
    least_loaded,
    round_robin,
    supermarket_tail,
    two_choices,
)

LOADS = st.lists(
    st.builds(
        ReplicaLoad,
        name=st.text("ab", max_size=2),
        outstanding=st.integers(0, 5),
        outstanding_bytes=st.integers(0, 10**9),
        capacity=st.floats(0.01, 1e4),
        bytes_per_s=st.floats(1e3, 1e10),
    ),
    min_size=1,
    max_size=7,
)
DRAW = st.floats(0, 1, exclude_max=True)


@given(LOADS, st.integers(0, 10**9), DRAW, st.sampled_from(sorted(POLICIES)))
def test_every_policy_names_a_replica(
    loads: list[ReplicaLoad], turn: int, draw: float, name: str
) -> None:
    assert 0 <= POLICIES[name](loads, turn, draw) < len(loads)


def of(*outstanding: int) -> list[ReplicaLoad]:
    return [ReplicaLoad(str(number), count) for number, count in enumerate(outstanding)]


def test_round_robin_takes_turns() -> None:
    assert [round_robin(of(9, 0, 0), turn, 0.5) for turn in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_takes_the_least_and_spreads_over_equals() -> None:
    assert least_loaded(of(3, 1, 2), 0, 0.99) == 1
    assert {least_loaded(of(1, 5, 1), 0, draw) for draw in (0.0, 0.49, 0.5, 0.99)} == {0, 2}


@given(LOADS, DRAW)
def test_two_choices_never_take_the_one_most_loaded(loads: list[ReplicaLoad], draw: float) -> None:
    chosen = loads[two_choices(loads, 0, draw)].outstanding
    if sorted(load.outstanding for load in loads).count(chosen) == 1 and len(loads) > 1:
        assert chosen < max(load.outstanding for load in loads)


def test_two_choices_see_every_pair_alike() -> None:
    """Of four with different loads the k-th best wins in C(4-k, 1) of the six pairs."""
    rng = random.Random(1)
    wins = Counter(two_choices(of(0, 1, 2, 3), 0, rng.random()) for _ in range(60_000))
    assert [round(wins[index] / 10_000) for index in range(4)] == [3, 2, 1, 0]
    equal = Counter(two_choices(of(0, 0, 0), 0, rng.random()) for _ in range(30_000))
    assert [round(equal[index] / 10_000) for index in range(3)] == [1, 1, 1]


def test_expected_wait_weighs_capacity_and_bytes() -> None:
    fast, slow = ReplicaLoad("fast", 4, capacity=10.0), ReplicaLoad("slow", 1, capacity=1.0)
    assert expected_wait([fast, slow], 0, 0.0) == 0  # 0.5 s beside 2 s
    full = ReplicaLoad("full", 0, 10**9, capacity=10.0, bytes_per_s=1e8)
    assert expected_wait([full, slow], 0, 0.0) == 1  # 10 s of bytes


def test_recurrence_is_as_written() -> None:
    loads = [
        ReplicaLoad("a", 4, 100, capacity=2.0, bytes_per_s=50.0),
        ReplicaLoad("b", 3, 30, capacity=1.0, bytes_per_s=10.0),
    ]
    # (4/2 + 3/1) / 2 = 2.5; 100/50 + 30/10 = 5; C/B = 0.04 and 0.1
    assert article_loads(loads) == pytest.approx((2.5 + 0.2, 2.5 + 0.5))


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_queues_of_a_simulation_are_those_of_the_supermarket_model(choices: int) -> None:
    """Poisson arrivals at 0.9 of what 300 servers can do, exponential service, discrete events."""
    load, servers, rng = 0.9, 300, random.Random(7)
    queues = [0] * servers
    busy: list[int] = []  # indices of servers with work, for a departure drawn among them
    where = [-1] * servers
    at_least = Counter[int]()
    samples = 0
    for event in range(400_000):
        if rng.random() < load * servers / (load * servers + len(busy)):
            tried = rng.sample(range(servers), choices)
            chosen = min(tried, key=lambda index: queues[index])
            queues[chosen] += 1
            if queues[chosen] == 1:
                where[chosen] = len(busy)
                busy.append(chosen)
        else:
            position = rng.randrange(len(busy))
            done = busy[position]
            queues[done] -= 1
            if not queues[done]:
                last = busy.pop()
                if last != done:
                    busy[position], where[last] = last, position
        if event > 200_000 and event % 500 == 0:
            samples += 1
            for length in range(1, 5):
                at_least[length] += sum(queue >= length for queue in queues)
    seen = [at_least[length] / samples / servers for length in range(1, 5)]
    assert seen == pytest.approx(supermarket_tail(load, choices=choices)[:4], abs=0.04)


def test_tail_of_the_model_ends() -> None:
    assert supermarket_tail(0.0, choices=2) == ()
    assert supermarket_tail(0.5, choices=2)[:3] == pytest.approx((0.5, 0.125, 0.5**7))
    assert supermarket_tail(0.5, choices=1)[:3] == pytest.approx((0.5, 0.25, 0.125))
    # Queues are long only near the limit of what servers can do, and end there too.
    almost = supermarket_tail(0.9999, choices=2)
    assert almost[12] == pytest.approx(0.9999 ** (2**13 - 1))
    assert len(almost) == 18
    assert len(supermarket_tail(0.9, choices=60_000)) == 1


@pytest.mark.parametrize(("load", "choices"), [(1.0, 2), (-0.1, 2), (float("nan"), 2), (0.5, 0)])
def test_load_without_a_limit_is_refused(load: float, choices: int) -> None:
    with pytest.raises(UsageError, match="choices="):
        supermarket_tail(load, choices=choices)
