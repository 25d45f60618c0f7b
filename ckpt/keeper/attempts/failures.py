"""Which failure of an attempt counts, and whether another attempt may follow it, on one node or on
several. Pure.

The roster of each node asks ``assess``. With several nodes their leader asks ``decide``: each node
reports why its own trainers died. If another node's death broke their collectives, that is an
exception, which explains nothing. So exceptions wait for ``ECHO_S`` for a better explanation, and
everything else is decided at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.events import Failure

ECHO_S = 1.0
"""An exception at most this long before another trainer's death was reported may come from that
death."""

OVERDUE_MAX = 20
"""How often in a row trainers may be stopped because their node could not act, with no new step:
they starve the node."""

PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)
"""Pauses after the first, second, ... failure in a row without a new step; the last one from there
on."""

OUTAGE_S = 15.0
"""An error that may pass by itself counts as repeated only if the attempt that met it again came
after a pause of at least this long."""

RESTARTS_HOUR_MAX = 60
"""The most attempts that may follow a failure within an hour."""
HOUR_S = 3600.0

# ---- one attempt: its cause, and what the failures before it say


FENCED = "fenced"
"""The kind of a failure by which another program that writes to the store was found."""
REFUSED = "refused"
"""The kind of a failure that the way in which the nodes were started causes."""
FUTILE_KINDS = (FENCED, REFUSED)
"""After these the same launch would end the same, or fence the other program in turn."""


@dataclass(frozen=True, slots=True)
class FailureHistory:
    """What is remembered from failure to failure.

    ``fingerprint`` and ``step``: of the last failure. ``same``: how often in a row the same error
    came at the same step. ``stuck``: how many attempts in a row failed without a new step.
    ``completed``: the most steps of any attempt; -1 for none. ``calls``: how many decorated calls
    had returned in the attempt that got furthest; ``completed`` is of the call after them.
    ``overdue``: how often in a row trainers were stopped because their node could not act, without
    a new step. ``restarts``: with several nodes, when attempts of the last hour failed by the
    program's fault, in seconds of the leaders' wall clocks.
    """

    fingerprint: str = ""
    step: int = -1
    same: int = 0
    stuck: int = 0
    completed: int = -1
    overdue: int = 0
    calls: int = 0
    restarts: tuple[int, ...] = ()


def cause_of(failures: Sequence[Failure]) -> Failure | None:
    """The failure that counts: the first one, unless it is an exception that a death within ECHO_S
    explains."""
    first = min(failures, key=lambda failure: failure.at_s, default=None)
    causes = [failure for failure in failures if failure.kind not in UNEXPLAINED]
    if first is None or not causes:
        return first
    cause = min(causes, key=lambda failure: failure.at_s)
    return cause if cause.at_s <= first.at_s + ECHO_S else first


def after_failure(
    history: FailureHistory, completed: int, *, calls: int = 0, moved: bool = False
) -> FailureHistory:
    """The history after an attempt failed that had completed so many steps (-1: none) in the call
    after ``calls`` that had returned. ``moved``: it made progress that neither number shows.

    Steps of an earlier call that are done again are no progress.
    """
    further = calls > history.calls
    moved |= further or (calls == history.calls and completed > history.completed)
    if calls == history.calls:
        completed = max(completed, history.completed)
    return replace(
        history,
        completed=completed if calls >= history.calls else history.completed,
        calls=max(calls, history.calls),
        stuck=0 if moved else history.stuck + 1,
        overdue=0 if moved else history.overdue,
    )


def after_overdue(history: FailureHistory, completed: int) -> FailureHistory:
    """The history after trainers were stopped because their node could not act: not counted as a
    failure of theirs."""
    moved = completed > history.completed
    return replace(
        history,
        completed=max(completed, history.completed),
        stuck=0 if moved else history.stuck,
        overdue=1 if moved else history.overdue + 1,
    )


def assess(
    history: FailureHistory, failure: Failure, policy: Policy
) -> tuple[FailureHistory, str | None]:
    """The history with ``failure`` counted, and why no attempt may follow: it would only repeat.
    None: one may follow."""
    same = failure.kind == "error" and (failure.fingerprint, failure.step) == (
        history.fingerprint,
        history.step,
    )
    # An outage may last longer than an attempt: it says something only after a pause.
    again = not failure.passing or pause_s(history.stuck - 1) >= OUTAGE_S
    history = replace(
        history,
        fingerprint=failure.fingerprint,
        step=failure.step,
        same=history.same + again if same else 1,
    )
    if failure.final:
        return history, failure.text
    if failure.kind == "error" and history.same >= policy.same_error_max:
        return (
            history,
            f"{failure.text}; the same error at the same step {history.same} times in a row: a "
            "bug, no fault",
        )
    if history.overdue >= OVERDUE_MAX:
        return (
            history,
            f"{failure.text}; {history.overdue} times without one new step completed: it starves "
            "its own node",
        )
    if history.stuck >= policy.stuck_max:
        return (
            history,
            f"{failure.text}; {history.stuck} failures in a row without one new step completed",
        )
    return history, None


def pause_s(stuck: int) -> float:
    """The pause after that many failures in a row without a new step."""
    return PAUSES_S[min(stuck, len(PAUSES_S)) - 1] if stuck > 0 else 0.0


UNEXPLAINED = ("error", "cut")
"""Kinds of failures that another node's end may cause: an exception, a broken connection."""

ASKED_TO_GO = ("preempted", "stopped")
"""Kinds of failures that follow from a node's SIGTERM, on itself and on all others."""

LEAVES_WITHIN_S = 30.0
"""How long a node that was asked to go may take from the stop until it has left, before the others
go on with it."""


# ---- several nodes: what their leader decides


@dataclass(frozen=True, slots=True)
class EpochFailures:
    """What is known to have gone wrong in one epoch. Times are when the leader heard of it, by its
    own clock.

    ``failures`` by node. ``lost``: dead nodes of the epoch, and since when. ``ended``: nodes whose
    ranks all ended well. ``completed``: the most steps that any of them is known to have completed,
    in the call after ``calls`` that had returned; ``moved``: it made progress that neither shows.
    """

    failures: Mapping[str, Failure]
    lost: Mapping[str, float]
    ended: AbstractSet[str]
    completed: int = -1
    calls: int = 0
    moved: bool = False


@dataclass(frozen=True, slots=True)
class NoFailure:
    """Nothing is wrong."""


@dataclass(frozen=True, slots=True)
class WaitForCause:
    """An exception may yet be explained, or the pause after a failure is not over; decide again
    then."""

    until_s: float


@dataclass(frozen=True, slots=True)
class StartNextEpoch:
    """The next epoch may begin. ``text``: why the last one ended. ``stopped``: because a node is
    asked to go; without another in its place the job ends."""

    record: FailureHistory
    text: str
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class EndJob:
    """All nodes leave with ``status``. ``futile``: and may not be launched again."""

    status: int
    text: str
    futile: bool = False


EpochDecision = NoFailure | WaitForCause | StartNextEpoch | EndJob


OF_NODES = ("node", "overdue", "cut", "elsewhere")
"""Kinds of failures that are no fault of the program: no pause, and no limit to their number."""


def decide(
    known: EpochFailures,
    history: FailureHistory,
    policy: Policy,
    now_s: float,
    *,
    clock_s: float = 0.0,
) -> EpochDecision:
    """What follows. ``history``: as the epoch carries it from the epochs before; ``clock_s``: the
    wall clock, which leaders of different nodes have alike enough to count failures of an hour."""
    failures = [
        *known.failures.values(),
        *(_lost(node, at_s) for node, at_s in sorted(known.lost.items())),
    ]
    cause = cause_of(failures)
    if cause is None:
        return NoFailure()
    finals = [failure for failure in failures if failure.final]
    asked = [failure for failure in failures if failure.kind in ASKED_TO_GO]
    if asked and not finals and not known.ended:
        # No failure of the program: nothing counts against it.
        until_s = min(failure.at_s for failure in asked) + LEAVES_WITHIN_S
        if not known.lost and now_s < until_s:
            return WaitForCause(until_s)
        if known.lost or any(failure.kind == "preempted" for failure in asked):
            completed = max(history.completed, known.completed)
            record = replace(history, completed=completed)
            return StartNextEpoch(record, asked[0].text, stopped=True)
        # No node was asked to go: the programs exit so by themselves, which counts as any failure.
        if cause.kind == "stopped":
            text = f"rank {cause.rank} exited with {cause.status}, and no node is asked to go"
            cause = replace(cause, kind="died", text=text)
    if finals:  # whatever else happened, that node can't continue
        cause = finals[0]
    elif cause.kind in UNEXPLAINED and now_s < cause.at_s + ECHO_S:
        return WaitForCause(cause.at_s + ECHO_S)
    if cause.kind == "overdue":
        history = after_overdue(history, known.completed)
    elif cause.kind != "node" or (known.completed >= 0 and known.calls >= history.calls):
        # A lost node before any other has reported its steps, or in which call they are, says
        # nothing about progress: it is not counted as stuck.
        history = after_failure(history, known.completed, calls=known.calls, moved=known.moved)
    history, reason = assess(history, cause, policy)
    if cause.kind not in OF_NODES:
        # A clock that was put back must not make old failures count for ever.
        recent = tuple(at_s for at_s in history.restarts if clock_s - HOUR_S < at_s <= clock_s)
        history = replace(history, restarts=(*recent, int(clock_s)))
        if reason is None and len(recent) >= RESTARTS_HOUR_MAX:
            reason = f"{cause.text}; {len(recent)} restarts within an hour, which is the most"
        if reason is None and now_s < cause.at_s + pause_s(history.stuck):
            return WaitForCause(cause.at_s + pause_s(history.stuck))
    if reason is None and known.ended:
        reason = f"{cause.text}, after the ranks of another node had ended"
    if reason is None:
        return StartNextEpoch(history, cause.text)
    return EndJob(_status(cause), reason, cause.kind in FUTILE_KINDS)


def _lost(node: str, at_s: float) -> Failure:
    return Failure(-1, "node", f"the node {node} is lost", 1, at_s)


def _status(failure: Failure) -> int:
    return 128 - failure.status if failure.status < 0 else failure.status or 1


def with_global_rank(failure: Failure, first_rank: int) -> Failure:
    """The same failure, with the rank's number in the whole job instead of on its node."""
    if failure.rank < 0:
        return failure
    rank, local = failure.rank + first_rank, f"rank {failure.rank} "
    text = (
        f"rank {rank} {failure.text.removeprefix(local)}"
        if failure.text.startswith(local)
        else failure.text
    )
    return replace(failure, rank=rank, text=text)
