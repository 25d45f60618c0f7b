"""A session's log: reading it, and opening epochs where no keeper does."""

from __future__ import annotations

import secrets
import socket

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, NotFoundError
from ckpt.format.keys import writer_name
from ckpt.log.journal import Journal
from ckpt.log.select import Chosen
from ckpt.log.state import LogState
from ckpt.save.persister import Place
from ckpt.values import SnapshotId


class Log:
    """The log of one store. ``named``: the job's name as the user gave it; ``job``: that or the address's own."""

    def __init__(self, backend: Backend, *, job: str, named: str | None) -> None:
        self._backend = backend
        self._job = job
        self._named = named
        self._journal: Journal | None = None
        self._may_write = False

    def state(self) -> LogState:
        """The log's fold, fresh from the store. Raises NotFoundError where there is no store yet."""
        if self._journal is None:
            self._journal = Journal.open(self._backend)
        return self._journal.refresh()

    def newest_epoch(self) -> int:
        """The newest epoch that the store knows; 0 where there is no store yet."""
        try:
            return self.state().epoch
        except NotFoundError:
            return 0

    def has(self, snapshot: SnapshotId) -> bool:
        """Whether the store has it committed, as far as the store can be asked."""
        try:
            return any(entry.snapshot == snapshot for entry in self.state().snapshots)
        except CkptError:
            return False

    def open_epoch(self, resume: SnapshotId | None, *, chosen: Chosen | None = None) -> int:
        """Open the next epoch, going on from ``resume``; its number. Makes the store where there is none.

        ``chosen``: see ``Journal.open_epoch``.
        """
        if self._journal is None or not self._may_write:
            self._journal = self._open_to_write()
            self._may_write = True
        return self._journal.open_epoch(resume=resume, chosen=chosen)

    def tag(self, name: str, snapshot: SnapshotId, *, epoch: int) -> None:
        """Tag a snapshot. Nothing where no log was opened."""
        if self._journal is not None:
            self._journal.tag(name, snapshot, epoch=epoch)

    def place(self, epoch: int, *, rank: int) -> Place:
        """Where this process makes its share of ``epoch``'s snapshots durable itself."""
        return Place(
            backend=self._backend, writer=writer_name(socket.gethostname(), secrets.token_hex(8)), epoch=lambda: epoch,
            journal=self._journal if rank == 0 else None,
        )  # fmt: skip

    def _open_to_write(self) -> Journal:
        """A store without a log becomes this job's, by the user's name or else its own address's."""
        try:
            Journal.open(self._backend, job=self._named)
            job = self._named
        except NotFoundError:
            job = self._job
        return Journal.open(self._backend, job=job, create=True)
