"""What each new epoch means for this node: told once, as soon as it is known where its ranks
meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ckpt.cluster.membership.api import MemberFacts, Membership
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.mesh.messages import MeetingAddress, MeshMessage
from ckpt.cluster.node.leading import EpochNote, epoch_note, peer_address

# What a node needs from those who make it: a membership, whom it tells what, and how it is
# reached.


class NodeMembership(Membership, MemberFacts, Protocol):
    """A driver of the membership: both of its seams."""


@dataclass(frozen=True, slots=True)
class NodeEpoch:
    """An epoch as it concerns this node, complete: where its ranks meet is known.

    ``addresses`` of the lines by node, those of standbys too; ``peers``: where nodes lend their
    memory; ``domains``: what fails together. ``meet``: None where this node has no ranks, or the
    job ends. ``me``: this node's id in it.
    """

    record: EpochRecord
    note: EpochNote
    addresses: Mapping[str, str]
    peers: Mapping[str, str]
    domains: Mapping[str, str]
    meeting: MeetingAddress | None
    me: str = ""

    @property
    def number(self) -> int:
        """Its number."""
        return self.record.number

    @property
    def standbys(self) -> tuple[str, ...]:
        """The nodes that lend memory and have no ranks."""
        return tuple(sorted(node for node in self.peers if node not in self.record.ranks))


@dataclass(frozen=True, slots=True)
class NodeObserver:
    """What a node tells its keeper, from threads of its own."""

    on_epoch: Callable[[NodeEpoch], object]
    on_standbys: Callable[[NodeEpoch], object]
    """The epoch that was told goes on with other standbys, or was there before this node, which is
    one."""
    on_membership_lost: Callable[[str], object]
    """This node is no member any more, so nothing of it may go on; it joins again by itself."""
    on_message: Callable[[str, MeshMessage], object]
    on_connected: Callable[[str], object]
    on_disconnected: Callable[[str, str], object]
    """A line to another node is up, or broke, with why."""
    on_act_until: Callable[[float], None] = lambda until_s: None
    """Its lease was prolonged: until when, of CLOCK_BOOTTIME in seconds, it may act."""


@dataclass(frozen=True, slots=True)
class NodeDeps:
    """How a node is reached. ``lines`` to others, for a node of that name; ``meeting``: where the
    trainers of an epoch meet.

    ``agent``: the launcher's own on this machine, which may live under this node's lease; "" where
    there is none.
    """

    open_mesh: Callable[[str, MeshObserver], Mesh]
    pick_meeting: Callable[[], tuple[str, int]]
    agent: str = ""


class EpochTracker:
    """See the module. ``meeting`` says where the trainers of an epoch shall meet, ``say`` says
    something to another node.

    ``see`` and ``tell`` are for one thread; the rest is thread-safe.
    """

    def __init__(
        self,
        told: NodeObserver,
        *,
        pick_meeting: Callable[[], tuple[str, int]],
        send: Callable[[str, MeshMessage], object],
    ) -> None:
        self._told = told
        self._meeting = pick_meeting
        self._say = send
        self._lock = threading.Lock()
        self._meet: MeetingAddress | None = None
        self._seen = 0
        self._epoch: NodeEpoch | None = None

    def forget_meeting(self) -> None:
        """This node is about to join: what is said from now on is for its new self."""
        with self._lock:
            self._meet = None

    def reset(self) -> None:
        """It has joined, and has seen no epoch as its new self."""
        with self._lock:
            self._seen = 0

    def receive_meeting(self, word: MeetingAddress) -> None:
        """The node of rank 0 says where an epoch's ranks meet."""
        with self._lock:
            if self._meet is None or word.attempt > self._meet.attempt:
                self._meet = word

    def resend_meeting(self, node: str) -> None:
        """There is a line again to a node that may not have heard where this one, that of rank 0,
        has its ranks meet."""
        with self._lock:
            meet = self._meet
        if meet is not None:
            self._say(node, meet)

    def observe(self, view: View, me: NodeInfo, *, joined_at: int, began_at: int) -> bool:
        """Look at the view's epoch, and tell of other standbys. True: it is new, and ``tell`` is
        due.

        This node joined at revision ``joined_at``, the first time at ``began_at``: an epoch from
        before is not its own, but a job's end concerns whoever was in it.
        """
        record, note = view.epoch, epoch_note(view)
        with self._lock:
            seen = self._seen
        if record is not None and record.number == seen:
            self._see_members(view)
            return False
        if record is None or record.number <= seen:
            return False
        if view.epoch_revision < (joined_at if note.end is None else began_at):
            self._see_from_outside(view, record, note, me)
            return False
        meet = None
        if note.end is None and me.node in record.ranks:
            meet = self._meeting_of(record, me)
            if meet is None:
                return False
        self._note(NodeEpoch(record, note, *_people(view), meet, me.node))
        return True

    def report(self) -> None:
        """Tell the epoch that ``see`` found to be new."""
        if self._epoch is not None:
            self._told.on_epoch(self._epoch)

    def _see_from_outside(
        self, view: View, record: EpochRecord, note: EpochNote, me: NodeInfo
    ) -> None:
        """An epoch that was there before this node: it is a standby, and is told of nothing but who
        is there."""
        if note.end is None and me.node not in record.ranks:
            self._told.on_standbys(
                self._note(NodeEpoch(record, note, *_people(view), None, me.node))
            )

    def _note(self, epoch: NodeEpoch) -> NodeEpoch:
        with self._lock:
            self._seen = epoch.number
        self._epoch = epoch
        return epoch

    def _see_members(self, view: View) -> None:
        """Standbys come and go within an epoch; who has ranks in it is of it until another one
        follows."""
        if (before := self._epoch) is None:
            return
        addresses, peers, domains = (
            {node: one for node, one in then.items() if node in before.record.ranks}
            | {node: one for node, one in now.items() if node not in before.record.ranks}
            for then, now in zip(
                (before.addresses, before.peers, before.domains), _people(view), strict=True
            )
        )
        epoch = replace(before, addresses=addresses, peers=peers, domains=domains)
        if epoch != before:
            self._epoch = epoch
            self._told.on_standbys(epoch)

    def _meeting_of(self, record: EpochRecord, me: NodeInfo) -> MeetingAddress | None:
        """Where the epoch's ranks meet, where that is known. The node of rank 0 chooses it, and
        says so."""
        with self._lock:
            meet = self._meet
        if record.rank0_node != me.node:
            return meet if meet is not None and meet.attempt == record.number else None
        if meet is None or meet.attempt != record.number:
            host, port = self._meeting()
            meet = MeetingAddress(attempt=record.number, host=host, port=port)
            with self._lock:
                self._meet = meet
        for node in record.ranks:
            self._say(node, meet)
        return meet


def _people(view: View) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Of all members: where their lines are, where they lend memory, and what each fails together
    with."""
    return (
        {member.node: member.info.address for member in view.members},
        {member.node: peer for member in view.members if (peer := peer_address(member.info))},
        {member.node: member.info.failure_domain for member in view.members},
    )
