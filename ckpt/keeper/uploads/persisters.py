"""The persisters of this node's ranks: one queue each, started and left together. Their shares form
one part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ckpt.errors import CkptError, InternalError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.ipc.mailbox import InProcessMailbox, InProcessRoom, RankMailbox
from ckpt.keeper.uploads.store_log import StoreLog
from ckpt.keeper.uploads.submissions import Submission, Submissions
from ckpt.log.journal import StoreProof
from ckpt.save.chunks import Compression
from ckpt.save.persister import LocalRanks, Persister, SaveTarget, new_writer
from ckpt.save.sealed import SealedSlot
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

T = TypeVar("T")

Settled = Callable[[int, Submission, SnapshotInfo | None, CkptError | None, bool], None]
"""A rank is done with a submission: the facts, or why it failed; and whether its slot was submitted
at all (else refused)."""


class Persisters:
    """Submits shares to the ranks' persisters and notes them in ``submissions``; ``settled`` is
    called for each, in the loop."""

    def __init__(
        self,
        submissions: Submissions,
        *,
        ranks: int,
        compression: Compression,
        post: Callable[[Callable[[], object]], None],
        emit: Emit,
        settled: Settled,
    ) -> None:
        self._submissions = submissions
        self._ranks = ranks
        self._compression = compression
        self._post = post
        self._emit = emit
        self._settled = settled
        self._persisters: list[Persister] = []
        self._left: list[Persister] = []
        self._epoch: _Epoch | None = None
        self.channel_of: Callable[[int], RankMailbox] | None = None
        """Makes the mailbox of each local rank if other nodes have ranks too. Read by ``start``."""

    def __bool__(self) -> bool:
        """Whether there are persisters: an epoch was opened."""
        return bool(self._persisters)

    def start(self, log: StoreLog) -> None:
        """Start the persisters, for the store that ``log`` has now."""
        mailboxes, channel_of = InProcessRoom(), self.channel_of
        channels = [
            channel_of(rank)
            if channel_of
            else InProcessMailbox(mailboxes, rank=rank, size=self._ranks)
            for rank in range(self._ranks)
        ]
        local_ranks = LocalRanks(channels[0].rank, self._ranks)
        self._epoch = _Epoch(log.writer_epoch)
        writes_log = channels[0].rank == 0
        proof = StoreProof(log.backend, log.journal if writes_log else None)
        for rank, channel in enumerate(channels):
            target = SaveTarget(
                backend=log.backend,
                writer=new_writer(),
                epoch=self._epoch,
                journal=log.journal if channel.rank == 0 else None,
                proof=proof,
            )
            self._persisters.append(
                Persister(
                    channel,
                    target,
                    compression=self._compression,
                    verify=True,
                    emit=self._emit if rank == 0 else _silent,
                    local_ranks=local_ranks,
                )
            )

    def leave(self) -> None:
        """The store, or the nodes, are others now: what is in flight fails, and known chunks are
        forgotten."""
        if self._epoch is not None:
            self._epoch.over = True
        # Not joined here: a thread that waits for a dead store must not block the loop. ``close``
        # does.
        for persister in self._persisters:
            persister.abandon(0.0)
        self._left = [
            persister for persister in (*self._left, *self._persisters) if not persister.ended
        ]
        self._persisters = []

    def refer_next(
        self, rank: int, base: SnapshotId, locations: Mapping[Digest, ChunkLocation]
    ) -> None:
        """Let what ``rank`` submits next refer to chunks of ``base``."""
        if self._persisters:
            self._persisters[rank].refer_next(base, locations)

    def call(self, call: Callable[[], T]) -> Future[T]:
        """Make ``call`` after all that was submitted, and before all that follows."""
        return self._persisters[0].call(call)

    def submit(self, rank: int, sealed: SealedSlot, tags: tuple[str, ...]) -> Submission:
        """Submit a rank's share."""
        snapshot = sealed.index.snapshot
        submission = self._submissions.submit(rank, snapshot, tags, sealed.index)
        persister = self._persisters[rank]
        tail = self._submissions.tail
        if any(one == snapshot and n < submission.n for n, one, _ in tail):
            # A trainer submits again what failed. Its part may be in the store, see below.
            persister.write_as(new_writer())

        def settled(future: Future[SnapshotInfo]) -> None:
            # In the persister's thread, before it takes its next call and changes ``last_info``.
            last = persister.last_info
            info = last if last is not None and last.id == snapshot else None
            error = error_of(future)
            if future.cancelled():
                sealed.free()
            self._post(lambda: self._settled(rank, submission, info, error, True))

        persister.submit(sealed, tags=tags).add_done_callback(settled)
        return submission

    def refuse(self, rank: int, snapshot: SnapshotId, error: CkptError) -> None:
        """A rank has no share to submit."""
        submission = self._submissions.submit(rank, snapshot, (), error)
        refused = self._persisters[rank].submit_failure(snapshot, error)
        refused.add_done_callback(
            lambda _: self._post(lambda: self._settled(rank, submission, None, error, False))
        )

    def submit_again(
        self, sealed: Mapping[int, SealedSlot], tags: tuple[str, ...] = ()
    ) -> Submission:
        """Submit all ranks' shares of one snapshot that may have been submitted before."""
        submission: Submission | None = None
        for rank, slot in sealed.items():
            # Its part may be in the store already, named by a commit that was never answered: it
            # must not be overwritten.
            self._persisters[rank].write_as(new_writer())
            submission = self.submit(rank, replace(slot, shared=None), tags)
        assert submission is not None, "there is at least one rank"
        return submission

    def close(self, deadline_s: float) -> bool:
        """Drop what has not begun and end the threads by then (monotonic); whether they ended."""
        every = [*self._persisters, *self._left]
        for persister in every:
            persister.stop_waiting()
        ended = [persister.abandon(max(0.0, deadline_s - time.monotonic())) for persister in every]
        return all(ended)


class _Epoch:
    """The epoch under which persisters commit. Once they are left there is none: a commit in flight
    must not land in a later one."""

    def __init__(self, newest: Callable[[], int]) -> None:
        self._newest = newest
        self.over = False

    def __call__(self) -> int:
        """Raises UnavailableError once the persisters are left."""
        epoch = self._newest()
        if self.over:
            raise UnavailableError("cluster membership or store changed. commit nothing")
        return epoch


def error_of(future: Future[T]) -> CkptError | None:
    """Why a call failed, as an error of this package; None if it did not."""
    if future.cancelled():
        return UnavailableError("the keeper ended before this was done.")
    error = future.exception()
    if error is None or isinstance(error, CkptError):
        return error
    wrapped = InternalError(f"unexpected error in a keeper. cause={error!r}")
    wrapped.__cause__ = error
    return wrapped


def _silent(event: Event) -> None:
    """Rank 0's persister reports what concerns all ranks."""
