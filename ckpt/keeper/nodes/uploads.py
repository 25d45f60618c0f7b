"""Uploads of snapshots whose ranks are on several nodes: one mailbox per placement generation, one
order everywhere.

A *placement generation* lasts as long as the same nodes hold the same ranks. Within it each node
submits the same snapshots in the same order. If trainers died between the submissions of two ranks,
the node of rank 0 sends all nodes the longest list that was submitted before the next attempt
submits anything. With another generation, uploads in flight fail: not all their ranks are there any
more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ckpt.cluster.membership.admission import shared_facts
from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox, ValueCallback
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.keeper.nodes.remote_mailbox import LoopChannel, uploads_mailbox
from ckpt.values import SnapshotId

if TYPE_CHECKING:  # imported when uploads are first needed
    from ckpt.keeper.uploads.uploads import WrittenLog


class _GenerationMailbox(LocalMailbox):
    """The mailbox of one generation's uploads. The loop does not tick it: old questions end when
    the next one arrives."""

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        self.tick(time.monotonic())
        super().peek(key, wait_s=wait_s, owner=owner, answer=answer)


class ClusterUploads:
    """Keeps the nodes' uploads in the same order. In the keeper's loop."""

    def __init__(
        self, state: JobState, view: EpochView, *, on_other_store: Callable[[str], object]
    ) -> None:
        """``on_other_store``: this node's stores are not those of rank 0's node, for the reason
        given."""
        self._state = state
        self._view = view
        self._on_other_store = on_other_store
        self._submitted: dict[str, mesh.NodeSubmissions] = {}
        """On the node of rank 0: what each node had submitted when the attempt began."""
        self._own: mesh.NodeSubmissions | None = None
        """What this node had submitted when the attempt began."""
        self._begun = 0
        """The attempt that began here last."""
        self._opened: tuple[SnapshotId | None] | None = None
        """On the node of rank 0: the resume of the log's open epoch, while some node has not sent
        its submissions."""
        self._said: mesh.MeshEpochOpened | None = None
        """The last one that this node sent as the node of rank 0: standbys that come later get it
        too."""
        self._message: mesh.MeshEpochOpened | None = None
        """The last message of its kind, which may be of an attempt that begins here in a moment."""
        self._mailbox: KeeperMailbox | None = None
        self._channels: list[LoopChannel] = []
        self.resume: SnapshotId | None = None
        """The snapshot that the log epoch opened last continues from."""

    def channel_of(self, rank: int) -> LoopChannel:
        """The mailbox over which this node's ``rank`` commits with all others, within this
        generation only."""
        placement = self._view.placement
        assert placement is not None, "an epoch with ranks here"
        mailbox = self._mailbox
        channel = LoopChannel(
            self._state.post,
            lambda: mailbox if mailbox is self._mailbox else None,
            rank=placement.first_rank + rank,
            size=placement.world_size,
        )
        self._channels.append(channel)
        return channel

    def see_epoch(self, epoch: NodeEpoch, before: NodeEpoch | None, *, placed: bool) -> None:
        """A new epoch; it may begin another generation."""
        self._submitted = {
            node: known for node, known in self._submitted.items() if known.attempt >= epoch.number
        }
        # Within a generation nothing is lost by a trainer's death: uploads in flight continue.
        if before is not None and before.note.era == epoch.note.era:
            return
        self._channels.clear()
        name = uploads_mailbox(epoch.note.era)
        self._mailbox = self._view.mailbox(name, _GenerationMailbox()) if placed else None
        self._state.uploads.new_generation(rank0_here=self._view.has_rank0)

    def begin(self, attempt: int) -> None:
        """An attempt begins: send what was submitted before, and hold new submissions until its log
        epoch is open."""
        assert self._view.epoch is not None, "an epoch with ranks here"
        uploads = self._state.uploads.need()
        uploads.use_channels(self.channel_of)  # an earlier launch of the program had other nodes
        uploads.begin_attempt(self._view.membership, self._may_act)
        count, entries = uploads.submitted
        self._own = mesh.NodeSubmissions(attempt=attempt, count=count, turns=entries)
        self._begun, self._opened = attempt, None
        self._send_own()
        uploads.hold_submissions()
        if self._message is not None and self._message.attempt == attempt:
            self._follow(self._message)

    def open(self, resume: SnapshotId | None) -> None:
        """On the node of rank 0: the log epoch is open. All nodes hear so once each has sent its
        submissions."""
        epoch = self._view.epoch
        assert epoch is not None, "an epoch with ranks here"
        if self._begun == epoch.number:  # else it was opened for an attempt that is over
            self._opened = (resume,)
            self._send_opened()

    def receive(self, node: str, message: mesh.NodeSubmissions | mesh.MeshEpochOpened) -> None:
        """A message of another node."""
        match message:
            case mesh.NodeSubmissions():
                self._submitted[node] = message
                self._send_opened()
            case mesh.MeshEpochOpened():
                self._message = message
                self._view.log_id = message.log or self._view.log_id
                if self._view.placed:
                    self._follow(message)
                elif (written := self._written(message)) is not None:
                    self._state.uploads.need().check_store(written)

    def connected(self, node: str) -> None:
        """A connection is up again: messages to the node of rank 0 may have been lost, so they are
        sent again."""
        epoch = self._view.epoch
        said = self._said
        if epoch is None:
            return
        if said is not None and said.attempt == epoch.number and node not in epoch.record.ranks:
            self._view.send(node, said)
        if node == epoch.record.rank0_node:
            self._send_own()
            for channel in self._channels:
                channel.repeat()

    def _may_act(self) -> bool:
        """Whether this node may act now, by the same word that its supervisors obey. In any
        thread."""
        board = self._state.memory.board
        until_ns = board.act_until_ns if board is not None else 0
        return not until_ns or time.clock_gettime_ns(time.CLOCK_BOOTTIME) < until_ns

    def _send_own(self) -> None:
        epoch = self._view.epoch
        if epoch is None or self._own is None or self._own.attempt != epoch.number:
            return
        if self._view.has_rank0:
            self._submitted[self._view.me] = self._own
        else:
            self._view.send(epoch.record.rank0_node, self._own)

    def _send_opened(self) -> None:
        """Once all nodes have sent their submissions: let all nodes submit the
        longest list, then continue."""
        epoch = self._view.epoch
        if self._opened is None or epoch is None or epoch.number != self._begun:
            return
        nodes = (self._view.me, *self._view.others)
        known = [
            entry
            for node in nodes
            if (entry := self._submitted.get(node)) is not None and entry.attempt == epoch.number
        ]
        if len(known) < len(nodes):
            return
        # Every node submits a prefix of the same sequence, so the longest list contains all others.
        entries = max(known, key=lambda entry: entry.count).turns
        self._view.log_id = self._state.uploads.need().log_id
        message = mesh.MeshEpochOpened(
            attempt=epoch.number,
            resume=self._opened[0],
            turns=entries,
            log=self._view.log_id,
            stores=shared_facts(self._state.spec.stores, log_id="", options={}).shown_stores,
        )
        self._opened = None
        self._follow(message)
        self._view.send_to_others(message)
        for node in epoch.standbys:
            self._view.send(node, message)
        self._said = message

    def _written(self, message: mesh.MeshEpochOpened) -> WrittenLog | None:
        """Where the node of rank 0 writes; None on that node, and if its release does not say
        it."""
        if self._view.has_rank0 or not message.log:
            return None
        made: type[WrittenLog] = import_module("ckpt.keeper.uploads.uploads").WrittenLog
        return made(message.log, message.stores, self._on_other_store)

    def _follow(self, message: mesh.MeshEpochOpened) -> None:
        slots, epoch = self._state.memory.slots, self._view.epoch
        if slots is None or epoch is None or not message.attempt == epoch.number == self._begun:
            return
        self.resume = message.resume
        # Submissions first: a slot that the list still needs may hold a capture that is discarded
        # next.
        self._state.uploads.need().epoch_opened(
            message.turns, slots.hold_snapshot, self._written(message)
        )
        slots.discard_after(message.resume)
