"""The log as a pure function: records in, what they mean out.

Dropping the base of a snapshot that is already committed is allowed: references lead straight to packs, and packs are kept
by what refers to them. Dropping it before the commit makes the commit void. Writing the same record twice is one record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt.format.records import Record
from ckpt.log.fold import apply, refusal
from ckpt.log.state import Hole, LogState, Void
from ckpt.log.working import Working

__all__ = ["LogState", "Unreadable", "empty", "fold", "verdict"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A place in the log whose bytes are missing or are no valid record."""

    seq: int
    reason: str


def empty(job: str) -> LogState:
    """The state before the first record of ``job``."""
    return LogState(job=job)


def fold(state: LogState, records: Sequence[Record | Unreadable]) -> LogState:
    """``state`` and then ``records``, in order of their seq.

    Stops at the first place that is missing, unreadable, of another job or not chained to the record before, and says so
    in ``hole``; a state with a hole folds nothing more. ``fold(fold(s, a), b) == fold(s, a + b)``. O(state + records).
    """
    if state.hole is not None or not records:
        return state
    log = Working(state)
    for record in records:
        if (hole := _hole(state.job, log, record)) is not None:
            return replace(log.freeze(state), hole=hole)
        assert isinstance(record, Record)
        if (why := refusal(log, record)) is not None:
            log.void(record.seq, *why)
        else:
            apply(log, record)
        log.step_on(record)
    return log.freeze(state)


def verdict(state: LogState, record: Record) -> Void | None:
    """Why ``record`` would count for nothing as the next record after ``state``, or None where it would count.

    The seq and chain of ``record`` are the caller's to get right. O(state).
    """
    why = refusal(Working(state), record)
    return None if why is None else Void(record.seq, *why)


def _hole(job: str, log: Working, record: Record | Unreadable) -> Hole | None:
    at = log.next_seq
    if record.seq != at:
        return Hole(at, f"record is missing. next_found={record.seq}")
    if isinstance(record, Unreadable):
        return Hole(at, record.reason)
    if record.job != job:
        return Hole(at, f"record of another job. expected={job!r} found={record.job!r}")
    if record.prev != log.head_digest:
        return Hole(at, f"record does not follow the one before. expected={log.head_digest!r} found={record.prev!r}")
    return None
