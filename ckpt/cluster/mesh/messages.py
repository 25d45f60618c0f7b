"""Messages between the keepers of a job's nodes, each one msgpack map with a ``type`` tag. Pure.

Messages that belong to an epoch of the membership carry its number as ``attempt``; the receiver
drops those of an older epoch, and keeps those of a newer one for later. ``call`` numbers a request,
which is answered with the same number on the same connection. Tags and field names are the wire
format.
"""

from __future__ import annotations

import msgspec

from ckpt.format.canonical import prepare_decoders
from ckpt.values import SnapshotId


class MeshMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of all messages."""


class NodeProof(MeshMessage, frozen=True, kw_only=True, tag="Proof"):
    """The first message of each end. Its MAC proves that the sender knows the job's secret."""

    node: str


class NodeHeartbeat(MeshMessage, frozen=True, kw_only=True, tag="Beat"):
    """Sent on an idle connection, so that the other end knows that this one lives."""


# ---- mailboxes: at the node of rank 0. ``room`` names one, and is never used again


class MeshPost(MeshMessage, frozen=True, kw_only=True, tag="Post"):
    """Publish ``value`` under ``key``."""

    room: str
    key: str
    value: bytes


class MeshPeek(MeshMessage, frozen=True, kw_only=True, tag="Peek"):
    """Ask for the value under ``key``; answered with MeshReply, after ``wait_s`` at the latest."""

    call: int
    room: str
    key: str
    wait_s: float = 0.0


class MeshCount(MeshMessage, frozen=True, kw_only=True, tag="Count"):
    """Add to a counter; answered with MeshReply."""

    call: int
    room: str
    key: str
    amount: int


class MeshForget(MeshMessage, frozen=True, kw_only=True, tag="Forget"):
    """Free the value under ``key``."""

    room: str
    key: str


class MeshReply(MeshMessage, frozen=True, kw_only=True, tag="Said"):
    """The mailbox's answer: a value (None: there is none), or a counter's sum."""

    call: int
    value: bytes | None = None
    number: int = 0


# ---- progress and liveness


class MeshDecided(MeshMessage, frozen=True, kw_only=True, tag="Decided"):
    """Rank 0's decision what all ranks do at a boundary; ``flags`` are those of the board."""

    attempt: int
    boundary: int
    flags: int


class NodeProgress(MeshMessage, frozen=True, kw_only=True, tag="Standing"):
    """Progress of a node's ranks, or from the node of rank 0 that of all other nodes' ranks.

    ``completed``: the least number of steps that a rank completed; -1: not all have begun.
    ``sealed``: the snapshots of which all these ranks have sealed slots; read after ``completed``.
    To the node of rank 0, ``mirrored`` is the last named snapshot that this node has on other nodes
    too, and ``missed`` the last one that it could not keep. From there, ``mirrored`` is the newest
    that all nodes have on others, and ``named`` the one to mirror next.
    """

    attempt: int
    sealed: tuple[SnapshotId, ...]
    completed: int
    mirrored: SnapshotId | None = None
    missed: SnapshotId | None = None
    named: SnapshotId | None = None


class LivenessCall(MeshMessage, frozen=True, kw_only=True, tag="Roll"):
    """From the node of rank 0: are you still at this epoch? ``number`` counts liveness rounds;
    ``answered`` is the last one that all nodes answered, 0: none."""

    attempt: int
    number: int
    answered: int


class LivenessAnswer(MeshMessage, frozen=True, kw_only=True, tag="Here"):
    """The answer: this node is at this epoch."""

    attempt: int
    number: int


# ---- snapshots

NodeSubmission = tuple[int, SnapshotId, tuple[str, ...]]
"""One submission: its number in the placement generation, the snapshot, its tags."""


class NodeSubmissions(MeshMessage, frozen=True, kw_only=True, tag="Handed"):
    """To the node of rank 0, when an attempt begins: the last submissions of this node's ranks
    since the placement generation began.

    ``staged``: the snapshots, with origins, of which all its ranks' slots hold a share. ``marked``:
    what some rank handed in to a keeper, with tags; it may be durable. ``settling``: no attempt
    follows here in this placement generation, whose number it is; 0: one does.
    """

    attempt: int
    count: int
    turns: tuple[NodeSubmission, ...]
    staged: tuple[tuple[SnapshotId, str], ...] = ()
    marked: tuple[tuple[SnapshotId, tuple[str, ...]], ...] = ()
    settling: int = 0


class MeshEpochOpened(MeshMessage, frozen=True, kw_only=True, tag="Opened"):
    """From the node of rank 0: an epoch of the log is open and continues from ``resume``.

    ``turns`` are the submissions of any node: a node that lacks one submits it from its slots.
    ``log``: the id of the log, ``stores``: where rank 0's node has it, for people. Standbys get it
    too, for these two. ``settling``: not 0 if no attempt follows in that placement generation, and
    the nodes make durable what only memory holds; ``settled``: nothing is left to submit for that.
    ``origins``: of those among ``turns`` whose shares are all in memory, if only as mirrors: a node
    that lacks one fetches it from another node's memory.
    """

    attempt: int
    resume: SnapshotId | None
    turns: tuple[NodeSubmission, ...]
    log: str = ""
    stores: str = ""
    settling: int = 0
    settled: bool = False
    origins: tuple[tuple[SnapshotId, str], ...] = ()


# ---- memory


class InventoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The shares of the ranks ``rank`` to ``rank + ranks - 1`` of a snapshot: in slots of their own
    node, or as a ``mirror`` of another one's."""

    snapshot: SnapshotId
    origin: str
    world_size: int
    rank: int
    ranks: int = 1
    mirror: bool = False


class AskNodeInventory(MeshMessage, frozen=True, kw_only=True, tag="AskHeld"):
    """From the node of rank 0: which state does this node have in memory?"""

    call: int


class NodeInventory(MeshMessage, frozen=True, kw_only=True, tag="Held"):
    """The answer: all state that this node has in memory. ``log``: the id of the log to which the
    job's snapshots of this launch belong, as far as this node heard of it."""

    call: int
    holdings: tuple[InventoryEntry, ...]
    log: str = ""


class MeshSources(MeshMessage, frozen=True, kw_only=True, tag="Sources"):
    """From the node of rank 0: which nodes have each rank's share of some snapshots in memory.

    For each snapshot its world size, and consecutive ranges of its ranks from 0 on: the length of
    the range, and the indexes in ``nodes`` of those that have it.
    """

    attempt: int
    nodes: tuple[str, ...]
    pairs: tuple[tuple[SnapshotId, int, tuple[tuple[int, tuple[int, ...]], ...]], ...]


# ---- beginnings and ends


class MeetingAddress(MeshMessage, frozen=True, kw_only=True, tag="Meet"):
    """From the node of rank 0: the address of the process group of ``attempt``'s trainers."""

    attempt: int
    host: str
    port: int


class NodeEnded(MeshMessage, frozen=True, kw_only=True, tag="Ended"):
    """To the leader: all ranks of this node ended successfully."""

    attempt: int


# ---- failures


class NodeFailed(MeshMessage, frozen=True, kw_only=True, tag="Failed"):
    """To the leader: this node's trainers of ``attempt`` are dead. The other fields are those of
    the keeper's failure record; ``completed``: the most steps that one of its ranks completed, in
    the call after ``calls`` that had returned; ``moved``: it made progress that neither shows."""

    attempt: int
    rank: int
    kind: str
    text: str
    status: int
    fingerprint: str = ""
    step: int = -1
    final: bool = False
    completed: int = -1
    calls: int = 0
    moved: bool = False
    passing: bool = False


AnyMeshMessage = (
    NodeProof
    | NodeHeartbeat
    | MeshPost
    | MeshPeek
    | MeshCount
    | MeshForget
    | MeshReply
    | MeshDecided
    | NodeProgress
    | LivenessCall
    | LivenessAnswer
    | NodeSubmissions
    | MeshEpochOpened
    | AskNodeInventory
    | NodeInventory
    | MeshSources
    | MeetingAddress
    | NodeEnded
    | NodeFailed
)
"""All messages."""


class _MeshCodec(msgspec.Struct, frozen=True):
    """Makes msgspec build the decoder of the union at import, once."""

    word: AnyMeshMessage


prepare_decoders(_MeshCodec)
