"""From a sealed slot to a committed snapshot, beside training.

Each rank has one persister: a thread that takes sealed slots in order. For each it writes the new
chunks and gives its share to the head of its node's ranks (``mates``), which writes their part and
posts their receipt. Rank 0's node's also gathers the receipts, commits, and posts the outcome. A
failure anywhere fails that one snapshot on all ranks with the same error; the next one starts
afresh.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
from msgspec import structs

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, ConflictError, InternalError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.format.manifest import Manifest
from ckpt.format.part import Part
from ckpt.ipc.mailbox import STOP_LOOK_S, RankMailbox, StayingMailbox, wait_for_message
from ckpt.ipc.messages import RemoteError, from_error, to_error
from ckpt.log.journal import Journal
from ckpt.save.chunks import Compression, default_budget_bytes, plan_repacking
from ckpt.save.packs import PackSizes, pack_numbers_max, persist, put_part
from ckpt.save.receipts import (
    Receipt,
    SaveOutcome,
    check_groups,
    failed_receipt,
    merge_receipts,
    replica_groups,
)
from ckpt.save.sealed import SealedSlot
from ckpt.threads import CallQueue
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo, StagedIndex

# What the persisters of one node's ranks tell each other: they are threads of one process.
#
# The first of them is the node's *head*. Each gives it what its rank wrote; the head writes one
# part for all, speaks for them to the head of rank 0's node, and tells them what became of the
# snapshot.

LOCAL_RANKS_WAIT_S = 7200.0
"""How long one waits for another's word on a snapshot."""


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank wrote, and where it lies; no part where it failed."""

    receipt: Receipt
    part: Part | None = None


class LocalRanks:
    """The node's ranks: ``ranks`` of them, from ``rank`` on. Snapshots are numbered alike by all.
    Thread-safe."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self._changed = threading.Condition()
        self._shares: dict[int, dict[int, RankShare]] = {}
        self._outcomes: dict[int, SaveOutcome] = {}
        self._taken = -1
        """The last snapshot whose shares the head took, or gave up."""

    def submit(self, n: int, share: RankShare) -> None:
        """A rank has done with its share of snapshot ``n``; its slot is free."""
        with self._changed:
            if n > self._taken:
                self._shares.setdefault(n, {})[share.receipt.rank] = share
            self._changed.notify_all()

    def shares(self, n: int, stop: Callable[[], bool]) -> tuple[RankShare, ...]:
        """For the head, once: the shares of all ranks, in rank order. Each has then seen the
        outcome of ``n - 1``.

        Raises UnavailableError as soon as ``stop()`` is true, and after MATE_WAIT_S; those that
        come later are dropped.
        """
        with self._changed:
            try:
                self._wait(
                    lambda: len(self._shares.get(n, ())) == self.ranks,
                    stop,
                    lambda: self._missing(n),
                )
            finally:
                self._taken = n
                found = self._shares.pop(n, {})
            self._outcomes = {
                later: outcome for later, outcome in self._outcomes.items() if later >= n
            }
            return tuple(share for _, share in sorted(found.items()))

    def publish(self, n: int, outcome: SaveOutcome) -> None:
        """From the head: what became of snapshot ``n``."""
        with self._changed:
            self._outcomes[n] = outcome
            self._changed.notify_all()

    def outcome(self, n: int, stop: Callable[[], bool]) -> SaveOutcome:
        """What became of snapshot ``n``. Raises UnavailableError as soon as ``stop()`` is true, and
        after MATE_WAIT_S."""
        with self._changed:
            self._wait(
                lambda: n in self._outcomes, stop, lambda: f"the outcome. first_rank={self.rank}"
            )
            return self._outcomes[n]

    def _missing(self, n: int) -> str:
        there = self._shares.get(n, {})
        missing = [rank for rank in range(self.rank, self.rank + self.ranks) if rank not in there]
        return f"the shares of this node's other ranks. missing={','.join(map(str, missing))}"

    def _wait(
        self, there: Callable[[], bool], stop: Callable[[], bool], what: Callable[[], str]
    ) -> None:
        until_s = time.monotonic() + LOCAL_RANKS_WAIT_S
        while not there():
            if stop():
                raise UnavailableError(f"stopped while waiting for {what()}")
            if time.monotonic() > until_s:
                raise UnavailableError(
                    f"no word within the time limit while waiting for {what()} "
                    f"timeout_s={LOCAL_RANKS_WAIT_S:g}; a rank is dead or "
                    "far behind: look at its log"
                )
            self._changed.wait(STOP_LOOK_S)


# The events of a snapshot on its way to a store, in one form for whoever tells them.


def durable_event(info: SnapshotInfo, *, seconds: float) -> Event:
    """A snapshot is committed, ``seconds`` after it was handed in."""
    facts = {
        "epoch": info.epoch,
        "step": info.step,
        "size_bytes": info.size_bytes,
        "new_bytes": info.new_bytes,
    }
    return Event("durable", f"{info.id} is durable", {**facts, "seconds": round(seconds, 3)})


def failed_event(snapshot: SnapshotId, error: CkptError) -> Event:
    """A snapshot did not become durable."""
    text = f"the snapshot of {snapshot} is not durable: {error}"
    return Event(
        "save-failed",
        text,
        {"epoch": snapshot.epoch, "step": snapshot.step, "code": error.code},
        alarm=True,
    )


def untagged_event(info: SnapshotInfo, error: CkptError) -> Event:
    """A snapshot is durable, but lacks a tag."""
    return Event("tag-failed", str(error), {"step": info.step, "code": error.code}, alarm=True)


__all__ = ["Persister", "SaveTarget", "SealedSlot"]

T = TypeVar("T")

PEER_WAIT_S = 7200.0
"""How long a rank waits for another's word on one snapshot, before it takes that rank for dead."""

ABANDON_STORE_S = 5.0
"""How long an abandoned save is waited for; it goes on behind, and ends with the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTarget:
    """Where and as whom a rank writes."""

    backend: Backend
    writer: str
    epoch: Callable[[], int]
    """The writer's epoch, asked when a record is written: what an older epoch captured is committed
    under the current one."""
    journal: Journal | None
    """Rank 0's handle on the commit log; None on the other ranks."""


class Persister:
    """One rank's queue of snapshots to make durable, in order.

    ``base`` is the committed snapshot whose chunks may be referred to (None: none is known),
    ``known`` where this rank's chunks of it lie. Every rank learns of each snapshot in the same
    order whether it exists, so those that have a base have the same; one that forgot its own for
    another error than others met refers to nothing for once. ``mates``: the ranks whose persisters
    are in this process too, this one among them; None: it is alone.
    """

    def __init__(
        self,
        channel: RankMailbox,
        target: SaveTarget,
        *,
        compression: Compression,
        verify: bool,
        emit: Emit,
        base: SnapshotId | None = None,
        stored_chunks: Mapping[Digest, ChunkLocation] | None = None,
        local_ranks: LocalRanks | None = None,
    ) -> None:
        self._channel = channel
        self._mates = local_ranks or LocalRanks(channel.rank, 1)
        self._heads: tuple[int, ...] = ()
        """On rank 0: who posted the receipts that were gathered last."""
        self._place = target
        self._writer = target.writer
        self._compression = compression
        self._verify = verify
        self._tell = emit
        self._base = base
        self._known: Mapping[Digest, ChunkLocation] = stored_chunks or {}
        self._pack_sizes = PackSizes(target.backend)
        self._packs_written = 0
        self._count = 0
        self._settled = 0
        self._closing = False
        self.durable_at_s: float | None = None
        """When the last snapshot became durable, by the monotonic clock."""
        self.last_info: SnapshotInfo | None = None
        """The last snapshot that became durable."""
        self.passed_step = -1
        """On rank 0: the last step whose boundary every rank is known to have passed."""
        self._calls = CallQueue("ckpt-persist")

    @property
    def in_flight(self) -> int:
        """Snapshots handed in and not settled yet. On rank 0, settled means that every rank has let
        go of its slot."""
        return self._count - self._settled

    def submit(self, staged: SealedSlot, *, tags: tuple[str, ...]) -> Future[SnapshotInfo]:
        """Queue a sealed slot; the future gives the commit's facts or the error. Every rank submits
        the same sequence."""
        self._count += 1
        n = self._count
        return self._calls.submit(lambda: self._run(n, staged, tags))

    def submit_failure(self, snapshot: SnapshotId, error: CkptError) -> Future[None]:
        """Take part in a snapshot that this rank could not stage: all ranks learn that it failed,
        and why.

        The future is done when the snapshot is settled; it gives no error.
        """
        self._count += 1
        n = self._count
        return self._calls.submit(lambda: self._refuse(n, snapshot, error))

    def refer_to(self, base: SnapshotId, stored_chunks: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot refer to chunks of ``base``; nothing once one was handed in. Every
        rank calls it alike."""
        if self._count == 0:
            self._base, self._known = base, stored_chunks

    def refer_next(self, base: SnapshotId, stored_chunks: Mapping[Digest, ChunkLocation]) -> None:
        """As ``refer_to``, in the queue's order: what is handed in next may refer to ``base``,
        unless a base is known then."""

        def refer() -> None:
            if self._base is None:
                self._base, self._known = base, stored_chunks

        self._calls.submit(refer)

    def write_as(self, writer: str) -> None:
        """Write what is handed in next under another writer's name, which nobody used before.

        For a snapshot that is handed in again: its first part may be committed, and a key's bytes
        never change.
        """

        def change() -> None:
            self._writer, self._packs_written = writer, 0

        self._calls.submit(change)

    def call(self, call: Callable[[], T]) -> Future[T]:
        """Do ``call`` in the queue's thread, after what was handed in before and before what comes
        later."""
        return self._calls.submit(call)

    @property
    def ended(self) -> bool:
        """Whether its thread is gone."""
        return self._calls.ended

    def close(self) -> None:
        """Wait until the queue is empty and end the thread."""
        self._calls.close()

    def stop_waiting(self) -> None:
        """Wait for no other rank any more."""
        self._closing = True

    def abandon(self, timeout_s: float | None = None) -> bool:
        """Drop what has not begun, wait for no other rank any more and only briefly for the store,
        and end the thread.

        Waits ``timeout_s`` seconds at most (None: ABANDON_STORE_S); returns whether the thread
        ended.
        """
        self.stop_waiting()
        return self._calls.close(
            cancel=True, timeout_s=ABANDON_STORE_S if timeout_s is None else timeout_s
        )

    def _run(self, n: int, staged: SealedSlot, tags: tuple[str, ...]) -> SnapshotInfo:
        began = time.monotonic()
        snapshot = staged.index.snapshot
        share: RankShare | None = None
        try:
            share, locations = self._write(staged)
            outcome = self._outcome(n, share, staged.index, tags)
            if outcome.info is None:
                assert outcome.error is not None, "an outcome has one or the other"
                raise to_error(outcome.error)
        except CkptError as error:
            if isinstance(
                error, ConflictError
            ):  # perhaps the base was dropped: refer to nothing next time
                self._base, self._known = None, {}
            self._tell(failed_event(snapshot, error))
            raise
        except Exception as error:  # a thread's border
            wrapped = InternalError(
                f"saving failed in an unforeseen way. snapshot={snapshot} cause={error!r}"
            )
            self._tell(failed_event(snapshot, wrapped))
            if share is None:  # the other ranks would wait for it
                self._decline(n, failed_receipt(snapshot, self._channel.rank, wrapped))
            raise wrapped from error
        finally:
            self._settled += 1
        self._base, self._known = snapshot, locations
        self.durable_at_s = time.monotonic()
        self.last_info = outcome.info
        self._tell(durable_event(outcome.info, seconds=time.monotonic() - began))
        if outcome.error is not None:
            untagged = to_error(outcome.error)
            self._tell(untagged_event(outcome.info, untagged))
            raise untagged
        return outcome.info

    def _refuse(self, n: int, snapshot: SnapshotId, error: CkptError) -> None:
        self._tell(failed_event(snapshot, error))
        try:
            self._decline(n, failed_receipt(snapshot, self._channel.rank, error))
        finally:
            self._settled += 1

    def _decline(self, n: int, mine: Receipt) -> None:
        """Have all ranks learn that this one has no share of a snapshot; of what keeps them from
        it, tell."""
        snapshot = mine.snapshot
        try:
            self._mates.submit(n, RankShare(mine))
            if not self._is_head:
                return
            outcome = SaveOutcome(error=mine.error)
            self._mates.publish(n, outcome)
            if self._channel.rank == 0:
                self._channel.post(f"outcome/{n}", msgspec.msgpack.encode(outcome))
                self._gather(
                    n, self._receipt(n, snapshot)
                )  # not settled before every rank has let go of its slot
            else:
                self._post(n, self._receipt(n, snapshot))
        except Exception as lost:  # noqa: BLE001  a thread's border; nobody waits for it
            text = f"the ranks can't be told. snapshot={snapshot} cause={lost!r}"
            self._tell(failed_event(snapshot, InternalError(text)))

    # ---- this rank's share

    def _write(self, staged: SealedSlot) -> tuple[RankShare, Mapping[Digest, ChunkLocation]]:
        """Write this rank's chunks, then let go of the slot. What fails becomes a receipt that says
        so."""
        index, rank = staged.index, self._channel.rank
        size = sum(shard.size_bytes for shard in index.shards)
        try:
            done = persist(
                index,
                staged.data,
                stored_chunks=self._worth_keeping(index, size),
                backend=self._place.backend,
                writer=self._writer,
                pack_start=self._packs_written,
                compression=self._compression,
                verify=self._verify,
            )
        except CkptError as error:
            return RankShare(failed_receipt(index.snapshot, rank, error)), {}
        except Exception as error:  # noqa: BLE001  a thread's border: without a receipt the other ranks would wait for ever
            wrapped = InternalError(
                f"writing failed in an unforeseen way. snapshot={index.snapshot} cause={error!r}"
            )
            wrapped.__cause__ = error
            return RankShare(failed_receipt(index.snapshot, rank, wrapped)), {}
        finally:
            self._packs_written += pack_numbers_max(index)
            staged.free()
        self._pack_sizes.note(done.pack_bytes)
        receipt = Receipt(
            snapshot=index.snapshot,
            rank=rank,
            size_bytes=size,
            new_bytes=done.new_bytes,
            base=self._base if self._known else None,
            shared=replica_groups(staged.shared),
            complete=staged.shared is not None,
        )
        return RankShare(receipt, done.part), done.locations

    def _worth_keeping(self, index: StagedIndex, size_bytes: int) -> Mapping[Digest, ChunkLocation]:
        """What is known, but for chunks in packs of which little is needed: those are written
        anew."""
        wanted = {digest for shard in index.shards for digest in shard.digests}
        sizes = self._pack_sizes.of(
            self._known[digest].pack for digest in wanted if digest in self._known
        )
        return plan_repacking(
            self._known, wanted, sizes, budget_bytes=default_budget_bytes(size_bytes)
        ).stored_chunks

    # ---- the node's

    @property
    def _is_head(self) -> bool:
        return self._channel.rank == self._mates.rank

    def _closes(self) -> bool:
        return self._closing

    def _outcome(
        self, n: int, share: RankShare, index: StagedIndex, tags: tuple[str, ...]
    ) -> SaveOutcome:
        """Give this rank's share; what became of the snapshot. What the head meets, its mates hear
        too."""
        self._mates.submit(n, share)
        if not self._is_head:
            return self._mates.outcome(n, self._closes)
        outcome = SaveOutcome(
            error=RemoteError(InternalError.code, "the node's head failed.", self._channel.rank)
        )
        try:
            outcome = self._speak(n, index, tags)
        except CkptError as error:
            outcome = SaveOutcome(error=from_error(error, rank=self._channel.rank))
            raise
        finally:
            self._mates.publish(n, outcome)
        return outcome

    def _speak(self, n: int, index: StagedIndex, tags: tuple[str, ...]) -> SaveOutcome:
        receipt = self._receipt(n, index.snapshot)
        if self._channel.rank == 0:
            outcome = self._settle(n, receipt, index, tags)
            self._channel.post(f"outcome/{n}", msgspec.msgpack.encode(outcome))
            return outcome
        self._post(n, receipt)
        word = self._wait(f"outcome/{n}", f"rank 0's commit of {index.snapshot}", rank=0)
        self._channel.forget(
            f"receipt/{n - 1}/{receipt.rank}"
        )  # or it would be posted again after a line broke
        return msgspec.msgpack.decode(word, type=SaveOutcome)

    def _receipt(self, n: int, snapshot: SnapshotId) -> Receipt:
        """Write the part of the node's ranks; their receipt, which says so where something
        failed."""
        rank, ranks = self._mates.rank, self._mates.ranks
        try:
            shares = self._mates.shares(n, self._closes)
        except UnavailableError as error:
            told_of = from_error(error, rank=rank)
            return Receipt(snapshot=snapshot, rank=rank, ranks=ranks, error=told_of, passed=False)
        try:
            receipt = merge_receipts([share.receipt for share in shares])
            if receipt.error is not None:
                return receipt
            parts = [share.part for share in shares if share.part is not None]
            ref = put_part(parts, backend=self._place.backend, writer=self._writer)
            return structs.replace(receipt, refs=(ref,))
        except CkptError as error:
            return Receipt(
                snapshot=snapshot, rank=rank, ranks=ranks, error=from_error(error, rank=rank)
            )
        except Exception as error:  # noqa: BLE001  a thread's border: without a receipt the other nodes would wait for ever
            wrapped = InternalError(
                f"writing a part failed in an unforeseen way. snapshot={snapshot} cause={error!r}"
            )
            return Receipt(
                snapshot=snapshot, rank=rank, ranks=ranks, error=from_error(wrapped, rank=rank)
            )

    def _post(self, n: int, receipt: Receipt) -> None:
        self._channel.post(f"receipt/{n}/{receipt.rank}", msgspec.msgpack.encode(receipt))

    # ---- rank 0's

    def _settle(
        self, n: int, mine: Receipt, index: StagedIndex, tags: tuple[str, ...]
    ) -> SaveOutcome:
        try:
            whole = check_groups(self._gather(n, mine))
            if whole.error is not None:
                return SaveOutcome(error=whole.error)
            return self._tagged(self._commit(index, whole), tags)
        except CkptError as error:
            return SaveOutcome(error=from_error(error, rank=0))
        except Exception as error:  # noqa: BLE001  a thread's border: without an outcome the other ranks would wait for ever
            wrapped = InternalError(
                f"committing failed in an unforeseen way. snapshot={index.snapshot} cause={error!r}"
            )
            return SaveOutcome(error=from_error(wrapped, rank=0))

    def _gather(self, n: int, mine: Receipt) -> Receipt:
        """All ranks' receipt for ``n``. Then each has seen the outcome of ``n - 1``, whose messages
        are freed."""
        receipts = [mine]
        rank = mine.ranks
        while rank < self._channel.size:
            word = self._wait(
                f"receipt/{n}/{rank}",
                f"{mine.snapshot} of rank {rank} and others of its node",
                rank=rank,
            )
            receipt = msgspec.msgpack.decode(word, type=Receipt)
            receipts.append(receipt)
            rank += max(1, receipt.ranks)
        self._forget(n - 1)
        self._heads = tuple(receipt.rank for receipt in receipts[1:])
        whole = merge_receipts(receipts)
        if whole.ranks != self._channel.size:
            raise InternalError(
                f"receipts of more ranks than there are. ranks={whole.ranks} "
                f"world={self._channel.size}"
            )
        if whole.passed:
            self.passed_step = max(self.passed_step, whole.snapshot.step)
        return whole

    def _commit(self, index: StagedIndex, whole: Receipt) -> SnapshotInfo:
        journal = self._place.journal
        assert journal is not None, "rank 0 has the log"
        manifest = Manifest(
            job=journal.job,
            snapshot=index.snapshot,
            world_size=self._channel.size,
            base=whole.base,
            parts=whole.refs,
            size_bytes=whole.size_bytes,
            new_bytes=whole.new_bytes,
            created_unix_s=time.time(),
            metadata=index.metadata,
        )
        return journal.commit(manifest, epoch=self._place.epoch())

    def _tagged(self, info: SnapshotInfo, tags: tuple[str, ...]) -> SaveOutcome:
        """Tag what is committed. A tag that fails makes the snapshot no less durable."""
        journal = self._place.journal
        assert journal is not None, "rank 0 has the log"
        for done, tag in enumerate(tags):
            try:
                journal.tag(tag, info.id, epoch=self._place.epoch())
            except CkptError as error:
                text = f"{info.id} is durable, but could not be tagged. tag={tag!r} cause={error}"
                return SaveOutcome(
                    replace(info, tags=tags[:done]), RemoteError(error.code, text, 0)
                )
        return SaveOutcome(replace(info, tags=tags))

    def _forget(self, n: int) -> None:
        """Free the messages of a snapshot that every rank has settled. The same nodes speak for the
        same ranks each time."""
        if n >= 1:
            self._channel.forget(f"outcome/{n}")
            for rank in self._heads:
                self._channel.forget(f"receipt/{n}/{rank}")

    def _wait(self, key: str, what: str, *, rank: int) -> bytes:
        """Wait for a message of ``rank``, while it is there. One that left has posted all that it
        ever will."""
        left = f"bye/{rank}"
        leaves = not (isinstance(self._channel, StayingMailbox) and self._channel.stays)

        def stop() -> bool:
            return self._closing or (leaves and self._channel.peek(left) is not None)

        try:
            return wait_for_message(
                self._channel, key, timeout_s=PEER_WAIT_S, awaited=what, stop=stop
            )
        except UnavailableError:
            word = self._channel.peek(key)  # posted just before it left
            if word is None:
                raise
            return word
