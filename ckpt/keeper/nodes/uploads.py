"""Making snapshots durable whose ranks are on several nodes: one era's room, and the same sequence
on every node.

An *era* lasts as long as the same nodes have the same ranks. Within it each node hands in the same
snapshots in the same order; where trainers died between two ranks' words, the node of rank 0 tells
all what was handed in before the next attempt hands in anything. With another era what is in flight
fails: its ranks are not all there any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt.cluster.mesh import messages as said
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.ipc.messages import RankPlacement
from ckpt.keeper.cluster_view import EpochView
from ckpt.keeper.job import Job
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox, ValueCallback
from ckpt.keeper.nodes.remote_mailbox import LoopChannel, uploads_mailbox
from ckpt.values import SnapshotId


class _EraRoom(LocalMailbox):
    """The room of an era's uploads. No clock of the loop's is for it: questions that waited long
    enough go when one comes."""

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        """See Room."""
        self.tick(time.monotonic())
        super().peek(key, wait_s=wait_s, owner=owner, answer=answer)


class ClusterUploads:
    """See the module. In the loop."""

    def __init__(
        self, job: Job, among: EpochView, *, seating: Callable[[], RankPlacement | None]
    ) -> None:
        self._job = job
        self._among = among
        self._seating = seating
        self._handed: dict[str, said.NodeSubmissions] = {}
        self._told: said.NodeSubmissions | None = None
        """What this node had handed in when the attempt began."""
        self._begun = 0
        """The attempt that began here last."""
        self._resume: tuple[SnapshotId | None] | None = None
        """On the node of rank 0: what the log's open epoch goes on from, while some node has not
        told what it handed in."""
        self._word: said.MeshEpochOpened | None = None
        """The last word of its kind, which may be of an attempt that begins here in a moment."""
        self._room: KeeperMailbox | None = None
        self._channels: list[LoopChannel] = []
        self.resume: SnapshotId | None = None
        """What the epoch that was opened last goes on from."""

    def channel_of(self, rank: int) -> LoopChannel:
        """The channel over which this node's ``rank`` makes snapshots durable together with all
        others, in this era alone."""
        seating = self._seating()
        assert seating is not None, "an epoch with ranks here"
        room = self._room
        channel = LoopChannel(
            self._job.post,
            lambda: room if room is self._room else None,
            rank=seating.first_rank + rank,
            size=seating.world_size,
        )
        self._channels.append(channel)
        return channel

    def see_epoch(self, epoch: NodeEpoch, before: NodeEpoch | None, *, placed: bool) -> None:
        """A new epoch; perhaps another era."""
        self._handed = {
            node: one for node, one in self._handed.items() if one.attempt >= epoch.number
        }
        if before is not None and before.note.era == epoch.note.era:
            return
        self._channels.clear()
        self._room = (
            self._among.room(uploads_mailbox(epoch.note.era), _EraRoom()) if placed else None
        )
        self._job.fenced = ""  # whoever wrote the log before, another one may do so now
        if self._job.uploads is not None:
            self._job.uploads.new_generation(root=self._among.root)

    def begin(self, attempt: int) -> None:
        """An attempt begins here: tell what was handed in before, and hold back what comes until
        its epoch is open."""
        assert self._among.epoch is not None, "an epoch with ranks here"
        uploads = self._job.need_uploads()
        uploads.use_channels(self.channel_of)  # an earlier launch of the program had other nodes
        count, turns = uploads.submitted
        self._told = said.NodeSubmissions(attempt=attempt, count=count, turns=turns)
        self._begun, self._resume = attempt, None
        self._tell()
        uploads.hold_submissions()
        if self._word is not None and self._word.attempt == attempt:
            self._follow(self._word)

    def open(self, resume: SnapshotId | None) -> None:
        """On the node of rank 0: an epoch of the log is open. All nodes hear of it once each told
        what it had handed in."""
        epoch = self._among.epoch
        assert epoch is not None, "an epoch with ranks here"
        if self._begun == epoch.number:  # else it was opened for an attempt that is over
            self._resume = (resume,)
            self._open()

    def take(self, node: str, word: said.NodeSubmissions | said.MeshEpochOpened) -> None:
        """What another node says."""
        match word:
            case said.NodeSubmissions():
                self._handed[node] = word
                self._open()
            case said.MeshEpochOpened():
                self._word = word
                self._follow(word)

    def connected(self, node: str) -> None:
        """What was said to the node of rank 0 may have been lost."""
        epoch = self._among.epoch
        if epoch is not None and node == epoch.record.rank0_node:
            self._tell()
            for channel in self._channels:
                channel.repeat()

    def _tell(self) -> None:
        epoch = self._among.epoch
        if epoch is None or self._told is None or self._told.attempt != epoch.number:
            return
        if self._among.root:
            self._handed[self._among.me] = self._told
        else:
            self._among.say(epoch.record.rank0_node, self._told)

    def _open(self) -> None:
        epoch = self._among.epoch
        if self._resume is None or epoch is None or epoch.number != self._begun:
            return
        nodes = (self._among.me, *self._among.others)
        known = [
            one
            for node in nodes
            if (one := self._handed.get(node)) is not None and one.attempt == epoch.number
        ]
        if len(known) < len(nodes):
            return
        turns = max(known, key=lambda one: one.count).turns
        word = said.MeshEpochOpened(attempt=epoch.number, resume=self._resume[0], turns=turns)
        self._resume = None
        self._follow(word)
        self._among.say_to_all(word)

    def _follow(self, word: said.MeshEpochOpened) -> None:
        slots, epoch = self._job.slots, self._among.epoch
        if slots is None or epoch is None or not word.attempt == epoch.number == self._begun:
            return
        self.resume = word.resume
        self._job.need_uploads().epoch_opened(word.turns, slots.hold_snapshot)
        slots.discard_after(word.resume)
