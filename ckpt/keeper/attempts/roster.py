"""Who trains on this node, and what to do if a trainer fails: events in, a new roster and actions
out. Pure.

A roster is one launch of a program with supervisors. Its attempts follow each other: all ranks
start, one fails, all are killed, all start again. Only the first failure of an attempt counts;
later ones are its echo.

If the job has several nodes (``shared``), its attempts are epochs of their membership: the roster
learns when one begins, and only reports why its own ranks failed. The leader of the nodes decides.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from ckpt.errors import FencedError
from ckpt.ipc.messages import Failing, Policy
from ckpt.keeper.attempts.events import (
    AttemptOver,
    EpochChanged,
    Failure,
    GatheringTimedOut,
    GraceExpired,
    Hung,
    JobEnded,
    KillAll,
    LeaveAll,
    LeaveNodes,
    LeaveOne,
    Pause,
    PauseOver,
    PreemptRequested,
    Rank0Unreachable,
    ReportEnded,
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
from ckpt.keeper.attempts.failures import (
    FENCED,
    FUTILE_KINDS,
    HOUR_S,
    REFUSED,
    RESTARTS_HOUR_MAX,
    FailureHistory,
    after_failure,
    assess,
    cause_of,
    pause_s,
)

PREEMPTED_STATUS = 128 + signal.SIGTERM
"""How a preempted program exits."""

NOT_DURABLE_STATUS = 75
"""How a preempted program exits whose last step is not durable: EX_TEMPFAIL of sysexits."""
_STOPPED = (PREEMPTED_STATUS, NOT_DURABLE_STATUS)

PREEMPTED_KIND = "Preempted"
"""What a preempted trainer reports as the kind of its exception (``Failing.kind``)."""

STORES_MAX = 64
"""Runs on so many other stores are followed."""


class RosterState(enum.Enum):
    """What the launch is doing: gathering supervisors, waiting for an epoch, running, killing,
    pausing before the next attempt, or over."""

    GATHERING = "gathering"
    WAITING = "waiting"
    RUNNING = "running"
    KILLING = "killing"
    PAUSING = "pausing"
    OVER = "over"


class RankState(enum.Enum):
    """What the trainer of one rank is doing."""

    IDLE = "idle"
    STARTING = "starting"
    ALIVE = "alive"
    DEAD = "dead"
    ENDED = "ended"


_WAITED = (RankState.STARTING,)
_LIVE = (RankState.STARTING, RankState.ALIVE)


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One rank: the connection of its supervisor, and its trainer. ``finished``: the trainer's
    decorated call has returned; ``calls``: how many have, in this attempt."""

    rank: int
    peer: int
    pid: int
    seat: RankState = RankState.IDLE
    trainer_pid: int = 0
    how: str = ""
    failing: Failing | None = None
    finished: bool = False
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Roster:
    """One launch. ``members`` by rank; ``failures``: those of the attempt that is being killed.

    ``status``: what supervisors leave with, once it is over. With several nodes, ``newest_epoch``:
    the newest epoch, and whether it has ranks for this node; ``job_ended``: the leader's decision
    to end the job, while trainers are still being killed for it.

    ``elsewhere``: the most steps of runs on other stores, which the board does not show; ``moved``:
    one of them made progress in this attempt. ``restarts``: when attempts of the last hour failed.
    """

    launch: str
    ranks: int
    policy: Policy
    attempt: int
    state: RosterState = RosterState.GATHERING
    members: Mapping[int, RosterEntry] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    record: FailureHistory = field(default_factory=FailureHistory)
    preempted: bool = False
    status: int = 0
    shared: bool = False
    newest_epoch: EpochChanged | None = None
    job_ended: JobEnded | None = None
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    moved: bool = False
    restarts: tuple[float, ...] = ()

    @property
    def calls(self) -> int:
        """How many decorated calls have returned in this attempt, on the rank that is furthest."""
        return max((entry.calls for entry in self.members.values()), default=0)

    @property
    def failure(self) -> Failure | None:
        """The failure that counts: see ``cause_of``."""
        return cause_of(self.failures)


def step(roster: Roster, event: RosterEvent) -> tuple[Roster, list[RosterAction]]:
    """The roster after ``event``, and what is to be done, in order. Events of dead attempts change
    nothing."""
    if roster.state is RosterState.OVER:
        # A supervisor that joins too late leaves at once: no later action would tell it to.
        if isinstance(event, SupervisorJoined):
            return roster, [LeaveOne(event.rank, roster.status)]
        return roster, []
    # While ranks gather or wait no attempt lives: the number is that of the last one, perhaps an
    # earlier keeper's.
    live = (
        roster.attempt if roster.state not in (RosterState.GATHERING, RosterState.WAITING) else None
    )
    if getattr(event, "attempt", live) != live:
        return roster, []
    match event:
        case SupervisorJoined():
            return _join(roster, event)
        case TrainerStarted(rank, _, pid, how):
            return _seat(
                roster, rank, of=_WAITED, seat=RankState.ALIVE, trainer_pid=pid, how=how
            ), []
        case TrainerFailing() | TrainerFinished() | TrainerProgressed() | TrainerEntered():
            return _told(roster, event), []
        case PauseOver():
            return _start(roster) if roster.state is RosterState.PAUSING else (roster, [])
        case TrainerDied():
            return _died(roster, event)
        case Hung(rank, _, text, at_s, completed):
            return _fail(roster, Failure(rank, "hang", text, 0, at_s), completed)
        case TrainerKilled(rank):
            return _gone(_seat(roster, rank, of=_LIVE, seat=RankState.DEAD))
        case SupervisorLeft():
            return _left(roster, event)
        case _:
            return _of_job(roster, event)


def _told(
    roster: Roster,
    event: TrainerFailing | TrainerFinished | TrainerProgressed | TrainerEntered,
) -> Roster:
    """What a trainer told of itself: it decides what its end will mean."""
    match event:
        case TrainerFailing(rank, _, failing):
            return _seat(roster, rank, failing=failing)
        case TrainerFinished(rank):
            entry = roster.members.get(rank)
            calls = entry.calls + 1 if entry is not None else 0
            return _seat(roster, rank, finished=True, calls=calls)
        case TrainerEntered(rank):
            # After an earlier call had returned, its rank counts as unfinished again.
            return _seat(roster, rank, finished=False, failing=None)
        case TrainerProgressed():
            return _progressed(roster, event)


def _of_job(roster: Roster, event: RosterEvent) -> tuple[Roster, list[RosterAction]]:
    """Events that concern all ranks."""
    match event:
        case PreemptRequested():
            return _preempted(roster)
        case GraceExpired(at_s):
            text = "preempted, and not done within the grace period"
            return _fail(roster, Failure(-1, "preempted", text, 0, at_s), roster.record.completed)
        case Rank0Unreachable(_, text, at_s, completed):
            running = roster.state is RosterState.RUNNING
            return (
                _fail(roster, Failure(-1, "cut", text, 1, at_s), completed)
                if running
                else (roster, [])
            )
        case EpochChanged():
            return _epoch(roster, event)
        case JobEnded():
            return _job_ended(roster, event)
        case GatheringTimedOut(text, at_s):
            gathering = roster.state is RosterState.GATHERING
            return (
                _leave(roster, Failure(-1, "missing", text, 1, at_s)) if gathering else (roster, [])
            )
        case _:
            raise AssertionError(f"unknown event: {event}")


def _preempted(roster: Roster) -> tuple[Roster, list[RosterAction]]:
    if roster.preempted:
        return roster, []
    roster = replace(roster, preempted=True)
    if roster.state is RosterState.WAITING:
        return _leave(roster, Failure(-1, "preempted", "preempted before the next epoch", 0, 0.0))
    if roster.state is RosterState.PAUSING:
        return _leave(roster, Failure(-1, "preempted", "preempted before the next attempt", 0, 0.0))
    return roster, [RequestStop()] if roster.state is RosterState.RUNNING else []


def _join(roster: Roster, event: SupervisorJoined) -> tuple[Roster, list[RosterAction]]:
    ended = event.status is not None and _well(roster, event.status)
    entry = RosterEntry(
        event.rank,
        event.peer,
        event.pid,
        seat=RankState.ENDED if ended else RankState.IDLE,
        failing=event.failing,
    )
    roster = replace(roster, members={**roster.members, entry.rank: entry})
    if event.status is not None and not ended and not _stopped_in_the_gap(event):
        failure = _of_end_of_trainer(event.rank, event.failing, event.status, event.at_s)
        roster = replace(roster, failures=(*roster.failures, failure))
    leaves: list[RosterAction] = [LeaveOne(event.rank, event.status or 0)] if ended else []
    if roster.state is not RosterState.GATHERING or len(roster.members) < roster.ranks:
        return roster, leaves
    ends = [entry.seat is RankState.ENDED for entry in roster.members.values()]
    # Trainers may have ended by themselves while no keeper was there to hear of it.
    if all(ends):
        return replace(roster, state=RosterState.OVER, status=event.status or 0), leaves
    if any(ends):
        text = "the keeper was lost after a rank had ended, and before the others did"
        roster, actions = _leave(roster, Failure(event.rank, "died", text, 1, 0.0))
    else:
        roster, actions = _after_the_gap(roster)
    return roster, [*leaves, *actions]


def _stopped_in_the_gap(event: SupervisorJoined) -> bool:
    """Whether a trainer that ended while there was no keeper was asked to stop."""
    if event.failing is None:
        return event.status in _STOPPED
    return event.failing.kind == PREEMPTED_KIND and event.status != -signal.SIGINT


def _after_the_gap(roster: Roster) -> tuple[Roster, list[RosterAction]]:
    """Go on after what trainers failed of while there was no keeper, if they did. It counts like
    any failure; what failed before it, only the lost keeper knew."""
    finals = [failure for failure in roster.failures if failure.final]
    failure = finals[0] if finals else roster.failure
    if roster.shared:  # the leader counts this node as lost, and other errors as its echo
        return _wait(roster, failure if finals else None)
    if failure is None:
        return _start(roster)
    if not failure.final:
        # The most steps that are known; the keeper that saw the others is gone.
        completed = max(one.step for one in roster.failures)
        roster = replace(roster, record=after_failure(roster.record, completed))
    roster, reason = _judge(roster, failure)
    return _start_later(roster) if reason is None else _leave(roster, replace(failure, text=reason))


def _wait(roster: Roster, failure: Failure | None) -> tuple[Roster, list[RosterAction]]:
    """No trainer lives here: start if a newer epoch has arrived, else ask for one, or report that
    none can follow here."""
    if roster.preempted:
        # A node that is asked to go is no worse than one that is lost: its ranks are given away.
        told = [LeaveNodes(roster.record.completed)] if failure else []
        asked = Failure(-1, "preempted", "preempted before its first epoch", 0, 0.0)
        roster, actions = _leave(roster, failure or asked)
        return roster, [*told, *actions]
    last = failure is not None and _is_last(roster)
    roster = replace(roster, state=RosterState.WAITING, failures=())
    newest = roster.newest_epoch
    if newest is not None and newest.number > roster.attempt and not last:
        # An epoch without ranks for this node: as a standby it waits for one that has some.
        return _start(roster) if newest.placed else (roster, [])
    if failure is not None and last:
        failure = replace(failure, final=True)
    record = roster.record
    return roster, [RequestEpoch(failure, record.completed, record.calls, roster.moved)]


def _epoch(roster: Roster, event: EpochChanged) -> tuple[Roster, list[RosterAction]]:
    """A newer epoch ends an attempt of an older one, and begins once nothing of that one lives."""
    known = (
        (roster.newest_epoch.number, roster.newest_epoch.placed)
        if roster.newest_epoch is not None
        else (0, False)
    )
    # A node that lost its membership gets an epoch without a place for it, numbered as the next.
    # The real epoch of that number may have one, so of equal numbers the placed one is newer.
    if event.number <= roster.attempt or (event.number, event.placed) <= known:
        return roster, []
    # Remembered in any state: an epoch may arrive while trainers of the last one are being killed.
    roster = replace(roster, newest_epoch=event)
    if roster.state is RosterState.RUNNING:
        return _fail(
            roster, Failure(-1, "elsewhere", event.text, 0, event.at_s), roster.record.completed
        )
    if roster.state is RosterState.WAITING and event.placed and not _is_last(roster):
        return _start(roster)
    return roster, []


def _job_ended(roster: Roster, event: JobEnded) -> tuple[Roster, list[RosterAction]]:
    roster = replace(roster, job_ended=event)
    failure = _of_end(event, event.at_s)
    if roster.state in (RosterState.RUNNING, RosterState.KILLING):
        return _fail(roster, failure, roster.record.completed)
    if event.status == 0:  # it held no rank, and none is needed any more
        return replace(roster, state=RosterState.OVER), [LeaveAll(0, event.text, flush_first=False)]
    return _leave(roster, failure)


def _of_end(event: JobEnded, at_s: float) -> Failure:
    kind = REFUSED if event.futile else "elsewhere"
    return Failure(-1, kind, event.text, event.status, at_s)


def _well(roster: Roster, status: int) -> bool:
    """Whether a trainer with this exit status was done."""
    return status == 0 or (roster.preempted and status in _STOPPED)


def _start(roster: Roster) -> tuple[Roster, list[RosterAction]]:
    attempt = (
        roster.newest_epoch.number
        if roster.shared and roster.newest_epoch is not None
        else roster.attempt + 1
    )
    members = {
        rank: replace(
            entry, seat=RankState.STARTING, trainer_pid=0, failing=None, finished=False, calls=0
        )
        for rank, entry in roster.members.items()
    }
    started = replace(
        roster,
        attempt=attempt,
        state=RosterState.RUNNING,
        members=members,
        failures=(),
        moved=False,
    )
    return started, [StartAll(attempt)]


def _seat(
    roster: Roster, rank: int, *, of: Collection[RankState] = tuple(RankState), **changes: object
) -> Roster:
    """Change the entry of a rank if its state is one ``of`` those."""
    if rank not in roster.members or roster.members[rank].seat not in of:
        return roster
    entry = replace(roster.members[rank], **changes)  # type: ignore[arg-type]
    return replace(roster, members={**roster.members, rank: entry})


def _progressed(roster: Roster, event: TrainerProgressed) -> Roster:
    """A run that the board does not show completed steps. Those that an earlier attempt had
    completed are no progress."""
    if event.completed <= roster.elsewhere.get(event.store, 0):
        return roster
    if event.store not in roster.elsewhere and len(roster.elsewhere) >= STORES_MAX:
        return roster
    return replace(roster, elsewhere={**roster.elsewhere, event.store: event.completed}, moved=True)


def _died(roster: Roster, event: TrainerDied) -> tuple[Roster, list[RosterAction]]:
    entry = roster.members.get(event.rank)
    if entry is None or entry.seat in (RankState.DEAD, RankState.ENDED):
        return roster, []
    if _well(roster, event.status):
        roster = _seat(roster, event.rank, seat=RankState.ENDED)
        leaves: list[RosterAction] = [LeaveOne(event.rank, event.status)]
        if roster.state is RosterState.KILLING:
            # It was done before the kill reached it, so it must not be started again.
            roster, actions = _gone(roster)
            return roster, [*leaves, *actions]
        ended = all(entry.seat is RankState.ENDED for entry in roster.members.values())
        if ended and roster.shared and event.status in _STOPPED:
            leaves = [LeaveNodes(roster.record.completed), *leaves]
        elif ended and roster.shared:
            leaves = [ReportEnded(event.status), *leaves]
        return replace(
            roster, state=RosterState.OVER, status=event.status
        ) if ended else roster, leaves
    roster = _seat(roster, event.rank, seat=RankState.DEAD)
    failing = entry.failing
    failure = _of_end_of_trainer(event.rank, failing, event.status, event.at_s)
    interrupted = event.status == -signal.SIGINT
    if not interrupted and roster.shared and _stopped_for_another(entry, event):
        if any(entry.seat in _LIVE for entry in roster.members.values()):
            return roster, []  # the others stop as well; once the next epoch comes they are killed
        text = f"rank {event.rank} stopped with all others, because another node is asked to go"
        failure = Failure(event.rank, "stopped", text, event.status, event.at_s)
    elif not interrupted and failing is None and event.overdue:
        text = (
            f"rank {event.rank} was stopped, because its node had lost contact with the job's "
            "other nodes"
        )
        failure = Failure(event.rank, "overdue", text, event.status, event.at_s)
    return _fail(roster, failure, event.completed)


def _of_end_of_trainer(rank: int, failing: Failing | None, status: int, at_s: float) -> Failure:
    """One that reported an exception before it died is judged by that, not by its status."""
    interrupted = status == -signal.SIGINT  # a person wants the end, whatever else went wrong
    if failing is not None and not interrupted:
        return _of_exception(rank, failing, status, at_s)
    text = f"rank {rank} {status_text(status)}"
    return Failure(rank, "died", text, status, at_s, final=interrupted)


def _of_exception(rank: int, failing: Failing, status: int, at_s: float) -> Failure:
    fenced = failing.kind == FencedError.__name__
    return Failure(
        rank,
        FENCED if fenced else "error",
        f"rank {rank} raised {failing.kind}: {failing.text}",
        FencedError.exit_code if fenced else status,
        at_s,
        failing.fingerprint,
        failing.step,
        failing.final,
        failing.passing,
    )


def _stopped_for_another(entry: RosterEntry, event: TrainerDied) -> bool:
    """Whether a trainer ended as one that stops because another node is asked to go. A program may
    also exit with these numbers by itself: then it reported another exception, its call had
    returned, or it was in the middle of its steps."""
    if event.status not in _STOPPED or entry.finished:
        return False
    return not event.stepping if entry.failing is None else entry.failing.kind == PREEMPTED_KIND


def _left(roster: Roster, event: SupervisorLeft) -> tuple[Roster, list[RosterAction]]:
    entry = roster.members.get(event.rank)
    if entry is None or entry.peer != event.peer:
        return roster, []
    if entry.seat is RankState.ENDED and roster.state is RosterState.GATHERING:
        return roster, []  # it has joined; that it ended is remembered for those that join later
    members = {rank: entry for rank, entry in roster.members.items() if rank != event.rank}
    roster = replace(roster, members=members)
    if entry.seat is RankState.ENDED:
        return (replace(roster, state=RosterState.OVER) if not members else roster), []
    text = f"the supervisor of rank {event.rank} {'left' if event.planned else 'was cut off'}"
    return _fail(roster, Failure(event.rank, "supervisor", text, 1, event.at_s), event.completed)


def _fail(roster: Roster, failure: Failure, completed: int) -> tuple[Roster, list[RosterAction]]:
    """Note a failure; the first one of an attempt has all trainers killed."""
    roster = replace(roster, failures=(*roster.failures, failure))
    if roster.state in (RosterState.GATHERING, RosterState.WAITING, RosterState.PAUSING):
        return _leave(roster, failure)
    if roster.state is RosterState.KILLING:
        return _gone(roster)
    # All trainers are killed, also healthy ones: a communicator with a lost rank can't be repaired,
    # and their state is in the slots.
    killing = replace(
        roster,
        state=RosterState.KILLING,
        record=after_failure(roster.record, completed, calls=roster.calls, moved=roster.moved),
    )
    over, actions = _gone(killing)
    return over, [KillAll(roster.attempt, failure), *actions]


def _gone(roster: Roster) -> tuple[Roster, list[RosterAction]]:
    """Once all are dead: decide, then start again or end."""
    left = [entry for entry in roster.members.values() if entry.seat in _LIVE]
    failure = roster.failure
    if roster.state is not RosterState.KILLING or left or failure is None:
        return roster, []
    # All dead: only now is known what all died of, and the next attempt must not meet a live one.
    over = AttemptOver(roster.attempt, failure)
    if roster.job_ended is not None:
        roster, actions = _leave(roster, _of_end(roster.job_ended, failure.at_s))
        return roster, [over, *actions]
    # With several nodes the leader decides. A lost supervisor ends this node's launch in any case:
    # its launcher starts the program again.
    if roster.shared and failure.kind != "supervisor":
        roster, actions = _wait(roster, failure)
        return roster, [over, *actions]
    roster, reason = _judge(roster, failure)
    roster, actions = (
        _start_later(roster) if reason is None else _leave(roster, replace(failure, text=reason))
    )
    return roster, [over, *actions]


def _start_later(roster: Roster) -> tuple[Roster, list[RosterAction]]:
    """Start the next attempt: at once, or after a pause if the last ones made no progress."""
    seconds = pause_s(roster.record.stuck)
    if not seconds:
        return _start(roster)
    paused = replace(roster, state=RosterState.PAUSING, failures=())
    return paused, [Pause(roster.attempt, seconds)]


def _is_last(roster: Roster) -> bool:
    """Whether no attempt can follow on this node, whatever this one died of."""
    gone = len(roster.members) < roster.ranks or any(
        entry.seat is RankState.ENDED for entry in roster.members.values()
    )
    return gone or roster.preempted or any(entry.finished for entry in roster.members.values())


def _leave(roster: Roster, failure: Failure) -> tuple[Roster, list[RosterAction]]:
    futile = failure.kind in FUTILE_KINDS
    # A futile end is the job's, not this node's: its launcher goes by that status.
    if roster.preempted and not futile:
        status = PREEMPTED_STATUS
    elif failure.status < 0:
        status = 128 - failure.status
    else:
        status = failure.status or 1
    # After the loss of a supervisor the launcher starts the program at once, and the keeper lives
    # on: nothing need be flushed before that.
    leave = LeaveAll(
        status,
        failure.text,
        flush_first=failure.kind != "supervisor",
        futile=futile,
    )
    return replace(roster, state=RosterState.OVER, status=status), [leave]


def _judge(roster: Roster, failure: Failure) -> tuple[Roster, str | None]:
    """The roster with its history brought up to date, and why no attempt follows; None: start
    one."""
    record, reason = assess(roster.record, failure, roster.policy)
    recent = tuple(at_s for at_s in roster.restarts if at_s > failure.at_s - HOUR_S)
    roster = replace(roster, record=record, restarts=(*recent, failure.at_s))
    if reason is None and len(recent) >= RESTARTS_HOUR_MAX:
        reason = f"{failure.text}; {len(recent)} restarts within an hour, which is the most"
    if roster.preempted or failure.kind == "supervisor" or failure.final:
        return roster, failure.text
    if (
        any(entry.seat is RankState.ENDED for entry in roster.members.values())
        or len(roster.members) < roster.ranks
    ):
        return roster, f"{failure.text}, after another rank had ended"
    if any(entry.finished for entry in roster.members.values()):
        return (
            roster,
            f"{failure.text}, after the training function had returned: the rest of a program is "
            "not run again",
        )
    return roster, reason


def status_text(status: int) -> str:
    """How a process ended, for people."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"
