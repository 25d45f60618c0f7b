"""Memory of several nodes: what all hold together, where it is, what this node lends, and what it
keeps on others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ckpt.cluster.membership.mirrors import RankHolder, place_mirrors, standby_copies
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.store import PeerStore
from ckpt.cluster.tls import peer_endpoint, serving_endpoint
from ckpt.errors import UsageError
from ckpt.events import Emit, Event
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.messages import Source
from ckpt.keeper.cluster_view import EpochView
from ckpt.keeper.job import Job
from ckpt.keeper.mirrors.plan import (
    InventoryQuery,
    MirrorReport,
    MirrorRound,
    SourceRange,
    complete_snapshots,
    from_message,
    merge_ranges,
    missing_ranks,
    retained_mirrors,
    to_message,
)
from ckpt.keeper.mirrors.send import RETRY_S, MirrorSender, MirrorTask
from ckpt.keeper.mirrors.serve import NodeMemoryServer
from ckpt.rate_limit import RateLimit
from ckpt.save.sealed import SealedSlot
from ckpt.values import SnapshotId

NAMED_MAX = 16
"""So many ranks are named whose share nobody has."""

SPARE_RETRY_S = 30.0
"""Pause before a standby that could not keep a pair is sent another: it may have cost as much as
one that it keeps."""


class ClusterMemory:
    """See the module. In the loop; ``host``: where this node lends its memory."""

    def __init__(
        self, job: Job, among: EpochView, spec: NodesSpec, secret: bytes, *, host: str, emit: Emit
    ) -> None:
        self._job = job
        self._among = among
        self._spec = spec
        self._secret = PeerSecret.of(secret)
        self._gather = InventoryQuery(among.say)
        self._sources: dict[SnapshotId, tuple[SourceRange, ...]] = {}
        self._lending = NodeMemoryServer(
            self._secret, serving_endpoint(spec, host), emit=emit, budget_bytes=spec.mirror_bytes
        )
        self._mirror = MirrorSender(
            done=lambda task, came: job.post(lambda: self._done(task, came)), emit=emit
        )
        self._peers: dict[str, PeerStore] = {}
        self._cap = RateLimit(spec.mirror_rate or None)
        """How fast this node sends, to all peers together."""
        self._keep_at_s = 0.0
        """When a pair may be sent next, where the last one did not come everywhere."""
        self._told_bad = ""
        self._spare_at_s: dict[str, float] = {}
        """When a standby that had no room, or did not answer, is tried again."""
        self._exposed_s: float | None = None
        """Since when not all have on others what they stage; None: they have."""
        self.round = MirrorRound()
        """Which pair all keep now, and which all have."""
        self.mirror_report = MirrorReport()
        """What this node has kept, and could not keep, since the epoch began."""
        self._before: frozenset[SnapshotId] = frozenset()

    @property
    def port(self) -> int:
        """Where it lends."""
        return self._lending.port

    @property
    def refused(self) -> dict[str, int]:
        """What was turned away of what others wanted of the memory here, by kind."""
        return self._lending.refused

    def see_epoch(self, epoch: NodeEpoch) -> None:
        """A new epoch: what was known of others' memory is known no more."""
        self._sources.clear()
        if self.round.named is not None:
            text = f"before epoch {epoch.number} all nodes had {self.round.kept} on others, and {self.round.named} was next"
            self._job.emit(Event("mirrors-begin-anew", text))
        self.round, self.mirror_report = MirrorRound(), MirrorReport()
        self._before = self._lending.pairs()
        self._keep_at_s = 0.0
        self._spare_at_s.clear()
        if self._exposed_s is None:
            self._exposed_s = time.monotonic()
        self._lending.see_epoch(epoch.number)
        self.see_members(epoch)

    def see_members(self, epoch: NodeEpoch) -> None:
        """Nobody waits any more for nodes that are gone."""
        for address in self._peers.keys() - set(epoch.peers.values()):
            self._peers.pop(address).close()

    def tick(self, now_s: float, *, placed: bool) -> float:
        """Show what there is, keep the newest pair on others; returns seconds until the next
        look."""
        if self._job.slots is not None:
            self._lending.slots.show(self._job.slots)
        if placed:
            self._keep_named(now_s)
        return self._gather.tick(now_s)

    def close(self) -> None:
        """Lend no more, and keep nothing on others any more. Waits briefly for what is on its
        way."""
        self._mirror.close()
        for peer in self._peers.values():
            peer.close()
        self._lending.close()

    # ---- what can be restored

    def gather(self, answer: Callable[[dict[SnapshotId, str]], object]) -> None:
        """On the node of rank 0: have ``answer`` told the pairs, with origins, that all nodes
        together hold in memory."""
        epoch = self._among.epoch
        assert epoch is not None, "an epoch with ranks here"

        def have(held: Mapping[str, Sequence[InventoryEntry]]) -> None:
            if self._number() != epoch.number:
                return  # who asked is of an attempt that is over
            pairs = complete_snapshots(held)
            for snapshot, missing in missing_ranks(held).items():
                text = f"{snapshot} is not whole in memory: nobody has the share of {sum(map(len, missing))} ranks"
                first = itertools.islice(itertools.chain.from_iterable(missing), NAMED_MAX)
                self._job.emit(Event("memory-lost", text, {"ranks": ",".join(map(str, first))}))
            text = f"{len(held)} nodes hold {len(pairs)} pairs in memory"
            self._job.emit(
                Event(
                    "memory-gathered", text, {"newest": str(pairs[0].snapshot) if pairs else None}
                )
            )
            word = to_message(epoch.number, pairs)
            self._see_sources(word)
            self._among.say_to_all(word)
            answer({one.snapshot: one.origin for one in reversed(pairs)})

        others = [node for node in epoch.addresses if node != self._among.me]
        self._gather.ask(
            others, (self._among.me, merge_ranges(self._holdings())), time.monotonic(), have
        )

    def take(
        self, node: str, word: said.AskNodeInventory | said.NodeInventory | said.MeshSources
    ) -> None:
        """What another node says."""
        match word:
            case said.AskNodeInventory(call=call):
                self._among.say(
                    node,
                    said.NodeInventory(call=call, holdings=tuple(merge_ranges(self._holdings()))),
                )
            case said.NodeInventory():
                self._gather.answered(node, word, time.monotonic())
            case said.MeshSources():
                self._see_sources(word)

    def disconnected(self, node: str) -> None:
        """A node answers nothing any more."""
        self._gather.disconnected(node, time.monotonic())

    def sources(self, snapshot: SnapshotId) -> tuple[Source, ...]:
        """For each rank of a pair's world, where its share is; nothing where the pair isn't
        known."""
        epoch, found = self._among.epoch, self._sources.get(snapshot)
        if epoch is None or found is None:
            return ()
        local, ranks = self._local(snapshot), itertools.count()
        return tuple(
            Source(local=local.get(next(ranks), -1), slots=peers, mirrors=peers)
            for span in found
            for peers in itertools.repeat(self._lenders(epoch, span.nodes), span.ranks)
        )

    def set_round(self, now: MirrorRound) -> None:
        """The node of rank 0 says which pair is kept next, and which all have: of what is kept here
        the others go."""
        if now != self.round:
            self.round = now
            self._see_protected()
            self._lending.retain(retained_mirrors(now, self._before))

    def copied(self, epoch: NodeEpoch) -> tuple[SnapshotId | None, dict[int, int]]:
        """On a standby: the newest pair of which it has all that it is to keep, and the bytes of
        each rank's share."""
        nodes = [
            node
            for node, by in standby_copies(epoch.record.ranks, epoch.standbys).items()
            if by == self._among.me
        ]
        wanted = {rank for node in nodes for rank in epoch.record.ranks[node]}
        held: dict[SnapshotId, dict[int, int]] = {}
        for snapshot, rank, size_bytes in self._lending.kept():
            held.setdefault(snapshot, {})[rank] = size_bytes
        whole = [snapshot for snapshot, sizes in held.items() if wanted and wanted <= sizes.keys()]
        return (newest := max(whole), held[newest]) if whole else (None, {})

    def _see_protected(self) -> None:
        """Where rank 0 is: tell when all have what they stage on others again, and how long they
        had not."""
        if self._exposed_s is None or self.round.kept is None:
            return
        exposed_s, self._exposed_s = time.monotonic() - self._exposed_s, None
        if not self._among.root:
            return
        count = min(self._spec.mirrors, len(self._among.others)) or 1
        text = f"{self.round.kept} is on {count} other nodes too; for {exposed_s:.1f} s nothing newer was"
        self._job.emit(
            Event(
                "protected", text, {"exposed_s": round(exposed_s, 3), "step": self.round.kept.step}
            )
        )

    def _lenders(self, epoch: NodeEpoch, nodes: Sequence[str]) -> tuple[str, ...]:
        """Whether a node has it in a slot or as a mirror may change while it is asked for, so both
        are tried. Here first."""
        near = sorted(nodes, key=lambda node: node != self._among.me)
        return tuple(peer for node in near if (peer := epoch.peers.get(node)))

    def _local(self, snapshot: SnapshotId) -> dict[int, int]:
        """The ranks whose shares of that pair slots here hold, and the local rank whose slot it
        is."""
        briefs = ((slot.rank, slot.brief()) for slot in self._job.slots or ())
        return {
            brief[0].rank: rank
            for rank, brief in briefs
            if brief is not None and brief[0].snapshot == snapshot
        }

    def _holdings(self) -> list[InventoryEntry]:
        found = self._lending.mirrored()
        for slot in self._job.slots or ():
            brief = slot.brief()
            if brief is not None:
                held = brief[0]
                found.append(
                    InventoryEntry(
                        snapshot=held.snapshot,
                        origin=held.origin,
                        world_size=held.world_size,
                        rank=held.rank,
                    )
                )
        return found

    def _see_sources(self, word: said.MeshSources) -> None:
        epoch = self._among.epoch
        if epoch is not None and word.attempt == epoch.number:
            self._sources = from_message(word)

    # ---- mirrors

    @property
    def sent_bytes(self) -> int:
        """See Report."""
        return self._mirror.sent_bytes

    def _keep_named(self, now_s: float) -> None:
        """Keep the pair that was named, here and on other nodes, unless the last one is still on
        its way."""
        job, epoch, named = self._job, self._among.epoch, self.round.named
        if (
            self._mirror.busy
            or not self._spec.mirrors
            or job.slots is None
            or epoch is None
            or named is None
        ):
            return
        if (
            named in (self.mirror_report.mirrored, self.mirror_report.missed)
            or now_s < self._keep_at_s
        ):
            return
        peers = self._peers_of(epoch)
        spare = self._spares_of(epoch, now_s)
        if not peers:  # the only node that has ranks
            peers, spare = spare, {}
        sealed = [
            one
            for rank in range(job.ranks)
            if (one := job.slots.hold_snapshot(rank, named)) is not None
        ]
        task = MirrorTask(
            named,
            epoch.number,
            sealed,
            {**spare, **peers},
            self._lending.keep,
            frozenset(spare) - peers.keys(),
        )
        if peers and len(sealed) == job.ranks and self._of_this_world(epoch, sealed):
            self._mirror.send(task)
            return
        task.let_go()
        self.mirror_report = replace(self.mirror_report, missed=named)

    def _of_this_world(self, epoch: NodeEpoch, sealed: Sequence[SealedSlot]) -> bool:
        """Whether these are the shares of the ranks that this node has now.

        Slots may still hold a pair of a world that has shrunk: those that are left all have theirs,
        and it is not whole. Were it kept, the mirrors that lost nodes left behind would go for it.
        """
        shares = [(one.index.world_size, one.index.rank) for one in sealed]
        return shares == [
            (epoch.record.world_size, rank) for rank in epoch.record.ranks[self._among.me]
        ]

    def _peers_of(self, epoch: NodeEpoch) -> dict[str, PeerStore]:
        """The nodes that keep what this one stages, but for a standby."""
        holders = [RankHolder(node, epoch.domains.get(node, node)) for node in epoch.record.ranks]
        nodes = place_mirrors(holders, self._spec.mirrors).get(self._among.me, ())
        return self._reached(epoch, nodes)

    def _spares_of(self, epoch: NodeEpoch, now_s: float) -> dict[str, PeerStore]:
        """The standby that keeps it as well, so that it has it when it takes a place."""
        standby = standby_copies(epoch.record.ranks, epoch.standbys).get(self._among.me)
        if standby is None or now_s < self._spare_at_s.get(standby, 0.0):
            return {}
        return self._reached(epoch, [standby])

    def _reached(self, epoch: NodeEpoch, nodes: Sequence[str]) -> dict[str, PeerStore]:
        try:
            return {node: self._peer(epoch.peers[node]) for node in nodes if epoch.peers.get(node)}
        except UsageError as error:
            if str(error) != self._told_bad:
                self._told_bad = str(error)
                text = f"nothing is kept on other nodes, for one can't be spoken to: {error}"
                self._job.emit(Event("mirror-failed", text, {"code": error.code}, alarm=True))
            return {}

    def _peer(self, address: str) -> PeerStore:
        if address not in self._peers:
            self._peers[address] = PeerStore(
                peer_endpoint(self._spec, address), self._secret, epoch=self._number, cap=self._cap
            )
        return self._peers[address]

    def _number(self) -> int:
        epoch = self._among.epoch
        return epoch.number if epoch is not None else 0

    def _done(self, task: MirrorTask, came: frozenset[str]) -> None:
        """A pair is kept, or could not be. By the placement of an earlier epoch it says nothing."""
        if task.epoch != self._number():
            return
        for node in task.spare - came:
            self._spare_at_s[node] = time.monotonic() + SPARE_RETRY_S
        if task.peers.keys() - task.spare <= came:
            self.mirror_report = replace(self.mirror_report, mirrored=task.snapshot)
            return
        self.mirror_report = replace(self.mirror_report, missed=task.snapshot)
        self._keep_at_s = (
            time.monotonic() + RETRY_S
        )  # what kept it from coming is not over in a moment
