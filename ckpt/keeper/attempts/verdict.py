"""Which failure counts, and whether an attempt may follow it. Pure; for a node's roster and for who leads several nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt.ipc.policy import Policy
from ckpt.keeper.attempts.events import Failure

ECHO_S = 1.0
"""An exception this soon before another trainer's death was told may come from that death."""

OVERDUE_MAX = 20
"""So often in a row nodes may not be able to act before one new step was completed: what starts there starves them."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered from failure to failure: how often the same error came, how often nothing was completed.

    ``overdue``: how often trainers were stopped because their node could not act, with nothing completed in between.
    """

    fingerprint: str = ""
    step: int = -1
    same: int = 0
    stuck: int = 0
    completed: int = -1
    overdue: int = 0


def cause_of(failures: Sequence[Failure]) -> Failure | None:
    """The failure that is judged: one that needs no other to explain it before exceptions, else the first."""
    first = min(failures, key=lambda one: one.at_s, default=None)
    causes = [one for one in failures if one.kind not in ("error", "cut")]
    if first is None or not causes:
        return first
    cause = min(causes, key=lambda one: one.at_s)
    return cause if cause.at_s <= first.at_s + ECHO_S else first


def after_failure(record: Record, completed: int) -> Record:
    """The record once an attempt failed that had completed so many steps (-1: none)."""
    moved = completed > record.completed
    completed = max(completed, record.completed)
    return replace(
        record, completed=completed, stuck=0 if moved else record.stuck + 1, overdue=0 if moved else record.overdue
    )


def after_overdue(record: Record, completed: int) -> Record:
    """The same where its trainers were stopped because their node could not act: no failure of theirs."""
    moved = completed > record.completed
    completed = max(completed, record.completed)
    return replace(
        record, completed=completed, stuck=0 if moved else record.stuck, overdue=1 if moved else record.overdue + 1
    )


def judged(record: Record, failure: Failure, policy: Policy) -> tuple[Record, str | None]:
    """The record once ``failure`` was judged, and why no attempt follows: it would only come again. None: one may follow."""
    same = failure.kind == "error" and (failure.fingerprint, failure.step) == (record.fingerprint, record.step)
    record = replace(record, fingerprint=failure.fingerprint, step=failure.step, same=record.same + 1 if same else 1)
    if failure.final:
        return record, failure.text
    if failure.kind == "error" and record.same >= policy.same_error_max:
        return record, f"{failure.text}; the same error at the same step {record.same} times in a row: a bug, no fault"
    if record.overdue >= OVERDUE_MAX:
        return record, f"{failure.text}; {record.overdue} times without one new step completed: it starves its own node"
    if record.stuck >= policy.stuck_max:
        return record, f"{failure.text}; {record.stuck} failures in a row without one new step completed"
    return record, None
