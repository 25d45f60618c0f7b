"""What a keeper asks of its cluster side, and the answers for a job of one node.

``Nodes`` (in ``ckpt.keeper.nodes``) is the other implementation. It is imported only for a job with
several nodes, because membership, mesh and peer memory take long to import.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ckpt.ipc.messages import NodeReport, RankPlacement, Source, Start
from ckpt.keeper.attempts.events import RequestEpoch
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox
from ckpt.values import SnapshotId

if TYPE_CHECKING:  # the keeper starts without it
    from ckpt.ipc.mailbox import RankMailbox
    from ckpt.keeper.slots import RankMemory

LOOK_S = 5.0
"""How long a keeper without other nodes may wait for its next tick."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What a status report says of the job's nodes. ``refused`` counts rejected connections and
    requests by kind."""

    nodes: tuple[NodeReport, ...] = ()
    mirror_bytes: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)


class SharedUploads(Protocol):
    """What nodes make durable together."""

    def channel_of(self, rank: int) -> RankMailbox:
        """The mailbox over which a local rank commits with all others."""
        ...

    @property
    def settling(self) -> bool:
        """Whether the nodes are making durable what only memory holds, and it is not done yet."""
        ...

    def staged(self) -> Mapping[SnapshotId, str]:
        """The snapshots, with origins, of which this node's ranks hold all their shares; newest
        first."""
        ...

    def settle(self) -> None:
        """No attempt follows here: with all other nodes, make durable what only memory holds."""
        ...


class ClusterView(Protocol):
    """This node within the nodes of one launch. All calls are made by the keeper's loop, and none
    of them blocks it.

    Larger than other protocols: each member is one question that a lone node answers differently.
    """

    @property
    def busy(self) -> bool:
        """Whether other nodes may still need this one although its own ranks have ended."""
        ...

    @property
    def placement(self) -> RankPlacement | None:
        """Where this node's ranks are among all ranks; None: the job has one node, or this one
        holds no rank."""
        ...

    @property
    def generation(self) -> int:
        """Which placement generation the newest membership epoch belongs to: it changes when other
        nodes hold the ranks. 0: the job has one node, or there is no epoch yet."""
        ...

    @property
    def epoch_reason(self) -> str:
        """Why the newest membership epoch was opened; "" if no leader gave a reason."""
        ...

    @property
    def resumed_from(self) -> SnapshotId | None:
        """The snapshot that the log epoch opened last continues from; None: from the start."""
        ...

    @property
    def uploads(self) -> SharedUploads | None:
        """The uploads of ranks that are on several nodes; None: all ranks are on this node."""
        ...

    def tick(self, now_s: float) -> float:
        """Do what is due; returns the seconds until the next call is needed."""
        ...

    def begin(self, attempt: int, own: LocalMailbox) -> KeeperMailbox:
        """Begin an attempt; returns the mailbox of its ranks: ``own``, or the one at rank 0's
        node."""
        ...

    def start_message(self, attempt: int) -> Start:
        """The order to start ``attempt``, with the port at which its ranks meet."""
        ...

    def request_epoch(self, asked: RequestEpoch, attempt: int) -> None:
        """Say that this node is ready for the next epoch; ``asked``: why its last ``attempt``
        ended, if it did."""
        ...

    def report_ended(self, attempt: int) -> None:
        """Say that all ranks of this node ended well."""
        ...

    def decided(self, boundary: int, flags: int) -> None:
        """Pass on what rank 0 decided for a step boundary."""
        ...

    def gather(self, answer: Callable[[Mapping[SnapshotId, str]], object]) -> None:
        """Call ``answer`` with the snapshots, and their origins, that memory holds for every rank
        of the job."""
        ...

    def sources(self, snapshot: SnapshotId) -> tuple[tuple[Source, ...], int]:
        """For each rank the places in memory that have its share, and the epoch in whose name to
        read them."""
        ...

    def log_epoch_opened(self, resume: SnapshotId | None) -> None:
        """An epoch of the log is open that continues from ``resume``: later captures of an older
        line are void."""
        ...

    def status(self) -> ClusterStatus:
        """For tools."""
        ...

    def leave(self) -> None:
        """Leave the membership in the background: nothing of this launch follows on this node."""
        ...

    def close(self) -> None:
        """Leave the membership, wait until that is done, and free all resources."""
        ...


class SingleNode:
    """The cluster side of a job with one node: no other node is asked, waited for or
    informed."""

    busy = False
    placement: RankPlacement | None = None
    generation = 0
    epoch_reason = ""
    uploads: SharedUploads | None = None

    def __init__(self, memory: RankMemory) -> None:
        self._memory = memory
        self.resumed_from: SnapshotId | None = None

    def tick(self, now_s: float) -> float:
        return LOOK_S

    def begin(self, attempt: int, own: LocalMailbox) -> KeeperMailbox:
        return own

    def start_message(self, attempt: int) -> Start:
        return Start(attempt=attempt, port=free_port("127.0.0.1"))

    def request_epoch(self, asked: RequestEpoch, attempt: int) -> None:
        raise AssertionError("a roster of one node numbers its attempts itself")

    def report_ended(self, attempt: int) -> None:
        raise AssertionError("a roster of one node has no leader to report to")

    def decided(self, boundary: int, flags: int) -> None:
        """Nothing to do: all ranks read the board of this node."""

    def gather(self, answer: Callable[[Mapping[SnapshotId, str]], object]) -> None:
        assert self._memory.slots is not None, "admitted"
        answer(self._memory.slots.snapshot_origins(self._memory.ranks))

    def sources(self, snapshot: SnapshotId) -> tuple[tuple[Source, ...], int]:
        return (), 0

    def log_epoch_opened(self, resume: SnapshotId | None) -> None:
        assert self._memory.slots is not None, "admitted"
        self._memory.slots.discard_after(resume)
        self.resumed_from = resume

    def status(self) -> ClusterStatus:
        return ClusterStatus()

    def leave(self) -> None:
        """Nothing to leave."""

    def close(self) -> None:
        """Nothing to close."""


def free_port(host: str) -> int:
    """A port of ``host`` that is free now. If another process takes it first, the attempt fails and
    is repeated."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
