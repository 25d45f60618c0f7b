"""A job's log and its store as a keeper uses them: the calls that may wait for a store. Never called by the keeper's loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.commit.fold import empty
from ckpt.commit.journal import Journal, new_write_id
from ckpt.commit.state import LogState, Opened
from ckpt.errors import CkptError, ConflictError, FencedError, InternalError, NotFoundError, UnavailableError
from ckpt.keeper.choices import NOT_WRITTEN, assumed
from ckpt.manifest.records import Open
from ckpt.observe.events import Event, Tell
from ckpt.values import SnapshotId

RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0
"""Pauses between tries to write an epoch's record to a store that doesn't take it: doubled from the first to the last."""


@dataclass(frozen=True, slots=True)
class Given:
    """An epoch that was given out before its record is written. ``write_id`` makes repeating the write harmless."""

    epoch: int
    resume: SnapshotId | None
    write_id: str


@dataclass(frozen=True, slots=True)
class Begun:
    """The log when the first epoch was opened: its fold before, and the opens written then, the new one last."""

    state: LogState
    opens: tuple[Opened, ...]


class StoreLog:
    """The store of one job. ``read`` and the first ``begin`` belong to one thread, all writing after it to rank 0's.

    ``job`` names a store that is made here; ``named``: the user chose it, so a store of another name is refused.
    """

    def __init__(
        self, open_store: Callable[[], Backend], *, job: str, named: bool, tell: Tell, retry_first_s: float = RETRY_FIRST_S
    ) -> None:  # fmt: skip
        self._open_store = open_store
        self._job = job
        self._named = named
        self._tell = tell
        self._retry_first_s = retry_first_s
        self._backend: Backend | None = None
        self._reader: Journal | None = None
        self._writer: Journal | None = None
        self._due: deque[Given] = deque()
        self._recorded = 0
        self._stopped = threading.Event()

    @property
    def backend(self) -> Backend:
        """The store; opened when first asked for."""
        if self._backend is None:
            self._backend = self._open_store()
        return self._backend

    @property
    def journal(self) -> Journal:
        """The log for writing, after ``begin``."""
        if self._writer is None:
            raise InternalError("the log is written before an epoch is open.")
        return self._writer

    def read(self) -> LogState:
        """The log's fold, fresh from the store; an empty one where there is no store yet."""
        if self._reader is None:
            try:
                self._reader = Journal.open(self.backend, job=self._job if self._named else None)
            except NotFoundError:
                return empty(self._job)
        # A journal of its own: the writer's serves one call at a time, and one to a dead store takes long.
        return self._reader.refresh()

    def begin(self, resume: SnapshotId | None, staged: frozenset[SnapshotId]) -> Begun:
        """Make the store where there is none, and open a launch's first epoch, going on from ``resume``.

        Epochs that are staged but have no record get theirs first. Raises whatever keeps the store from being written.
        """
        self._due.clear()  # of an earlier launch, and not to be written any more
        if self._writer is None:
            self._writer = self._open_to_write()
        state = self._writer.refresh()
        missing = assumed(state, staged)
        for opened in missing:
            self._writer.append(Open(opened.epoch, opened.resume), epoch=opened.epoch)
        epoch = self._writer.open_epoch(resume=resume)
        self._recorded = epoch
        return Begun(state, (*missing, Opened(epoch, NOT_WRITTEN, resume)))

    def record(self, given: Given) -> None:
        """Write the record of an epoch that was given out. Repeated, with an alarm, until the store takes it.

        Raises FencedError where another writer opened an epoch in between. What else can't be helped by repeating (a hole in
        the log) is raised too, and tried again before the next record.
        """
        self._due.append(given)
        self._record_due()

    def writer_epoch(self) -> int:
        """The newest epoch whose record is written: whose writer this keeper is. Writes what is due first."""
        self._record_due()
        return self._recorded

    def stop(self) -> None:
        """End all waiting between tries."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of the store."""
        if self._backend is not None:
            self._backend.close()

    def _open_to_write(self) -> Journal:
        job = self._job
        if not self._named:
            try:
                job = Journal.open(self.backend).job
            except NotFoundError:
                job = self._job
        return Journal.open(self.backend, job=job, create=True)

    def _record_due(self) -> None:
        while self._due:
            self._record(self._due[0])
            self._recorded = self._due.popleft().epoch

    def _record(self, given: Given) -> None:
        pause_s, told = self._retry_first_s, ""
        while True:
            try:
                self._append(given)
                return
            except CkptError as error:
                if not error.retry:
                    raise
                if str(error) != told:
                    told = str(error)
                    text = f"epoch {given.epoch} is given out but not in the log yet, commits wait for it: {told}"
                    self._tell(Event("open-waits", text, {"epoch": given.epoch, "code": error.code}, alarm=True))
            if self._stopped.wait(pause_s):
                raise UnavailableError(
                    f"the keeper ends before the log could be written. epoch={given.epoch} why={told}"
                )
            pause_s = min(2 * pause_s, RETRY_LAST_S)

    def _append(self, given: Given) -> None:
        try:
            self.journal.append(Open(given.epoch, given.resume), epoch=given.epoch, write_id=given.write_id)
        except ConflictError as error:
            newest = self.journal.refresh().epoch
            if newest < given.epoch:
                raise
            raise FencedError(
                f"another writer opened an epoch of this job. newest={newest} mine={given.epoch} stop this one"
            ) from error


def give_out(epoch: int, resume: SnapshotId | None) -> Given:
    """An epoch to be recorded later."""
    return Given(epoch, resume, new_write_id())
