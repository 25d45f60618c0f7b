"""The leader's decision: from a view and the nodes' reports to the next epoch and its note. Pure.

``membership.decide`` decides which nodes an epoch has; this module, whether one is published now:
why the last epoch failed, whether another may follow, or whether the job ends.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import msgspec

from ckpt.cluster.membership.decide import MembershipDecision, NewEpoch, WaitForNodes
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View
from ckpt.cluster.mesh.messages import NodeEnded, NodeFailed
from ckpt.errors import IntegrityError
from ckpt.format.canonical import prepare_decoders

# ---- the note of an epoch

NOTE_CHARS_MAX = 4000
"""Below the limit of the record that carries the note."""


class EpochNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an epoch carries besides places: its reason, the failure history, and the job's end.

    ``why`` the epoch was opened, for people. ``fingerprint``, ``step``, ``same``, ``stuck``,
    ``completed``, ``overdue``, ``calls``, ``restarts``: the fields of the keeper's FailureHistory;
    they travel here so that the next leader decides as this one would have. ``end``: all nodes
    leave the job with that status; ``futile``: and are not launched again. ``era``: the placement
    generation, named by the first of the epochs in a row with the same nodes in the same places;
    submissions of snapshots continue within it. ``line``: the row of epochs whose numbers can be
    compared, named by the node that published the first of them; it goes on from launch to launch,
    until no epoch and no member remembers it.
    """

    why: str = ""
    fingerprint: str = ""
    step: int = -1
    same: int = 0
    stuck: int = 0
    completed: int = -1
    overdue: int = 0
    calls: int = 0
    restarts: tuple[int, ...] = ()
    end: int | None = None
    futile: bool = False
    era: int = 0
    line: str = ""


prepare_decoders(EpochNote)


def encode_note(note: EpochNote) -> str:
    """The note as text; a reason that is too long is cut."""
    text = msgspec.json.encode(note).decode()
    if len(text) <= NOTE_CHARS_MAX:
        return text
    short = msgspec.structs.replace(note, why=note.why[:500], fingerprint=note.fingerprint[:200])
    return msgspec.json.encode(short).decode()


def decode_note(text: str) -> EpochNote:
    """The note in ``text``; of empty text, an empty note. Raises IntegrityError."""
    if not text:
        return EpochNote()
    try:
        return msgspec.json.decode(text, type=EpochNote)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise IntegrityError(f"invalid note of an epoch. reason={error}") from error


# ---- reports of nodes: whose trainers failed, whose ended


@dataclass(frozen=True, slots=True)
class EpochReports:
    """The reports of one epoch: failures by node, when each arrived, and the nodes of which all
    ranks ended successfully; ``over``: those of them that did so in an earlier epoch, and when the
    report arrived."""

    failures: Mapping[str, NodeFailed]
    received_s: Mapping[str, float]
    ended: frozenset[str]
    over: Mapping[str, float] = field(default_factory=dict)


class NodeReports:
    """The newest report of each node. Not thread-safe.

    Reports may be of an epoch that this node has not seen yet.
    """

    def __init__(self) -> None:
        self._failures: dict[str, tuple[NodeFailed, float]] = {}
        self._ended: dict[str, tuple[int, float]] = {}

    def add(self, node: str, message: NodeFailed | NodeEnded, now_s: float) -> None:
        """Add a report, unless one as new or newer of that node is there."""
        match message:
            case NodeFailed():
                newest = self._failures.get(node)
                if newest is None or _age(newest[0]) < _age(message):
                    self._failures[node] = (message, now_s)
            case NodeEnded():
                if node not in self._ended or self._ended[node][0] < message.attempt:
                    self._ended[node] = (message.attempt, now_s)

    def for_epoch(self, record: EpochRecord) -> EpochReports:
        """The reports of an epoch's nodes.

        A node that can't continue sends one final failure, which counts in each later epoch that
        still places the node. So does the end of a node's ranks, which are never started again.
        """
        ended = {
            node: self._ended[node]
            for node in record.ranks
            if node in self._ended and self._ended[node][0] <= record.number
        }
        failures = {
            node: self._failures[node]
            for node in record.ranks
            if node in self._failures and _concerns(self._failures[node][0], record.number)
        }
        return EpochReports(
            {node: message for node, (message, _) in failures.items()},
            {node: at_s for node, (_, at_s) in failures.items()},
            frozenset(ended),
            {node: at_s for node, (attempt, at_s) in ended.items() if attempt < record.number},
        )

    def forget(self, view: View) -> None:
        """Drop reports that concern neither the view's epoch nor a later one."""
        number = view.epoch.number if view.epoch is not None else 0
        self._failures = {
            node: (message, at_s)
            for node, (message, at_s) in self._failures.items()
            if message.attempt >= number or (message.final and node in view.by_node)
        }
        self._ended = {
            node: (attempt, at_s)
            for node, (attempt, at_s) in self._ended.items()
            if attempt >= number or node in view.by_node
        }


def _age(message: NodeFailed) -> tuple[int, bool]:
    return message.attempt, message.final


def _concerns(message: NodeFailed, number: int) -> bool:
    return message.attempt == number or (message.final and message.attempt < number)


# ---- the next epoch

ALL_ENDED = "all ranks ended"
STOPPED_STATUS = 128 + signal.SIGTERM
"""How a job ends that a node was asked to leave, and that can't go on without it."""
OVER_WAIT_S = 1.0
"""How long the reports of other nodes are waited for, once an epoch is known to place a node whose
ranks had ended before."""

PEER_CAPABILITY = "peer="
"""Prefix of the capability that names the address at which a node serves memory."""
FLOOR_CAPABILITY = "attempt="
"""Prefix of the capability that names the greatest attempt that a node's keeper knows of. Each
epoch exceeds it, even if the membership's data were lost."""


LINE_CAPABILITY = "line="
"""Prefix of the capability that names the line of epochs that a node's keeper has seen last."""


@dataclass(frozen=True, slots=True)
class FailureDecision:
    """What follows from failures: ``note`` of the next epoch (None: no reason for one), or decide
    again at ``until_s``. ``stopped``: a node was asked to go; without enough others the job ends.
    """

    note: EpochNote | None = None
    until_s: float | None = None
    stopped: bool = False


DecideFailures = Callable[
    [
        EpochNote,
        Mapping[str, NodeFailed],
        Mapping[str, float],
        AbstractSet[str],
        Mapping[str, float],
        float,
    ],
    FailureDecision,
]
"""Decides by the epoch's note, failures by node, since when nodes are lost, nodes that ended, when
each failure arrived, and now."""


@dataclass(frozen=True, slots=True)
class EpochProblems:
    """What went wrong in a view's epoch. ``lost``: dead nodes that had not ended, and since when
    they are known to be dead."""

    reported: EpochReports
    lost: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NextEpoch:
    """Publish ``record``, which carries ``note``, and end the membership of ``remove``."""

    record: EpochRecord
    note: EpochNote
    remove: tuple[str, ...] = ()


def epoch_note(view: View) -> EpochNote:
    """The note of the view's epoch; an empty one if there is no epoch."""
    return decode_note(view.epoch.note) if view.epoch is not None else EpochNote()


def epoch_floor(view: View) -> int:
    """The greatest attempt that a member's keeper knows of."""
    return max((_floor(member.info) for member in view.members), default=0)


def line_of(view: View) -> str:
    """The line that the next epoch goes on with: the epoch's, else that of the member which knows
    the greatest attempt; "": none is known."""
    known = [
        (_floor(member.info), _capability(member.info, LINE_CAPABILITY)) for member in view.members
    ]
    return epoch_note(view).line or max(known, default=(0, ""))[1]


def peer_address(info: NodeInfo) -> str:
    """The address at which a node serves memory; "": it names none."""
    return _capability(info, PEER_CAPABILITY)


def end_unseen(view: View) -> bool:
    """Whether the epoch is the end of a job that some of its members have not seen yet.

    Each member leaves when it sees the end; the leader opens no epoch before all have seen it.
    """
    return epoch_note(view).end is not None and any(
        member.joined_revision < view.epoch_revision for member in view.members
    )


def assess(
    view: View, problems: EpochProblems, decide_failures: DecideFailures, now_s: float
) -> FailureDecision:
    """What follows from the problems of the view's epoch.

    If none of its nodes is left, nothing: the next epoch starts anew.
    """
    record, reported = view.epoch, problems.reported
    note = epoch_note(view)
    if record is None or note.end is not None:
        return FailureDecision()
    # Before any failure is looked at: nodes leave after they ended, which is no loss.
    if reported.ended == frozenset(record.ranks):
        return FailureDecision(EpochNote(why=ALL_ENDED, end=0))
    if _none_left(record, problems):
        return FailureDecision()
    if reported.over:
        # The epoch was published before its leader knew. Those nodes start nothing, and the others
        # would wait for them for ever; the end of these may only not have been heard of yet.
        until_s = max(reported.over.values()) + OVER_WAIT_S
        if now_s < until_s:
            return FailureDecision(until_s=until_s)
        names = ", ".join(sorted(reported.over))
        why = f"the ranks of {names} had ended before this epoch began, and are not started again"
        return FailureDecision(msgspec.structs.replace(note, why=why, end=1))
    return decide_failures(
        note, reported.failures, problems.lost, reported.ended, reported.received_s, now_s
    )


def next_epoch(
    view: View,
    decision: MembershipDecision,
    failure_decision: FailureDecision,
    problems: EpochProblems,
) -> NextEpoch | None:
    """The epoch to publish now; None: none.

    A rank that ended is never started again: once a node's ranks have ended, only the end of the
    job follows. While an exception waits for its explanation the world does not grow, and while a
    lost node may come back no epoch starts without it.
    """
    epoch, note = view.epoch, failure_decision.note
    if epoch is not None and note is not None and note.end is not None:
        return _next(view, _repeated(view, epoch), note, note.why)
    if problems.reported.ended or failure_decision.until_s is not None:
        return None  # wait for the other nodes' ends, or for a better explanation
    if isinstance(decision, NewEpoch):
        gathers = epoch is None or _none_left(epoch, problems)
        before = EpochNote() if gathers else note or epoch_note(view)
        return _next(view, decision.record, before, decision.reason, decision.remove)
    if (
        epoch is not None
        and note is not None
        and failure_decision.stopped
        and isinstance(decision, WaitForNodes)
        and decision.until_s == math.inf
    ):
        ends = msgspec.structs.replace(note, end=STOPPED_STATUS)
        return _next(view, _repeated(view, epoch), ends, f"{note.why}, and none takes its place")
    if epoch is not None and note is not None and not problems.lost:
        return _next(view, _repeated(view, epoch), note, note.why)
    return None


def _next(
    view: View, record: EpochRecord, note: EpochNote, why: str, remove: tuple[str, ...] = ()
) -> NextEpoch:
    old = view.epoch
    same = old is not None and old.places == record.places
    era = (epoch_note(view).era or old.number) if same and old is not None else record.number
    note = msgspec.structs.replace(note, why=why, era=era, line=line_of(view) or record.leader)
    return NextEpoch(record, note, remove)


def _repeated(view: View, epoch: EpochRecord) -> EpochRecord:
    """The next epoch with the same nodes in the same places."""
    assert view.leader is not None, "this node"
    # A keeper may know of an attempt that the membership has forgotten.
    number = max(epoch.number, epoch_floor(view)) + 1
    return replace(epoch, number=number, leader=view.leader.node, removed=(), resumes=None)


def _none_left(epoch: EpochRecord, problems: EpochProblems) -> bool:
    return set(problems.lost) == set(epoch.ranks)


def _floor(info: NodeInfo) -> int:
    text = _capability(info, FLOOR_CAPABILITY)
    return int(text) if text.isascii() and text.isdecimal() else 0


def _capability(info: NodeInfo, prefix: str) -> str:
    return next(
        (text.removeprefix(prefix) for text in info.capabilities if text.startswith(prefix)), ""
    )


# ---- the topology of the mesh

FULL_MESH_NODES_MAX = 64
"""Up to so many nodes each is connected to each other."""


def mesh_topology(view: View, me: str) -> dict[str, str]:
    """The nodes to which ``me`` keeps connections, and their addresses.

    With many nodes: the leader and the node of rank 0, which are connected to all, and both
    neighbours in a ring of all members, so that at least two witnesses see each node's death.
    """
    addresses = {member.node: member.info.address for member in view.members if member.info.address}
    nodes = sorted(addresses)
    if len(nodes) <= FULL_MESH_NODES_MAX or me in _centres(view):
        return {node: address for node, address in addresses.items() if node != me}
    near = {*_centres(view), *_neighbours(nodes, me)}
    return {node: addresses[node] for node in near if node in addresses and node != me}


def _centres(view: View) -> set[str]:
    leader = {view.leader.node} if view.leader is not None else set()
    return leader | {view.epoch.rank0_node} if view.epoch is not None else leader


def _neighbours(nodes: Sequence[str], me: str) -> set[str]:
    if me not in nodes:
        return set()
    position = nodes.index(me)
    return {nodes[position - 1], nodes[(position + 1) % len(nodes)]}
