"""Memory of several nodes: what all hold together, where it is, what this node serves, and what it
keeps on others."""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from ckpt.backends.base import Backend
from ckpt.cluster.membership.mirrors import RankHolder, place_mirrors, standby_copies
from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.keys import mirror_key, slot_key
from ckpt.cluster.peermem.store import PeerStore
from ckpt.cluster.tls import peer_endpoint, serving_endpoint
from ckpt.errors import (
    CkptError,
    IntegrityError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event
from ckpt.format.canonical import digest
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.messages import Source
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mirrors.plan import (
    WAIT_S_MAX,
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
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.rate_limit import RateLimit
from ckpt.save.sealed import SealedSlot
from ckpt.staging.header import SlotSummary, header_bytes_of, read_slot
from ckpt.staging.memory import available_bytes
from ckpt.threads import start_thread
from ckpt.values import CHUNK_BYTES, PAGE_BYTES, SnapshotId

NAMED_MAX = 16
"""How many ranks without a share are named in an event."""

SPARE_RETRY_S = 30.0
"""Pause before a standby that could not keep a snapshot is sent another: a failed send may cost as
much as a good one."""


class MirrorPeers:
    """The nodes that keep mirrors of this one, and the connections to them. For the loop alone."""

    def __init__(self, view: EpochView, spec: NodesSpec, secret: PeerSecret, *, emit: Emit) -> None:
        self._view = view
        self._spec = spec
        self._secret = secret
        self._emit = emit
        self._stores: dict[str, PeerStore] = {}
        self._cap = RateLimit(spec.mirror_rate or None)
        """How fast this node sends, to all peers together."""
        self._reported = ""
        self._standby_at_s: dict[str, float] = {}
        """When a standby that could not keep a snapshot is tried again."""

    @property
    def wanted(self) -> int:
        """How many other nodes are to keep each share; 0: mirrors are off."""
        return self._spec.mirrors

    def holders(self, epoch: NodeEpoch) -> dict[str, PeerStore]:
        """The nodes with ranks that keep mirrors of this one."""
        holders = [RankHolder(node, epoch.domains.get(node, node)) for node in epoch.record.ranks]
        nodes = place_mirrors(holders, self._spec.mirrors).get(self._view.me, ())
        return self._stores_of(epoch, nodes)

    def standby(self, epoch: NodeEpoch, now_s: float) -> dict[str, PeerStore]:
        """The standby that keeps a copy as well, so that it has the state when it takes this node's
        place."""
        standby = standby_copies(epoch.record.ranks, epoch.standbys).get(self._view.me)
        if standby is None or now_s < self._standby_at_s.get(standby, 0.0):
            return {}
        return self._stores_of(epoch, [standby])

    def standby_failed(self, node: str) -> None:
        """A standby could not keep a snapshot: try it again later."""
        self._standby_at_s[node] = time.monotonic() + SPARE_RETRY_S

    def see_epoch(self) -> None:
        """A new epoch: what kept a standby from keeping a snapshot may be over."""
        self._standby_at_s.clear()

    def see_members(self, epoch: NodeEpoch) -> None:
        """Close connections to nodes that are gone, so that no send waits for them."""
        for address in self._stores.keys() - set(epoch.peers.values()):
            self._stores.pop(address).close()

    def close(self) -> None:
        """Close all connections."""
        for store in self._stores.values():
            store.close()

    def stores_at(self, addresses: Sequence[str]) -> list[PeerStore]:
        """The memory of the nodes there; none of those whose address is invalid."""
        stores = []
        for address in addresses:
            with suppress(UsageError):  # told where mirrors are sent
                stores.append(self._store(address))
        return stores

    def _stores_of(self, epoch: NodeEpoch, nodes: Sequence[str]) -> dict[str, PeerStore]:
        try:
            return {node: self._store(epoch.peers[node]) for node in nodes if epoch.peers.get(node)}
        except UsageError as error:
            if str(error) != self._reported:
                self._reported = str(error)
                text = (
                    "no mirrors are kept on other nodes, because the address of one is invalid: "
                    f"{error}"
                )
                self._emit(Event("mirror-failed", text, {"code": error.code}, alarm=True))
            return {}

    def _store(self, address: str) -> PeerStore:
        if address not in self._stores:
            self._stores[address] = PeerStore(
                peer_endpoint(self._spec, address),
                self._secret,
                epoch=lambda: self._view.number,
                cap=self._cap,
            )
        return self._stores[address]


HoldShare = Callable[[], SealedSlot]
"""Gives a share that was fetched, for an upload."""


def read_share(
    wanted: SlotSummary, stores: Sequence[Backend], *, left_bytes: int | None
) -> HoldShare:
    """Read one rank's share from the first of ``stores``, memory of nodes, that has it in a slot or
    as a mirror, and compare each chunk with its digest. May take long.

    Takes memory for the share, ``left_bytes`` at most (None: not known). Raises UnavailableError if
    none has it.
    """
    failures = []
    keys = (mirror_key(wanted.snapshot, wanted.rank), slot_key(wanted.snapshot, wanted.rank))
    for store, key in itertools.product(stores, keys):
        try:
            return _read_whole(wanted, store, key, left_bytes)
        except NotFoundError as error:
            failures.append(f"{store.url}: {error}")
        except CkptError as error:
            failures.insert(0, f"{store.url}: {error}")  # more than that it is not there
    raise UnavailableError(
        "no node has this share in memory any more, or it can't be read. "
        f"snapshot={wanted.snapshot} rank={wanted.rank} why={' | '.join(failures[:NAMED_MAX])}"
    )


def _read_whole(wanted: SlotSummary, store: Backend, key: str, left_bytes: int | None) -> HoldShare:
    stat = store.stat(key)
    if stat is None:
        raise NotFoundError(f"no such share. key={key}")
    size = stat.size_bytes
    if size <= PAGE_BYTES:
        raise IntegrityError(f"not a share. key={key} size_bytes={size}")
    if left_bytes is not None and size > left_bytes:
        raise StoreFullError(f"no memory here. key={key} size_bytes={size} left_bytes={left_bytes}")
    try:
        memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (OSError, ValueError, OverflowError) as error:
        raise StoreFullError(f"no memory here. key={key} size_bytes={size}") from error
    store.read_into(key, memory)
    sealed, header_bytes = read_slot(memory), header_bytes_of(memory)
    if sealed is None or header_bytes is None:
        raise IntegrityError(f"not a sealed share. key={key}")
    index, data = sealed[0], memory[header_bytes:]
    if SlotSummary(index.snapshot, index.rank, index.world_size, index.origin) != wanted:
        raise IntegrityError(f"it holds another share now. key={key}")
    for shard in index.shards:
        body = data[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]
        for number, expected in enumerate(shard.digests):
            if digest(body[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]) != expected:
                raise IntegrityError(
                    f"the bytes differ from their digest. key={key} leaf={shard.leaf.name!r}"
                )
    # Each upload gets a view of its own; the memory goes with the last of them.
    return lambda: SealedSlot(index=index, data=data[:], release=lambda: None)


class ClusterMemory:
    """What the nodes hold in memory together. In the keeper's loop; ``host``: where this node
    serves its memory.
    """

    def __init__(
        self,
        state: JobState,
        view: EpochView,
        spec: NodesSpec,
        secret: bytes,
        *,
        host: str,
        emit: Emit,
    ) -> None:
        self._state = state
        self._view = view
        peer_secret = PeerSecret.of(secret)
        self._peers = MirrorPeers(view, spec, peer_secret, emit=state.emit)
        self._query = InventoryQuery(view.send, self._tell_awaited)
        self._sources: dict[SnapshotId, tuple[SourceRange, ...]] = {}
        self._server = NodeMemoryServer(
            peer_secret, serving_endpoint(spec, host), emit=emit, budget_bytes=spec.mirror_bytes
        )
        self._sender = MirrorSender(
            done=lambda task, received: state.post(lambda: self._done(task, received)), emit=emit
        )
        self._retry_at_s = 0.0
        """When a snapshot may be sent next, if the last one was not kept everywhere."""
        self._exposed_s: float | None = None
        """Since when the newest staged state is on no other node; None: it is."""
        self.round = MirrorRound()
        """Which snapshot all nodes keep now, and which one all have."""
        self.mirror_report = MirrorReport()
        """What this node has kept, and could not keep, since the epoch began."""
        self._before: frozenset[SnapshotId] = frozenset()
        """The snapshots of which this node had mirrors when the epoch began."""

    @property
    def port(self) -> int:
        """Where this node serves its memory."""
        return self._server.port

    @property
    def refused(self) -> dict[str, int]:
        """How many requests of other nodes for the memory here were rejected, by kind."""
        return self._server.refused

    @property
    def sent_bytes(self) -> int:
        """How much was sent to other nodes as mirrors."""
        return self._sender.sent_bytes

    def see_epoch(self, epoch: NodeEpoch) -> None:
        """A new epoch: forget what others had in memory, and fence requests of older epochs."""
        self._sources.clear()
        if self.round.named is not None:
            text = (
                f"before epoch {epoch.number} all nodes had mirrors of {self.round.kept}; "
                f"{self.round.named} was next"
            )
            self._state.emit(Event("mirrors-begin-anew", text))
        self.round, self.mirror_report = MirrorRound(), MirrorReport()
        self._before = self._server.snapshots()
        self._retry_at_s = 0.0
        self._peers.see_epoch()
        if self._exposed_s is None:
            self._exposed_s = time.monotonic()
        self._server.see_epoch(epoch.number)
        self.see_members(epoch)

    def see_members(self, epoch: NodeEpoch) -> None:
        """Close connections to nodes that are gone, so that no send waits for them."""
        self._peers.see_members(epoch)
        self._query.keep_members(epoch.addresses, time.monotonic())

    def tick(self, now_s: float, *, placed: bool) -> float:
        """Serve the current slots, and mirror the named snapshot; returns the seconds until the
        next call is needed."""
        if self._state.memory.slots is not None:
            self._server.slots.show(self._state.memory.slots)
        if placed:
            self._keep_named(now_s)
        return self._query.tick(now_s)

    def receive(
        self, node: str, message: mesh.AskNodeInventory | mesh.NodeInventory | mesh.MeshSources
    ) -> None:
        """A message of another node."""
        match message:
            case mesh.AskNodeInventory(call=call):
                held = tuple(merge_ranges(self._inventory()))
                self._view.send(
                    node, mesh.NodeInventory(call=call, holdings=held, log=self._view.log_id)
                )
            case mesh.NodeInventory():
                self._view.log_id = self._view.log_id or message.log
                self._query.answered(node, message, time.monotonic())
            case mesh.MeshSources():
                self._see_sources(message)

    def connected(self, node: str) -> None:
        """A connection to a node is up."""
        self._query.connected(node)

    def disconnected(self, node: str) -> None:
        """The connection to a node ended."""
        self._query.disconnected(node, time.monotonic())

    def close(self) -> None:
        """Stop serving and sending. Waits briefly for a send in flight."""
        self._sender.close()
        self._peers.close()
        self._server.close()

    # ---- what can be restored from memory

    def gather(self, answer: Callable[[dict[SnapshotId, str]], object]) -> None:
        """On rank 0's node: call ``answer`` with the snapshots, and origins, that all nodes
        together hold in memory."""
        epoch = self._view.epoch
        assert epoch is not None, "an epoch with ranks here"

        def gathered(held: Mapping[str, Sequence[InventoryEntry]]) -> None:
            if self._view.number != epoch.number:
                return  # the attempt that asked is over
            snapshots = complete_snapshots(held)
            for snapshot, missing in missing_ranks(held).items():
                text = (
                    f"{snapshot} is incomplete in memory: no node has the share of "
                    f"{sum(map(len, missing))} ranks"
                )
                first = itertools.islice(itertools.chain.from_iterable(missing), NAMED_MAX)
                self._state.emit(Event("memory-lost", text, {"ranks": ",".join(map(str, first))}))
            text = f"{len(held)} nodes hold {len(snapshots)} snapshots in memory"
            newest = str(snapshots[0].snapshot) if snapshots else None
            self._state.emit(Event("memory-gathered", text, {"newest": newest}))
            message = to_message(epoch.number, snapshots)
            self._see_sources(message)
            self._view.send_to_others(message)
            # Reversed, so that of two origins of one number the first of ``snapshots`` counts, as
            # in ``from_message``.
            answer({each.snapshot: each.origin for each in reversed(snapshots)})

        others = [node for node in epoch.addresses if node != self._view.me]
        self._query.ask(
            others,
            (self._view.me, merge_ranges(self._inventory())),
            time.monotonic(),
            gathered,
            ranked=epoch.record.ranks,
        )

    def _tell_awaited(self, nodes: Collection[str]) -> None:
        text = (
            "the newest snapshot in memory is not complete yet, and these nodes have not said what "
            f"they hold: {', '.join(list(nodes)[:NAMED_MAX])}; waiting for {WAIT_S_MAX:.0f} s at "
            "most"
        )
        self._state.emit(Event("memory-awaited", text, {"nodes": len(nodes)}, alarm=True))

    def sources(self, snapshot: SnapshotId) -> tuple[Source, ...]:
        """For each rank of the snapshot's world, where its share is; empty if the snapshot is not
        known."""
        epoch, ranges = self._view.epoch, self._sources.get(snapshot)
        if epoch is None or ranges is None:
            return ()
        local, ranks = self._local_ranks(snapshot), itertools.count()
        return tuple(
            Source(local=local.get(next(ranks), -1), slots=peers, mirrors=peers)
            for each in ranges
            for peers in itertools.repeat(self._servers_of(epoch, each.nodes), each.ranks)
        )

    def world_size(self, snapshot: SnapshotId) -> int:
        """Of how many ranks the snapshot is that all nodes together hold; 0 if it is not known."""
        return sum(each.ranks for each in self._sources.get(snapshot, ()))

    def fetch(
        self,
        wanted: Sequence[SlotSummary],
        then: Callable[[Mapping[SlotSummary, HoldShare]], object],
    ) -> None:
        """Read shares of ranks of this node that no slot here holds from the memory of nodes that
        have them; ``then`` gets those that were read, in the loop."""
        stores = {}
        for share in wanted:
            sources = self.sources(share.snapshot)[share.rank : share.rank + 1]
            stores[share] = self._peers.stores_at(sources[0].mirrors if sources else ())

        def read() -> None:
            got: dict[SlotSummary, HoldShare] = {}
            for share in wanted:
                try:
                    got[share] = read_share(share, stores[share], left_bytes=available_bytes())
                except CkptError as error:
                    text = f"a share that a lost node had can't be fetched: {error}"
                    facts = {"ranks": str(share.rank)}
                    self._state.post(partial(self._state.emit, Event("memory-lost", text, facts)))
            self._state.post(lambda: then(got))

        start_thread(read, name="ckpt-share-fetch")

    def copied(self, epoch: NodeEpoch) -> tuple[SnapshotId | None, dict[int, int]]:
        """On a standby: the newest snapshot of which it has all that it should, and the bytes of
        each rank's share."""
        nodes = [
            node
            for node, by in standby_copies(epoch.record.ranks, epoch.standbys).items()
            if by == self._view.me
        ]
        wanted = {rank for node in nodes for rank in epoch.record.ranks[node]}
        held: dict[SnapshotId, dict[int, int]] = {}
        for snapshot, rank, size_bytes in self._server.kept():
            held.setdefault(snapshot, {})[rank] = size_bytes
        complete = [
            snapshot for snapshot, sizes in held.items() if wanted and wanted <= sizes.keys()
        ]
        return (newest := max(complete), held[newest]) if complete else (None, {})

    def _servers_of(self, epoch: NodeEpoch, nodes: Sequence[str]) -> tuple[str, ...]:
        """The addresses of ``nodes``, this one first.

        Both as slots and as mirrors: a share may move from a node's slot to its mirrors while it is
        being read.
        """
        near = sorted(nodes, key=lambda node: node != self._view.me)
        return tuple(peer for node in near if (peer := epoch.peers.get(node)))

    def _local_ranks(self, snapshot: SnapshotId) -> dict[int, int]:
        """The ranks whose shares of the snapshot slots here hold, and the local rank of each
        slot."""
        summaries = ((slot.rank, slot.summary()) for slot in self._state.memory.slots or ())
        return {
            summary[0].rank: rank
            for rank, summary in summaries
            if summary is not None and summary[0].snapshot == snapshot
        }

    def _inventory(self) -> list[InventoryEntry]:
        entries = self._server.mirrored()
        for slot in self._state.memory.slots or ():
            summary = slot.summary()
            if summary is not None:
                held = summary[0]
                entries.append(
                    InventoryEntry(
                        snapshot=held.snapshot,
                        origin=held.origin,
                        world_size=held.world_size,
                        rank=held.rank,
                    )
                )
        return entries

    def _see_sources(self, message: mesh.MeshSources) -> None:
        epoch = self._view.epoch
        if epoch is not None and message.attempt == epoch.number:
            self._sources = from_message(message)

    # ---- mirrors

    def set_round(self, now: MirrorRound) -> None:
        """Follow the round of rank 0's node: of the mirrors here, those that nothing needs any more
        go."""
        if now != self.round:
            self.round = now
            self._see_protected()
            self._server.retain(retained_mirrors(now, self._before))

    def _see_protected(self) -> None:
        """On rank 0's node: report when all nodes have mirrors of staged state again, and how long
        they had none."""
        if self._exposed_s is None or self.round.kept is None:
            return
        exposed_s, self._exposed_s = time.monotonic() - self._exposed_s, None
        if not self._view.has_rank0:
            return
        count = min(self._peers.wanted, len(self._view.others)) or 1
        text = (
            f"{self.round.kept} is on {count} other nodes too; for {exposed_s:.1f} s nothing newer "
            "was"
        )
        facts = {"exposed_s": round(exposed_s, 3), "step": self.round.kept.step}
        self._state.emit(Event("protected", text, facts))

    def _keep_named(self, now_s: float) -> None:
        """Mirror the named snapshot, here and on other nodes, unless the last one is still being
        sent."""
        memory, epoch, named = self._state.memory, self._view.epoch, self.round.named
        if (
            self._sender.busy
            or not self._peers.wanted
            or memory.slots is None
            or epoch is None
            or named is None
        ):
            return
        if (
            named in (self.mirror_report.mirrored, self.mirror_report.missed)
            or now_s < self._retry_at_s
        ):
            return
        peers = self._peers.holders(epoch)
        spare = self._peers.standby(epoch, now_s)
        if not peers:  # the only node that has ranks
            peers, spare = spare, {}
        sealed = [
            slot
            for rank in range(memory.ranks)
            if (slot := memory.slots.hold_snapshot(rank, named)) is not None
        ]
        task = MirrorTask(
            named,
            epoch.number,
            sealed,
            {**spare, **peers},
            self._server.keep,
            frozenset(spare) - peers.keys(),
        )
        if peers and len(sealed) == memory.ranks and self._of_this_world(epoch, sealed):
            self._sender.send(task)
            return
        task.free()
        self.mirror_report = replace(self.mirror_report, missed=named)

    def _of_this_world(self, epoch: NodeEpoch, sealed: Sequence[SealedSlot]) -> bool:
        """Whether these are the shares of the ranks that this node has now.

        Slots may still hold a snapshot of a larger world, before it shrank: the remaining nodes all
        have their shares, but it is not complete. If it were kept, the mirrors that lost nodes left
        behind would be removed for it.
        """
        shares = [(slot.index.world_size, slot.index.rank) for slot in sealed]
        return shares == [
            (epoch.record.world_size, rank) for rank in epoch.record.ranks[self._view.me]
        ]

    def _done(self, task: MirrorTask, received: frozenset[str]) -> None:
        """A task ended; ``received``: the nodes that have it all. In a later epoch it says nothing:
        others keep mirrors."""
        if task.epoch != self._view.number:
            return
        for node in task.spare - received:
            self._peers.standby_failed(node)
        if task.peers.keys() - task.spare <= received:
            self.mirror_report = replace(self.mirror_report, mirrored=task.snapshot)
            return
        self.mirror_report = replace(self.mirror_report, missed=task.snapshot)
        self._retry_at_s = time.monotonic() + RETRY_S  # the cause is not over in a moment
