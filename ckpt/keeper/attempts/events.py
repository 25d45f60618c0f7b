"""The events that the roster takes and the actions that it asks for: frozen values without
behaviour. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.ipc.messages import Failing


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended. ``status``: the trainer's exit status; 0: none died. A ``text`` about a
    rank begins with ``rank N``.

    ``kind``: died, error, hang, supervisor (lost), preempted, missing, cut (rank 0's node is
    unreachable), overdue (this node could not act for a while: no fault of the program), stopped
    (all ranks stopped at one step, because another node is asked to go), or elsewhere (on another
    node, where it is decided).
    """

    rank: int
    kind: str
    text: str
    status: int
    at_s: float
    fingerprint: str = ""
    step: int = -1
    final: bool = False
    passing: bool = False
    """An exception of an outage that may pass by itself."""


@dataclass(frozen=True, slots=True)
class SupervisorJoined:
    """A supervisor is ready: it runs no trainer. ``status``: how its last trainer ended by itself,
    if it did; ``failing``: the exception that it ended with at ``at_s``, of which no keeper may
    have heard."""

    rank: int
    peer: int
    pid: int
    status: int | None = None
    failing: Failing | None = None
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainerStarted:
    """A supervisor started its trainer."""

    rank: int
    attempt: int
    pid: int
    how: str


@dataclass(frozen=True, slots=True)
class TrainerFailing:
    """A trainer reported the exception that it is about to die of."""

    rank: int
    attempt: int
    failing: Failing


@dataclass(frozen=True, slots=True)
class TrainerFinished:
    """A trainer's decorated call returned. What follows is the rest of its program, which must not
    run twice."""

    rank: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TrainerEntered:
    """A trainer's decorated call began: the first one, or one after earlier calls have returned."""

    rank: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TrainerProgressed:
    """A run of a trainer on another store than its keeper's, which the board does not show, has
    completed so many steps."""

    rank: int
    attempt: int
    store: str
    completed: int


@dataclass(frozen=True, slots=True)
class PauseOver:
    """The pause after a failure is over."""

    attempt: int


@dataclass(frozen=True, slots=True)
class TrainerDied:
    """A trainer ended by itself, or was ``overdue``: see the message ``Died``. ``completed``: the
    most steps of any rank; -1 for none. ``stepping``: it had not come to the end of its steps, nor
    to the boundary at which all stop."""

    rank: int
    attempt: int
    status: int
    at_s: float
    completed: int
    overdue: bool = False
    stepping: bool = False


@dataclass(frozen=True, slots=True)
class Hung:
    """No step was completed for too long."""

    rank: int
    attempt: int
    text: str
    at_s: float
    completed: int


@dataclass(frozen=True, slots=True)
class TrainerKilled:
    """No process of the attempt is left on this rank."""

    rank: int
    attempt: int


@dataclass(frozen=True, slots=True)
class SupervisorLeft:
    """A supervisor's connection ended; ``planned``: it said so before."""

    rank: int
    peer: int
    planned: bool
    at_s: float
    completed: int


@dataclass(frozen=True, slots=True)
class PreemptRequested:
    """The job is to stop, for example because a launcher got SIGTERM."""


@dataclass(frozen=True, slots=True)
class GraceExpired:
    """A preempted job did not stop in time."""

    at_s: float


@dataclass(frozen=True, slots=True)
class GatheringTimedOut:
    """Some ranks did not join in time; ``text`` names them."""

    text: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Rank0Unreachable:
    """Of a job with several nodes: this node lost its connection to the node of rank 0, or found
    that a later membership epoch writes the log."""

    attempt: int
    text: str
    at_s: float
    completed: int


@dataclass(frozen=True, slots=True)
class EpochChanged:
    """The membership has a new epoch. ``placed``: it has ranks for this node; ``text``: why it was
    opened."""

    number: int
    placed: bool
    text: str
    at_s: float


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The leader of the job's nodes decided that no attempt follows on any node. ``futile``: nor
    may another launch follow."""

    status: int
    text: str
    at_s: float
    futile: bool = False


RosterEvent = (
    SupervisorJoined
    | TrainerStarted
    | TrainerFailing
    | TrainerFinished
    | TrainerEntered
    | TrainerProgressed
    | TrainerDied
    | PauseOver
    | Hung
    | TrainerKilled
    | SupervisorLeft
    | PreemptRequested
    | GraceExpired
    | GatheringTimedOut
    | Rank0Unreachable
    | EpochChanged
    | JobEnded
)


@dataclass(frozen=True, slots=True)
class StartAll:
    """Start ``attempt`` on every rank."""

    attempt: int


@dataclass(frozen=True, slots=True)
class KillAll:
    """Kill what is left of ``attempt`` on every rank, because of ``failure``."""

    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class AttemptOver:
    """No process of ``attempt`` is left; ``failure`` says why it ended. Precedes the start of the
    next one."""

    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so many seconds before the attempt that follows ``attempt``."""

    attempt: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LeaveAll:
    """Every remaining supervisor exits with ``status``; ``text`` is for people.

    ``flush_first``: what only memory holds is made durable before. Not if the launcher starts the
    program again at once. ``futile``: the same launch again would end the same.
    """

    status: int
    text: str
    flush_first: bool = True
    futile: bool = False


@dataclass(frozen=True, slots=True)
class LeaveOne:
    """The supervisor of ``rank`` exits as its trainer did."""

    rank: int
    status: int


@dataclass(frozen=True, slots=True)
class LeaveNodes:
    """Of a job with several nodes: tell the others that this one is asked to go, and leave them;
    they go on without it. ``completed``: the most steps of any rank."""

    completed: int


@dataclass(frozen=True, slots=True)
class RequestStop:
    """Ask the trainers to stop at a step boundary."""


@dataclass(frozen=True, slots=True)
class RequestEpoch:
    """Of a job with several nodes: this node is ready for the next epoch. ``failure``: why its last
    attempt ended, if it did.

    ``completed``: the most steps that any rank of this node has completed so far, in the call after
    ``calls`` that had returned; ``moved``: the attempt made progress that neither shows.
    """

    failure: Failure | None
    completed: int
    calls: int = 0
    moved: bool = False


@dataclass(frozen=True, slots=True)
class ReportEnded:
    """Of a job with several nodes: all ranks of this node ended, with ``status``."""

    status: int


RosterAction = (
    StartAll
    | KillAll
    | AttemptOver
    | Pause
    | LeaveAll
    | LeaveNodes
    | LeaveOne
    | RequestStop
    | RequestEpoch
    | ReportEnded
)
