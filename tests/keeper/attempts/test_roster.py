"""The rules of a roster, one by one."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace

import pytest
from msgspec import structs

from ckpt.elastic.failure import Preempted, describe_failure
from ckpt.ipc.messages import Failing, Policy
from ckpt.keeper.attempts import roster as rules
from ckpt.keeper.attempts.events import (
    AttemptOver,
    EpochChanged,
    GatheringTimedOut,
    GraceExpired,
    Hung,
    KillAll,
    LeaveAll,
    LeaveOne,
    Pause,
    PauseOver,
    PreemptRequested,
    RequestEpoch,
    RequestStop,
    RosterAction,
    RosterEvent,
    StartAll,
    SupervisorJoined,
    SupervisorLeft,
    TrainerDied,
    TrainerEntered,
    TrainerFailing,
    TrainerFinished,
    TrainerKilled,
    TrainerProgressed,
    TrainerStarted,
)
from ckpt.keeper.attempts.failures import ECHO_S, RESTARTS_HOUR_MAX
from ckpt.keeper.attempts.roster import (
    NOT_DURABLE_STATUS,
    PREEMPTED_STATUS,
    RankState,
    Roster,
    RosterState,
)


def failing(*, fingerprint: str = "f", step: int = 7, final: bool = False) -> Failing:
    return Failing(kind="ValueError", text="bad", fingerprint=fingerprint, step=step, final=final)


class Told:
    """A roster and all that it asked for."""

    def __init__(self, ranks: int = 2, policy: Policy | None = None, *, attempt: int = 0) -> None:
        self.roster = Roster("l", ranks, policy or Policy(), attempt)
        self.actions: list[RosterAction] = []
        self.now_s = 100.0

    def __call__(self, *events: RosterEvent) -> list[RosterAction]:
        """What these events led to."""
        came: list[RosterAction] = []
        for event in events:
            self.roster, actions = rules.step(self.roster, event)
            came += actions
        self.actions += came
        return came

    @property
    def attempt(self) -> int:
        return self.roster.attempt

    def run(self) -> Told:
        """All join and start."""
        self(*(SupervisorJoined(rank, rank, 1) for rank in range(self.roster.ranks)))
        return self.started()

    def started(self) -> Told:
        self(*(TrainerStarted(rank, self.attempt, 9, "fork") for rank in range(self.roster.ranks)))
        return self

    def die(
        self,
        rank: int,
        status: int = -9,
        *,
        after_s: float = 0.0,
        completed: int = 0,
        told: Failing | None = None,
    ):
        if told is not None:
            self(TrainerFailing(rank, self.attempt, told))
        return self(TrainerDied(rank, self.attempt, status, self.now_s + after_s, completed))

    def pause_over(self) -> None:
        """The pause passes, if there is one, and the next attempt starts."""
        self.now_s += 10
        self(PauseOver(self.attempt))
        if self.roster.state is RosterState.RUNNING:
            self.started()

    def killed(self, *ranks: int) -> list[RosterAction]:
        return self(*(TrainerKilled(rank, self.attempt) for rank in ranks))

    def fail(
        self, rank: int = 0, status: int = -9, *, completed: int = 0, told: Failing | None = None
    ) -> list[RosterAction]:
        """One dies, the others are killed; what came of it at the end."""
        self.die(rank, status, completed=completed, told=told)
        others = [one for one in range(self.roster.ranks) if one != rank]
        came = self.killed(*others)
        if self.roster.state is RosterState.PAUSING:
            came = [*came, *self(PauseOver(self.attempt))]
        if self.roster.state is RosterState.RUNNING:
            self.started()
        self.now_s += 10
        return came


def kinds(actions: Sequence[RosterAction]) -> list[type]:
    return [type(action) for action in actions]


def test_the_first_attempt_begins_when_all_have_come() -> None:
    told = Told(3)
    assert told(SupervisorJoined(2, 12, 1), SupervisorJoined(0, 10, 1)) == []
    assert told(SupervisorJoined(1, 11, 1)) == [StartAll(1)]


def test_attempts_are_numbered_on_from_those_of_an_earlier_keeper() -> None:
    assert Told(1, attempt=4)(SupervisorJoined(0, 0, 1)) == [StartAll(5)]


def test_words_of_an_earlier_keepers_attempt_count_for_nothing_while_ranks_gather() -> None:
    told = Told(2, attempt=4)
    told(SupervisorJoined(0, 0, 1))
    assert (
        told(TrainerDied(0, 4, -9, 1.0, 3), Hung(0, 4, "hangs", 1.0, 3), TrainerKilled(0, 4)) == []
    )
    assert told(SupervisorJoined(1, 1, 1)) == [StartAll(5)]


def test_a_death_has_all_killed_and_all_started_again_once_nothing_lives() -> None:
    told = Told(3).run()
    assert kinds(told.die(1)) == [KillAll]
    assert told.killed(2) == []
    assert kinds(told.killed(0)) == [AttemptOver, StartAll]
    assert told.attempt == 2


def test_a_late_start_does_not_revive_the_dead() -> None:
    told = Told(2).run()
    told.die(0)
    told(TrainerStarted(0, 1, 9, "fork"))
    assert told.roster.members[0].seat is RankState.DEAD
    assert kinds(told.killed(1)) == [AttemptOver, StartAll]


def test_an_exception_soon_after_anothers_death_is_its_echo() -> None:
    told = Told(2).run()
    told.die(1, 1, told=failing(), after_s=0.0)
    actions = told.die(0, -9, after_s=ECHO_S)  # heard later, and the cause all the same
    over = actions[0]
    assert isinstance(over, AttemptOver)
    assert (over.failure.kind, over.failure.rank) == ("died", 0)


def test_an_exception_long_before_a_death_is_judged_itself() -> None:
    told = Told(2).run()
    told.die(1, 1, told=failing(), after_s=0.0)
    over = told.die(0, -9, after_s=ECHO_S + 0.1)[0]
    assert isinstance(over, AttemptOver)
    assert over.failure.kind == "error"


def test_echoes_never_make_a_bug_of_a_death() -> None:
    told = Told(2).run()
    for completed in range(4):
        told.die(1, 1, told=failing(), after_s=0.2, completed=completed)
        assert kinds(told.die(0, -9, after_s=0.5)) == [AttemptOver, StartAll]
        told.started()
        told.now_s += 10


def test_the_same_error_at_the_same_step_twice_in_a_row_ends_the_job() -> None:
    told = Told(2).run()
    assert kinds(told.fail(1, 1, told=failing())) == [AttemptOver, StartAll]
    over, leave = told.fail(0, 3, told=failing())
    assert isinstance(over, AttemptOver)
    assert isinstance(leave, LeaveAll)
    assert leave.status == 3
    assert "a bug" in leave.text


@pytest.mark.parametrize("other", [failing(step=8), failing(fingerprint="g")])
def test_another_error_or_another_step_is_no_bug(other: Failing) -> None:
    told = Told(2).run()
    for completed, one in enumerate([failing(), other, failing(), other]):
        assert kinds(told.fail(1, 1, told=one, completed=completed)) == [AttemptOver, StartAll]


def test_a_death_between_two_equal_errors_breaks_the_row() -> None:
    told = Told(2).run()
    told.fail(1, 1, told=failing())
    told.fail(1, -11)
    assert kinds(told.fail(1, 1, told=failing())) == [AttemptOver, Pause, StartAll]


def test_a_final_error_ends_the_job_at_once() -> None:
    told = Told(2).run()
    assert told.fail(0, 2, told=failing(final=True))[-1] == LeaveAll(
        2, "rank 0 raised ValueError: bad"
    )


def test_a_fenced_job_ends_with_the_status_of_a_conflict_and_may_not_be_launched_again() -> None:
    told = Told(2).run()
    fenced = structs.replace(failing(final=True), kind="FencedError")
    assert told.fail(0, 1, told=fenced)[-1] == LeaveAll(
        12, "rank 0 raised FencedError: bad", futile=True
    )


def test_an_error_is_known_by_what_was_told_however_its_trainer_ended() -> None:
    told = Told(2).run()
    assert kinds(told.fail(0, -6, told=failing())) == [AttemptOver, StartAll]
    assert "a bug" in told.fail(0, -9, told=failing())[-1].text
    final = Told(2).run()
    assert final.fail(0, -9, told=failing(final=True))[-1] == LeaveAll(
        137, "rank 0 raised ValueError: bad"
    )


@pytest.mark.parametrize("said", [None, failing(), failing(final=True)])
def test_an_interrupt_ends_the_job_with_its_status(said: Failing | None) -> None:
    told = Told(2).run()
    assert told.fail(0, -2, told=said)[-1] == LeaveAll(130, "rank 0 died of SIGINT")


def test_an_interrupt_counts_before_the_error_that_another_rank_made_of_it() -> None:
    told = Told(2).run()
    told.die(1, 1, told=failing())
    assert told.die(0, -2, after_s=0.5)[-1] == LeaveAll(130, "rank 0 died of SIGINT")


@pytest.mark.parametrize(("status", "left"), [(3, 3), (-11, 139)])
def test_no_exit_after_the_training_function_returned_starts_anything_again(
    status: int, left: int
) -> None:
    told = Told(2).run()
    told(TrainerFinished(1, 1))
    leave = told.fail(0, status)[-1]
    assert isinstance(leave, LeaveAll)
    assert leave.status == left
    assert "had returned" in leave.text


def test_a_training_function_that_is_entered_again_can_be_started_again() -> None:
    told = Told(2).run()
    told(TrainerFinished(0, 1), TrainerFinished(1, 1), TrainerEntered(0, 1), TrainerEntered(1, 1))
    assert kinds(told.fail(0)) == [AttemptOver, StartAll]
    assert not any(one.finished for one in told.roster.members.values())


def test_an_error_that_was_caught_explains_no_later_death() -> None:
    told = Told(1).run()
    told(TrainerFailing(0, 1, failing(final=True)), TrainerEntered(0, 1))
    assert kinds(told.die(0)) == [KillAll, AttemptOver, StartAll]


def test_a_second_call_that_never_completes_a_step_is_given_up_although_the_first_one_does() -> (
    None
):
    told = Told(1, Policy(stuck_max=5)).run()
    for _ in range(6):
        told(TrainerFinished(0, told.attempt), TrainerEntered(0, told.attempt))
        if told.die(0, completed=7)[-1:] == [
            LeaveAll(
                137, "rank 0 died of SIGKILL; 5 failures in a row without one new step completed"
            )
        ]:
            return
        told.pause_over()
    raise AssertionError("it goes on for ever")


def test_steps_of_a_call_after_the_first_count_by_themselves() -> None:
    told = Told(1, Policy(stuck_max=2)).run()
    told.die(0, completed=100)
    told.started()
    for completed in (3, 4, 9):  # fewer than the first call had
        told(TrainerFinished(0, told.attempt), TrainerEntered(0, told.attempt))
        assert kinds(told.die(0, completed=completed))[-1] is StartAll
        told.started()
    for _ in range(2):  # the first call, again
        told.die(0, completed=101)
        told.pause_over()
    assert told.roster.state is RosterState.OVER


def test_steps_of_a_run_inside_another_one_are_progress() -> None:
    told = Told(1, Policy(stuck_max=2)).run()
    for completed in (1, 10, 20, 30, 40):
        told(TrainerProgressed(0, told.attempt, "inner", completed))
        assert kinds(told.die(0, completed=-1))[-1] is StartAll
        told.started()
    for _ in range(2):
        told(TrainerProgressed(0, told.attempt, "inner", 40))
        told.die(0, completed=-1)
        told.pause_over()
    assert told.roster.state is RosterState.OVER


def test_attempts_without_progress_pause_longer_and_longer() -> None:
    told = Told(1, Policy(stuck_max=9)).run()
    pauses = []
    for _ in range(7):
        (*_, last) = told.die(0, completed=-1)
        pauses.append(last.seconds if isinstance(last, Pause) else 0.0)
        told.pause_over()
    assert pauses == [0.0, 1.0, 5.0, 15.0, 60.0, 60.0, 60.0]
    (*_, last) = told.die(0, completed=3)
    assert last == StartAll(told.attempt), "with progress there is no pause"


def test_outage_is_no_bug_until_it_outlasts_the_pauses() -> None:
    outage = structs.replace(failing(), passing=True)
    told = Told(1, Policy(same_error_max=2, stuck_max=9)).run()
    texts = []
    for _ in range(6):
        texts = [
            one.text
            for one in told.die(0, 1, completed=7, told=outage)
            if isinstance(one, LeaveAll)
        ]
        told.pause_over()
    assert told.roster.state is RosterState.OVER
    assert told.attempt == 6, "0 + 0 + 1 + 5 + 15 seconds"
    assert "2 times in a row: a bug" in texts[0]


def test_what_ends_a_launch_ends_it_in_a_pause_too() -> None:
    def pausing() -> Told:
        told = Told(1).run()
        for _ in range(2):
            told.die(0, completed=-1)
            told.started()
        assert told.roster.state is RosterState.PAUSING
        return told

    assert pausing()(PreemptRequested())[-1] == LeaveAll(
        PREEMPTED_STATUS, "preempted before the next attempt"
    )
    told = pausing()
    assert kinds(told(SupervisorLeft(0, 0, False, told.now_s, -1))) == [LeaveAll]


def test_restarts_of_an_hour_are_limited() -> None:
    told = Told(1).run()
    for completed in range(RESTARTS_HOUR_MAX):
        assert kinds(told.die(0, completed=completed))[-1] is StartAll
        told.started()
        told.now_s += 1.0
    (*_, last) = told.die(0, completed=100)
    assert isinstance(last, LeaveAll) and "60 restarts within an hour" in last.text
    slow = Told(1).run()
    for completed in range(2 * RESTARTS_HOUR_MAX):
        assert kinds(slow.die(0, completed=completed))[-1] is StartAll
        slow.started()
        slow.now_s += 61.0


def test_an_attempts_first_call_does_not_make_it_patient_again() -> None:
    told = Told(1, Policy(stuck_max=2)).run()
    ends = []
    for _ in range(3):
        told(TrainerEntered(0, told.attempt))
        ends.append(kinds(told.die(0, completed=7))[-1])
        told.started()
    assert ends == [StartAll, StartAll, LeaveAll]


def test_ranks_that_do_not_come_in_time_end_those_that_did() -> None:
    told = Told(2)
    told(SupervisorJoined(0, 0, 1))
    assert told(GatheringTimedOut("rank 1 is missing", 600.0)) == [LeaveAll(1, "rank 1 is missing")]
    assert told(SupervisorJoined(1, 1, 1)) == [LeaveOne(1, 1)]
    assert Told(2).run()(GatheringTimedOut("late word", 600.0)) == []


def test_a_job_that_completes_no_step_is_given_up() -> None:
    told = Told(2, Policy(stuck_max=3)).run()
    assert kinds(told.fail(completed=5)) == [AttemptOver, StartAll]
    assert [kinds(told.fail(completed=5))[-1] for _ in range(3)] == [StartAll, StartAll, LeaveAll]


def test_a_job_that_never_completed_a_step_is_given_up() -> None:
    told = Told(1, Policy(stuck_max=3)).run()
    for _ in range(3):
        told.die(0, -9, completed=-1)
        told.pause_over()
    assert told.actions[-1] == LeaveAll(
        137, "rank 0 died of SIGKILL; 3 failures in a row without one new step completed"
    )


def test_every_new_step_makes_it_patient_again() -> None:
    told = Told(2, Policy(stuck_max=2)).run()
    for completed in (1, 1, 2, 2, 3, 3):
        assert kinds(told.fail(completed=completed)) == [AttemptOver, StartAll]


def test_ranks_that_ended_are_not_started_again() -> None:
    told = Told(2).run()
    assert told.die(0, 0) == [LeaveOne(0, 0)]
    assert kinds(told.die(1)) == [KillAll, AttemptOver, LeaveAll]


def test_a_rank_that_ended_and_answers_a_kill_has_still_ended() -> None:
    told = Told(3).run()
    told.die(0, 0)
    told.die(1)
    told.killed(0)
    assert kinds(told.killed(2)) == [AttemptOver, LeaveAll]


def test_a_rank_that_ended_before_the_kill_came_is_not_started_again() -> None:
    told = Told(2).run()
    assert kinds(told.die(0)) == [KillAll]
    assert kinds(told.die(1, 0)) == [LeaveOne, AttemptOver, LeaveAll]


def test_a_job_that_all_ranks_end_is_over_without_a_word() -> None:
    told = Told(2).run()
    assert told.die(0, 0) + told.die(1, 0) == [LeaveOne(0, 0), LeaveOne(1, 0)]
    assert told.roster.state is RosterState.OVER


def test_preempted_trainers_are_asked_once_and_leave_one_by_one() -> None:
    told = Told(2).run()
    assert told(PreemptRequested(), PreemptRequested()) == [RequestStop()]
    assert told.die(0, PREEMPTED_STATUS) == [LeaveOne(0, PREEMPTED_STATUS)]
    assert told.die(1, PREEMPTED_STATUS) == [LeaveOne(1, PREEMPTED_STATUS)]
    assert told.roster.state is RosterState.OVER


def test_a_preempted_job_is_never_started_again() -> None:
    told = Told(2).run()
    told(PreemptRequested())
    assert told.fail(1)[-1] == LeaveAll(PREEMPTED_STATUS, "rank 1 died of SIGKILL")


def test_preempted_job_that_another_program_fenced_leaves_with_that_status() -> None:
    told = Told(1).run()
    told(PreemptRequested())
    fenced = structs.replace(failing(final=True), kind="FencedError")
    assert told.die(0, 12, told=fenced)[-1] == LeaveAll(
        12, "rank 0 raised FencedError: bad", futile=True
    )


def test_preempted_while_it_is_killed_is_preempted() -> None:
    told = Told(2).run()
    told.die(0)
    assert told(PreemptRequested()) == []
    assert kinds(told.killed(1)) == [AttemptOver, LeaveAll]


def test_the_end_of_grace_has_all_killed() -> None:
    told = Told(2).run()
    told(PreemptRequested())
    assert kinds(told(GraceExpired(110.0))) == [KillAll]
    leave = told.killed(0, 1)[-1]
    assert isinstance(leave, LeaveAll)
    assert leave.status == PREEMPTED_STATUS


def test_a_hang_is_a_failure_of_the_attempt() -> None:
    told = Told(2).run()
    assert kinds(told(Hung(1, 1, "rank 1 hangs", 100.0, 4))) == [KillAll]
    assert kinds(told.killed(0, 1)) == [AttemptOver, StartAll]


def test_a_lost_supervisor_ends_the_job() -> None:
    told = Told(2).run()
    assert kinds(told(SupervisorLeft(0, 0, False, 100.0, 3))) == [KillAll]
    leave = told.killed(1)[-1]
    assert leave == LeaveAll(1, "the supervisor of rank 0 was cut off", flush_first=False)


@pytest.mark.parametrize("planned", [True, False])
def test_a_supervisor_that_goes_before_all_have_come_ends_the_job(planned: bool) -> None:
    told = Told(2)
    told(SupervisorJoined(0, 0, 1))
    assert kinds(told(SupervisorLeft(0, 0, planned, 1.0, -1))) == [LeaveAll]
    assert told(SupervisorJoined(1, 1, 1)) == [LeaveOne(1, 1)], (
        "who comes too late must not wait for ever"
    )


def test_the_end_of_a_connection_that_was_replaced_says_nothing() -> None:
    told = Told(2)
    told(SupervisorJoined(0, 5, 1), SupervisorJoined(0, 6, 1))
    assert told(SupervisorLeft(0, 5, False, 1.0, -1)) == []


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exited with 0"),
        (3, "exited with 3"),
        (-9, "died of SIGKILL"),
        (-77, "died of signal 77"),
    ],
)
def test_a_status_in_words(status: int, text: str) -> None:
    assert rules.status_text(status) == text


def test_ranks_that_ended_while_there_was_no_keeper_are_not_started_again() -> None:
    told = Told(2, attempt=4)
    assert told(SupervisorJoined(0, 0, 1, 0)) == [LeaveOne(0, 0)]
    assert told(SupervisorLeft(0, 0, True, 1.0, 3)) == []
    assert kinds(told(SupervisorJoined(1, 1, 1))) == [LeaveAll]
    both = Told(2, attempt=4)
    assert both(SupervisorJoined(0, 0, 1, 0), SupervisorJoined(1, 1, 1, 0)) == [
        LeaveOne(0, 0),
        LeaveOne(1, 0),
    ]
    assert both.roster.state is RosterState.OVER


def test_a_rank_that_died_while_there_was_no_keeper_is_started_again() -> None:
    assert Told(1, attempt=4)(SupervisorJoined(0, 0, 1, -9)) == [StartAll(5)]


def shared(ranks: int = 2) -> Told:
    """Ranks of one node of several, in their first epoch."""
    told = Told(ranks)
    told.roster = replace(told.roster, shared=True)
    told(*(SupervisorJoined(rank, rank, 1) for rank in range(ranks)))
    told(EpochChanged(1, True, "first", 90.0))
    return told.started()


@pytest.mark.parametrize("status", [PREEMPTED_STATUS, NOT_DURABLE_STATUS])
def test_program_that_exits_by_itself_with_the_status_of_a_stop_has_failed(status: int) -> None:
    told = shared()
    exited = Failing(kind="SystemExit", text=str(status), fingerprint="f", step=7)
    assert KillAll in kinds(told.die(0, status, told=exited)), "its peer would wait for it"
    *_, asked = told.killed(1)
    assert isinstance(asked, RequestEpoch) and asked.failure is not None
    assert (asked.failure.kind, asked.failure.status) == ("error", status)


def test_status_of_a_stop_after_the_call_had_returned_is_a_failure_that_nothing_follows() -> None:
    told = shared(1)
    told(TrainerFinished(0, told.attempt))
    *_, asked = told.die(0, NOT_DURABLE_STATUS)
    assert isinstance(asked, RequestEpoch) and asked.failure is not None
    assert (asked.failure.kind, asked.failure.final) == ("died", True)


@pytest.mark.parametrize("status", [PREEMPTED_STATUS, NOT_DURABLE_STATUS])
def test_status_of_a_stop_in_the_middle_of_the_steps_is_a_failure_at_once(status: int) -> None:
    told = shared()
    died = TrainerDied(0, told.attempt, status, told.now_s, 3, stepping=True)
    assert kinds(told(died)) == [KillAll], "the other one would be waited for"
    *_, asked = told.killed(1)
    assert isinstance(asked, RequestEpoch) and asked.failure is not None
    assert (asked.failure.kind, asked.failure.status) == ("died", status)


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("status", [PREEMPTED_STATUS, NOT_DURABLE_STATUS])
def test_ranks_that_stop_for_another_node_are_no_failure_and_stay_supervised(
    status: int, reports: bool
) -> None:
    told = shared()
    stops = Failing(step=7, **describe_failure(Preempted(7))) if reports else None
    assert told.die(0, status, told=stops) == [], "the other one stops as well"
    *_, asked = told.die(1, status, told=stops)
    assert isinstance(asked, RequestEpoch) and asked.failure is not None
    assert (asked.failure.kind, asked.failure.final) == ("stopped", False)
    assert told.roster.state is RosterState.WAITING


FINAL = Failing(kind="UsageError", text="no such layer", fingerprint="f", step=3, final=True)


def test_final_error_of_a_trainer_that_ended_while_there_was_no_keeper_ends_the_launch() -> None:
    told = Told(2, attempt=4)
    told(SupervisorJoined(0, 0, 1))
    leave = told(SupervisorJoined(1, 1, 1, 1, FINAL))[-1]
    assert isinstance(leave, LeaveAll)
    assert (leave.status, leave.text) == (1, "rank 1 raised UsageError: no such layer")


def test_final_error_that_no_keeper_heard_of_ends_the_job_of_several_nodes() -> None:
    told = Told(2, attempt=4)
    told.roster = replace(told.roster, shared=True)
    told(SupervisorJoined(1, 1, 1, 1, FINAL))
    (asked,) = told(SupervisorJoined(0, 0, 1))
    assert isinstance(asked, RequestEpoch) and asked.failure is not None
    assert (asked.failure.final, asked.failure.rank) == (True, 1)


def test_error_that_no_keeper_heard_of_counts_like_one_that_it_heard_of() -> None:
    told = Told(2, attempt=4)
    told(SupervisorJoined(0, 0, 1, 1, failing(step=7), 90.0))
    echo = failing(fingerprint="broken collective", step=7)
    assert told(SupervisorJoined(1, 1, 1, 1, echo, 90.2)) == [StartAll(5)]
    told.started()
    leave = told.fail(told=failing(step=7), status=1, completed=7)[-1]
    assert isinstance(leave, LeaveAll)
    assert "the same error at the same step 2 times in a row" in leave.text


def test_error_that_no_keeper_heard_of_is_the_echo_of_a_death_that_none_heard_of() -> None:
    told = Told(2, attempt=4)
    echo = failing(fingerprint="broken collective", step=7)
    told(SupervisorJoined(0, 0, 1, 1, echo, 90.2))
    assert told(SupervisorJoined(1, 1, 1, -9, None, 90.0)) == [StartAll(5)]
    record = told.roster.record
    assert (record.fingerprint, record.completed) == ("", 7), "no error of the program"


@pytest.mark.parametrize("told_of", [None, failing(step=7)])
def test_interrupt_that_no_keeper_heard_of_ends_the_job(told_of: Failing | None) -> None:
    told = Told(2, attempt=4)
    told(SupervisorJoined(0, 0, 1))
    leave = told(SupervisorJoined(1, 1, 1, -signal.SIGINT, told_of, 90.0))[-1]
    assert isinstance(leave, LeaveAll)
    assert (leave.status, leave.text) == (130, "rank 1 died of SIGINT")


def test_error_that_no_keeper_heard_of_and_another_one_after_it_are_two() -> None:
    told = Told(1, attempt=4)
    assert told(SupervisorJoined(0, 0, 1, 1, failing(step=7), 90.0)) == [StartAll(5)]
    told.started()
    told.fail(told=failing(step=8), status=1, completed=8)
    assert (told.roster.state, told.attempt) == (RosterState.RUNNING, 6)


@pytest.mark.parametrize("kind", ["UsageError", "Preempted"])
def test_other_errors_that_no_keeper_heard_of_are_followed_by_an_attempt(kind: str) -> None:
    told = Told(1, attempt=4)
    failing = structs.replace(FINAL, kind=kind, final=kind == "Preempted")
    assert told(SupervisorJoined(0, 0, 1, 1, failing)) == [StartAll(5)]
