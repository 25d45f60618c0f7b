"""Uploads of snapshots whose ranks are on several nodes: one mailbox per placement generation, one
order everywhere.

A *placement generation* lasts as long as the same nodes hold the same ranks. Within it each node
submits the same snapshots in the same order. If trainers died between the submissions of two ranks,
the node of rank 0 sends all nodes the longest list that was submitted before the next attempt
submits anything. With another generation, uploads in flight fail: not all their ranks are there any
more. Those whose shares are all in memory still, in slots or as mirrors of what a lost node had,
are the first that the next generation submits.

If no attempt follows, the nodes *settle*: each says so to the node of rank 0, which sends the
longest list once all have, and then has all submit the newest snapshot that only memory holds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from ckpt.cluster.membership.admission import shared_facts
from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.events import Event
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox, ValueCallback
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.keeper.nodes.remote_mailbox import LoopChannel, uploads_mailbox
from ckpt.save.sealed import SealedSlot
from ckpt.staging.header import SlotSummary
from ckpt.values import SnapshotId

if TYPE_CHECKING:  # imported when uploads are first needed
    from ckpt.keeper.uploads.final_flush import HoldSnapshot
    from ckpt.keeper.uploads.uploads import WrittenLog


SETTLE_WAIT_S = 60.0
"""How long a node whose trainers are gone waits until all others have said the same, or until the
node of rank 0 has answered."""
SETTLE_S = 600.0
"""How long the nodes then try to make durable what only memory holds."""


FetchedShares = Mapping[SlotSummary, Callable[[], SealedSlot]]
"""Shares that were read from the memory of other nodes; each can be held for uploads."""

FetchShares = Callable[[Sequence[SlotSummary], Callable[[FetchedShares], object]], object]
"""Reads these shares from the memory of nodes that have them, then makes a call in the loop with
those that it could read."""


class SharesElsewhere:
    """Shares of this node's ranks that are in no slot here: a lost node had them, and others keep
    mirrors. In the keeper's loop."""

    def __init__(self, state: JobState, view: EpochView, fetch: FetchShares) -> None:
        self._state = state
        self._view = view
        self._fetch = fetch
        self.complete: Mapping[SnapshotId, str] = {}
        """On the node of rank 0: the snapshots of this world, with origins, of which all nodes
        together had all shares in memory when the attempt began."""
        self._waiting: deque[tuple[Mapping[SnapshotId, str], Callable[[HoldSnapshot], object]]] = (
            deque()
        )
        self._fetched: dict[SlotSummary, Callable[[], SealedSlot] | None] = {}
        """What those that wait asked for; None: it could not be read."""
        self.fetching = False
        """Whether shares are being read."""

    def opened(self, resume: SnapshotId | None) -> None:
        """On the node of rank 0: training continues from ``resume``; what is newer is on no
        lineage."""
        self.complete = {
            pair: origin
            for pair, origin in self.complete.items()
            if resume is not None and pair <= resume
        }

    def held_by_all(self, said: Iterable[mesh.NodeSubmissions]) -> dict[SnapshotId, str]:
        """On the node of rank 0: the snapshots, with origins, that all nodes can submit; newest
        first."""
        # What slots hold now counts before what memory held a while ago.
        return dict(sorted({**self.complete, **_common(said)}.items(), reverse=True))

    def ready(
        self, origins: Mapping[SnapshotId, str], then: Callable[[HoldSnapshot], object]
    ) -> None:
        """Call ``then``, in the order of such calls, once this node's shares of these snapshots are
        here, or can't be had. At once if slots hold all of them."""
        self._waiting.append((origins, then))
        if not self.fetching:
            self._go_on()

    def hold_here(self, rank: int, pair: SnapshotId) -> SealedSlot | None:
        """The slot of a local rank that holds the share of a snapshot which its rank has in the
        newest epoch, for an upload; None if there is none."""
        slots, epoch = self._state.memory.slots, self._view.epoch
        sealed = slots.hold_snapshot(rank, pair) if slots is not None else None
        if sealed is None or epoch is None or not self._view.placed:
            return sealed
        whose = (self._view.local_ranks.start + rank, epoch.record.world_size)
        if (sealed.index.rank, sealed.index.world_size) == whose:
            return sealed
        sealed.free()
        return None

    def _go_on(self) -> None:
        while self._waiting:
            origins, then = self._waiting[0]
            lacking = self._lacking(origins)
            unread = [share for share in lacking if share not in self._fetched]
            if unread:
                self.fetching = True
                self._fetch(unread, partial(self._got, unread))
                return
            self._waiting.popleft()
            then(self._holding(lacking))
        self._fetched = {}

    def _got(self, asked: Sequence[SlotSummary], got: FetchedShares) -> None:
        self.fetching = False
        self._fetched.update({share: got.get(share) for share in asked})
        self._go_on()

    def _lacking(self, origins: Mapping[SnapshotId, str]) -> list[SlotSummary]:
        slots, epoch = self._state.memory.slots, self._view.epoch
        if slots is None or epoch is None or not self._view.placed or not origins:
            return []
        first, size = self._view.local_ranks.start, epoch.record.world_size
        held = {
            summary[0]
            for slot in slots
            if (summary := slot.summary()) is not None and summary[0].rank - first == slot.rank
        }
        wanted = (
            SlotSummary(pair, rank, size, origin)
            for pair, origin in sorted(origins.items())
            for rank in self._view.local_ranks
        )
        return [share for share in wanted if share not in held]

    def _holding(self, lacking: Sequence[SlotSummary]) -> HoldSnapshot:
        first = self._view.local_ranks.start if lacking else 0
        fetched = {(share.rank - first, share.snapshot): self._fetched[share] for share in lacking}

        def hold(rank: int, pair: SnapshotId) -> SealedSlot | None:
            if (rank, pair) in fetched:
                share = fetched[rank, pair]
                return share() if share is not None else None
            return self.hold_here(rank, pair)

        return hold


@dataclass(slots=True)
class _Settling:
    """A placement generation in which no attempt follows. ``until_s``: when this node gives up;
    ``begun``: all nodes said so. On the node of rank 0: what each node said, and what it told them
    last; ``ready``: it has all shares that it is to submit."""

    generation: int
    until_s: float
    begun: bool = False
    ready: bool = False
    said: dict[str, mesh.NodeSubmissions] = field(default_factory=dict)
    told: mesh.MeshEpochOpened | None = None


class _GenerationMailbox(LocalMailbox):
    """The mailbox of one generation's uploads. The loop does not tick it: old questions end when
    the next one arrives."""

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        self.tick(time.monotonic())
        super().peek(key, wait_s=wait_s, owner=owner, answer=answer)


class Settlement:
    """What memory alone holds, once no attempt follows in a placement generation. In the keeper's
    loop; see the module."""

    def __init__(
        self,
        state: JobState,
        view: EpochView,
        elsewhere: SharesElsewhere,
        *,
        on_other_store: Callable[[str], object],
    ) -> None:
        self._state = state
        self._view = view
        self._elsewhere = elsewhere
        self._on_other_store = on_other_store
        self._settling: _Settling | None = None
        self._said: dict[str, mesh.NodeSubmissions] = {}
        """On the node of rank 0: the nodes on which no attempt follows in this generation."""

    def begin(self, *, generation: bool = False) -> None:
        """An attempt begins after all, or a new ``generation``."""
        self._settling = None
        self.begins(self._view.me)
        if generation:
            self._said.clear()

    def begins(self, node: str) -> None:
        """An attempt begins on a node: what it said of the end of an earlier one is over. Its slots
        hold something else since, and it has yet to end."""
        self._said.pop(node, None)

    def receive(self, node: str, message: mesh.NodeSubmissions | mesh.MeshEpochOpened) -> None:
        """A message of another node about a generation in which no attempt follows."""
        if isinstance(message, mesh.NodeSubmissions):
            self._end_said(node, message)
        else:
            self._follow(message)

    def connected(self, node: str) -> None:
        """A connection is up again: what was sent over the last one may be lost."""
        settling, epoch = self._settling, self._view.epoch
        if settling is None or epoch is None:
            return
        if settling.told is not None:
            self._view.send(node, settling.told)
        if node == epoch.record.rank0_node:
            self._say_end(settling)

    def staged(self) -> dict[SnapshotId, str]:
        """The snapshots, with origins, of which this node's ranks hold all their shares; newest
        first."""
        slots, epoch = self._state.memory.slots, self._view.epoch
        if slots is None or epoch is None or not self._view.placed:
            return {}
        return slots.shares_of(self._view.local_ranks, epoch.record.world_size)

    @property
    def settling(self) -> bool:
        """Whether something that may become durable is not yet."""
        settling = self._settling
        if settling is None:
            return False
        return settling.begun or self._not_durable() is not None

    def settle(self) -> None:
        """No attempt follows on this node: once that is so on all, they make durable together what
        only memory holds."""
        epoch = self._view.epoch
        if epoch is None or not self._view.placed:
            return
        if self._settling is None:
            self._settling = _Settling(epoch.note.era, time.monotonic() + SETTLE_WAIT_S)
            if self._not_durable() is not None:
                self._state.uploads.need()  # the keeper stays for it
        self._say_end(self._settling)

    def tick(self, now_s: float) -> None:
        """Do what is due while the nodes settle."""
        settling = self._settling
        if settling is None:
            return
        if now_s >= settling.until_s:
            self._settling = None
            lost = self._not_durable()
            if lost is not None:
                text = (
                    f"{lost} stays in memory only: not all nodes of the job brought it to the store"
                    f" within {SETTLE_WAIT_S if not settling.begun else SETTLE_S:.0f} s; start the "
                    "job again while they live"
                )
                facts = {"step": lost.step}
                self._state.emit(Event("settle-failed", text, facts, alarm=True))
        elif settling.ready and self._view.has_rank0:
            self._tell(settling, settled=not self._state.uploads.need().flushing)

    def _not_durable(self) -> SnapshotId | None:
        """The newest snapshot of this node's ranks, if it is not known to be durable."""
        newest, uploads = next(iter(self.staged()), None), self._state.uploads
        durable = uploads.newest_durable
        if newest is None or uploads.is_durable(newest):
            return None
        return newest if durable is None or durable < newest else None

    def submissions(self, attempt: int, *, settling: int = 0) -> mesh.NodeSubmissions:
        """What this node's ranks submitted in this generation, and what their slots hold."""
        count, entries = self._state.uploads.need().submitted
        slots = self._state.memory.slots
        return mesh.NodeSubmissions(
            attempt=attempt,
            count=count,
            turns=entries,
            staged=tuple(self.staged().items()),
            marked=tuple(slots.marked().items()) if slots is not None else (),
            settling=settling,
        )

    def _say_end(self, settling: _Settling) -> None:
        epoch = self._view.epoch
        assert epoch is not None, "placed"
        message = self.submissions(epoch.number, settling=settling.generation)
        if self._view.has_rank0:
            self._end_said(self._view.me, message)
        else:
            self._view.send(epoch.record.rank0_node, message)

    def _end_said(self, node: str, message: mesh.NodeSubmissions) -> None:
        """On the node of rank 0: once all have said it, submit what any had submitted, then the
        newest snapshot that all hold and the store has not."""
        epoch, slots, settling = self._view.epoch, self._state.memory.slots, self._settling
        if epoch is None or slots is None or not self._view.has_rank0:
            return
        if message.settling != epoch.note.era:
            return
        self._said[node] = message
        said = [one for name in epoch.record.ranks if (one := self._said.get(name))]
        if settling is None or settling.begun or len(said) < len(epoch.record.ranks):
            return
        settling.begun, settling.until_s = True, time.monotonic() + SETTLE_S
        longest = max(said, key=lambda one: one.count)
        held, marked = self._elsewhere.held_by_all(said), _marked(said, longest)

        def submit(hold: HoldSnapshot) -> None:
            if self._settling is not settling:
                return  # an attempt follows after all
            settling.ready = True
            uploads = self._state.uploads.need()
            if longest.turns:
                uploads.epoch_opened(longest.turns, hold)
            # No epoch need have been opened in this generation. What the log takes is decided
            # there, by the membership epoch in whose name it is opened: this node may have left.
            uploads.begin_attempt(self._view.membership, lambda: True)
            uploads.settle_nodes(marked, held, hold)
            self._tell(settling, settled=False)

        needed = {pair for _, pair, _ in longest.turns} | marked.keys() | set(list(held)[:1])
        self._elsewhere.ready(
            {
                pair: held[pair]
                for pair in held.keys() & needed
                if not self._state.uploads.is_durable(pair)
            },
            submit,
        )

    def _tell(self, settling: _Settling, *, settled: bool) -> None:
        """On the node of rank 0: have all nodes submit what is submitted here."""
        epoch, uploads = self._view.epoch, self._state.uploads.need()
        assert epoch is not None, "placed"
        held, turns = self._elsewhere.held_by_all(self._said.values()), uploads.submitted[1]
        message = mesh.MeshEpochOpened(
            attempt=epoch.number,
            resume=next(iter(held), None),
            turns=turns,
            log=uploads.log_id,
            stores=shared_facts(self._state.spec.stores, log_id="", options={}).shown_stores,
            settling=settling.generation,
            settled=settled,
            origins=_origins(turns, held),
        )
        if message != settling.told:
            settling.told = message
            self._view.send_to_others(message)
        if settled:
            self._settling = None

    def _follow(self, message: mesh.MeshEpochOpened) -> None:
        slots, epoch, settling = self._state.memory.slots, self._view.epoch, self._settling
        if settling is None or slots is None or epoch is None or self._view.has_rank0:
            return
        if message.settling != settling.generation:
            return
        settling.begun, settling.until_s = True, time.monotonic() + SETTLE_S

        def submit(hold: HoldSnapshot) -> None:
            if self._settling is not settling:
                return
            if message.turns:
                self._state.uploads.need().epoch_opened(message.turns, hold, self.written(message))
            if message.settled:
                self._settling = None

        self._elsewhere.ready(self.to_fetch(message), submit)

    def to_fetch(self, message: mesh.MeshEpochOpened) -> dict[SnapshotId, str]:
        """What this node is to submit and may have to fetch first, with origins."""
        if not message.origins:
            return {}
        count, origins = self._state.uploads.need().submitted[0], dict(message.origins)
        return {
            pair: origins[pair] for n, pair, _ in message.turns if n >= count and pair in origins
        }

    def written(self, message: mesh.MeshEpochOpened) -> WrittenLog | None:
        """Where the node of rank 0 writes; None on that node, and if its release does not say
        it."""
        if self._view.has_rank0 or not message.log:
            return None
        made: type[WrittenLog] = import_module("ckpt.keeper.uploads.uploads").WrittenLog
        return made(message.log, message.stores, self._on_other_store)


class ClusterUploads:
    """Keeps the nodes' uploads in the same order. In the keeper's loop."""

    def __init__(
        self,
        state: JobState,
        view: EpochView,
        *,
        on_other_store: Callable[[str], object],
        fetch: FetchShares,
    ) -> None:
        """``on_other_store``: this node's stores are not those of rank 0's node, for the reason
        given."""
        self._state = state
        self._view = view
        self._elsewhere = SharesElsewhere(state, view, fetch)
        self._settlement = Settlement(state, view, self._elsewhere, on_other_store=on_other_store)
        self._submitted: dict[str, mesh.NodeSubmissions] = {}
        """What this node had submitted when the attempt began; on the node of rank 0, what each
        node had."""
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

    @property
    def settling(self) -> bool:
        """Whether the nodes are making durable what only memory holds."""
        return self._settlement.settling or self._elsewhere.fetching

    def staged(self) -> Mapping[SnapshotId, str]:
        """See ``Settlement``."""
        return self._settlement.staged()

    def settle(self) -> None:
        """See ``Settlement``."""
        self._settlement.settle()

    def tick(self, now_s: float) -> None:
        """Do what is due while the nodes settle."""
        self._settlement.tick(now_s)

    def see_epoch(self, epoch: NodeEpoch, before: NodeEpoch | None, *, placed: bool) -> None:
        """A new epoch; it may begin another generation."""
        self._submitted = {
            node: known for node, known in self._submitted.items() if known.attempt >= epoch.number
        }
        # Within a generation nothing is lost by a trainer's death: uploads in flight continue.
        if before is not None and before.note.era == epoch.note.era:
            return
        self._channels.clear()
        self._settlement.begin(generation=True)
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
        self._settlement.begin()
        self._elsewhere.complete = {}
        self._submitted[self._view.me] = self._settlement.submissions(attempt)
        self._begun, self._opened = attempt, None
        self._send_own()
        uploads.hold_submissions()
        if self._message is not None and self._message.attempt == attempt:
            self._follow(self._message)

    def gathered(self, held: Mapping[SnapshotId, str]) -> None:
        """On the node of rank 0: the snapshots of this world, with origins, of which all nodes
        together have all shares in memory."""
        self._elsewhere.complete = held

    def open(self, resume: SnapshotId | None) -> None:
        """On the node of rank 0: the log epoch is open. All nodes hear so once each has sent its
        submissions."""
        epoch = self._view.epoch
        assert epoch is not None, "an epoch with ranks here"
        if self._begun == epoch.number:  # else it was opened for an attempt that is over
            self._opened = (resume,)
            self._elsewhere.opened(resume)
            self._send_opened()

    def receive(self, node: str, message: mesh.NodeSubmissions | mesh.MeshEpochOpened) -> None:
        """A message of another node."""
        match message:
            case _ if message.settling:
                self._settlement.receive(node, message)
            case mesh.NodeSubmissions():
                self._submitted[node] = message
                self._settlement.begins(node)
                self._send_opened()
            case mesh.MeshEpochOpened():
                self._message = message
                self._view.log_id = message.log or self._view.log_id
                if self._view.placed:
                    self._follow(message)
                elif (written := self._settlement.written(message)) is not None:
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
        self._settlement.connected(node)  # last: what begins an attempt takes back its end

    def _may_act(self) -> bool:
        """Whether this node may act now, by the same word that its supervisors obey. In any
        thread."""
        board = self._state.memory.board
        until_ns = board.act_until_ns if board is not None else 0
        return not until_ns or time.clock_gettime_ns(time.CLOCK_BOOTTIME) < until_ns

    def _send_own(self) -> None:
        epoch = self._view.epoch
        own = self._submitted.get(self._view.me)
        if epoch is None or own is None or own.attempt != epoch.number:
            return
        if not self._view.has_rank0:
            self._view.send(epoch.record.rank0_node, own)

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
        longest = max(known, key=lambda entry: entry.count)
        held = self._elsewhere.held_by_all(known)
        handed_in = self._state.uploads.need().handed_in_before(_marked(known, longest), held)
        entries = (
            *longest.turns,
            *((longest.count + n, pair, tags) for n, (pair, tags) in enumerate(handed_in)),
        )
        self._view.log_id = self._state.uploads.need().log_id
        message = mesh.MeshEpochOpened(
            attempt=epoch.number,
            resume=self._opened[0],
            turns=entries,
            log=self._view.log_id,
            stores=shared_facts(self._state.spec.stores, log_id="", options={}).shown_stores,
            origins=_origins(entries, held),
        )
        self._opened = None
        self._follow(message)
        self._view.send_to_others(message)
        for node in epoch.standbys:
            self._view.send(node, message)
        self._said = message

    def _follow(self, message: mesh.MeshEpochOpened) -> None:
        slots, epoch = self._state.memory.slots, self._view.epoch
        if slots is None or epoch is None or not message.attempt == epoch.number == self._begun:
            return
        self.resume = message.resume
        uploads, fetch = self._state.uploads.need(), self._settlement.to_fetch(message)
        count, resume = uploads.submitted[0], message.resume
        if any(n >= count and (resume is None or pair > resume) for n, pair, _ in message.turns):
            fetch = {}  # nothing is waited for: the discard below would take what is needed

        def submit(hold: HoldSnapshot) -> None:
            if message.attempt == self._begun == self._view.number:
                uploads.epoch_opened(message.turns, hold, self._settlement.written(message))

        # Submissions first: a slot that the list still needs may hold a capture that is discarded
        # next.
        if fetch:
            self._elsewhere.ready(fetch, submit)
        else:
            submit(self._elsewhere.hold_here)
        slots.discard_after(resume)


def _origins(
    turns: Iterable[mesh.NodeSubmission], held: Mapping[SnapshotId, str]
) -> tuple[tuple[SnapshotId, str], ...]:
    """The origins of those of ``turns`` that all nodes can submit."""
    return tuple({pair: held[pair] for _, pair, _ in turns if pair in held}.items())


def _common(said: Iterable[mesh.NodeSubmissions]) -> Mapping[SnapshotId, str]:
    """The snapshots, with origins, of which all nodes hold their shares; newest first."""
    held = [set(one.staged) for one in said]
    return dict(sorted(set.intersection(*held), reverse=True)) if held else {}


def _marked(
    said: Iterable[mesh.NodeSubmissions], longest: mesh.NodeSubmissions
) -> Mapping[SnapshotId, tuple[str, ...]]:
    """What some rank handed in and is not among the submissions of this generation."""
    submitted = {pair for _, pair, _ in longest.turns}
    return {pair: tags for one in said for pair, tags in one.marked if pair not in submitted}
