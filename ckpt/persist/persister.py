"""From a sealed slot to a committed snapshot, beside training.

Each rank has one persister: a thread that takes sealed slots in order. For each it writes the new chunks and its part, posts a
receipt, and waits for the outcome. Rank 0's also gathers the receipts, commits, and posts the outcome. A failure anywhere
fails that one snapshot on all ranks with the same error; the next one starts afresh.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from ckpt.backends.base import Backend
from ckpt.commit.journal import Journal
from ckpt.encode.choose import Compression
from ckpt.encode.pack_sizes import PackSizes
from ckpt.encode.persist import packs_at_most, persist
from ckpt.encode.sparse import default_budget_bytes, thin
from ckpt.errors import CkptError, ConflictError, InternalError, UnavailableError, UsageError
from ckpt.link.message import RemoteError
from ckpt.link.remote import from_error, to_error
from ckpt.manifest.canonical import ready
from ckpt.manifest.manifest import Manifest, PartRef
from ckpt.observe.events import Event, Tell
from ckpt.persist.channel import Channel, wait_for
from ckpt.persist.queue import CallQueue
from ckpt.persist.sealed import Sealed
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo, StagedIndex

__all__ = ["Persister", "Place", "Sealed", "check_shared", "one_base"]

T = TypeVar("T")

PEER_WAIT_S = 7200.0
"""How long a rank waits for another's word on one snapshot, before it takes that rank for dead."""

ABANDON_STORE_S = 5.0
"""How long an abandoned save is waited for; it goes on behind, and ends with the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and as whom a rank writes."""

    backend: Backend
    writer: str
    epoch: Callable[[], int]
    """The writer's epoch, asked when a record is written: what an older epoch captured is committed under the current one."""
    journal: Journal | None
    """Rank 0's handle on the commit log; None on the other ranks."""


class _Receipt(msgspec.Struct, frozen=True):
    snapshot: SnapshotId
    ref: PartRef | None = None
    size_bytes: int = 0
    new_bytes: int = 0
    error: RemoteError | None = None
    base: SnapshotId | None = None
    """The snapshot whose chunks this rank refers to."""
    shared: Mapping[str, tuple[int, str]] | None = None


class _Outcome(msgspec.Struct, frozen=True):
    info: SnapshotInfo | None = None
    error: RemoteError | None = None
    """Why there is no ``info``; or beside one, why the snapshot, durable as it is, lacks a tag."""


class Persister:
    """One rank's queue of snapshots to make durable, in order.

    ``base`` is the committed snapshot whose chunks may be referred to (None: none is known), ``known`` where this rank's
    chunks of it lie. Every rank sees the same outcomes in the same order, so all ranks always have the same base.
    """

    def __init__(
        self, channel: Channel, place: Place, *, compression: Compression, verify: bool, tell: Tell,
        base: SnapshotId | None = None, known: Mapping[Digest, ChunkLocation] | None = None,
    ) -> None:  # fmt: skip
        self._channel = channel
        self._place = place
        self._writer = place.writer
        self._compression = compression
        self._verify = verify
        self._tell = tell
        self._base = base
        self._known: Mapping[Digest, ChunkLocation] = known or {}
        self._pack_sizes = PackSizes(place.backend)
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
        """Snapshots handed in and not settled yet. On rank 0, settled means that every rank has let go of its slot."""
        return self._count - self._settled

    def submit(self, staged: Sealed, *, tags: tuple[str, ...]) -> Future[SnapshotInfo]:
        """Queue a sealed slot; the future gives the commit's facts or the error. Every rank submits the same sequence."""
        self._count += 1
        n = self._count
        return self._calls.submit(lambda: self._run(n, staged, tags))

    def refuse(self, snapshot: SnapshotId, error: CkptError) -> Future[None]:
        """Take part in a snapshot that this rank could not stage: all ranks learn that it failed, and why.

        The future is done when the snapshot is settled; it gives no error.
        """
        self._count += 1
        n = self._count
        return self._calls.submit(lambda: self._refuse(n, snapshot, error))

    def refer_to(self, base: SnapshotId, known: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot refer to chunks of ``base``; nothing once one was handed in. Every rank calls it alike."""
        if self._count == 0:
            self._base, self._known = base, known

    def refer_next(self, base: SnapshotId, known: Mapping[Digest, ChunkLocation]) -> None:
        """As ``refer_to``, in the queue's order: what is handed in next may refer to ``base``, unless a base is known then."""

        def refer() -> None:
            if self._base is None:
                self._base, self._known = base, known

        self._calls.submit(refer)

    def write_as(self, writer: str) -> None:
        """Write what is handed in next under another writer's name, which nobody used before.

        For a snapshot that is handed in again: its first part may be committed, and a key's bytes never change.
        """

        def change() -> None:
            self._writer, self._packs_written = writer, 0

        self._calls.submit(change)

    def call(self, call: Callable[[], T]) -> Future[T]:
        """Do ``call`` in the queue's thread, after what was handed in before and before what comes later."""
        return self._calls.submit(call)

    def close(self) -> None:
        """Wait until the queue is empty and end the thread."""
        self._calls.close()

    def stop_waiting(self) -> None:
        """Wait for no other rank any more."""
        self._closing = True

    def abandon(self, timeout_s: float | None = None) -> bool:
        """Drop what has not begun, wait for no other rank any more and only briefly for the store, and end the thread.

        Waits ``timeout_s`` seconds at most (None: ABANDON_STORE_S); returns whether the thread ended.
        """
        self.stop_waiting()
        return self._calls.close(cancel=True, timeout_s=ABANDON_STORE_S if timeout_s is None else timeout_s)

    def _run(self, n: int, staged: Sealed, tags: tuple[str, ...]) -> SnapshotInfo:
        began = time.monotonic()
        try:
            receipt, locations = self._write(staged)
            self._channel.post(f"receipt/{n}/{self._channel.rank}", msgspec.msgpack.encode(receipt))
            if self._channel.rank == 0:
                self._channel.post(f"outcome/{n}", msgspec.msgpack.encode(self._settle(n, staged, tags)))
            word = self._wait(f"outcome/{n}", f"rank 0's commit of {staged.index.snapshot}", rank=0)
            outcome = msgspec.msgpack.decode(word, type=_Outcome)
            if outcome.info is None:
                assert outcome.error is not None, "an outcome has one or the other"
                raise to_error(outcome.error)
        except CkptError as error:
            if isinstance(error, ConflictError):  # perhaps the base was dropped: refer to nothing next time
                self._base, self._known = None, {}
            self._tell(_failed(staged.index.snapshot, error))
            raise
        except Exception as error:  # a thread's border
            wrapped = InternalError(
                f"saving failed in an unforeseen way. snapshot={staged.index.snapshot} cause={error!r}"
            )
            self._tell(_failed(staged.index.snapshot, wrapped))
            raise wrapped from error
        finally:
            self._settled += 1
        self._base, self._known = staged.index.snapshot, locations
        self.durable_at_s = time.monotonic()
        self.last_info = outcome.info
        self._tell(_durable(outcome.info, time.monotonic() - began))
        if outcome.error is not None:
            untagged = to_error(outcome.error)
            self._tell(
                Event("tag-failed", str(untagged), {"step": outcome.info.step, "code": untagged.code}, alarm=True)
            )
            raise untagged
        return outcome.info

    def _refuse(self, n: int, snapshot: SnapshotId, error: CkptError) -> None:
        self._tell(_failed(snapshot, error))
        receipt = _Receipt(snapshot, error=from_error(error, rank=self._channel.rank))
        try:
            self._channel.post(f"receipt/{n}/{self._channel.rank}", msgspec.msgpack.encode(receipt))
            if self._channel.rank == 0:
                self._channel.post(f"outcome/{n}", msgspec.msgpack.encode(_Outcome(error=receipt.error)))
                self._gather(n, snapshot)  # not settled before every rank has let go of its slot
        except Exception as lost:  # noqa: BLE001  a thread's border; nobody holds this call's future
            self._tell(_failed(snapshot, InternalError(f"the ranks can't be told. snapshot={snapshot} cause={lost!r}")))
        finally:
            self._settled += 1

    def _write(self, staged: Sealed) -> tuple[_Receipt, Mapping[Digest, ChunkLocation]]:
        """Write this rank's chunks and part, then let go of the slot. What fails becomes a receipt that says so."""
        index = staged.index
        size = sum(shard.size_bytes for shard in index.shards)
        try:
            done = persist(
                index, staged.data, known=self._worth_keeping(index, size), backend=self._place.backend,
                writer=self._writer, pack_start=self._packs_written, compression=self._compression, verify=self._verify,
            )  # fmt: skip
        except CkptError as error:
            return _Receipt(index.snapshot, error=from_error(error, rank=self._channel.rank)), {}
        except Exception as error:  # noqa: BLE001  a thread's border: without a receipt the other ranks would wait for ever
            wrapped = InternalError(f"writing failed in an unforeseen way. snapshot={index.snapshot} cause={error!r}")
            wrapped.__cause__ = error
            return _Receipt(index.snapshot, error=from_error(wrapped, rank=self._channel.rank)), {}
        finally:
            self._packs_written += packs_at_most(index)
            staged.let_go()
        self._pack_sizes.note(done.pack_bytes)
        receipt = _Receipt(
            index.snapshot, ref=done.part_ref, size_bytes=size, new_bytes=done.new_bytes,
            base=self._base if self._known else None, shared=staged.shared,
        )  # fmt: skip
        return receipt, done.locations

    def _worth_keeping(self, index: StagedIndex, size_bytes: int) -> Mapping[Digest, ChunkLocation]:
        """What is known, but for chunks in packs of which little is needed: those are written anew."""
        wanted = {digest for shard in index.shards for digest in shard.digests}
        sizes = self._pack_sizes.of(self._known[digest].pack for digest in wanted if digest in self._known)
        return thin(self._known, wanted, sizes, budget_bytes=default_budget_bytes(size_bytes)).known

    def _settle(self, n: int, staged: Sealed, tags: tuple[str, ...]) -> _Outcome:
        try:
            receipts = self._gather(n, staged.index.snapshot)
            for receipt in receipts:
                if receipt.error is not None:
                    return _Outcome(error=receipt.error)
            captured = [receipt.snapshot for receipt in receipts]
            if len(set(captured)) > 1:
                by_rank = ", ".join(f"{rank}: {snapshot}" for rank, snapshot in enumerate(captured))
                raise ConflictError(
                    f"the ranks captured different steps, which never make one snapshot. captured_by_rank={by_rank}; every "
                    "rank must run and save the same steps"
                )
            check_shared([receipt.shared for receipt in receipts])
            return self._tagged(self._commit(staged, receipts), tags)
        except CkptError as error:
            return _Outcome(error=from_error(error, rank=0))
        except Exception as error:  # noqa: BLE001  a thread's border: without an outcome the other ranks would wait for ever
            wrapped = InternalError(
                f"committing failed in an unforeseen way. snapshot={staged.index.snapshot} cause={error!r}"
            )
            return _Outcome(error=from_error(wrapped, rank=0))

    def _gather(self, n: int, snapshot: SnapshotId) -> list[_Receipt]:
        """Every rank's receipt for ``n``. Then each has seen the outcome of ``n - 1``, whose messages are freed."""
        receipts = [self._receipt(n, rank, snapshot) for rank in range(self._channel.size)]
        self._forget(n - 1)
        self.passed_step = max(self.passed_step, min(receipt.snapshot.step for receipt in receipts))
        return receipts

    def _receipt(self, n: int, rank: int, snapshot: SnapshotId) -> _Receipt:
        word = self._wait(f"receipt/{n}/{rank}", f"rank {rank}'s part of {snapshot}", rank=rank)
        return msgspec.msgpack.decode(word, type=_Receipt)

    def _commit(self, staged: Sealed, receipts: list[_Receipt]) -> SnapshotInfo:
        journal = self._place.journal
        assert journal is not None, "rank 0 has the log"
        parts = tuple(receipt.ref for receipt in receipts if receipt.ref is not None)
        manifest = Manifest(
            job=journal.job, snapshot=staged.index.snapshot, world_size=self._channel.size,
            base=one_base([receipt.base for receipt in receipts]), parts=parts,
            size_bytes=sum(r.size_bytes for r in receipts), new_bytes=sum(r.new_bytes for r in receipts),
            created_unix_s=time.time(), metadata=staged.index.metadata,
        )  # fmt: skip
        return journal.commit(manifest, epoch=self._place.epoch())

    def _tagged(self, info: SnapshotInfo, tags: tuple[str, ...]) -> _Outcome:
        """Tag what is committed. A tag that fails makes the snapshot no less durable."""
        journal = self._place.journal
        assert journal is not None, "rank 0 has the log"
        for done, tag in enumerate(tags):
            try:
                journal.tag(tag, info.id, epoch=self._place.epoch())
            except CkptError as error:
                text = f"{info.id} is durable, but could not be tagged. tag={tag!r} cause={error}"
                return _Outcome(replace(info, tags=tags[:done]), RemoteError(error.code, text, 0))
        return _Outcome(replace(info, tags=tags))

    def _forget(self, n: int) -> None:
        """Free the messages of a snapshot that every rank has settled."""
        if n >= 1:
            self._channel.forget(f"outcome/{n}")
            for rank in range(self._channel.size):
                self._channel.forget(f"receipt/{n}/{rank}")

    def _wait(self, key: str, what: str, *, rank: int) -> bytes:
        """Wait for a message of ``rank``, while it is there. One that left has posted all that it ever will."""
        left = f"bye/{rank}"
        stop = (lambda: self._closing) if rank == self._channel.rank else lambda: self._closing or self._has(left)
        try:
            return wait_for(self._channel, key, timeout_s=PEER_WAIT_S, what=what, stop=stop)
        except UnavailableError:
            word = self._channel.peek(key)  # posted just before it left
            if word is None:
                raise
            return word

    def _has(self, key: str) -> bool:
        return self._channel.peek(key) is not None


def one_base(bases: Sequence[SnapshotId | None]) -> SnapshotId | None:
    """The snapshot that the ranks refer to chunks of; None: no rank refers to any. Raises ConflictError where they differ.

    A commit names one base. Chunks of another could be deleted before it, with nobody the wiser.
    """
    found = {base for base in bases if base is not None}
    if len(found) > 1:
        raise ConflictError(
            f"the ranks refer to chunks of different snapshots. bases={', '.join(map(str, sorted(found)))}; the next snapshot "
            "refers to none"
        )
    return next(iter(found), None)


def check_shared(sets: Sequence[Mapping[str, tuple[int, str]] | None]) -> None:
    """Each rank's ``shared_sets``: raises UsageError unless all members of a group hold the same leaves in the same order.

    Each rank stores its share of them, computed from what it holds itself; were the sets different, the shares would overlap
    or leave gaps, and the snapshot could not be read. With a rank whose sets are unknown (None), the others are compared.
    """
    complete = None not in sets
    found: dict[str, list[tuple[int, tuple[int, str]]]] = {}
    for rank, one in enumerate(sets):
        for group, held in (one or {}).items():
            found.setdefault(group, []).append((rank, held))
    for members in found.values():
        (first, (size, _)), kinds = members[0], {held for _, held in members}
        if len(kinds) > 1 or (complete and len(members) != size):
            raise UsageError(
                f"replicas hold different leaves, so their shares don't fit together. first_rank={first} replicas={size} "
                f"ranks_with_any={len(members)} different={len(kinds)}; keep the same optimizer state on each"
            )


def _failed(snapshot: SnapshotId, error: CkptError) -> Event:
    text = f"the snapshot of {snapshot} is not durable: {error}"
    return Event("save-failed", text, {"epoch": snapshot.epoch, "step": snapshot.step, "code": error.code}, alarm=True)


def _durable(info: SnapshotInfo, seconds: float) -> Event:
    facts = {"epoch": info.epoch, "step": info.step, "size_bytes": info.size_bytes, "new_bytes": info.new_bytes}
    return Event("durable", f"{info.id} is durable", {**facts, "seconds": round(seconds, 3)})


ready(_Receipt, _Outcome)
