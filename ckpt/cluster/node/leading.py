"""What a leader makes of what it sees and of what nodes said: the next epoch and its note. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import msgspec

from ckpt.cluster.membership.decide import MembershipDecision, NewEpoch
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View
from ckpt.cluster.mesh.messages import NodeEnded, NodeFailed
from ckpt.errors import IntegrityError
from ckpt.format.canonical import prepare_decoders

# What an epoch carries besides places: why it came, what to remember of failures, and the job's
# end. Pure.

NOTE_CHARS_MAX = 4000


class EpochNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``why`` the epoch came, for people.

    ``fingerprint``, ``step``, ``same``, ``stuck``, ``completed``, ``overdue``: see
    ``keeper.verdict.FailureHistory``. ``end``: all nodes leave with that status. ``era``: the first
    epoch with the same nodes in the same places; what their keepers do together goes on within.
    """

    why: str = ""
    fingerprint: str = ""
    step: int = -1
    same: int = 0
    stuck: int = 0
    completed: int = -1
    overdue: int = 0
    end: int | None = None
    era: int = 0


prepare_decoders(EpochNote)


def encode_note(note: EpochNote) -> str:
    """As text; a reason that is too long is cut."""
    text = msgspec.json.encode(note).decode()
    if len(text) <= NOTE_CHARS_MAX:
        return text
    short = msgspec.structs.replace(note, why=note.why[:500], fingerprint=note.fingerprint[:200])
    return msgspec.json.encode(short).decode()


def decode_note(text: str) -> EpochNote:
    """The note in ``text``; an empty one of no text. Raises IntegrityError."""
    if not text:
        return EpochNote()
    try:
        return msgspec.json.decode(text, type=EpochNote)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise IntegrityError(f"an epoch's note is no note. why={error}") from error


# What nodes said about one epoch after the other: whose trainers failed, whose ended. Not
# thread-safe.


@dataclass(frozen=True, slots=True)
class EpochReports:
    """What is known of one epoch: failures by node, when each was heard, and the nodes all of whose
    ranks ended well."""

    failures: Mapping[str, NodeFailed]
    received_s: Mapping[str, float]
    ended: frozenset[str]


class NodeReports:
    """The newest word of each node. Words may be of an epoch that this node has not seen yet."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[NodeFailed, float]] = {}
        self._ended: dict[str, int] = {}

    def add(self, node: str, word: NodeFailed | NodeEnded, now_s: float) -> None:
        """Note a word, unless it is known or older than what is."""
        match word:
            case NodeFailed():
                known = self._failures.get(node)
                if known is None or _age(known[0]) < _age(word):
                    self._failures[node] = (word, now_s)
            case NodeEnded():
                self._ended[node] = max(word.attempt, self._ended.get(node, 0))

    def for_epoch(self, record: EpochRecord) -> EpochReports:
        """Of an epoch's nodes. A node that can't go on said so once, and it holds in each epoch
        that still places it."""
        known = {
            node: self._failures[node]
            for node in record.ranks
            if node in self._failures and _concerns(self._failures[node][0], record.number)
        }
        return EpochReports(
            {node: word for node, (word, _) in known.items()},
            {node: at_s for node, (_, at_s) in known.items()},
            frozenset(node for node in record.ranks if self._ended.get(node) == record.number),
        )

    def forget(self, view: View) -> None:
        """Drop what says nothing about the view's epoch or a later one."""
        number = view.epoch.number if view.epoch is not None else 0
        self._failures = {
            node: (word, at_s)
            for node, (word, at_s) in self._failures.items()
            if word.attempt >= number or (word.final and node in view.by_node)
        }
        self._ended = {node: attempt for node, attempt in self._ended.items() if attempt >= number}


def _age(word: NodeFailed) -> tuple[int, bool]:
    return word.attempt, word.final


def _concerns(word: NodeFailed, number: int) -> bool:
    return word.attempt == number or (word.final and word.attempt < number)


ALL_ENDED = "all ranks ended"

PEER_CAPABILITY = "peer="
"""How a node's capabilities begin where they say where it lends its memory,"""
FLOOR_CAPABILITY = "attempt="
"""and the greatest attempt that its keeper knows of: each epoch exceeds it, whatever the membership
remembers."""


@dataclass(frozen=True, slots=True)
class FailureDecision:
    """What a judge says: ``note`` for the next epoch (None: no reason for one), or look again at
    ``until_s``."""

    note: EpochNote | None = None
    until_s: float | None = None


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
"""Of the epoch's note, failures by node, lost nodes since when, nodes that ended, when each failure
was heard, and now."""


@dataclass(frozen=True, slots=True)
class EpochProblems:
    """What is known of the epoch of a view; ``lost``: its nodes that are dead and had not ended,
    since when."""

    reported: EpochReports
    lost: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NextEpoch:
    """Publish ``record``, which carries ``note``, and end the membership of ``remove``."""

    record: EpochRecord
    note: EpochNote
    remove: tuple[str, ...] = ()


def epoch_note(view: View) -> EpochNote:
    """The note of the view's epoch; an empty one where there is none."""
    return decode_note(view.epoch.note) if view.epoch is not None else EpochNote()


def epoch_floor(view: View) -> int:
    """The greatest attempt that a member's keeper knows of."""
    return max((_floor(member.info) for member in view.members), default=0)


def peer_address(info: NodeInfo) -> str:
    """Where a node lends its memory; "" where it doesn't say."""
    return _said(info, PEER_CAPABILITY)


def end_unseen(view: View) -> bool:
    """Whether the epoch is a job's end that members of that job have yet to see: each leaves when
    it does."""
    return epoch_note(view).end is not None and any(
        member.joined_revision < view.epoch_revision for member in view.members
    )


def assess(
    view: View, trouble: EpochProblems, judge: DecideFailures, now_s: float
) -> FailureDecision:
    """What an epoch's failures amount to. Where none of its nodes is left there is nothing to go on
    from, or to judge."""
    record, reported = view.epoch, trouble.reported
    note = epoch_note(view)
    if record is None or note.end is not None:
        return FailureDecision()
    if reported.ended == frozenset(record.ranks):
        return FailureDecision(EpochNote(why=ALL_ENDED, end=0))
    if _nobody_left(record, trouble):
        return FailureDecision()
    return judge(note, reported.failures, trouble.lost, reported.ended, reported.received_s, now_s)


def next_epoch(
    view: View, decision: MembershipDecision, verdict: FailureDecision, trouble: EpochProblems
) -> NextEpoch | None:
    """What is to be published now, if anything.

    A rank that ended is never started again: once a node's ranks have, no epoch follows but the
    end. While an exception waits to be explained the world does not grow, and while a lost node is
    waited for nothing starts anew without it.
    """
    epoch, found = view.epoch, verdict.note
    if epoch is not None and found is not None and found.end is not None:
        return _next(view, _again(view, epoch), found, found.why)
    if trouble.reported.ended or verdict.until_s is not None:
        return None
    if isinstance(decision, NewEpoch):
        gathers = epoch is None or _nobody_left(epoch, trouble)
        before = EpochNote() if gathers else found or epoch_note(view)
        return _next(view, decision.record, before, decision.reason, decision.remove)
    if epoch is not None and found is not None and not trouble.lost:
        return _next(view, _again(view, epoch), found, found.why)
    return None


def _next(
    view: View, record: EpochRecord, found: EpochNote, why: str, remove: tuple[str, ...] = ()
) -> NextEpoch:
    old = view.epoch
    same = old is not None and old.places == record.places
    era = (epoch_note(view).era or old.number) if same and old is not None else record.number
    note = EpochNote(
        why=why,
        fingerprint=found.fingerprint,
        step=found.step,
        same=found.same,
        stuck=found.stuck,
        completed=found.completed,
        overdue=found.overdue,
        end=found.end,
        era=era,
    )
    return NextEpoch(record, note, remove)


def _again(view: View, epoch: EpochRecord) -> EpochRecord:
    """The same nodes in the same places, once more."""
    assert view.leader is not None, "this node"
    number = max(epoch.number, epoch_floor(view)) + 1
    return replace(epoch, number=number, leader=view.leader.node, removed=(), resumes=None)


def _nobody_left(epoch: EpochRecord, trouble: EpochProblems) -> bool:
    return set(trouble.lost) == set(epoch.ranks)


def _floor(info: NodeInfo) -> int:
    text = _said(info, FLOOR_CAPABILITY)
    return int(text) if text.isascii() and text.isdecimal() else 0


def _said(info: NodeInfo, what: str) -> str:
    return next((one.removeprefix(what) for one in info.capabilities if one.startswith(what)), "")


# Which nodes a node keeps a line to. Pure.

FULL_MESH_NODES_MAX = 64
"""Up to so many nodes everybody has a line to everybody."""


def mesh_topology(view: View, me: str) -> dict[str, str]:
    """The addresses, by node, to which ``me`` keeps lines.

    With many nodes: to the leader and the node of rank 0, who have lines to all, and to both
    neighbours in a ring of all members, so that two at least see each node's end.
    """
    addresses = {member.node: member.info.address for member in view.members if member.info.address}
    nodes = sorted(addresses)
    if len(nodes) <= FULL_MESH_NODES_MAX or me in _centres(view):
        return {node: address for node, address in addresses.items() if node != me}
    near = {*_centres(view), *_neighbours(nodes, me)}
    return {node: addresses[node] for node in near if node in addresses and node != me}


def _centres(view: View) -> set[str]:
    found = {view.leader.node} if view.leader is not None else set()
    return found | {view.epoch.rank0_node} if view.epoch is not None else found


def _neighbours(nodes: Sequence[str], me: str) -> set[str]:
    if me not in nodes:
        return set()
    at = nodes.index(me)
    return {nodes[at - 1], nodes[(at + 1) % len(nodes)]}
