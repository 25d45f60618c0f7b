"""Making staged snapshots durable where a keeper does it: hand slots over, learn what became of
them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from ckpt.errors import CkptError, InternalError, UnavailableError
from ckpt.events import Emit
from ckpt.ipc.messages import Outcome, to_error
from ckpt.save import persister as told
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.keeper.slots import SharedSlots
from ckpt.session.staging import StagedSlot
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo


@dataclass(frozen=True, slots=True, eq=False)
class _PendingSubmission:
    snapshot: SnapshotId
    began_s: float
    future: Future[SnapshotInfo] = field(default_factory=Future)


class KeeperPersister:
    """What ``Persister`` is without a keeper: one rank's snapshots of one epoch, in the order in
    which all ranks hand them in.

    Nothing of what was handed in is lost with this process. Becomes the link's listener: one at a
    time.
    """

    def __init__(self, link: KeeperLink, slots: SharedSlots, *, emit: Emit) -> None:
        self._link = link
        self._slots = slots
        self._tell = emit
        self._changed = threading.Lock()
        self._pending: list[_PendingSubmission] = []
        self._any = False
        self.durable_at_s: float | None = None
        """When the last snapshot became durable, by the monotonic clock."""
        self.last_info: SnapshotInfo | None = None
        """The last snapshot that became durable."""
        self.passed_step = -1
        """The last step whose boundary every rank is known to have passed."""
        link.on_outcome(self._settle)
        link.on_lost(self._fail_all)

    @property
    def in_flight(self) -> int:
        """Snapshots handed in and not settled yet."""
        with self._changed:
            return len(self._pending)

    def submit(self, staged: StagedSlot, *, tags: tuple[str, ...]) -> Future[SnapshotInfo]:
        """Hand a sealed slot to the keeper; the future gives the commit's facts or the error.

        Every rank submits the same sequence. On return the keeper will persist it even if this
        process is killed, unless the future has an error already.
        """
        slot, snapshot = staged.slot, staged.index.snapshot
        one = self._expect(snapshot)
        self._slots.hand_over(slot)
        try:
            self._link.persist(
                snapshot,
                index=slot.number,
                generation=slot.generation,
                tags=tags,
                shared=staged.shared,
            )
        except CkptError as error:
            self._slots.take_back(slot)
            self._fail(one, error)
        finally:
            staged.release()
        return one.future

    def submit_failure(self, snapshot: SnapshotId, error: CkptError) -> None:
        """Take part in a snapshot that this rank could not stage: all ranks learn that it failed,
        and why."""
        one = self._expect(snapshot)
        try:
            self._link.refuse(snapshot, error)
        except CkptError as lost:
            self._fail(one, lost)

    def refer_to(self, base: SnapshotId, known: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot refer to chunks of ``base``; nothing once one was handed in. Every
        rank calls it alike.

        ``known`` is what was read from the store. A keeper that is gone needs to know nothing: the
        next call tells.
        """
        if not self._any and self._link.lost is None:
            self._link.known(base, known)

    def close(self) -> None:
        """Wait until everything that was handed in is settled, or the keeper is gone."""
        with self._changed:
            futures = [one.future for one in self._pending]
        wait(futures)

    def abandon(self) -> None:
        """Wait for nothing any more. The keeper goes on with what it was handed."""
        self._fail_all(
            UnavailableError(
                "the session ended before the snapshot was durable; the keeper goes on with it"
            ),
            quiet=True,
        )

    def _expect(self, snapshot: SnapshotId) -> _PendingSubmission:
        """Before the keeper is told: its answer may come at once."""
        one = _PendingSubmission(snapshot, time.monotonic())
        one.future.set_running_or_notify_cancel()  # nobody can cancel what the keeper does
        with self._changed:
            self._any = True
            self._pending.append(one)
        return one

    def _settle(self, outcome: Outcome) -> None:
        """A snapshot is settled on all ranks; perhaps one that an earlier attempt handed in."""
        snapshot, info = outcome.snapshot, outcome.info
        one = self._take(snapshot)
        self.passed_step = (
            max(self.passed_step, snapshot.step) if one is not None else self.passed_step
        )
        error = to_error(outcome.error) if outcome.error is not None else None
        if info is not None:
            self.durable_at_s, self.last_info = time.monotonic(), info
            self._tell(
                told.durable_event(
                    info, seconds=time.monotonic() - one.began_s if one is not None else 0.0
                )
            )
            if error is not None:
                self._tell(told.untagged_event(info, error))
        else:
            error = error or InternalError(
                f"the keeper settled a snapshot without a word. snapshot={snapshot}"
            )
            self._tell(told.failed_event(snapshot, error))
        if one is None:
            return
        if error is not None:
            one.future.set_exception(error)
        elif info is not None:
            one.future.set_result(info)

    def _take(self, snapshot: SnapshotId) -> _PendingSubmission | None:
        with self._changed:
            one = next((one for one in self._pending if one.snapshot == snapshot), None)
            if one is not None:
                self._pending.remove(one)
        return one

    def _fail(self, one: _PendingSubmission, error: CkptError) -> None:
        with self._changed:
            if one not in self._pending:  # the link's thread was faster
                return
            self._pending.remove(one)
        self._tell(told.failed_event(one.snapshot, error))
        one.future.set_exception(error)

    def _fail_all(self, error: CkptError, *, quiet: bool = False) -> None:
        with self._changed:
            left, self._pending = self._pending, []
        for one in left:
            if not quiet:
                self._tell(told.failed_event(one.snapshot, error))
            one.future.set_exception(error)
