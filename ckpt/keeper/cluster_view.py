"""What the parts of a keeper that deal with other nodes need to know of them."""

from __future__ import annotations

from typing import Protocol

from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox


class EpochView(Protocol):
    """This node among the others, as of the newest epoch. For the keeper's loop."""

    @property
    def epoch(self) -> NodeEpoch | None:
        """The newest epoch, complete; None before the first."""
        ...

    @property
    def me(self) -> str:
        """This node's id."""
        ...

    @property
    def root(self) -> bool:
        """Whether rank 0 is on this node."""
        ...

    @property
    def placed(self) -> bool:
        """Whether the epoch has ranks for this node."""
        ...

    @property
    def others(self) -> tuple[str, ...]:
        """The other nodes that hold ranks."""
        ...

    def room(self, name: str, own: LocalMailbox) -> KeeperMailbox:
        """The room of that name: ``own`` where it is here, else the one at the node of rank 0."""
        ...

    def say(self, node: str, word: MeshMessage) -> bool:
        """Say something to another node's keeper; False where there is no line now."""
        ...

    def say_to_all(self, word: MeshMessage) -> None:
        """Say something to all other nodes that hold ranks."""
        ...
