"""The events that a roster takes and the actions that it asks for. Frozen; no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.ipc.messages import Failing


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended. ``status``: the trainer's, 0: none died; ``text`` about a rank begins
    with ``rank N``.

    ``kind``: died, error, hang, supervisor, preempted, missing, cut, overdue (this node could not
    act for a while: no fault of the program's), or elsewhere (on another node, which is judged
    there).
    """

    rank: int
    kind: str
    text: str
    status: int
    at_s: float
    fingerprint: str = ""
    step: int = -1
    final: bool = False


@dataclass(frozen=True, slots=True)
class SupervisorJoined:
    """A supervisor said hello, its trainer (if it had one) dead. ``status``: how that one had ended
    by itself, if it had."""

    rank: int
    peer: int
    pid: int
    status: int | None = None


@dataclass(frozen=True, slots=True)
class TrainerStarted:
    """A supervisor started its trainer."""

    rank: int
    attempt: int
    pid: int
    how: str


@dataclass(frozen=True, slots=True)
class TrainerFailing:
    """A trainer told the exception that it is about to die of."""

    rank: int
    attempt: int
    failing: Failing


@dataclass(frozen=True, slots=True)
class TrainerFinished:
    """A trainer's decorated call returned: what follows is the rest of its program, and not to be
    run twice."""

    rank: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TrainerEntered:
    """A trainer's decorated call began: the first one, or one after others have returned."""

    rank: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TrainerDied:
    """A trainer ended by itself, or ``overdue``: see Died. ``completed``: the most steps that any
    rank had completed (-1)."""

    rank: int
    attempt: int
    status: int
    at_s: float
    completed: int
    overdue: bool = False


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
    """Nothing of the attempt's process group is left on this rank."""

    rank: int
    attempt: int


@dataclass(frozen=True, slots=True)
class SupervisorLeft:
    """A supervisor's connection ended: as planned or cut off."""

    rank: int
    peer: int
    planned: bool
    at_s: float
    completed: int


@dataclass(frozen=True, slots=True)
class PreemptRequested:
    """Somebody asked the job to stop."""


@dataclass(frozen=True, slots=True)
class GraceExpired:
    """A preempted job took too long."""

    at_s: float


@dataclass(frozen=True, slots=True)
class GatheringTimedOut:
    """Some ranks did not come in time; ``text`` names them."""

    text: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Rank0Unreachable:
    """Of a job with several nodes: this one can't speak to the node of rank 0 any more."""

    attempt: int
    text: str
    at_s: float
    completed: int


@dataclass(frozen=True, slots=True)
class EpochChanged:
    """The job's nodes have a new epoch. ``placed``: it has ranks for this node; ``text`` says why
    it came."""

    number: int
    placed: bool
    text: str
    at_s: float


@dataclass(frozen=True, slots=True)
class JobEnded:
    """Who leads the job's nodes decided that there is no next attempt anywhere."""

    status: int
    text: str
    at_s: float


RosterEvent = (
    SupervisorJoined
    | TrainerStarted
    | TrainerFailing
    | TrainerFinished
    | TrainerEntered
    | TrainerDied
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
    """Nothing of ``attempt`` lives any more; ``failure`` says why. Before the next one starts."""

    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class LeaveAll:
    """Every supervisor that is left exits with ``status``; ``text`` for people.

    ``flush_first``: first what only memory holds goes to a store. Not where the launcher starts the
    program again at once.
    """

    status: int
    text: str
    flush_first: bool = True


@dataclass(frozen=True, slots=True)
class LeaveOne:
    """The supervisor of ``rank`` exits as its trainer did."""

    rank: int
    status: int


@dataclass(frozen=True, slots=True)
class RequestStop:
    """Ask the trainers to stop at a boundary."""


@dataclass(frozen=True, slots=True)
class RequestEpoch:
    """Of a job with several nodes: this node is ready for the next epoch. ``failure``: why the last
    one ended here, if it did.

    ``completed``: the most steps that any rank of this node has completed so far.
    """

    failure: Failure | None
    completed: int


@dataclass(frozen=True, slots=True)
class ReportEnded:
    """Of a job with several nodes: all ranks of this node ended, with ``status``."""

    status: int


RosterAction = (
    StartAll
    | KillAll
    | AttemptOver
    | LeaveAll
    | LeaveOne
    | RequestStop
    | RequestEpoch
    | ReportEnded
)
