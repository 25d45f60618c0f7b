"""How long a first step may take, as the keeper learns it: over attempts, generations and
launches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.keepers.served import Served, end_well, started, until

from ckpt.events import Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import Policy
from ckpt.keeper import daemon as daemon_module
from ckpt.keeper.attempts.events import Hung
from ckpt.keeper.attempts.hang import STEP_TIME_FACTOR, check_interval_s
from ckpt.keeper.attempts.hang_watch import SLOW_START_S, STACKS_WAIT_S, HangWatch
from ckpt.keeper.attempts.roster import RankState, Roster, RosterEntry, RosterState
from ckpt.keeper.job_state import JobState
from ckpt.values import TrainerPhase

POLICY = Policy(hang_s=60.0, start_s=1800.0, build_s=3600.0)
QUICK_S, SLOW_S = 30.0, 900.0
"""First steps of which the second takes more than STEP_TIME_FACTOR times the first."""
LOOK_S = check_interval_s(POLICY.hang_s)


class OneRank:
    """A watch over one rank, in a time of its own."""

    def __init__(self, folder: Path) -> None:
        spec = KeeperSpec(job="job", store=str(folder / "store"))
        self.events: list[Event] = []
        self.state = JobState.create(
            spec, incarnation="b", post=lambda call: call(), emit=self.events.append
        )
        self.state.launch.policy = POLICY
        self.state.memory.resize(1)
        self.watch = HangWatch(self.state, stacks=folder)
        self.now_s = 0.0
        mine = os.getpid()
        entry = RosterEntry(0, 1, mine, RankState.ALIVE, mine)
        self.roster = Roster("l1", 1, POLICY, 1, RosterState.RUNNING, {0: entry})

    def attempt(
        self,
        first_step_s: float = math.inf,
        *,
        generation: int = 0,
        gives_up_s: float = math.inf,
    ) -> float | None:
        """An attempt whose first step takes that long; after how long the watch ended it, None: it
        did not. After ``gives_up_s`` something else ends it."""
        board = self.state.memory.board
        assert board is not None
        rank, began_s = board.rank(0), self.now_s
        rank.phase, rank.first_step_done = TrainerPhase.TRAINING, False
        self.watch.begin(generation=generation)
        while self.now_s - began_s <= first_step_s:
            if self.now_s - began_s > gives_up_s:
                return None
            if self.watch.tick(self.roster, self.now_s) is not None:
                return self.now_s - began_s - STACKS_WAIT_S
            self.now_s += min(LOOK_S, self.watch.wait_s() or LOOK_S)
        rank.first_step_done = True
        assert self.watch.tick(self.roster, self.now_s) is None
        self.now_s += LOOK_S
        return None

    def builds(self, until_s: float) -> Hung | None:
        """Time passes in which no step is begun; the hang that is found by then."""
        while self.now_s <= until_s:
            if (found := self.watch.tick(self.roster, self.now_s)) is not None:
                return found
            self.now_s += min(LOOK_S, self.watch.wait_s() or LOOK_S)
        return None

    def warning(self) -> str:
        return [event.text for event in self.events if event.kind == "slow-start"][-1]


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OneRank]:
    made = OneRank(tmp_path)
    yield made
    made.state.memory.close()


def test_hang_before_the_first_step_is_warned_of_and_found(one: OneRank) -> None:
    one.watch.begin(generation=0)
    one.watch.reached(0, "entered")
    assert one.builds(SLOW_START_S - LOOK_S) is None
    assert not one.events
    assert one.builds(SLOW_START_S + 2 * LOOK_S) is None
    assert "rank 0: in the function, before run.track" in one.warning()
    assert "RestartPolicy(build=...)" in one.warning()
    one.watch.reached(0, "tracked")
    assert one.builds(POLICY.build_s + 2 * LOOK_S) is None, "it came further meanwhile"
    assert "rank 0: restoring" in one.warning()
    found = one.builds(SLOW_START_S + POLICY.build_s + 10 * LOOK_S)
    assert found is not None
    assert "before their first step (rank 0: restoring)" in found.text


def test_steps_of_a_run_on_another_store_are_no_hang_of_the_call_around_it(one: OneRank) -> None:
    one.watch.begin(generation=0)
    one.watch.reached(0, "entered")
    for step in range(10):
        one.watch.progressed(0, "file:///other", step)
        assert one.builds(one.now_s + POLICY.build_s / 2) is None
    assert one.builds(one.now_s + POLICY.build_s) is not None, "the run inside hangs"


def test_wait_of_the_keeper_for_a_store_is_no_hang_of_what_waits_for_it(
    one: OneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = one.state.uploads.need()
    monkeypatch.setattr(type(uploads), "asks_store", property(lambda _: one.now_s < 9000.0))
    one.watch.begin(generation=0)
    assert one.builds(9000.0 + POLICY.build_s - LOOK_S) is None
    assert one.builds(9000.0 + POLICY.build_s + 5 * LOOK_S) is not None
    one.state.uploads.close()


def ended_about(ended_s: float | None, limit_s: float) -> bool:
    return ended_s is not None and limit_s < ended_s <= limit_s + 3 * LOOK_S


def test_first_step_that_stands_still_is_found_sooner_once_one_was_completed(one: OneRank) -> None:
    assert one.attempt(QUICK_S) is None
    assert ended_about(one.attempt(), STEP_TIME_FACTOR * QUICK_S)
    assert "RestartPolicy(hang=...)" in one.warning(), "start= would not raise this limit"


def test_without_an_earlier_one_the_users_limit_holds(one: OneRank) -> None:
    assert ended_about(one.attempt(), POLICY.start_s)
    assert "RestartPolicy(start=...)" in one.warning()


def test_first_step_that_takes_long_ends_one_attempt_and_not_each_after_it(one: OneRank) -> None:
    assert one.attempt(QUICK_S) is None
    assert one.attempt(SLOW_S) is not None
    assert one.attempt(SLOW_S) is None


def test_attempt_that_another_node_ended_in_its_first_step_counts_too(one: OneRank) -> None:
    assert one.attempt(QUICK_S) is None
    assert one.attempt(SLOW_S, gives_up_s=QUICK_S) is None
    assert one.attempt(SLOW_S) is None


def test_other_nodes_may_take_longer_for_their_first_step(one: OneRank) -> None:
    assert one.attempt(QUICK_S, generation=1) is None
    assert one.attempt(SLOW_S, generation=2) is None, "a standby compiles what survivors have"


def test_what_is_learned_holds_for_the_attempts_of_a_generation(one: OneRank) -> None:
    assert one.attempt(QUICK_S, generation=1) is None
    assert one.attempt(QUICK_S / 2, generation=1) is None
    assert ended_about(one.attempt(generation=1), STEP_TIME_FACTOR * QUICK_S)


def test_next_launch_on_the_same_keeper_learns_anew(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "TICK_S_MAX", 0.02)
    served = serve(Policy(linger_s=60.0, hang_s=0.5, start_s=1800.0))
    crew = served.supervisors(1, launch="l1")
    started(crew)
    trainer = served.trainer(launch="l1", attempt=1)
    rank = trainer.board.rank(0)
    rank.phase = TrainerPhase.TRAINING
    supervisors = served.daemon._job._supervisors
    until(lambda: supervisors._watch._first_step_s)
    rank.first_step_done = True
    until(lambda: supervisors._watch._longest_start_s)
    trainer.leave()
    end_well(crew, 1)
    again = served.supervisors(1, launch="l2")
    attempt = started(again).attempt
    assert supervisors._watch._longest_start_s is None
    end_well(again, attempt)
