"""Epochs of the membership as they concern one node.

A node reports each epoch to its keeper once, as soon as it is known where the epoch's ranks meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.mesh.messages import MeetingAddress, MeshMessage
from ckpt.cluster.node.leading import EpochNote, epoch_note, peer_address


@dataclass(frozen=True, slots=True)
class NodeEpoch:
    """An epoch as it concerns this node, complete with the address where its ranks meet.

    By node, standbys too: ``addresses`` of their keepers in the mesh, ``peers``: where they serve
    memory, ``domains``: their failure domains. ``meeting``: None if this node has no ranks in it,
    or the job ends. ``me``: this node's id in it.
    """

    record: EpochRecord
    note: EpochNote
    addresses: Mapping[str, str]
    peers: Mapping[str, str]
    domains: Mapping[str, str]
    meeting: MeetingAddress | None
    me: str = ""
    standbys: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """The nodes that serve memory and have no ranks."""

    def __post_init__(self) -> None:
        waiting = sorted(node for node in self.peers if node not in self.record.ranks)
        object.__setattr__(self, "standbys", tuple(waiting))

    @property
    def number(self) -> int:
        """The epoch's number, which is its attempt's too."""
        return self.record.number


@dataclass(frozen=True, slots=True)
class NodeObserver:
    """Callbacks of a node to its keeper, called in threads of the node: quick, and never raising.

    Nodes are given by their ids.
    """

    on_epoch: Callable[[NodeEpoch], object]
    on_standbys: Callable[[NodeEpoch], object]
    """The reported epoch has other standbys now; or this node is a standby, and the epoch was there
    before it."""
    on_membership_lost: Callable[[str], object]
    """This node is no member any more, for this reason: its ranks must stop. It joins again by
    itself."""
    on_message: Callable[[str, MeshMessage], object]
    on_connected: Callable[[str], object]
    on_disconnected: Callable[[str, str], object]
    """A connection to a node broke, or dialling it failed, for this reason."""
    on_act_until: Callable[[float], None] = lambda until_s: None
    """The lease was renewed: the node may act until then, in seconds of CLOCK_BOOTTIME."""
    on_refused: Callable[[str], object] = lambda reason: None
    """This node can't be one of its job, for this reason, or no node can: its launch ends."""


@dataclass(frozen=True, slots=True)
class NodeDeps:
    """What a node is given. ``open_mesh`` opens the mesh of a node with that id.

    ``pick_meeting`` picks host and port at which the trainers of an epoch meet. ``agent``: the
    launcher's agent on this machine, which may live under this node's lease; "": none. ``ttl_s``:
    how long a silent node counts as a member. ``ends_after``: the end of a job in an epoch of a
    greater revision concerns this node, even if it joins later; -1: not known.
    """

    open_mesh: Callable[[str, MeshObserver], Mesh]
    pick_meeting: Callable[[], tuple[str, int]]
    agent: str = ""
    ttl_s: float = 5.0
    ends_after: int = -1


class EpochTracker:
    """Finds out which epochs are new to this node, and where their ranks meet.

    ``pick_meeting``: see NodeDeps; ``send`` sends a message to another node. ``observe`` and
    ``report`` are for one thread; the other methods are thread-safe.
    """

    def __init__(
        self,
        observer: NodeObserver,
        *,
        pick_meeting: Callable[[], tuple[str, int]],
        send: Callable[[str, MeshMessage], object],
    ) -> None:
        self._observer = observer
        self._pick_meeting = pick_meeting
        self._send = send
        self._lock = threading.Lock()
        self._meeting: MeetingAddress | None = None
        self._newest = 0
        """Number of the newest epoch that is complete here."""
        self._epoch: NodeEpoch | None = None

    def forget_meeting(self) -> None:
        """Call before this node joins: what arrives from now on is meant for its new id."""
        with self._lock:
            self._meeting = None

    def reset(self) -> None:
        """Call after this node has joined: under its new id it has seen no epoch."""
        with self._lock:
            self._newest = 0

    def receive_meeting(self, meeting: MeetingAddress) -> None:
        """Take the address that the node of rank 0 sent; the newest attempt's counts."""
        with self._lock:
            if self._meeting is None or meeting.attempt > self._meeting.attempt:
                self._meeting = meeting

    def resend_meeting(self, node: str) -> None:
        """Send the meeting address to a node that is connected again, and may have missed it.

        For the node of rank 0.
        """
        with self._lock:
            meeting = self._meeting
        if meeting is not None:
            self._send(node, meeting)

    def observe(self, view: View, me: NodeInfo, *, joined_at: int, began_at: int) -> bool:
        """Take the view's epoch, and report changed standbys. True: it is new; call ``report``.

        This node joined at revision ``joined_at``, and was in the job from ``began_at`` on. An
        epoch published before it joined is not its own; but the end of a job concerns each node
        that was in the job.
        """
        record, note = view.epoch, epoch_note(view)
        with self._lock:
            newest = self._newest
        if record is not None and record.number == newest:
            self._update_standbys(view)
            return False
        if record is None or record.number <= newest:
            return False
        if view.epoch_revision < (joined_at if note.end is None else began_at):
            self._observe_as_standby(view, record, note, me)
            return False
        meeting = None
        if note.end is None and me.node in record.ranks:
            meeting = self._meeting_of(record, me)
            if meeting is None:
                return False  # rank 0's node has not sent it yet; its message leads here again
        self._take(NodeEpoch(record, note, *_addresses(view), meeting, me.node))
        return True

    def report(self) -> None:
        """Report the epoch that ``observe`` found to be new."""
        if self._epoch is not None:
            self._observer.on_epoch(self._epoch)

    def _observe_as_standby(
        self, view: View, record: EpochRecord, note: EpochNote, me: NodeInfo
    ) -> None:
        """Take an epoch that was there before this node, which is a standby in it."""
        if note.end is None and me.node not in record.ranks:
            epoch = NodeEpoch(record, note, *_addresses(view), None, me.node)
            self._take(epoch)
            self._observer.on_standbys(epoch)

    def _take(self, epoch: NodeEpoch) -> None:
        with self._lock:
            self._newest = epoch.number
        self._epoch = epoch

    def _update_standbys(self, view: View) -> None:
        """Standbys may change within an epoch; nodes with ranks do not."""
        if (before := self._epoch) is None:
            return
        ranked = before.record.ranks
        addresses, peers, domains = (
            {node: value for node, value in old.items() if node in ranked}
            | {node: value for node, value in new.items() if node not in ranked}
            for old, new in zip(
                (before.addresses, before.peers, before.domains), _addresses(view), strict=True
            )
        )
        epoch = replace(before, addresses=addresses, peers=peers, domains=domains)
        if epoch != before:
            self._epoch = epoch
            self._observer.on_standbys(epoch)

    def _meeting_of(self, record: EpochRecord, me: NodeInfo) -> MeetingAddress | None:
        """Where the epoch's ranks meet, if known. Rank 0's node picks it and sends it to all."""
        with self._lock:
            meeting = self._meeting
        if record.rank0_node != me.node:
            return meeting if meeting is not None and meeting.attempt == record.number else None
        if meeting is None or meeting.attempt != record.number:
            host, port = self._pick_meeting()
            meeting = MeetingAddress(attempt=record.number, host=host, port=port)
            # Before it is sent: a node that connects in between gets it by ``resend_meeting``.
            with self._lock:
                self._meeting = meeting
        for node in record.ranks:
            self._send(node, meeting)
        return meeting


def _addresses(view: View) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Of all members: their addresses in the mesh, where they serve memory, their domains."""
    return (
        {member.node: member.info.address for member in view.members},
        {member.node: peer for member in view.members if (peer := peer_address(member.info))},
        {member.node: member.info.failure_domain for member in view.members},
    )
