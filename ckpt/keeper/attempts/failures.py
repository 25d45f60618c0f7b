"""What the leader of several nodes makes of their failures: wait for a better explanation, go on,
or end the job. Pure.

Each node tells why its own trainers died (``Failure``). Where another node's death broke their
collectives that is an exception, which explains nothing. So exceptions wait for ``ECHO_S``,
everything else is judged at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.events import Failure

# Which failure counts, and whether an attempt may follow it. Pure; for a node's roster and for
# who leads several nodes.

ECHO_S = 1.0
"""An exception this soon before another trainer's death was told may come from that death."""

OVERDUE_MAX = 20
"""So often in a row nodes may not be able to act before one new step was completed: what starts
there starves them."""


@dataclass(frozen=True, slots=True)
class FailureHistory:
    """What is remembered from failure to failure: how often the same error came, how often nothing
    was completed.

    ``overdue``: how often trainers were stopped because their node could not act, with nothing
    completed in between.
    """

    fingerprint: str = ""
    step: int = -1
    same: int = 0
    stuck: int = 0
    completed: int = -1
    overdue: int = 0


def cause_of(failures: Sequence[Failure]) -> Failure | None:
    """The failure that is judged: one that needs no other to explain it before exceptions, else the
    first."""
    first = min(failures, key=lambda one: one.at_s, default=None)
    causes = [one for one in failures if one.kind not in ("error", "cut")]
    if first is None or not causes:
        return first
    cause = min(causes, key=lambda one: one.at_s)
    return cause if cause.at_s <= first.at_s + ECHO_S else first


def after_failure(record: FailureHistory, completed: int) -> FailureHistory:
    """The record once an attempt failed that had completed so many steps (-1: none)."""
    moved = completed > record.completed
    completed = max(completed, record.completed)
    return replace(
        record,
        completed=completed,
        stuck=0 if moved else record.stuck + 1,
        overdue=0 if moved else record.overdue,
    )


def after_overdue(record: FailureHistory, completed: int) -> FailureHistory:
    """The same where its trainers were stopped because their node could not act: no failure of
    theirs."""
    moved = completed > record.completed
    completed = max(completed, record.completed)
    return replace(
        record,
        completed=completed,
        stuck=0 if moved else record.stuck,
        overdue=1 if moved else record.overdue + 1,
    )


def assess(
    record: FailureHistory, failure: Failure, policy: Policy
) -> tuple[FailureHistory, str | None]:
    """The record once ``failure`` was judged, and why no attempt follows: it would only come again.
    None: one may follow."""
    same = failure.kind == "error" and (failure.fingerprint, failure.step) == (
        record.fingerprint,
        record.step,
    )
    record = replace(
        record,
        fingerprint=failure.fingerprint,
        step=failure.step,
        same=record.same + 1 if same else 1,
    )
    if failure.final:
        return record, failure.text
    if failure.kind == "error" and record.same >= policy.same_error_max:
        return (
            record,
            f"{failure.text}; the same error at the same step {record.same} times in a row: a bug, "
            "no fault",
        )
    if record.overdue >= OVERDUE_MAX:
        return (
            record,
            f"{failure.text}; {record.overdue} times without one new step completed: it starves "
            "its own node",
        )
    if record.stuck >= policy.stuck_max:
        return (
            record,
            f"{failure.text}; {record.stuck} failures in a row without one new step completed",
        )
    return record, None


UNEXPLAINED = ("error", "cut")
"""What may come from another node's end: an exception, a broken line."""


@dataclass(frozen=True, slots=True)
class EpochFailures:
    """What is known to have gone wrong in one epoch. Times are the leader's, when it heard of it.

    ``failures`` by node; ``lost``: nodes of the epoch that are dead, since when; ``ended``: those
    whose ranks all ended well. ``completed``: the most steps that any of them is known to have
    completed.
    """

    failures: Mapping[str, Failure]
    lost: Mapping[str, float]
    ended: AbstractSet[str]
    completed: int = -1


@dataclass(frozen=True, slots=True)
class NoFailure:
    """Nothing is wrong."""


@dataclass(frozen=True, slots=True)
class WaitForCause:
    """An exception may yet be explained; judge again then."""

    until_s: float


@dataclass(frozen=True, slots=True)
class StartNextEpoch:
    """The next epoch may begin. ``text``: why the last one ended."""

    record: FailureHistory
    text: str


@dataclass(frozen=True, slots=True)
class EndJob:
    """All nodes leave with ``status``."""

    status: int
    text: str


EpochDecision = NoFailure | WaitForCause | StartNextEpoch | EndJob


def decide(
    trouble: EpochFailures, record: FailureHistory, policy: Policy, now_s: float
) -> EpochDecision:
    """What follows. ``record`` is what the epoch carries from the ones before."""
    failures = [
        *trouble.failures.values(),
        *(_lost(node, at_s) for node, at_s in sorted(trouble.lost.items())),
    ]
    cause = cause_of(failures)
    if cause is None:
        return NoFailure()
    finals = [one for one in failures if one.final]
    if finals:  # whatever else happened, that node can't go on
        cause = finals[0]
    elif cause.kind in UNEXPLAINED and now_s < cause.at_s + ECHO_S:
        return WaitForCause(cause.at_s + ECHO_S)
    if cause.kind == "overdue":
        record = after_overdue(record, trouble.completed)
    elif (
        cause.kind != "node" or trouble.completed >= 0
    ):  # else nobody could tell yet how far they were
        record = after_failure(record, trouble.completed)
    record, why = assess(record, cause, policy)
    if why is None and trouble.ended:
        why = f"{cause.text}, after the ranks of another node had ended"
    if why is None:
        return StartNextEpoch(record, cause.text)
    return EndJob(_status(cause), why)


def _lost(node: str, at_s: float) -> Failure:
    return Failure(-1, "node", f"the node {node} is lost", 1, at_s)


def _status(failure: Failure) -> int:
    return 128 - failure.status if failure.status < 0 else failure.status or 1


def with_global_rank(failure: Failure, first_rank: int) -> Failure:
    """The same, told of a rank of the whole job instead of one of its node."""
    if failure.rank < 0:
        return failure
    rank, here = failure.rank + first_rank, f"rank {failure.rank} "
    text = (
        f"rank {rank} {failure.text.removeprefix(here)}"
        if failure.text.startswith(here)
        else failure.text
    )
    return replace(failure, rank=rank, text=text)
