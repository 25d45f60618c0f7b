"""This node among the job's other nodes, as of the newest membership epoch. For the keeper's loop
alone."""

from __future__ import annotations

from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.cluster.node.node import Node
from ckpt.ipc.messages import RankPlacement
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox
from ckpt.keeper.nodes.remote_mailbox import RemoteMailbox, RemoteMailboxes
from ckpt.values import MembershipEpoch


class EpochView:
    """The newest epoch and the connections to its nodes. ``Nodes`` writes it; uploads, memory and
    progress read it."""

    def __init__(self) -> None:
        self.node: Node | None = None
        """This machine's membership; None before the launch has joined, and once it leaves."""
        self._epoch: NodeEpoch | None = None
        self.others: tuple[str, ...] = ()
        """The other nodes that hold ranks."""
        self.out = False
        """Whether this node has lost its membership, and no epoch since has included it."""
        self.mailboxes = RemoteMailboxes(self.send)
        self.log_id = ""
        """The id of the log to which this launch writes; "" until some node said it."""

    @property
    def epoch(self) -> NodeEpoch | None:
        """The newest epoch, complete; None before the first."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: NodeEpoch | None) -> None:
        self._epoch = epoch
        ranks = epoch.record.ranks if epoch is not None else ()
        self.others = tuple(node for node in ranks if node != self.me)

    @property
    def me(self) -> str:
        """This node's id in the newest epoch, although it may have joined under another one
        since."""
        if self.epoch is not None:
            return self.epoch.me
        return self.node.node_id if self.node is not None else ""

    @property
    def number(self) -> int:
        """The number of the newest epoch; 0 before the first."""
        return self.epoch.number if self.epoch is not None else 0

    @property
    def membership(self) -> MembershipEpoch | None:
        """The newest epoch as the log names it; None before the first, or if its leader named no
        line."""
        if self.epoch is None or not self.epoch.note.line:
            return None
        return MembershipEpoch(self.epoch.note.line, self.epoch.number)

    @property
    def has_rank0(self) -> bool:
        """Whether rank 0 is on this node."""
        return self.epoch is not None and self.epoch.record.rank0_node == self.me

    @property
    def placed(self) -> bool:
        """Whether the newest epoch has ranks for this node."""
        return self.epoch is not None and not self.out and self.me in self.epoch.record.ranks

    @property
    def local_ranks(self) -> range:
        """The ranks of this node, which is placed."""
        assert self.epoch is not None, "an epoch"
        return self.epoch.record.ranks[self.me]

    @property
    def placement(self) -> RankPlacement | None:
        """Where this node's ranks are in the newest epoch; None if it has none."""
        epoch = self.epoch
        if epoch is None or epoch.meeting is None or not self.placed:
            return None
        # In the order of their ranks: a node's place in it is the node rank that trainers see.
        nodes = list(epoch.record.ranks)
        return RankPlacement(
            host=epoch.meeting.host,
            first_rank=self.local_ranks.start,
            world_size=epoch.record.world_size,
            node=nodes.index(self.me),
            nodes=len(nodes),
        )

    def mailbox(self, name: str, own: LocalMailbox) -> KeeperMailbox:
        """The mailbox of that name: ``own``, served to the others, if rank 0 is here, else the one
        at rank 0's node."""
        assert self.epoch is not None, "an epoch with ranks here"
        if self.has_rank0:
            self.mailboxes.serve(name, own)
            return own
        return RemoteMailbox(self.mailboxes, name, self.epoch.record.rank0_node)

    def send(self, node: str, message: MeshMessage) -> bool:
        """Send a message to another node's keeper; False if there is no connection now."""
        return self.node is not None and self.node.send(node, message)

    def send_to_others(self, message: MeshMessage) -> None:
        """Send a message to all other nodes that hold ranks."""
        for node in self.others:
            self.send(node, message)
