"""Restoring from the memory of several nodes: slots of this node, slots and mirrors at others, read
as one store.
"""

from __future__ import annotations

import mmap
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.keys import mirror_key, slot_key
from ckpt.cluster.peermem.store import PeerStore
from ckpt.cluster.secret import job_secret
from ckpt.cluster.tls import peer_endpoint
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.messages import GetSources, Source, Sources
from ckpt.restore.from_slots import SlotStore, staged_index
from ckpt.restore.from_slots import slot_key as place_key
from ckpt.session.keeper.connection import KeeperLink
from ckpt.staging.header import INDEX_BYTES_MAX, INDEX_OFFSET_BYTES, read_slot
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex

_HEAD = struct.Struct("=8Q")

SLOT_BYTES_MAX = 1 << 46
"""No slot is longer: no machine has so much memory."""

_NORESERVE = (
    0x4000 if sys.platform == "linux" else 0
)  # no constant of the standard library before 3.13
RESERVE_FLAGS: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
"""Address space is reserved, not memory: a system that counts committed memory would refuse the
mapping otherwise.
"""

FAILURES_MAX = 8
"""Failed places that an error names."""

OpenPeer = Callable[[str], Backend]
"""Opens the store that the node at an address serves from its memory."""


@dataclass(frozen=True, slots=True)
class RemoteSlot:
    """One rank's share of a snapshot at another node. ``offset_bytes``: where its data begin in the
    object.
    """

    store: Backend
    key: str
    index: StagedIndex
    offset_bytes: int
    size_bytes: int


class RemoteShare:
    """One rank's share of a snapshot in the memory of other nodes, with the next place tried if one
    fails. Thread-safe.

    Raises IntegrityError if no place has it.
    """

    def __init__(
        self,
        snapshot: SnapshotId,
        rank: int,
        places: Sequence[tuple[str, str]],
        open_peer: OpenPeer,
    ) -> None:
        """``places``: addresses of nodes, and the key at each."""
        self._snapshot = snapshot
        self._rank = rank
        self._places = deque(places)
        self._open_peer = open_peer
        self._failures: list[str] = []
        self._lock = threading.Lock()
        self.slot = self._next(None)
        """Where the share is read now."""

    @property
    def index(self) -> StagedIndex:
        """The staged index of the share."""
        return self.slot.index

    def read_into(self, out: memoryview, *, offset_bytes: int) -> None:
        """Read from the first place that still has the share. A place that fails once, or does not
        answer, is given up.
        """
        if offset_bytes < 0 or offset_bytes + out.nbytes > self.slot.size_bytes:
            raise IntegrityError(
                f"the slot ends too early. rank={self._rank} offset_bytes={offset_bytes}"
            )
        while True:
            slot = self.slot
            try:
                slot.store.read_into(slot.key, out, offset_bytes=slot.offset_bytes + offset_bytes)
                return
            except CkptError as error:
                # Also FencedError: a newer membership epoch ends this attempt, but says nothing
                # about the job's log, so it must not reach the caller as a fence of the log.
                self._give_up(slot, error)

    def _give_up(self, slot: RemoteSlot, error: CkptError) -> None:
        with self._lock:
            if self.slot is slot:  # else another thread went on to the next place
                self._failures.append(f"{slot.store.url}: {error}")
                self.slot = self._next(slot)

    def _next(self, before: RemoteSlot | None) -> RemoteSlot:
        while self._places:
            address, key = self._places.popleft()
            try:
                slot = _read_header(self._open_peer(address), key)
            except CkptError as error:
                self._failures.append(f"{address}: {error}")
                continue
            identity = None if slot is None else (slot.index.snapshot, slot.index.rank)
            same = before is None or (slot is not None and slot.index == before.index)
            if slot is not None and identity == (self._snapshot, self._rank) and same:
                return slot
            self._failures.append(f"{address}: it holds another share now")
        raise IntegrityError(
            f"no node has this share in memory any more. snapshot={self._snapshot} "
            f"rank={self._rank} "
            f"why={' | '.join(self._failures[:FAILURES_MAX])}"
        )


class MemoryStore:
    """A read-only ``Backend`` over the shares of all ranks: ``slot/<rank>`` is one share's data.
    Thread-safe.

    Readers compare each chunk with its digest, so a slot that is overwritten meanwhile is damage
    like any other.
    """

    def __init__(
        self, snapshot: SnapshotId, own: Mapping[int, SlotStore], lent: Mapping[int, RemoteShare]
    ) -> None:
        self.snapshot = snapshot
        self._own = {place_key(rank): store for rank, store in own.items()}
        self._lent = {place_key(rank): share for rank, share in lent.items()}

    @property
    def url(self) -> str:
        return f"memory of {len(self._lent)} ranks elsewhere: {self.snapshot.key}"

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=False, read_bytes_best=1 << 20, concurrency_best=4)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        raise UsageError(f"slot store is read-only. key={key} store={self.url}")

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """If a node does not answer, or no longer has the share, the next one is asked."""
        if (share := self._lent.get(key)) is not None:
            share.read_into(out, offset_bytes=offset_bytes)
        elif (own := self._own.get(key)) is not None:
            own.read_into(key, out, offset_bytes=offset_bytes)
        else:
            raise NotFoundError(f"no such slot. key={key} store={self.url}")

    def stat(self, key: str) -> Stat | None:
        if (share := self._lent.get(key)) is not None:
            return Stat(key, share.slot.size_bytes, 0.0)
        own = self._own.get(key)
        return own.stat(key) if own is not None else None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        for key in sorted({*self._own, *self._lent}):
            if key.startswith(prefix) and key > after and (stat := self.stat(key)) is not None:
                yield stat

    def delete(self, key: str) -> None:
        raise UsageError(f"slot store is read-only. key={key} store={self.url}")

    def close(self) -> None:
        """Release this node's memory. Idempotent."""
        for own in self._own.values():
            own.close()


@contextmanager
def open_from_nodes(
    keeper: KeeperLink, snapshot: SnapshotId, *, nodes: NodesSpec, job: str
) -> Iterator[tuple[SnapshotIndex, Backend]]:
    """Open a staged snapshot of a job with several nodes, to restore from. Raises as
    ``open_memory``.
    """
    sources = keeper.ask(GetSources(snapshot=snapshot), Sources)
    if not sources.ranks:
        raise IntegrityError(f"no node has this snapshot in memory any more. snapshot={snapshot}")
    with ExitStack() as resources:
        own: dict[int, list[memoryview]] = {}
        for rank, source in enumerate(sources.ranks):
            if source.local >= 0:
                regions = [region for _, region in keeper.slots(source.local)]
                for region in regions:
                    resources.callback(region.close)
                own[rank] = [region.view for region in regions]
        stores: dict[str, PeerStore] = {}

        def open_peer(address: str) -> Backend:
            if address not in stores:
                stores[address] = PeerStore(
                    peer_endpoint(nodes, address),
                    PeerSecret.of(job_secret(nodes)),
                    epoch=lambda: sources.epoch,
                )
                resources.callback(stores[address].close)
            return stores[address]

        try:
            with open_memory(snapshot, sources.ranks, own, open_peer=open_peer, job=job) as opened:
                yield opened
        finally:
            own.clear()


@contextmanager
def open_memory(
    snapshot: SnapshotId,
    sources: Sequence[Source],
    own: Mapping[int, Sequence[memoryview]],
    *,
    open_peer: OpenPeer,
    job: str,
) -> Iterator[tuple[SnapshotIndex, Backend]]:
    """Open a staged snapshot of several nodes: its index, and its ranks' shares as a store.

    ``own``: the memory of this node's slots, for the ranks that ``sources`` names as local. Raises
    IntegrityError if no node has a rank's share (any more), also at the end; UnavailableError if no
    node answers.
    """
    with ExitStack() as resources:
        own_stores: dict[int, SlotStore] = {}
        elsewhere: dict[int, list[tuple[str, str]]] = {}
        for rank, source in enumerate(sources):
            places = [(address, slot_key(snapshot, rank)) for address in source.slots]
            places += [(address, mirror_key(snapshot, rank)) for address in source.mirrors]
            if rank in own:
                try:
                    own_stores[rank] = SlotStore.find(snapshot, {rank: own[rank]})
                    resources.callback(own_stores[rank].close)
                    continue
                except IntegrityError:
                    if not places:
                        raise
            elsewhere[rank] = places
        lent = _shares(snapshot, elsewhere, open_peer, first=max(own_stores, default=0))
        indexes = [
            *(share.indexes[0] for share in own_stores.values()),
            *(share.index for share in lent.values()),
        ]
        yield staged_index(indexes, job=job), MemoryStore(snapshot, own_stores, lent)
        if not all(share.unchanged() for share in own_stores.values()):
            raise IntegrityError(f"a slot was overwritten while it was read. snapshot={snapshot}")


def _shares(
    snapshot: SnapshotId,
    places: Mapping[int, Sequence[tuple[str, str]]],
    open_peer: OpenPeer,
    *,
    first: int,
) -> dict[int, RemoteShare]:
    """The shares of these ranks, each with its header read, in the order of ranks.

    Starts after ``first``, a rank of this node, and wraps around: all trainers do this at once, and
    would otherwise ask the same nodes at the same time.
    """
    order = [
        *(rank for rank in places if rank > first),
        *(rank for rank in places if rank <= first),
    ]
    shares = {rank: RemoteShare(snapshot, rank, places[rank], open_peer) for rank in order}
    return {rank: shares[rank] for rank in places}


def _read_header(store: Backend, key: str) -> RemoteSlot | None:
    """Read the header that a node serves under ``key``, and nothing else; None if the slot is not
    sealed.

    The sizes in it are not trusted: memory is taken for the index only, INDEX_BYTES_MAX at most.
    """
    stat = store.stat(key)
    if stat is None:
        raise NotFoundError(f"no such slot. key={key} store={store.url}")
    size = stat.size_bytes
    if not PAGE_BYTES < size <= SLOT_BYTES_MAX:
        raise IntegrityError(f"not a slot. key={key} size_bytes={size}")
    head = bytearray(_HEAD.size)
    store.read_into(key, memoryview(head))
    header_bytes, data_bytes, index_bytes = _HEAD.unpack(head)[3:6]
    if header_bytes + data_bytes != size or index_bytes > min(
        INDEX_BYTES_MAX, header_bytes - INDEX_OFFSET_BYTES
    ):
        raise IntegrityError(
            f"not a slot. key={key} size_bytes={size} header_bytes={header_bytes} "
            f"index_bytes={index_bytes}"
        )
    try:
        reserved = mmap.mmap(-1, size, flags=RESERVE_FLAGS)  # only the header's pages are ever used
    except (OSError, ValueError, OverflowError) as error:
        raise IntegrityError(
            f"not a slot, or larger than can be mapped. key={key} size_bytes={size}"
        ) from error
    memory = memoryview(reserved)
    try:
        memory[: _HEAD.size] = head
        if index_bytes:
            target = memory[INDEX_OFFSET_BYTES : INDEX_OFFSET_BYTES + index_bytes]
            store.read_into(key, target, offset_bytes=INDEX_OFFSET_BYTES)
            target.release()
        sealed = read_slot(memory)
    finally:
        memory.release()
        with suppress(BufferError):  # the frame of an error may still hold a view
            reserved.close()
    return None if sealed is None else RemoteSlot(store, key, sealed[0], header_bytes, data_bytes)
