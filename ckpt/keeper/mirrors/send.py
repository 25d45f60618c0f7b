"""Sends what this node staged to other nodes as mirrors: the newest complete snapshot, again and
again, in a thread."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Buffer
from ckpt.backends.replicated.buffers import TakenBackError
from ckpt.cluster.peermem.http import BaseGoneError, StoredContent
from ckpt.cluster.peermem.keys import mirror_key
from ckpt.cluster.peermem.store import PeerStore
from ckpt.errors import CkptError, FencedError, InternalError, StoreFullError, UnavailableError
from ckpt.events import Emit, Event, Fact
from ckpt.keeper.mirrors.plan import DeltaRanges, StagedShare, delta_of
from ckpt.save.sealed import SealedSlot
from ckpt.staging.header import INDEX_OFFSET_BYTES, Header, encode_index
from ckpt.threads import start_thread
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex

# ---- bases: what a node's peers surely have of its shares

BASES_MAX = 2
"""How many shares of one rank are remembered. A snapshot that another node could not keep is
dropped, and the one before stays."""

BEHIND_MAX = 64
"""After this many shares in a row that were sent as changes, one is sent whole. Else a byte that
went wrong in a peer's memory would be carried along as long as training lasts."""


@dataclass(frozen=True, slots=True)
class MirrorBase:
    """A share that a peer has completely, under which name, and how many shares ago its oldest
    bytes were sent."""

    stored: StoredContent
    share: StagedShare
    behind: int


class MirrorBases:
    """What peers surely have, by node and rank, the newest first: the bases of what is sent next.
    Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch: int | None = None
        self._known: dict[str, dict[int, tuple[MirrorBase, ...]]] = {}

    def begin(self, epoch: int, nodes: Collection[str]) -> None:
        """Shares go to ``nodes`` now, in the name of ``epoch``. Bases of other epochs and nodes are
        forgotten."""
        with self._lock:
            kept = self._known if epoch == self._epoch else {}
            self._epoch, self._known = epoch, {node: kept.get(node, {}) for node in nodes}

    def of(self, node: str, rank: int) -> tuple[MirrorBase, ...]:
        """What ``node`` has of ``rank`` that may be a base; nothing if the next share must be sent
        whole."""
        with self._lock:
            bases = self._known.get(node, {}).get(rank, ())
            return () if bases and bases[0].behind >= BEHIND_MAX else bases

    def add(self, node: str, rank: int, base: MirrorBase) -> None:
        """A share arrived completely, and nothing was sent in its place meanwhile."""
        with self._lock:
            by_rank = self._known.setdefault(node, {})
            others = [
                other for other in by_rank.get(rank, ()) if other.stored.key != base.stored.key
            ]
            by_rank[rank] = (base, *others)[:BASES_MAX]

    def drop(self, node: str, rank: int, base: MirrorBase) -> None:
        """The node does not have it any more."""
        with self._lock:
            by_rank = self._known.get(node, {})
            by_rank[rank] = tuple(other for other in by_rank.get(rank, ()) if other is not base)

    def retain(self, nodes: Collection[str]) -> None:
        """These nodes have all that was sent; of others nothing is sure."""
        with self._lock:
            self._known = {node: known for node, known in self._known.items() if node in nodes}


RETRY_S = 0.5
"""Pause before a snapshot that no node received is sent again."""

CLOSE_WAIT_S = 2.0
"""How long the end waits for a send in flight, which otherwise ends with the process."""


Own = Callable[[str, Sequence[Buffer]], object]


@dataclass(frozen=True, slots=True)
class MirrorTask:
    """One snapshot to be mirrored: the shares of this node's ranks, and the nodes of ``epoch`` that
    are to keep them.

    ``own`` keeps a share in this node's own memory, beside its slots (None: nothing does). The task
    succeeds without the ``spare`` nodes, which are among the ``peers``.
    """

    snapshot: SnapshotId
    epoch: int
    sealed: Sequence[SealedSlot]
    peers: Mapping[str, PeerStore]
    own: Own | None = None
    spare: frozenset[str] = frozenset()

    def free(self) -> None:
        """Release the slots."""
        for slot in self.sealed:
            slot.free()


Done = Callable[[MirrorTask, frozenset[str]], object]
"""Gets each task that has ended, in the sender's thread, and the nodes that received it completely:
none if this node could not keep its own copy."""


class MirrorSender:
    """Sends one snapshot at a time, in a thread. A node's failure is reported once, until a send to
    it succeeds."""

    def __init__(self, *, done: Done, emit: Emit) -> None:
        self._done = done
        self._emit = emit
        self._changed = threading.Condition()
        self._task: MirrorTask | None = None
        self._busy = False
        self._stopped = False
        self._reported: set[tuple[str, str]] = set()
        self._bases = MirrorBases()
        self.sent_bytes = 0
        """Bytes that were sent and received, without those that a node had already."""
        self._thread = threading.Thread(target=self._run, name="ckpt-mirror", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being sent."""
        with self._changed:
            return self._busy or self._task is not None

    def send(self, task: MirrorTask) -> None:
        """Mirror this snapshot; its slots are released in any case. Only if not busy."""
        with self._changed:
            assert self._task is None and not self._busy, "one at a time"
            self._task = task
            self._changed.notify_all()

    def close(self, timeout_s: float = CLOSE_WAIT_S) -> bool:
        """End; a send in flight has ``timeout_s`` seconds. Whether the thread ended."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._task is not None or self._stopped)
                task, self._task = self._task, None
                self._busy = task is not None
            if task is None:
                return
            received: frozenset[str] = frozenset()
            try:
                received = self._send(task)
            except Exception as error:  # noqa: BLE001  a thread's border
                self._fail(
                    "",
                    task,
                    InternalError(f"unexpected error while keeping a mirror. cause={error!r}"),
                )
            finally:
                task.free()
                with self._changed:
                    self._busy = False
                self._done(task, received)
                del task  # or it would keep the slots' memory until the next task

    def _send(self, task: MirrorTask) -> frozenset[str]:
        headers = [compact_header(slot.index, slot.data.nbytes) for slot in task.sealed]
        self._bases.begin(task.epoch, task.peers.keys())

        def sending(node: str, peer: PeerStore) -> Callable[[], bool]:
            return lambda: self._send_to(node, peer, task, headers)

        jobs = {
            node: start_thread(sending(node, peer), name="ckpt-mirror-send")
            for node, peer in task.peers.items()
        }
        kept = self._keep_own(task, headers)
        received = frozenset([node for node, job in jobs.items() if job.result()])
        self._bases.retain(received)
        return received if kept else frozenset()

    def _keep_own(self, task: MirrorTask, headers: Sequence[bytes]) -> bool:
        try:
            for slot, header in zip(task.sealed, headers, strict=True):
                if task.own is not None:
                    task.own(mirror_key(task.snapshot, slot.index.rank), [header, slot.data])
        except CkptError as error:
            self._fail("", task, error)
            return False
        with self._changed:
            self._reported = {failure for failure in self._reported if failure[0] != ""}
        return True

    def _send_to(
        self, node: str, peer: PeerStore, task: MirrorTask, headers: Sequence[bytes]
    ) -> bool:
        incarnation: str | None = None
        try:
            for slot, header in zip(task.sealed, headers, strict=True):
                if self._stopped:
                    return False
                stored = self._put(node, peer, slot, header)
                if incarnation not in (None, stored.boot):
                    raise UnavailableError(
                        "the node's keeper restarted meanwhile: its mirrors are gone."
                    )
                incarnation = stored.boot
        except FencedError:
            return False  # a newer epoch has begun, which places mirrors anew
        except CkptError as error:
            self._fail(node, task, error)
            return False
        except Exception as error:  # noqa: BLE001  a thread's border: the other nodes go on
            self._fail(
                node,
                task,
                InternalError(f"unexpected error while sending a mirror. cause={error!r}"),
            )
            return False
        with self._changed:
            self._reported = {failure for failure in self._reported if failure[0] != node}
        return True

    def _put(self, node: str, peer: PeerStore, slot: SealedSlot, header: bytes) -> StoredContent:
        """Send a share: the changes since an earlier one that the node still has, or all of it."""
        key, rank = mirror_key(slot.index.snapshot, slot.index.rank), slot.index.rank
        share = StagedShare(slot.index, len(header), slot.data.nbytes)
        pieces: list[Buffer] = [header, slot.data]

        # Called by the peer's client after the last byte: a torn share must not be published.
        def check_unchanged() -> None:
            if not slot.unchanged():
                raise TakenBackError(
                    f"the slot was overwritten while it was sent. key={key}; nothing was stored"
                )

        for base in self._bases.of(node, rank):
            changed = delta_of(share, base.share)
            if not isinstance(changed, DeltaRanges):
                continue
            try:
                stored = peer.put_changed(
                    key,
                    pieces,
                    base=base.stored,
                    changed=changed.ranges,
                    check_unchanged=check_unchanged,
                )
            except BaseGoneError:
                self._bases.drop(node, rank, base)
                continue
            self._note_base(
                node, rank, MirrorBase(stored, share, base.behind + 1), changed.size_bytes
            )
            return stored
        stored = peer.put_whole(key, pieces, check_unchanged)
        self._note_base(node, rank, MirrorBase(stored, share, 0), share.size_bytes)
        return stored

    def _note_base(self, node: str, rank: int, base: MirrorBase, sent_bytes: int) -> None:
        self._bases.add(node, rank, base)
        with self._changed:
            self.sent_bytes += sent_bytes

    def _fail(self, node: str, task: MirrorTask, error: CkptError) -> None:
        with self._changed:
            if (node, error.code) in self._reported or self._stopped:
                return
            self._reported.add((node, error.code))
        text = (
            f"{task.snapshot} and later snapshots are not mirrored "
            f"{'on another node' if node else 'on this node'}: {error}"
        )
        if node in task.spare:
            text = (
                f"the standby {node} does not have {task.snapshot}, and may have to fetch the "
                f"state of ranks that it takes over: {error}"
            )
        elif isinstance(error, StoreFullError):
            text += (
                "; a lost node then costs the steps since the last durable snapshot: raise "
                "mirror_bytes"
            )
        facts: dict[str, Fact] = {"node": node, "step": task.snapshot.step, "code": error.code}
        self._emit(Event("mirror-failed", text, facts, alarm=node not in task.spare))


def compact_header(index: StagedIndex, data_bytes: int) -> bytes:
    """A slot's header around ``index`` that is as short as possible: the reserve that a slot has
    behind its index is never sent."""
    size = INDEX_OFFSET_BYTES + len(encode_index(index))
    header_bytes = -(-size // PAGE_BYTES) * PAGE_BYTES
    # The seal covers the size of the data, so the map is as large; only the header's pages are
    # used.
    with mmap.mmap(-1, header_bytes + data_bytes, flags=SPARSE_FLAGS) as sparse:
        memory = memoryview(sparse)
        try:
            header = Header(memory, header_bytes=header_bytes)
            header.begin()
            header.seal(index)
            return bytes(memory[:header_bytes])
        finally:
            del header
            memory.release()


# The standard library has no constant for it before 3.13.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
SPARSE_FLAGS: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
"""Memory without a reservation: a system with strict overcommit would refuse a map as large as a
slot."""
