"""What a leader makes of what it sees and of what nodes said: the next epoch and its note. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.cluster.membership.decide import Decision, NewEpoch
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View
from ckpt.cluster.mesh.messages import Failed
from ckpt.cluster.node.note import Note, decode_note
from ckpt.cluster.node.reports import Reported

ALL_ENDED = "all ranks ended"

PEER = "peer="
"""How a node's capabilities begin where they say where it lends its memory,"""
FLOOR = "attempt="
"""and the greatest attempt that its keeper knows of: each epoch exceeds it, whatever the membership remembers."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says: ``note`` for the next epoch (None: no reason for one), or look again at ``until_s``."""

    note: Note | None = None
    until_s: float | None = None


Judge = Callable[
    [Note, Mapping[str, Failed], Mapping[str, float], AbstractSet[str], Mapping[str, float], float], Verdict
]
"""Of the epoch's note, failures by node, lost nodes since when, nodes that ended, when each failure was heard, and now."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is known of the epoch of a view; ``lost``: its nodes that are dead and had not ended, since when."""

    reported: Reported
    lost: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Next:
    """Publish ``record``, which carries ``note``, and end the membership of ``remove``."""

    record: EpochRecord
    note: Note
    remove: tuple[str, ...] = ()


def note_of(view: View) -> Note:
    """The note of the view's epoch; an empty one where there is none."""
    return decode_note(view.epoch.note) if view.epoch is not None else Note()


def floor_of(view: View) -> int:
    """The greatest attempt that a member's keeper knows of."""
    return max((_floor(member.info) for member in view.members), default=0)


def peer_of(info: NodeInfo) -> str:
    """Where a node lends its memory; "" where it doesn't say."""
    return _said(info, PEER)


def end_unseen(view: View) -> bool:
    """Whether the epoch is a job's end that members of that job have yet to see: each leaves when it does."""
    return note_of(view).end is not None and any(member.joined < view.epoch_revision for member in view.members)


def assess(view: View, trouble: Trouble, judge: Judge, now_s: float) -> Verdict:
    """What an epoch's failures amount to. Where none of its nodes is left there is nothing to go on from, or to judge."""
    record, reported = view.epoch, trouble.reported
    note = note_of(view)
    if record is None or note.end is not None:
        return Verdict()
    if reported.ended == frozenset(record.ranks):
        return Verdict(Note(why=ALL_ENDED, end=0))
    if _nobody_left(record, trouble):
        return Verdict()
    return judge(note, reported.failures, trouble.lost, reported.ended, reported.heard_s, now_s)


def next_epoch(view: View, decision: Decision, verdict: Verdict, trouble: Trouble) -> Next | None:
    """What is to be published now, if anything.

    A rank that ended is never started again: once a node's ranks have, no epoch follows but the end. While an exception waits
    to be explained the world does not grow, and while a lost node is waited for nothing starts anew without it.
    """
    epoch, found = view.epoch, verdict.note
    if epoch is not None and found is not None and found.end is not None:
        return _next(view, _again(view, epoch), found, found.why)
    if trouble.reported.ended or verdict.until_s is not None:
        return None
    if isinstance(decision, NewEpoch):
        gathers = epoch is None or _nobody_left(epoch, trouble)
        before = Note() if gathers else found or note_of(view)
        return _next(view, decision.record, before, decision.why, decision.remove)
    if epoch is not None and found is not None and not trouble.lost:
        return _next(view, _again(view, epoch), found, found.why)
    return None


def _next(view: View, record: EpochRecord, found: Note, why: str, remove: tuple[str, ...] = ()) -> Next:
    old = view.epoch
    same = old is not None and old.places == record.places
    era = (note_of(view).era or old.number) if same and old is not None else record.number
    note = Note(
        why=why, fingerprint=found.fingerprint, step=found.step, same=found.same, stuck=found.stuck,
        completed=found.completed, overdue=found.overdue, end=found.end, era=era,
    )  # fmt: skip
    return Next(record, note, remove)


def _again(view: View, epoch: EpochRecord) -> EpochRecord:
    """The same nodes in the same places, once more."""
    assert view.leader is not None, "this node"
    number = max(epoch.number, floor_of(view)) + 1
    return replace(epoch, number=number, leader=view.leader.node, removed=(), resumes=None)


def _nobody_left(epoch: EpochRecord, trouble: Trouble) -> bool:
    return set(trouble.lost) == set(epoch.ranks)


def _floor(info: NodeInfo) -> int:
    text = _said(info, FLOOR)
    return int(text) if text.isascii() and text.isdecimal() else 0


def _said(info: NodeInfo, what: str) -> str:
    return next((one.removeprefix(what) for one in info.capabilities if one.startswith(what)), "")
