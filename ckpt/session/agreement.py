"""Decisions that hold for the whole job: at which boundary all ranks take a snapshot. Pure.

A boundary is named by the number of completed steps. Two questions are answered here, each once for
the job:

* **A due boundary** is known to every rank in advance (each 50th, say). Rank 0 only says "take" or
  "skip" for it.
* **A request** (``run.save``, a snapshot by time) comes at any moment from any rank. It is placed
  at the first boundary that no rank has passed: each rank answers with the boundary it has reached,
  and promises to go at most one step further before it knows the decision. The greatest answer plus
  one is then a boundary that is still ahead of every rank.

So no rank decides alone. Ranks that each skip for themselves seldom share a snapshot: modelled,
1,023 of 2,000 at 2 ranks, and 2 of 2,000 at 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.errors import ConflictError


@dataclass(frozen=True, slots=True)
class Ack:
    """A rank's answer to a proposal: the boundary it has reached, and whether its loop has ended
    there.
    """

    completed: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """What all ranks do at one boundary: take a snapshot, with the tags that it gets once it is
    durable.
    """

    tags: tuple[str, ...] = ()
    forced: bool = False
    """The user asked for it: it is taken at exactly this boundary, and waits a while for a slot
    instead of being skipped.
    """
    stop: bool = False
    """Training ends here: the node is about to be taken away."""


@dataclass(frozen=True, slots=True)
class Take:
    """A due boundary is taken."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A due boundary is skipped, and why."""

    reason: str


def boundary_for(acks: Mapping[int, Ack]) -> int:
    """The boundary at which a request takes effect: the first that no rank has passed.

    ``acks`` holds every rank's answer. If loops have ended, it is their end. Raises ConflictError
    if ranks ended at different boundaries, or one went past another's end: there is no common
    snapshot any more.
    """
    ends = {rank: ack.completed for rank, ack in acks.items() if ack.ended}
    reached = max(ack.completed for ack in acks.values())
    if not ends:
        return reached + 1
    end = max(ends.values())
    if reached > end or min(ends.values()) < end:
        raise ConflictError(
            "the ranks' loops ended at different steps, so they have no common snapshot. "
            f"completed_by_rank={_by_rank(acks)}; "
            "every rank must run the same number of steps"
        )
    return end


def merge_requests(requests: Sequence[SnapshotRequest]) -> SnapshotRequest:
    """One request for several at one boundary: all tags, forced if any is, and the end if any asks
    for it.
    """
    tags = dict.fromkeys(tag for request in requests for tag in request.tags)
    return SnapshotRequest(
        tuple(tags),
        any(request.forced for request in requests),
        any(request.stop for request in requests),
    )


def take_or_skip(*, in_flight: int, slots: int) -> Take | Skip:
    """Whether a due snapshot is taken: only if a slot is free on every rank.

    ``in_flight`` counts snapshots that were decided and have no outcome on all ranks yet. Training
    never waits for a store here; a skipped snapshot is counted and reported.
    """
    if in_flight < slots:
        return Take()
    return Skip(f"all slots are held by uploads. in_flight={in_flight} slots={slots}")


def _by_rank(acks: Mapping[int, Ack]) -> str:
    return ",".join(
        f"{rank}:{ack.completed}{'(ended)' if ack.ended else ''}"
        for rank, ack in sorted(acks.items())
    )
