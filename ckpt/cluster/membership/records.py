"""Records of the membership: nodes, epochs, state inventories, and views of them. Pure.

Node, epoch and inventory are stored as sealed JSON with their digest inside; every value is checked
when it is read, since nothing in the keyspace is trusted. ``_Wire...`` classes are the stored
forms: their field names are the format.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ckpt.errors import IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import prepare_decoders, seal, unseal
from ckpt.format.manifest import is_job_name
from ckpt.values import SnapshotId

RECORD_VERSION = 1
NODE_BYTES_MAX = 16 << 10
EPOCH_BYTES_MAX = 1 << 20
"""An epoch is one value in one transaction, of which etcd takes 1.5 MiB: enough for some 40,000
nodes.
"""
INVENTORY_BYTES_MAX = 64 << 10
TEXT_CHARS_MAX = 255
REASON_CHARS_MAX = 200
NOTE_CHARS_MAX = 4096
SLOTS_MAX = 1024
RANKS_MAX = 10**7
CAPABILITIES_MAX = 64
REMOVED_MAX = 1000
"""How many removed nodes an epoch names with a reason. Others that it removes are just not placed.
"""

_NODE_RE = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """A node as it describes itself when it joins.

    ``node`` is drawn at random for each join, so that no two joins are ever mistaken for one.
    ``domain``: its failure domain; empty means the host. ``address``: where its keeper listens.
    ``slots``: how many ranks it can hold.
    """

    node: str
    host: str
    slots: int
    domain: str = ""
    address: str = ""
    capabilities: tuple[str, ...] = ()

    @property
    def failure_domain(self) -> str:
        """The name shared by all nodes that fail together with this one."""
        return self.domain or self.host


@dataclass(frozen=True, slots=True)
class NodePlacement:
    """A node's placement in an epoch: ``slots`` ranks, which follow those of the placements before
    it.
    """

    node: str
    slots: int


@dataclass(frozen=True, slots=True)
class RemovedNode:
    """A node that an epoch removed from the membership, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """A numbered membership.

    ``places`` are in the order of ranks; ``leader`` is the node that decided it.

    ``resumes``: the snapshot that its training continues from, if the leader knew it. ``note``: a
    text for the keepers, an encoded EpochNote; the membership does not read it. ``ranks``: those
    that each node holds; ``world_size``: how many there are. Both are worked out once: keepers look
    at them with every word that they hear.
    """

    job: str
    number: int
    places: tuple[NodePlacement, ...]
    leader: str
    nodes_min: int
    nodes_max: int
    removed: tuple[RemovedNode, ...] = ()
    resumes: SnapshotId | None = None
    note: str = ""
    ranks: Mapping[str, range] = field(init=False, repr=False, compare=False)
    world_size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ranks: dict[str, range] = {}
        first = 0
        for place in self.places:
            ranks[place.node] = range(first, first + place.slots)
            first += place.slots
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "world_size", first)

    @property
    def rank0_node(self) -> str:
        """The node of rank 0."""
        return self.places[0].node


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The statement of the witness ``by`` that ``node`` may be dead."""

    node: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class StateInventory:
    """How many bytes of each rank's state a node has in memory.

    Ranks are those of a world of ``world_size``.
    """

    world_size: int
    size_bytes: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Member:
    """A node whose lease lives. ``joined_revision``: the revision at which it joined."""

    info: NodeInfo
    lease_id: int
    joined_revision: int
    inventory: StateInventory | None = None

    @property
    def node(self) -> str:
        """The node's id."""
        return self.info.node


@dataclass(frozen=True, slots=True)
class Leader:
    """The node that leads, and the revision at which it began to."""

    node: str
    revision: int


class ViewScope(enum.Enum):
    """How much of a job a view holds.

    At thousands of nodes only the leader can afford to read all of it.
    """

    HEAD = "head"
    """The epoch and the leader."""
    ALL = "all"
    """Also members, their state inventories, and suspicions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A job at one revision. ``epoch`` is None if none was published here.

    ``members`` are sorted by node id.

    ``epoch_revision``: the revision at which the epoch was published, 0 if there is none.
    ``unreadable``: keys whose values are invalid, and count for nothing.
    """

    job: str
    revision: int
    scope: ViewScope
    leader: Leader | None = None
    epoch: EpochRecord | None = None
    epoch_revision: int = 0
    members: tuple[Member, ...] = ()
    suspicions: tuple[Suspicion, ...] = ()
    unreadable: tuple[str, ...] = ()
    by_node: Mapping[str, Member] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_node", {member.node: member for member in self.members})


class _WireNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    node: str
    host: str
    slots: int
    domain: str
    address: str
    capabilities: tuple[str, ...]
    digest: str


class _WireEpoch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    job: str
    number: int
    places: tuple[tuple[str, int], ...]
    leader: str
    nodes_min: int
    nodes_max: int
    removed: tuple[tuple[str, str], ...]
    resumes: tuple[int, int] | None
    note: str
    digest: str


class _WireInventory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    world_size: int
    size_bytes: tuple[tuple[int, int], ...]
    digest: str


prepare_decoders(_WireNode, _WireEpoch, _WireInventory)


def encode_node(info: NodeInfo) -> bytes:
    """The canonical bytes. Raises UsageError, naming the field, if one is out of range."""
    if problem := node_problem(info):
        raise UsageError(f"invalid node record. {problem}")
    wire = _WireNode(
        v=RECORD_VERSION,
        node=info.node,
        host=info.host,
        slots=info.slots,
        domain=info.domain,
        address=info.address,
        capabilities=info.capabilities,
        digest="",
    )
    return seal(wire, label="node", bytes_max=NODE_BYTES_MAX)[0]


def decode_node(data: bytes) -> NodeInfo:
    """The node in ``data``, which is not trusted. Raises IntegrityError or FormatVersionError."""
    wire = unseal(data, _WireNode, label="node", version=RECORD_VERSION, bytes_max=NODE_BYTES_MAX)
    info = NodeInfo(
        node=wire.node,
        host=wire.host,
        slots=wire.slots,
        domain=wire.domain,
        address=wire.address,
        capabilities=wire.capabilities,
    )
    if problem := node_problem(info):
        raise IntegrityError(f"invalid node record. {problem}")
    return info


def encode_epoch(record: EpochRecord) -> bytes:
    """The canonical bytes. Raises UsageError, naming the field, if one is out of range."""
    if problem := epoch_problem(record):
        raise UsageError(f"invalid epoch record. {problem}")
    resumes = record.resumes
    wire = _WireEpoch(
        v=RECORD_VERSION,
        job=record.job,
        number=record.number,
        places=tuple((place.node, place.slots) for place in record.places),
        leader=record.leader,
        nodes_min=record.nodes_min,
        nodes_max=record.nodes_max,
        removed=tuple((removed.node, removed.reason) for removed in record.removed),
        resumes=None if resumes is None else (resumes.epoch, resumes.step),
        note=record.note,
        digest="",
    )
    return seal(wire, label="epoch", bytes_max=EPOCH_BYTES_MAX)[0]


def decode_epoch(data: bytes) -> EpochRecord:
    """The epoch in ``data``, which is not trusted. Raises IntegrityError or FormatVersionError."""
    wire = unseal(
        data, _WireEpoch, label="epoch", version=RECORD_VERSION, bytes_max=EPOCH_BYTES_MAX
    )
    record = EpochRecord(
        job=wire.job,
        number=wire.number,
        places=tuple(NodePlacement(*place) for place in wire.places),
        leader=wire.leader,
        nodes_min=wire.nodes_min,
        nodes_max=wire.nodes_max,
        removed=tuple(RemovedNode(*removed) for removed in wire.removed),
        resumes=None if wire.resumes is None else SnapshotId(*wire.resumes),
        note=wire.note,
    )
    if problem := epoch_problem(record):
        raise IntegrityError(f"invalid epoch record. {problem}")
    return record


def encode_inventory(inventory: StateInventory) -> bytes:
    """The canonical bytes. Raises UsageError, naming the field, if one is out of range."""
    if problem := inventory_problem(inventory):
        raise UsageError(f"invalid state inventory. {problem}")
    wire = _WireInventory(
        v=RECORD_VERSION,
        world_size=inventory.world_size,
        size_bytes=tuple(sorted(inventory.size_bytes.items())),
        digest="",
    )
    return seal(wire, label="state inventory", bytes_max=INVENTORY_BYTES_MAX)[0]


def decode_inventory(data: bytes) -> StateInventory:
    """The inventory in ``data``, which is not trusted.

    Raises IntegrityError or FormatVersionError.
    """
    wire = unseal(
        data,
        _WireInventory,
        label="state inventory",
        version=RECORD_VERSION,
        bytes_max=INVENTORY_BYTES_MAX,
    )
    inventory = StateInventory(wire.world_size, dict(wire.size_bytes))
    problem = inventory_problem(inventory)
    if problem is None and tuple(sorted(inventory.size_bytes.items())) != wire.size_bytes:
        problem = "ranks are not in order"  # equal inventories have equal bytes
    if problem is not None:
        raise IntegrityError(f"invalid state inventory. {problem}")
    return inventory


def is_node_id(node: str) -> bool:
    """Whether ``node`` can be a node id: 1 to 64 of 0-9 a-z A-Z _ -."""
    return _NODE_RE.fullmatch(node) is not None


def node_problem(info: NodeInfo) -> str | None:
    """What makes ``info`` invalid, as ``fact. key=value``, or None."""
    if not is_node_id(info.node):
        return f"not a node id (1 to 64 of 0-9 a-z A-Z _ -). node={info.node[:80]!r}"
    if not 1 <= info.slots <= SLOTS_MAX:
        return f"slots out of range. slots={info.slots} (1..{SLOTS_MAX})"
    if not info.host:
        return f"no host. node={info.node}"
    if len(info.capabilities) > CAPABILITIES_MAX:
        return f"too many capabilities. count={len(info.capabilities)} limit={CAPABILITIES_MAX}"
    for text in (info.host, info.domain, info.address, *info.capabilities):
        if len(text) > TEXT_CHARS_MAX or not text.isprintable():
            return f"a text is too long or not printable. text={text[:80]!r} limit={TEXT_CHARS_MAX}"
    return None


def epoch_problem(record: EpochRecord) -> str | None:
    """What makes ``record`` invalid, as ``fact. key=value``, or None."""
    if not is_job_name(record.job):
        return f"not a job name. job={record.job!r}"
    if not 1 <= record.number <= keys.EPOCH_MAX:
        return f"epoch out of range. epoch={record.number} (1..{keys.EPOCH_MAX})"
    if not 1 <= record.nodes_min <= record.nodes_max <= RANKS_MAX:
        return f"not a range of nodes. nodes_min={record.nodes_min} nodes_max={record.nodes_max}"
    if len(record.places) < record.nodes_min:
        return f"fewer nodes than it needs. nodes={len(record.places)} nodes_min={record.nodes_min}"
    names = [place.node for place in record.places]
    for name in (*names, record.leader, *(removed.node for removed in record.removed)):
        if not is_node_id(name):
            return f"not a node id (1 to 64 of 0-9 a-z A-Z _ -). node={name[:80]!r}"
    if len(set(names)) != len(names):
        return "a node has two places"
    if (
        any(not 1 <= place.slots <= SLOTS_MAX for place in record.places)
        or record.world_size > RANKS_MAX
    ):
        return f"slots out of range. world_size={record.world_size} limit={RANKS_MAX}"
    if len(record.removed) > REMOVED_MAX or {removed.node for removed in record.removed} & set(
        names
    ):
        return (
            "too many removed nodes are named, or one of them has a place. "
            f"removed={len(record.removed)} limit={REMOVED_MAX}"
        )
    if any(
        len(removed.reason) > REASON_CHARS_MAX or not removed.reason.isprintable()
        for removed in record.removed
    ):
        return f"a reason is too long or not printable. limit={REASON_CHARS_MAX}"
    if len(record.note) > NOTE_CHARS_MAX:
        return f"a note is too long. chars={len(record.note)} limit={NOTE_CHARS_MAX}"
    if record.resumes is not None and not keys.is_snapshot_id(record.resumes):
        return (
            f"resumes a pair out of range. epoch={record.resumes.epoch} step={record.resumes.step}"
        )
    return None


def inventory_problem(inventory: StateInventory) -> str | None:
    """What makes ``inventory`` invalid, as ``fact. key=value``, or None."""
    if not 1 <= inventory.world_size <= RANKS_MAX:
        return f"world size out of range. world_size={inventory.world_size}"
    for rank, size_bytes in inventory.size_bytes.items():
        if not 0 <= rank < inventory.world_size or not 0 <= size_bytes < 1 << 62:
            return f"rank or size out of range. rank={rank} size_bytes={size_bytes}"
    return None
