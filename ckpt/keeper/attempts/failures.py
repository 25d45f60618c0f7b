"""What the leader of several nodes makes of their failures: wait for a better explanation, go on, or end the job. Pure.

Each node tells why its own trainers died (``Failure``). Where another node's death broke their collectives that is an
exception, which explains nothing. So exceptions wait for ``ECHO_S``, everything else is judged at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.ipc.policy import Policy
from ckpt.keeper.attempts.events import Failure
from ckpt.keeper.attempts.verdict import ECHO_S, Record, after_failure, after_overdue, cause_of, judged

UNEXPLAINED = ("error", "cut")
"""What may come from another node's end: an exception, a broken line."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is known to have gone wrong in one epoch. Times are the leader's, when it heard of it.

    ``failures`` by node; ``lost``: nodes of the epoch that are dead, since when; ``ended``: those whose ranks all ended well.
    ``completed``: the most steps that any of them is known to have completed.
    """

    failures: Mapping[str, Failure]
    lost: Mapping[str, float]
    ended: AbstractSet[str]
    completed: int = -1


@dataclass(frozen=True, slots=True)
class Well:
    """Nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Later:
    """An exception may yet be explained; judge again then."""

    until_s: float


@dataclass(frozen=True, slots=True)
class Again:
    """The next epoch may begin. ``text``: why the last one ended."""

    record: Record
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """All nodes leave with ``status``."""

    status: int
    text: str


Judgement = Well | Later | Again | End


def judge(trouble: Trouble, record: Record, policy: Policy, now_s: float) -> Judgement:
    """What follows. ``record`` is what the epoch carries from the ones before."""
    failures = [*trouble.failures.values(), *(_lost(node, at_s) for node, at_s in sorted(trouble.lost.items()))]
    cause = cause_of(failures)
    if cause is None:
        return Well()
    finals = [one for one in failures if one.final]
    if finals:  # whatever else happened, that node can't go on
        cause = finals[0]
    elif cause.kind in UNEXPLAINED and now_s < cause.at_s + ECHO_S:
        return Later(cause.at_s + ECHO_S)
    if cause.kind == "overdue":
        record = after_overdue(record, trouble.completed)
    elif cause.kind != "node" or trouble.completed >= 0:  # else nobody could tell yet how far they were
        record = after_failure(record, trouble.completed)
    record, why = judged(record, cause, policy)
    if why is None and trouble.ended:
        why = f"{cause.text}, after the ranks of another node had ended"
    if why is None:
        return Again(record, cause.text)
    return End(_status(cause), why)


def _lost(node: str, at_s: float) -> Failure:
    return Failure(-1, "node", f"the node {node} is lost", 1, at_s)


def _status(failure: Failure) -> int:
    return 128 - failure.status if failure.status < 0 else failure.status or 1


def with_rank(failure: Failure, first_rank: int) -> Failure:
    """The same, told of a rank of the whole job instead of one of its node."""
    if failure.rank < 0:
        return failure
    rank, here = failure.rank + first_rank, f"rank {failure.rank} "
    text = f"rank {rank} {failure.text.removeprefix(here)}" if failure.text.startswith(here) else failure.text
    return replace(failure, rank=rank, text=text)
