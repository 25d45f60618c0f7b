"""What the leader of several nodes makes of their failures."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.events import Failure
from ckpt.keeper.attempts.failures import (
    ECHO_S,
    HOUR_S,
    LEAVES_WITHIN_S,
    OVERDUE_MAX,
    PAUSES_S,
    RESTARTS_HOUR_MAX,
    EndJob,
    EpochFailures,
    FailureHistory,
    NoFailure,
    StartNextEpoch,
    WaitForCause,
    decide,
    with_global_rank,
)

NOW_S = 100.0
DIED = Failure(0, "died", "rank 0 died of SIGKILL", -9, NOW_S)
ERROR = Failure(1, "error", "rank 1 raised ValueError: bad", 1, NOW_S, "f", 7)


def trouble(
    *failures: Failure, lost: tuple[str, ...] = (), ended: tuple[str, ...] = (), completed: int = 5
) -> EpochFailures:
    by_node = {f"n{number}": failure for number, failure in enumerate(failures)}
    return EpochFailures(by_node, dict.fromkeys(lost, NOW_S), frozenset(ended), completed)


def test_without_failure_nothing_is_judged() -> None:
    assert decide(trouble(), FailureHistory(), Policy(), NOW_S) == NoFailure()
    assert decide(trouble(ended=("a",)), FailureHistory(), Policy(), NOW_S) == NoFailure()


def test_death_is_followed_at_once() -> None:
    came = decide(trouble(DIED), FailureHistory(), Policy(), NOW_S)
    assert isinstance(came, StartNextEpoch)
    assert came.text == DIED.text
    assert came.record.completed == 5


def test_lost_node_is_followed_at_once_and_explains_the_exceptions_of_the_others() -> None:
    broken = replace(ERROR, at_s=NOW_S - 0.3)
    came = decide(trouble(broken, lost=("x",)), FailureHistory("f", 7, 1, 0, 5), Policy(), NOW_S)
    assert isinstance(came, StartNextEpoch)
    assert "x" in came.text
    assert came.record.same == 1


def test_exception_alone_waits_for_an_explanation_then_counts() -> None:
    assert decide(trouble(ERROR), FailureHistory(), Policy(), NOW_S) == WaitForCause(NOW_S + ECHO_S)
    came = decide(trouble(ERROR), FailureHistory(), Policy(), NOW_S + ECHO_S)
    assert isinstance(came, StartNextEpoch)
    assert (came.record.fingerprint, came.record.same) == ("f", 1)


def test_same_exception_at_the_same_step_twice_ends_all_nodes_with_its_status() -> None:
    came = decide(
        trouble(replace(ERROR, status=3)), FailureHistory("f", 7, 1, 0, 5), Policy(), NOW_S + 9
    )
    assert isinstance(came, EndJob)
    assert came.status == 3
    assert "twice" in came.text or "2 times" in came.text


def test_failure_that_one_node_cannot_go_on_from_ends_the_job_whatever_else_happened() -> None:
    final = replace(ERROR, final=True, text="rank 1 raised UsageError: wrong")
    came = decide(trouble(DIED, final, lost=("x",)), FailureHistory(), Policy(), NOW_S)
    assert came == EndJob(1, final.text)


def test_failure_after_another_nodes_ranks_had_ended_ends_the_job() -> None:
    came = decide(trouble(DIED, ended=("b",)), FailureHistory(), Policy(), NOW_S)
    assert isinstance(came, EndJob)
    assert came.status == 128 + 9


def test_failures_without_progress_end_the_job() -> None:
    record = FailureHistory()
    for number in range(1, 6):
        came = decide(
            trouble(DIED, completed=-1), record, Policy(stuck_max=5), NOW_S + PAUSES_S[-1]
        )
        assert isinstance(came, EndJob if number == 5 else StartNextEpoch)
        if isinstance(came, StartNextEpoch):
            record = came.record


def test_nodes_that_could_not_act_for_a_while_are_no_failures_of_the_program() -> None:
    stopped = replace(DIED, kind="overdue", text="rank 0 was stopped")
    record = FailureHistory()
    for _ in range(OVERDUE_MAX - 1):
        came = decide(trouble(stopped, completed=-1), record, Policy(stuck_max=5), NOW_S)
        assert isinstance(came, StartNextEpoch)
        record = came.record
    assert record.stuck == 0
    came = decide(trouble(stopped, completed=0), record, Policy(stuck_max=5), NOW_S)
    assert isinstance(came, StartNextEpoch) and came.record.overdue == 1, "a step was completed"
    came = decide(trouble(stopped, completed=-1), record, Policy(stuck_max=5), NOW_S)
    assert isinstance(came, EndJob) and "starves its own node" in came.text


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([DIED, ERROR, replace(ERROR, fingerprint="g"), replace(DIED, kind="hang")]),
        max_size=4,
    ),
    st.sets(st.sampled_from(["x", "y"])),
    st.floats(NOW_S, NOW_S + 3),
)
def test_waiting_ends_and_only_exceptions_wait(
    failures: list[Failure], lost: set[str], now_s: float
) -> None:
    came = decide(trouble(*failures, lost=tuple(sorted(lost))), FailureHistory(), Policy(), now_s)
    assert isinstance(came, NoFailure) == (not failures and not lost)
    if isinstance(came, WaitForCause):
        assert not lost
        assert all(one.kind == "error" for one in failures)
        assert now_s < came.until_s <= NOW_S + ECHO_S


def test_ranks_are_told_as_those_of_the_whole_job() -> None:
    told = with_global_rank(DIED, 8)
    assert (told.rank, told.text) == (8, "rank 8 died of SIGKILL")
    assert (
        with_global_rank(replace(DIED, rank=1, text="rank 12 is not this one"), 8).text
        == "rank 12 is not this one"
    )
    assert with_global_rank(replace(DIED, rank=-1), 8).rank == -1


def test_stop_for_a_node_that_is_asked_to_go_waits_for_its_leave_and_counts_against_nobody() -> (
    None
):
    stopped = Failure(0, "stopped", "rank 0 stopped with all others", 143, NOW_S)
    before = FailureHistory("f", 7, 1, 4, 3)
    waits = decide(trouble(stopped), before, Policy(), NOW_S + 1)
    assert waits == WaitForCause(NOW_S + LEAVES_WITHIN_S)
    came = decide(trouble(stopped, lost=("x",)), before, Policy(), NOW_S + 1)
    assert came == StartNextEpoch(replace(before, completed=5), stopped.text, stopped=True)
    stays = decide(trouble(stopped), before, Policy(), NOW_S + LEAVES_WITHIN_S)
    assert isinstance(stays, StartNextEpoch), "the node that was asked did not go"
    after_end = decide(trouble(stopped, ended=("y",)), before, Policy(), NOW_S + 1)
    assert isinstance(after_end, EndJob)


def test_programs_that_exit_as_if_they_were_stopped_though_no_node_goes_are_given_up() -> None:
    stopped = Failure(0, "stopped", "rank 0 stopped with all others", 75, NOW_S)
    record, now_s = FailureHistory(), NOW_S + LEAVES_WITHIN_S
    for number in range(1, 6):
        came = decide(trouble(stopped, completed=-1), record, Policy(stuck_max=5), now_s)
        assert isinstance(came, EndJob if number == 5 else StartNextEpoch)
        assert "exited with 75, and no node is asked to go" in came.text
        if isinstance(came, StartNextEpoch):
            assert not came.stopped, "the world need not shrink"
            record = came.record
    asked = Failure(-1, "preempted", "a node is asked to go", 143, NOW_S)
    came = decide(trouble(stopped, asked, completed=-1), record, Policy(stuck_max=5), now_s)
    assert came == StartNextEpoch(record, stopped.text, stopped=True)


def test_attempts_of_several_nodes_without_a_new_step_follow_after_growing_pauses() -> None:
    history, waited = FailureHistory(completed=5), []
    for number in range(4):
        failure = replace(DIED, text=f"rank 0 died, {number}")
        came = decide(trouble(failure), history, Policy(), NOW_S)
        waited.append(came.until_s - NOW_S if isinstance(came, WaitForCause) else 0.0)
        came = decide(trouble(failure), history, Policy(), NOW_S + waited[-1])
        assert isinstance(came, StartNextEpoch)
        history = came.record
    assert waited == list(PAUSES_S[:4])
    came = decide(trouble(lost=("x",)), history, replace_stuck(Policy(), 99), NOW_S)
    assert isinstance(came, StartNextEpoch), "a lost node is no fault of the program"


def replace_stuck(policy: Policy, most: int) -> Policy:
    return structs.replace(policy, stuck_max=most)


def test_steps_of_a_later_call_are_progress_also_with_several_nodes() -> None:
    history = FailureHistory(completed=100, calls=0, stuck=4)
    later = replace(trouble(DIED, completed=3), calls=1)
    came = decide(later, history, Policy(), NOW_S)
    assert isinstance(came, StartNextEpoch)
    assert (came.record.calls, came.record.completed, came.record.stuck) == (1, 3, 0)
    elsewhere = replace(trouble(DIED, completed=3), calls=1, moved=True)
    came = decide(elsewhere, came.record, Policy(), NOW_S)
    assert isinstance(came, StartNextEpoch) and came.record.stuck == 0
    lost = decide(trouble(lost=("x",), completed=50), came.record, Policy(), NOW_S)
    assert isinstance(lost, StartNextEpoch) and lost.record.stuck == 0, "which call is not known"


def test_error_of_an_outage_counts_as_the_same_only_after_a_long_pause() -> None:
    outage, history, tried = replace(ERROR, passing=True), FailureHistory(), 0
    while not isinstance(
        came := decide(
            trouble(outage, completed=-1),
            history,
            replace_stuck(Policy(), 99),
            NOW_S + PAUSES_S[-1],
        ),
        EndJob,
    ):
        assert isinstance(came, StartNextEpoch)
        history, tried = came.record, tried + 1
    assert tried == PAUSES_S.index(15.0) + 1
    assert "2 times in a row" in came.text


def test_nodes_restart_so_many_times_an_hour_whatever_fails() -> None:
    history, clock_s = FailureHistory(), 1_000_000.0
    for number in range(RESTARTS_HOUR_MAX):
        error = replace(ERROR, fingerprint=f"f{number}")
        steps = trouble(error, completed=number)
        came = decide(steps, history, Policy(), NOW_S + ECHO_S, clock_s=clock_s + number)
        assert isinstance(came, StartNextEpoch), number
        history = came.record
    last = trouble(replace(ERROR, fingerprint="other"), completed=999)
    came = decide(last, history, Policy(), NOW_S + ECHO_S, clock_s=clock_s + 100)
    assert isinstance(came, EndJob)
    assert "restarts within an hour" in came.text
    for later_s in (HOUR_S + 200, -HOUR_S):  # an hour has passed; a clock was put back
        came = decide(last, history, Policy(), NOW_S + ECHO_S, clock_s=clock_s + later_s)
        assert isinstance(came, StartNextEpoch)
        assert len(came.record.restarts) == 1
