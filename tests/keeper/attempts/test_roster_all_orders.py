"""Every order of words, deaths and kills up to a number of faults: nothing hangs, and no two
attempts ever live."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.keepers.roster import RosterSimulation, check_rest, moves, world

from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.roster import RosterState

SOAK = os.environ.get("CKPT_SOAK") == "1"

STATES_MAX = 2_000_000


def explore(start: RosterSimulation) -> tuple[int, set[RosterState]]:
    """Go everywhere; how many states there are, and in what the roster can come to rest."""
    seen = {start.key()}
    todo = [start]
    rests: set[RosterState] = set()
    while todo:
        now = todo.pop()
        if now.at_rest():
            check_rest(now)
            rests.add(now.roster.state)
        for _, after in moves(now):
            key = after.key()
            if key not in seen:
                seen.add(key)
                todo.append(after)
        assert len(seen) < STATES_MAX
    return len(seen), rests


@pytest.mark.slow
@pytest.mark.parametrize("gap_s", [0.4, 5.0])
@pytest.mark.parametrize(("ranks", "faults"), [(1, 3), (2, 1)])
def test_every_order_ends_in_training_or_in_leaving(ranks: int, faults: int, gap_s: float) -> None:
    _, rests = explore(world(ranks, faults=faults, gap_s=gap_s))
    assert rests == {RosterState.RUNNING, RosterState.OVER}


@pytest.mark.slow
def test_a_keepers_successor_behaves_alike() -> None:
    _, rests = explore(world(2, faults=1, attempt=7))
    explore(world(1, faults=2, attempt=7))
    assert rests == {RosterState.RUNNING, RosterState.OVER}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "faults", "attempt"), [(1, 2, 0), (2, 1, 0), (1, 2, 7)])
def test_one_node_of_several_trains_leaves_or_waits_for_an_epoch_it_asked_for(
    ranks: int, faults: int, attempt: int
) -> None:
    _, rests = explore(world(ranks, faults=faults, attempt=attempt, shared=True))
    assert rests == {RosterState.RUNNING, RosterState.WAITING, RosterState.OVER}


@pytest.mark.slow
@pytest.mark.parametrize("gap_s", [0.4, 5.0] if SOAK else [0.4])
@pytest.mark.parametrize(("ranks", "faults"), [(1, 3), (2, 2), (3, 1)] if SOAK else [(1, 3)])
def test_every_order_of_more_faults_on_one_node_of_several(
    ranks: int, faults: int, gap_s: float
) -> None:
    explore(
        world(
            ranks,
            faults=faults,
            gap_s=gap_s,
            shared=True,
            policy=Policy(same_error_max=2, stuck_max=3),
        )
    )


def test_without_faults_all_train_or_end() -> None:
    explore(world(3, faults=0))


@pytest.mark.slow
@pytest.mark.parametrize("gap_s", [0.4, 5.0] if SOAK else [5.0])
@pytest.mark.parametrize(
    ("ranks", "faults", "attempt"),
    [(1, 4, 0), (2, 2, 7), (3, 1, 0)] if SOAK else [(1, 4, 0), (2, 1, 7)],
)
def test_every_order_of_more_faults_and_ranks(
    ranks: int, faults: int, attempt: int, gap_s: float
) -> None:
    policy = Policy(same_error_max=2, stuck_max=3)
    explore(world(ranks, faults=faults, gap_s=gap_s, policy=policy, attempt=attempt))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([0.1, 0.6, 5.0]), st.randoms(use_true_random=False))
def test_long_walks_never_hang(ranks: int, gap_s: float, random) -> None:
    now = world(ranks, faults=12, gap_s=gap_s, policy=Policy(same_error_max=3, stuck_max=4))
    for _ in range(400):
        if now.at_rest():
            check_rest(now)
        found = list(moves(now))
        quiet = [after for name, after in found if "ends" not in name or random.random() < 0.1]
        if not found:
            break
        now = random.choice(quiet or [after for _, after in found])
    drained = RosterSimulation(
        now.roster, now.sides, 0, now.gap_s, now.now_s, now.completed, now.asked_to_stop, now.stops
    )
    while not drained.at_rest():
        drained = next(
            after for name, after in moves(drained) if " ends" not in name and " stops" not in name
        )
    check_rest(drained)
