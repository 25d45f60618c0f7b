"""Jobs of several nodes: whatever is lost, the others go on, from memory."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from kit.jobs import SOAK, differences, wait_for
from kit.machines import TTL_S, Cluster, calm, cluster

import ckpt

STEPS = 100
KILL_AT = 15
REDONE_MAX = 12
"""Steps since the last pair that was on another node: at a fifth of a second each many on a busy
machine, and fewer than all. The store, which holds nothing before the end, would leave all."""

STANDS_STILL_S = 6.0
"""Longer than a connection may be silent at short TTLs."""

ARGUMENTS = (STEPS, "--every", 1000, "--step-s", 0.2)
"""Steps are slow until somebody is in a hurry: what happens at step KILL_AT has a long time for
it."""


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as ending:
        yield lambda **how: ending.enter_context(
            cluster(tmp_path / f"cluster{len(list(tmp_path.iterdir()))}", **how)
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """What two nodes compute when nothing happens."""
    return calm(tmp_path_factory, 2, ARGUMENTS)


def hang(keeper: int, members: Path) -> None:
    """Stop a keeper while it isn't writing the file of the membership: that would stop all keepers
    of this machine."""

    def stopped() -> bool:
        os.kill(keeper, signal.SIGSTOP)
        with closing(sqlite3.connect(members, timeout=0.5, isolation_level=None)) as db:
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                os.kill(keeper, signal.SIGCONT)
                return False
            db.execute("ROLLBACK")
            return True

    wait_for(stopped, "a moment in which it writes nothing")


def redone(one: Cluster, rank: int = 0) -> int:
    return one.job.losses[rank].poll().redone


def check_equal(one: Cluster, undisturbed) -> None:
    assert differences(undisturbed, one.job, world_size=2) == [], one.output()


@pytest.mark.slow
def test_death_of_a_trainer_costs_steps_of_no_other_node(
    made: Callable[..., Cluster], undisturbed
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS)
    one.wait_steps(KILL_AT)
    os.kill(one.job.trainer(1), signal.SIGKILL)
    assert set(one.wait_end(hurry=True).values()) == {0}, one.output()
    check_equal(one, undisturbed)
    assert redone(one) <= REDONE_MAX, one.output()
    one.wait_gone()
    assert ckpt.Checkpointer(str(one.results / "store")).verify().ok


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1] if SOAK else [0])
def test_standby_takes_over_from_a_node_that_is_killed_with_all_that_is_on_it(
    made: Callable[..., Cluster], undisturbed, rank: int
) -> None:
    one = made(nodes="2")
    for _ in range(3):
        one.start(*ARGUMENTS)
    one.wait_steps(KILL_AT)
    lost = one.of_rank(rank)
    lost.kill()
    ends = one.wait_end(hurry=True)
    assert {status for name, status in ends.items() if name != lost.name} == {0}, one.output()
    check_equal(one, undisturbed)
    assert redone(one) <= REDONE_MAX, one.output()
    assert "went on from step" in one.output()
    one.wait_gone()
    newest = ckpt.Checkpointer(str(one.results / "store")).latest()
    assert newest is not None and newest.step == STEPS


@pytest.mark.slow
def test_prepared_trainer_of_a_standby_goes_on_in_the_place_of_the_lost_one(
    made: Callable[..., Cluster], undisturbed
) -> None:
    one = made(nodes="2")
    for _ in range(3):
        one.start(*ARGUMENTS, "--prepared")
    one.wait_steps(KILL_AT // 2)
    lost = one.of_rank(1)
    (standby,) = (machine for machine in one.machines if machine not in (lost, one.of_rank(0)))

    def ran_ahead() -> set[int]:
        told = {int(path.name.partition("-")[2]) for path in one.results.glob("ahead-*")}
        return {pid for pid in told if standby.has(pid)}

    wait_for(ran_ahead, "a trainer that has run ahead on the standby", say=one.output)
    (ahead,) = ran_ahead()
    one.wait_steps(KILL_AT)
    lost.kill()
    ends = one.wait_end(hurry=True)
    assert {status for name, status in ends.items() if name != lost.name} == {0}, one.output()
    check_equal(one, undisturbed)
    assert redone(one) <= REDONE_MAX, one.output()
    assert str(ahead) in (one.results / "attempts-1.txt").read_text().split(), one.output()


@pytest.mark.slow
def test_world_shrinks_without_a_standby_and_grows_when_a_node_comes(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="1:2")
    arguments = (STEPS * 4, "--every", 20, "--step-s", 0.2)
    for _ in range(2):
        one.start(*arguments)
    wait_for(lambda: one.job.trainer(1) > 0, "two ranks", say=one.output)
    one.wait_steps(one.job.completed + KILL_AT)
    one.of_rank(1).kill()
    one.wait_steps(one.job.completed + 5)
    one.start(*arguments)
    wait_for(
        lambda: "the world grows" in one.output() or one.ended(), "a larger world", say=one.output
    )
    ends = one.wait_end(240.0, hurry=True)
    assert sorted(ends.values()) == [-signal.SIGKILL, 0, 0], one.output()
    assert "no standby: 1 nodes go on without" in one.output()
    assert "the world grows" in one.output()
    losses = one.job.losses[0].poll()
    assert sorted(losses.of_step) == list(range(STEPS * 4))
    assert losses.redone <= 2 * REDONE_MAX, one.output()
    one.wait_gone()


@pytest.mark.slow
def test_standby_has_the_state_of_the_only_node_and_goes_on_from_its_own_memory(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="1")
    one.start(STEPS * 10, *ARGUMENTS[1:])
    one.wait_steps(5)
    one.start(STEPS * 10, *ARGUMENTS[1:])
    lost = one.of_rank(0)
    (standby,) = (machine for machine in one.machines if machine is not lost)

    def told() -> dict[str, object]:
        """What the keeper of rank 0's node says of the standby."""
        nodes = one.nodes_of(lost)
        return next((node for node in nodes if node["standby"]), {})

    wait_for(lambda: told().get("has") is not None, "a copy at the standby", say=one.output)
    assert one.nodes_of(standby)[-1]["here"] and not one.ended()
    one.wait_steps(one.job.completed + 5)
    lost.kill()
    assert one.wait_end(hurry=True)[standby.name] == 0, one.output()
    assert one.job.losses[0].poll().redone <= REDONE_MAX, one.output()
    assert "other nodes too; for" in one.output(), "how long it was exposed"
    one.wait_gone()


@pytest.mark.slow
def test_two_nodes_lost_at_once_cost_steps_of_no_other_node_with_two_mirrors(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="2:4", mirrors=2)
    arguments = (STEPS * 2, "--every", 1000, "--step-s", 0.2)
    for _ in range(4):
        one.start(*arguments)
    wait_for(lambda: all(one.job.trainer(rank) for rank in range(4)), "four ranks", say=one.output)
    one.wait_steps(one.job.completed + KILL_AT)
    lost = [one.of_rank(rank) for rank in (0, 3)]
    before = one.job.completed
    for machine in lost:
        machine.stop()
    for machine in lost:
        machine.kill()
    ends = one.wait_end(240.0, hurry=True)
    assert {
        status for name, status in ends.items() if name not in {machine.name for machine in lost}
    } == {0}
    assert sorted(one.job.losses[0].poll().of_step) == list(range(STEPS * 2)), one.output()
    assert one.job.losses[0].poll().redone <= 2 * REDONE_MAX, one.output()
    assert before > REDONE_MAX and "went on from step" in one.output()
    one.wait_gone()


@pytest.mark.slow
def test_more_nodes_lost_than_mirrors_goes_back_to_the_store_and_says_what_was_lost(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="1:3")
    for _ in range(3):
        one.start(STEPS * 3, "--every", 10, "--step-s", 0.2, more={"ttl_s": 3 * TTL_S})
    one.wait_steps(KILL_AT)
    # One that came late makes the world grow first.
    wait_for(
        lambda: one.job.trainer(2) > 0 and one.job.losses[0].poll().completed > 0,
        "three ranks",
        say=one.output,
    )
    one.wait_steps(one.job.completed + 10)
    store = ckpt.Checkpointer(str(one.results / "store"))
    wait_for(lambda: store.latest() is not None, "a durable snapshot", say=one.output)
    lost = [one.of_rank(rank) for rank in (1, 2)]
    wait_for(
        lambda: 4 <= one.job.completed % 10 <= 7, "steps that only memory holds", say=one.output
    )
    for machine in lost:  # both at one moment: the loss of one has the other's trainer end
        machine.stop()
    for machine in lost:
        machine.kill()
    said = re.compile(r"is incomplete in memory: no node has the share of")
    wait_for(
        lambda: said.search(one.output()), "what was lost", say=one.output
    )  # the log goes with its keeper
    ends = one.wait_end(hurry=True)
    assert sorted(ends.values()) == [-signal.SIGKILL, -signal.SIGKILL, 0], one.output()
    assert sorted(one.job.losses[0].poll().of_step) == list(range(STEPS * 3))
    one.wait_gone()


@pytest.mark.slow
def test_node_that_arrives_as_the_job_ends_or_after_it_ends_well_too(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="2")
    began: dict[str, object] = {"ends_after": 0}  # no epoch was there when the job's run began
    for _ in range(2):
        one.start(*ARGUMENTS, more=began)
    one.wait_steps(KILL_AT // 3)
    (one.results / "hurry").touch()
    one.start(*ARGUMENTS, more=began)
    assert set(one.wait_end().values()) == {0}, one.output()
    one.wait_gone()
    one.start(*ARGUMENTS, more=began)
    assert set(one.wait_end(30.0).values()) == {0}, one.output()


@pytest.mark.slow
def test_node_that_stands_still_for_less_than_the_ttl_costs_nobody_an_attempt(
    made: Callable[..., Cluster], undisturbed
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS, more={"ttl_s": 15.0})
    one.wait_steps(KILL_AT)
    still = one.of_rank(1)
    hang(still.keeper(), one.folder / "members.db")
    pids = still.members()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STANDS_STILL_S)  # what is tested is that nothing happens meanwhile
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert set(one.wait_end(hurry=True).values()) == {0}, one.output()
    check_equal(one, undisturbed)
    assert (one.job.attempts(0), redone(one)) == (1, 0), one.output()


@pytest.mark.slow
def test_same_exception_at_the_same_step_twice_ends_all_nodes(made: Callable[..., Cluster]) -> None:
    one = made(nodes="2")
    for _ in range(3):
        one.start(STEPS, "--every", 40, "--raise-at", 12)
    ends = one.wait_end()
    assert set(ends.values()) == {1}, one.output()
    assert one.job.attempts(0) == 2, one.output()
    assert "a bug, no fault" in one.output()
    one.wait_gone()


@pytest.mark.slow
def test_node_whose_keeper_hangs_stops_by_itself_and_another_takes_its_ranks(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="2")
    for _ in range(3):
        one.start(STEPS * 3, "--every", 20, "--step-s", 0.2)
    one.wait_steps(KILL_AT)
    hung = one.of_rank(1)
    trainer, keeper = one.job.trainer(1), hung.keeper()
    assert keeper
    hang(keeper, one.folder / "members.db")
    try:
        wait_for(
            lambda: not hung.has(trainer),
            "the end of its trainer",
            wait_s=TTL_S * 10,
            say=one.output,
        )
        wait_for(lambda: one.job.trainer(1) != trainer, "another trainer of rank 1", say=one.output)
        assert one.of_rank(1) is not hung
    finally:
        os.kill(keeper, signal.SIGCONT)
    ends = one.wait_end(240.0, hurry=True)
    assert set(ends.values()) == {0}, one.output()
    assert sorted(one.job.losses[0].poll().of_step) == list(range(STEPS * 3))
    one.wait_gone()
    assert ckpt.Checkpointer(str(one.results / "store")).verify().ok
