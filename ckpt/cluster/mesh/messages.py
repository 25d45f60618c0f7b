"""What keepers of one job's nodes say to each other. One word is one msgpack map with a ``type``
tag, see ``cable``.

Words that belong to an epoch of the membership carry its number as ``attempt``; those of another
one are dropped or kept for later by whoever hears them. ``call``: a question, which is answered
with the same number on the same line.
"""

from __future__ import annotations

import msgspec

from ckpt.format.canonical import prepare_decoders
from ckpt.values import SnapshotId


class MeshMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of all words."""


class NodeProof(MeshMessage, frozen=True, kw_only=True, tag="Proof"):
    """The first word of each end: its authentication proves that it knows the job's secret."""

    node: str


class NodeHeartbeat(MeshMessage, frozen=True, kw_only=True, tag="Beat"):
    """Nothing to say, and still here."""


# ---- rooms, which are at the node of rank 0; ``room`` names one for ever


class MeshPost(MeshMessage, frozen=True, kw_only=True, tag="Post"):
    """Publish ``value`` under ``key``."""

    room: str
    key: str
    value: bytes


class MeshPeek(MeshMessage, frozen=True, kw_only=True, tag="Peek"):
    """The value under ``key`` as soon as it is there, ``MeshReply``; without one after ``wait_s``
    seconds."""

    call: int
    room: str
    key: str
    wait_s: float = 0.0


class MeshCount(MeshMessage, frozen=True, kw_only=True, tag="Count"):
    """Add to a counter; answered with ``MeshReply``."""

    call: int
    room: str
    key: str
    amount: int


class MeshForget(MeshMessage, frozen=True, kw_only=True, tag="Forget"):
    """Free what is under ``key``."""

    room: str
    key: str


class MeshReply(MeshMessage, frozen=True, kw_only=True, tag="Said"):
    """The answer of the room: a value (None: there is none), or a counter's sum."""

    call: int
    value: bytes | None = None
    number: int = 0


# ---- steps


class MeshDecided(MeshMessage, frozen=True, kw_only=True, tag="Decided"):
    """Rank 0 decided what all ranks do at a boundary: see ``Board.decide``."""

    attempt: int
    boundary: int
    flags: int


class NodeProgress(MeshMessage, frozen=True, kw_only=True, tag="Standing"):
    """How far the ranks of a node are, or those of several nodes as one: what all of them hold
    sealed, looked at second.

    ``completed``: the least number of steps that one of them completed, looked at first; -1: not
    all have begun. To the node of rank 0 ``mirrored`` is the last named pair that this node has on
    others too, ``missed`` the last one that it could not keep; from there ``mirrored`` is the
    newest that all nodes have on others, and ``named`` the one to keep next.
    """

    attempt: int
    sealed: tuple[SnapshotId, ...]
    completed: int
    mirrored: SnapshotId | None = None
    missed: SnapshotId | None = None
    named: SnapshotId | None = None


class LivenessCall(MeshMessage, frozen=True, kw_only=True, tag="Roll"):
    """From the node of rank 0: who is still at this epoch? ``answered``: the last call that
    everybody answered; 0: none."""

    attempt: int
    number: int
    answered: int


class LivenessAnswer(MeshMessage, frozen=True, kw_only=True, tag="Here"):
    """The answer: this node is."""

    attempt: int
    number: int


# ---- snapshots

NodeSubmission = tuple[int, SnapshotId, tuple[str, ...]]
"""One snapshot that was handed in: its number in the era, the pair, the tags."""


class NodeSubmissions(MeshMessage, frozen=True, kw_only=True, tag="Handed"):
    """To the node of rank 0, when an attempt begins: what this node's ranks handed in since the era
    began, the last ones."""

    attempt: int
    count: int
    turns: tuple[NodeSubmission, ...]


class MeshEpochOpened(MeshMessage, frozen=True, kw_only=True, tag="Opened"):
    """From the node of rank 0: an epoch of the log is open, which goes on from ``resume``;
    ``turns`` as any node handed in."""

    attempt: int
    resume: SnapshotId | None
    turns: tuple[NodeSubmission, ...]


# ---- memory


class InventoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The shares of ``ranks`` ranks of a pair, from ``rank`` on: in slots of their node, or kept
    for another as ``mirror``."""

    snapshot: SnapshotId
    origin: str
    world_size: int
    rank: int
    ranks: int = 1
    mirror: bool = False


class AskNodeInventory(MeshMessage, frozen=True, kw_only=True, tag="AskHeld"):
    """From the node of rank 0: what is there to restore from."""

    call: int


class NodeInventory(MeshMessage, frozen=True, kw_only=True, tag="Held"):
    """The answer: all that this node holds in memory."""

    call: int
    holdings: tuple[InventoryEntry, ...]


class MeshSources(MeshMessage, frozen=True, kw_only=True, tag="Sources"):
    """From the node of rank 0: where each rank's share of some pairs is.

    Of each pair the size of its world; of spans of its ranks, from 0 on, how many they are and
    which of ``nodes`` have them.
    """

    attempt: int
    nodes: tuple[str, ...]
    pairs: tuple[tuple[SnapshotId, int, tuple[tuple[int, tuple[int, ...]], ...]], ...]


# ---- beginnings and ends


class MeetingAddress(MeshMessage, frozen=True, kw_only=True, tag="Meet"):
    """From the node of rank 0: where the trainers of ``attempt`` make their process group."""

    attempt: int
    host: str
    port: int


class NodeEnded(MeshMessage, frozen=True, kw_only=True, tag="Ended"):
    """To whoever leads: all ranks of this node ended well."""

    attempt: int


# ---- failures


class NodeFailed(MeshMessage, frozen=True, kw_only=True, tag="Failed"):
    """To the leader: this node's trainers of ``attempt`` are dead, because of this; see
    ``keeper.roster_words.Failure``."""

    attempt: int
    rank: int
    kind: str
    text: str
    status: int
    fingerprint: str = ""
    step: int = -1
    final: bool = False
    completed: int = -1


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
"""Every word there is."""


class _MeshCodec(msgspec.Struct, frozen=True):
    """Only to make msgspec build the union's codec once, at import."""

    word: AnyMeshMessage


prepare_decoders(_MeshCodec)
