"""A rank's queue of snapshots to make durable, beside training.

Each rank has one persister: a thread that takes sealed slots in order. For each it writes the new
chunks and submits its share to the *lead* of its node's ranks. The lead writes one part for all of
them and posts their receipt. The lead of rank 0's node also gathers the receipts, commits, and
posts the outcome. A failure anywhere fails that one snapshot on all ranks with the same error; the
next snapshot starts afresh.

A share may refer to chunks of an earlier snapshot, its base, which somebody may drop before the
commit. So a slot of such a share is held until the outcome is known. If the base is gone, rank 0
says so, and all ranks take a second turn in which they write everything.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
from msgspec import structs

from ckpt.backends.base import Backend
from ckpt.errors import (
    CkptError,
    ConflictError,
    FencedError,
    InternalError,
    SupersededError,
    UnavailableError,
)
from ckpt.events import Emit, Event, Fact
from ckpt.format.keys import writer_name
from ckpt.format.manifest import Manifest, metadata_problem
from ckpt.format.part import Part
from ckpt.ipc.mailbox import STOP_LOOK_S, RankMailbox, StayingMailbox, wait_for_message
from ckpt.ipc.messages import RemoteError, from_error, to_error
from ckpt.log.journal import Journal, StoreProof
from ckpt.save.chunks import Compression, default_budget_bytes, plan_repacking
from ckpt.save.packs import PackSizes, pack_numbers_max, persist, put_part
from ckpt.save.receipts import (
    Receipt,
    SaveOutcome,
    check_groups,
    diverged,
    failed_receipt,
    merge_receipts,
    replica_groups,
    replica_samples,
)
from ckpt.save.sealed import SealedSlot
from ckpt.threads import CallQueue
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo, StagedIndex

SUSPECT_KEY = "suspect_replicas"
"""The metadata of a snapshot whose replicas were found to differ: which ranks, in what."""

SUSPECT_CHARS_MAX = 500

__all__ = ["Persister", "SaveTarget", "SealedSlot"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Turn:
    """One try to make the ``n``-th snapshot durable. ``again``: the second, without a base."""

    n: int
    again: bool = False

    @property
    def number(self) -> int:
        """Grows with each turn."""
        return 2 * self.n + self.again

    @property
    def name(self) -> str:
        """In the keys of its messages."""
        return f"{self.n}+" if self.again else str(self.n)


# ---- one node: its ranks' persisters are threads of one process

LOCAL_RANKS_WAIT_S = 7200.0
"""How long a rank waits for others of its node to finish with a snapshot."""


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank wrote. ``part`` is None if it failed."""

    receipt: Receipt
    part: Part | None = None


class LocalRanks:
    """The persisters of one node's ranks, which are threads of one process. Thread-safe.

    ``ranks`` of them, from ``rank`` on; the first is the lead. All number the snapshots' turns
    alike (``Turn.number``).
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self._changed = threading.Condition()
        self._shares: dict[int, dict[int, RankShare]] = {}
        self._outcomes: dict[int, SaveOutcome] = {}
        self._taken = -1
        """The last snapshot whose shares the lead took or gave up."""

    def submit(self, n: int, share: RankShare) -> None:
        """A rank has written its share of snapshot ``n``."""
        with self._changed:
            if n > self._taken:
                self._shares.setdefault(n, {})[share.receipt.rank] = share
            self._changed.notify_all()

    def shares(self, n: int, stop: Callable[[], bool]) -> tuple[RankShare, ...]:
        """For the lead, once per snapshot: the shares of all ranks, in rank order.

        Each rank has then received the outcome of ``n - 1``. Raises UnavailableError as soon as
        ``stop()`` is true, or after LOCAL_RANKS_WAIT_S; later shares are dropped.
        """
        with self._changed:
            try:
                self._wait(
                    lambda: len(self._shares.get(n, ())) == self.ranks,
                    stop,
                    lambda: self._missing(n),
                )
            finally:
                # Set also after a failure: a share that arrives later would never be taken.
                self._taken = n
                shares = self._shares.pop(n, {})
            self._outcomes = {
                later: outcome for later, outcome in self._outcomes.items() if later >= n
            }
            return tuple(share for _, share in sorted(shares.items()))

    def publish(self, n: int, outcome: SaveOutcome) -> None:
        """From the lead: the outcome of snapshot ``n``."""
        with self._changed:
            self._outcomes[n] = outcome
            self._changed.notify_all()

    def outcome(self, n: int, stop: Callable[[], bool]) -> SaveOutcome:
        """Wait for the outcome of snapshot ``n``.

        Raises UnavailableError as soon as ``stop()`` is true, or after LOCAL_RANKS_WAIT_S.
        """
        with self._changed:
            self._wait(
                lambda: n in self._outcomes, stop, lambda: f"the outcome. first_rank={self.rank}"
            )
            return self._outcomes[n]

    def _missing(self, n: int) -> str:
        shares = self._shares.get(n, {})
        missing = [rank for rank in range(self.rank, self.rank + self.ranks) if rank not in shares]
        return f"the shares of this node's other ranks. missing={','.join(map(str, missing))}"

    def _wait(
        self, ready: Callable[[], bool], stop: Callable[[], bool], awaited: Callable[[], str]
    ) -> None:
        until_s = time.monotonic() + LOCAL_RANKS_WAIT_S
        while not ready():
            if stop():
                raise UnavailableError(f"stopped while waiting for {awaited()}")
            if time.monotonic() > until_s:
                raise UnavailableError(
                    f"no answer within the time limit while waiting for {awaited()} "
                    f"timeout_s={LOCAL_RANKS_WAIT_S:g}; a rank is dead or far behind: look at its "
                    "log"
                )
            self._changed.wait(STOP_LOOK_S)


# ---- events


def durable_event(info: SnapshotInfo, *, seconds: float) -> Event:
    """A snapshot is committed, ``seconds`` after it was submitted."""
    facts = {
        "epoch": info.epoch,
        "step": info.step,
        "size_bytes": info.size_bytes,
        "new_bytes": info.new_bytes,
    }
    return Event("durable", f"{info.id} is durable", {**facts, "seconds": round(seconds, 3)})


def diverged_event(snapshot: SnapshotId, different: str) -> Event:
    """Replicas hold different bytes of what they should hold alike."""
    text = (
        f"replicas have diverged, so {snapshot} is a mixture of them and is marked "
        f"{SUSPECT_KEY}: {different}; look for a rank with a failing device, or for an update that "
        "not all ranks make"
    )
    return Event("replicas-diverged", text, {"step": snapshot.step}, alarm=True)


def _marked(metadata: Mapping[str, Fact], different: str) -> Mapping[str, Fact]:
    marked = {**metadata, SUSPECT_KEY: different[:SUSPECT_CHARS_MAX]}
    # A snapshot whose own metadata leaves no room is better unmarked than not saved.
    return metadata if metadata_problem(marked) else marked


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


# ---- the queue

PEER_WAIT_S = 7200.0
"""How long a rank waits for another one's message, before it takes that rank for dead."""

ABANDON_STORE_S = 5.0
"""How long ``abandon`` waits for a save; it continues in the background, and ends with the
process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTarget:
    """The store that a rank writes to, and the rank's name there."""

    backend: Backend
    writer: str
    epoch: Callable[[], int]
    """The writer's epoch, called when a record is written.

    A snapshot that an older epoch captured is committed under the current one.
    """
    journal: Journal | None
    """The commit log, on rank 0; None on the other ranks."""
    proof: StoreProof | None = None
    """Which stores take the node's objects, shared by its ranks; None: this rank's own."""


def new_writer() -> str:
    """A writer's name that was never used."""
    return writer_name(socket.gethostname(), secrets.token_hex(8))


class _ShareWriter:
    """Writes one rank's shares. ``base`` and ``stored_chunks`` say what they may refer to."""

    def __init__(
        self,
        target: SaveTarget,
        proof: StoreProof,
        rank: int,
        *,
        compression: Compression,
        verify: bool,
        base: SnapshotId | None,
        stored_chunks: Mapping[Digest, ChunkLocation],
    ) -> None:
        self.writer = target.writer
        self.base = base
        self.stored_chunks = stored_chunks
        self._backend = target.backend
        self._proof = proof
        self._rank = rank
        self._compression = compression
        self._verify = verify
        self._pack_sizes = PackSizes(target.backend)
        self._packs_written = 0

    def refer_to(
        self, base: SnapshotId | None, stored_chunks: Mapping[Digest, ChunkLocation]
    ) -> None:
        """Let later shares refer to chunks of ``base``."""
        self.base, self.stored_chunks = base, stored_chunks

    def write_as(self, writer: str) -> None:
        """Write later shares under another name."""
        self.writer, self._packs_written = writer, 0

    def write(
        self, turn: Turn, staged: SealedSlot
    ) -> tuple[RankShare, Mapping[Digest, ChunkLocation]]:
        """Write the new chunks. A failure becomes a receipt that says so."""
        index = staged.index
        size_bytes = sum(shard.size_bytes for shard in index.shards)
        try:
            self._proof.begin(turn.number)
            persisted = persist(
                index,
                staged.data,
                stored_chunks=self._worth_keeping(index, size_bytes),
                backend=self._backend,
                writer=self.writer,
                pack_start=self._packs_written,
                compression=self._compression,
                verify=self._verify,
            )
        except Exception as error:  # noqa: BLE001  a thread's border: other ranks wait for a receipt
            return self._failed(index.snapshot, error), {}
        finally:
            # After an error it is unknown which pack keys were written, and a key is never used
            # twice: so all that may have been used are given up.
            self._packs_written += pack_numbers_max(index)
        self._pack_sizes.note(persisted.pack_bytes)
        receipt = Receipt(
            snapshot=index.snapshot,
            rank=self._rank,
            size_bytes=size_bytes,
            new_bytes=persisted.new_bytes,
            base=self.base if self.stored_chunks else None,
            shared=replica_groups(staged.shared),
            complete=staged.shared is not None,
            samples=replica_samples(staged.samples, self._rank),
            repeats=True,
        )
        return RankShare(receipt, persisted.part), persisted.locations

    def write_all(
        self, turn: Turn, staged: SealedSlot, written: RankShare
    ) -> tuple[RankShare, Mapping[Digest, ChunkLocation] | None]:
        """The same in a second turn, without a base and under another name. A share that had none
        is complete: only a part of its node is written anew then (no locations)."""
        self.refer_to(None, {})
        self.write_as(new_writer())
        if written.receipt.base is not None:
            return self.write(turn, staged)
        try:
            self._proof.begin(turn.number)
        except Exception as error:  # noqa: BLE001  as above
            return self._failed(staged.index.snapshot, error), None
        return written, None

    def _failed(self, snapshot: SnapshotId, error: Exception) -> RankShare:
        if not isinstance(error, CkptError):
            wrapped = InternalError(
                f"unexpected error while writing. snapshot={snapshot} cause={error!r}"
            )
            wrapped.__cause__ = error
            error = wrapped
        return RankShare(failed_receipt(snapshot, self._rank, error))

    def _worth_keeping(self, index: StagedIndex, size_bytes: int) -> Mapping[Digest, ChunkLocation]:
        """The stored chunks, without those of sparse and old packs: these are written anew."""
        wanted = {digest for shard in index.shards for digest in shard.digests}
        stored = self.stored_chunks
        sizes = self._pack_sizes.of(stored[digest].pack for digest in wanted if digest in stored)
        budget_bytes = default_budget_bytes(size_bytes)
        return plan_repacking(
            stored,
            wanted,
            sizes,
            budget_bytes=budget_bytes,
            ages_s=self._pack_sizes.ages_s(),
        ).stored_chunks


class Persister:
    """One rank's queue of snapshots to make durable, in order.

    ``base`` is the committed snapshot whose chunks may be referred to (None: none),
    ``stored_chunks`` where this rank's chunks of it are. Every rank learns in the same order
    whether each snapshot exists, so all that have a base have the same one. A rank that dropped its
    base, after an error that others did not meet, refers to nothing once. ``local_ranks``: the
    ranks whose persisters are in this process, this one included; None: only this one.
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
        self._local_ranks = local_ranks or LocalRanks(channel.rank, 1)
        self._leads: tuple[int, ...] = ()
        """On rank 0: the ranks that posted the receipts gathered last."""
        self._target = target
        self._proof = target.proof or StoreProof(target.backend, target.journal)
        self._emit = emit
        self._share_writer = _ShareWriter(
            target,
            self._proof,
            channel.rank,
            compression=compression,
            verify=verify,
            base=base,
            stored_chunks=stored_chunks or {},
        )
        self._submitted = 0
        self._completed = 0
        self._last_turn = Turn(0)
        """Before the one at hand."""
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
        """Snapshots submitted and not completed. On rank 0, completed: every rank has written its
        share, and has released its slot or does so as soon as it hears the outcome."""
        return self._submitted - self._completed

    def submit(self, staged: SealedSlot, *, tags: tuple[str, ...]) -> Future[SnapshotInfo]:
        """Queue a sealed slot; the future gives the commit's facts or the error.

        Every rank submits the same sequence.
        """
        # All ranks count the same sequence, so ``n`` names the snapshot's messages on each of them.
        self._submitted += 1
        n = self._submitted
        return self._calls.submit(lambda: self._run(n, staged, tags))

    def submit_failure(self, snapshot: SnapshotId, error: CkptError) -> Future[None]:
        """Take part in a snapshot that this rank could not stage: all ranks learn that it failed,
        and why.

        The future is done when the snapshot is completed; it raises no error.
        """
        self._submitted += 1
        n = self._submitted
        return self._calls.submit(lambda: self._fail(n, snapshot, error))

    def refer_to(self, base: SnapshotId, stored_chunks: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot refer to chunks of ``base``. No effect once a snapshot was
        submitted.

        Every rank calls it alike.
        """
        if self._submitted == 0:
            self._share_writer.refer_to(base, stored_chunks)

    def refer_next(self, base: SnapshotId, stored_chunks: Mapping[Digest, ChunkLocation]) -> None:
        """Let the next snapshot submitted refer to ``base``, unless a base is known by then."""

        def refer() -> None:
            if self._share_writer.base is None:
                self._share_writer.refer_to(base, stored_chunks)

        self._calls.submit(refer)

    def write_as(self, writer: str) -> None:
        """Write later snapshots under another writer's name, which was never used.

        For a snapshot that is submitted again: its first part may be committed, and the bytes of a
        key never change.
        """

        self._calls.submit(lambda: self._share_writer.write_as(writer))

    def call(self, call: Callable[[], T]) -> Future[T]:
        """Run ``call`` in the queue's thread, in order with submissions."""
        return self._calls.submit(call)

    @property
    def ended(self) -> bool:
        """Whether the thread has ended."""
        return self._calls.ended

    def close(self) -> None:
        """Wait until the queue is empty and end the thread."""
        self._calls.close()

    def stop_waiting(self) -> None:
        """Stop waiting for other ranks."""
        self._closing = True

    def abandon(self, timeout_s: float | None = None) -> bool:
        """Drop snapshots that have not begun, wait only briefly for the store, and end the thread.

        Waits at most ``timeout_s`` seconds (None: ABANDON_STORE_S); returns whether the thread
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
            with ExitStack() as slot:
                slot.callback(staged.free)
                written, locations = self._share_writer.write(Turn(n), staged)
                if written.receipt.base is None:
                    slot.close()  # nothing that it refers to can be gone
                share = written
                outcome = self._outcome(Turn(n), share, staged.index, tags)
                if outcome.again:
                    turn = Turn(n, again=True)
                    share, anew = self._share_writer.write_all(turn, staged, share)
                    locations = locations if anew is None else anew
                    outcome = self._outcome(turn, share, staged.index, tags)
            if outcome.info is None:
                assert outcome.error is not None, "an outcome has one or the other"
                raise to_error(outcome.error)
        except CkptError as error:
            if isinstance(error, ConflictError):
                # The base may have been dropped, so the next snapshot refers to nothing.
                self._share_writer.refer_to(None, {})
            self._emit(failed_event(snapshot, error))
            raise
        except Exception as error:  # a thread's border
            wrapped = InternalError(
                f"unexpected error while saving. snapshot={snapshot} cause={error!r}"
            )
            self._emit(failed_event(snapshot, wrapped))
            if share is None:  # the other ranks wait for it
                self._decline(n, failed_receipt(snapshot, self._channel.rank, wrapped))
            raise wrapped from error
        finally:
            self._completed += 1
        self._share_writer.refer_to(snapshot, locations)
        self.durable_at_s = time.monotonic()
        self.last_info = outcome.info
        self._emit(durable_event(outcome.info, seconds=time.monotonic() - began))
        if outcome.error is not None:
            untagged = to_error(outcome.error)
            self._emit(untagged_event(outcome.info, untagged))
            raise untagged
        return outcome.info

    def _fail(self, n: int, snapshot: SnapshotId, error: CkptError) -> None:
        self._emit(failed_event(snapshot, error))
        try:
            self._decline(n, failed_receipt(snapshot, self._channel.rank, error))
        finally:
            self._completed += 1

    def _decline(self, n: int, own: Receipt) -> None:
        """Let all ranks learn that this one has no share of a snapshot. An error in that is
        reported."""
        snapshot, turn = own.snapshot, Turn(n)
        try:
            self._local_ranks.submit(turn.number, RankShare(own))
            if not self._is_lead:
                return
            outcome = SaveOutcome(error=own.error)
            self._local_ranks.publish(turn.number, outcome)
            if self._channel.rank == 0:
                self._channel.post(f"outcome/{turn.name}", msgspec.msgpack.encode(outcome))
                # Completed only after every rank has written its share, which its receipt shows.
                self._gather(turn, self._receipt(turn, snapshot))
            else:
                self._post(turn, self._receipt(turn, snapshot))
                self._last_turn = turn
        except Exception as lost:  # noqa: BLE001  a thread's border; no other thread waits for this
            text = f"the other ranks cannot be informed. snapshot={snapshot} cause={lost!r}"
            self._emit(failed_event(snapshot, InternalError(text)))

    # ---- a node

    @property
    def _is_lead(self) -> bool:
        return self._channel.rank == self._local_ranks.rank

    def _closes(self) -> bool:
        return self._closing

    def _outcome(
        self, turn: Turn, share: RankShare, index: StagedIndex, tags: tuple[str, ...]
    ) -> SaveOutcome:
        """Submit this rank's share; returns the snapshot's outcome. The lead's errors reach all its
        ranks."""
        self._local_ranks.submit(turn.number, share)
        if not self._is_lead:
            return self._local_ranks.outcome(turn.number, self._closes)
        # Published if anything but a CkptError ends the lead, so that its other ranks do not wait.
        outcome = SaveOutcome(
            error=RemoteError(InternalError.code, "the node's lead failed.", self._channel.rank)
        )
        try:
            outcome = self._lead(turn, index, tags)
        except CkptError as error:
            outcome = SaveOutcome(error=from_error(error, rank=self._channel.rank))
            raise
        finally:
            self._local_ranks.publish(turn.number, outcome)
        return outcome

    def _lead(self, turn: Turn, index: StagedIndex, tags: tuple[str, ...]) -> SaveOutcome:
        receipt = self._receipt(turn, index.snapshot)
        if self._channel.rank == 0:
            outcome = self._complete(turn, receipt, index, tags)
            self._channel.post(f"outcome/{turn.name}", msgspec.msgpack.encode(outcome))
            return outcome
        self._post(turn, receipt)
        before, self._last_turn = self._last_turn, turn
        message = self._wait(f"outcome/{turn.name}", f"rank 0's commit of {index.snapshot}", rank=0)
        # Rank 0 has it; it would be posted again after a broken connection.
        self._channel.forget(f"receipt/{before.name}/{receipt.rank}")
        return msgspec.msgpack.decode(message, type=SaveOutcome)

    def _receipt(self, turn: Turn, snapshot: SnapshotId) -> Receipt:
        """Write the part of the node's ranks; returns their receipt, which also reports a
        failure."""
        rank, ranks = self._local_ranks.rank, self._local_ranks.ranks
        try:
            shares = self._local_ranks.shares(turn.number, self._closes)
        except UnavailableError as error:
            return Receipt(
                snapshot=snapshot,
                rank=rank,
                ranks=ranks,
                error=from_error(error, rank=rank),
                passed=False,  # a rank that did not report may still be before the boundary
            )
        try:
            receipt = merge_receipts([share.receipt for share in shares])
            if receipt.error is not None:
                return receipt
            parts = [share.part for share in shares if share.part is not None]
            ref = put_part(parts, backend=self._target.backend, writer=self._share_writer.writer)
            # After the last object: what a store acknowledged before it vanished is in doubt.
            return structs.replace(receipt, refs=(ref,), stores=(self._proof.finish(turn.number),))
        except CkptError as error:
            return Receipt(
                snapshot=snapshot, rank=rank, ranks=ranks, error=from_error(error, rank=rank)
            )
        except Exception as error:  # noqa: BLE001  a thread's border: rank 0 waits for a receipt
            wrapped = InternalError(
                f"unexpected error while writing a part. snapshot={snapshot} cause={error!r}"
            )
            return Receipt(
                snapshot=snapshot, rank=rank, ranks=ranks, error=from_error(wrapped, rank=rank)
            )

    def _post(self, turn: Turn, receipt: Receipt) -> None:
        self._channel.post(f"receipt/{turn.name}/{receipt.rank}", msgspec.msgpack.encode(receipt))

    # ---- rank 0

    def _complete(
        self, turn: Turn, own: Receipt, index: StagedIndex, tags: tuple[str, ...]
    ) -> SaveOutcome:
        try:
            whole = check_groups(self._gather(turn, own))
            if whole.error is not None:
                return SaveOutcome(error=whole.error)
            try:
                info = self._commit(index, whole)
            except ConflictError as error:
                if turn.again or not whole.repeats or not self._lacks_base(whole, error):
                    raise
                text = f"{whole.base} was dropped, so everything is written anew: {error}"
                self._emit(Event("base-gone", text, {"step": index.snapshot.step}))
                return SaveOutcome(error=from_error(error, rank=0), again=True)
            return self._tagged(info, tags)
        except CkptError as error:
            return SaveOutcome(error=from_error(error, rank=0))
        except Exception as error:  # noqa: BLE001  a thread's border: all ranks wait for an outcome
            wrapped = InternalError(
                f"unexpected error while committing. snapshot={index.snapshot} cause={error!r}"
            )
            return SaveOutcome(error=from_error(wrapped, rank=0))

    def _lacks_base(self, whole: Receipt, error: ConflictError) -> bool:
        """Whether nothing but the base that is gone keeps the snapshot from being committed."""
        journal = self._target.journal
        assert journal is not None, "rank 0 has the log"
        if whole.base is None or isinstance(error, FencedError | SupersededError):
            return False
        return journal.refresh().find(whole.base) is None

    def _gather(self, turn: Turn, own: Receipt) -> Receipt:
        """The receipt of all ranks for this turn. Each has then received the outcome of the one
        before, which is freed."""
        before, self._last_turn = self._last_turn, turn
        receipts = [own]
        rank = own.ranks
        while rank < self._channel.size:
            message = self._wait(
                f"receipt/{turn.name}/{rank}",
                f"{own.snapshot} of rank {rank} and others of its node",
                rank=rank,
            )
            receipt = msgspec.msgpack.decode(message, type=Receipt)
            receipts.append(receipt)
            rank += max(1, receipt.ranks)
        self._forget(before)
        self._leads = tuple(receipt.rank for receipt in receipts[1:])
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
        journal = self._target.journal
        assert journal is not None, "rank 0 has the log"
        metadata = index.metadata
        if different := diverged(whole):
            self._emit(diverged_event(index.snapshot, different))
            metadata = _marked(metadata, different)
        manifest = Manifest(
            job=journal.job,
            snapshot=index.snapshot,
            world_size=self._channel.size,
            base=whole.base,
            parts=whole.refs,
            size_bytes=whole.size_bytes,
            new_bytes=whole.new_bytes,
            created_unix_s=time.time(),
            metadata=metadata,
        )
        return journal.commit(manifest, epoch=self._target.epoch(), proven=whole.stores)

    def _tagged(self, info: SnapshotInfo, tags: tuple[str, ...]) -> SaveOutcome:
        """Tag the committed snapshot. It stays durable if a tag fails."""
        journal = self._target.journal
        assert journal is not None, "rank 0 has the log"
        for done, tag in enumerate(tags):
            try:
                journal.tag(tag, info.id, epoch=self._target.epoch())
            except CkptError as error:
                text = f"{info.id} is durable, but could not be tagged. tag={tag!r} cause={error}"
                return SaveOutcome(
                    replace(info, tags=tags[:done]), RemoteError(error.code, text, 0)
                )
        return SaveOutcome(replace(info, tags=tags))

    def _forget(self, turn: Turn) -> None:
        """Free the messages of a turn that every rank has completed. Its leads are always the
        same."""
        if turn.n >= 1:
            self._channel.forget(f"outcome/{turn.name}")
            for rank in self._leads:
                self._channel.forget(f"receipt/{turn.name}/{rank}")

    def _wait(self, key: str, awaited: str, *, rank: int) -> bytes:
        """Wait for a message of ``rank`` while it is there. A rank that left has posted all its
        messages."""
        left = f"bye/{rank}"
        leaves = not (isinstance(self._channel, StayingMailbox) and self._channel.stays)

        def stop() -> bool:
            return self._closing or (leaves and self._channel.peek(left) is not None)

        try:
            return wait_for_message(
                self._channel, key, timeout_s=PEER_WAIT_S, awaited=awaited, stop=stop
            )
        except UnavailableError:
            message = self._channel.peek(key)  # it may have been posted just before the rank left
            if message is None:
                raise
            return message
