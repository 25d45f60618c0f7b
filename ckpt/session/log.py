"""A session's log: reading it, and opening epochs where no keeper does."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format.keys import writer_name
from ckpt.ipc.client import KeeperClient, KeeperSpec
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    WIRE_VERSION,
    GetStatus,
    Hello,
    KeeperReport,
    RemoteError,
    Status,
    from_error,
    to_error,
)
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.log.catalog import candidates
from ckpt.log.journal import Journal
from ckpt.log.select import ResumeChoice
from ckpt.log.state import LogState
from ckpt.save.persister import SaveTarget
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.options import SessionOptions, retention_of
from ckpt.session.restoring import RestoreCandidate
from ckpt.values import SnapshotId


class SessionLog:
    """The log of one store. ``named``: the job's name as the user gave it; ``job``: that or the
    address's own."""

    def __init__(self, backend: Backend, *, job: str, named: str | None) -> None:
        self._backend = backend
        self._job = job
        self._named = named
        self._journal: Journal | None = None
        self._may_write = False

    def state(self) -> LogState:
        """The log's fold, fresh from the store. Raises NotFoundError where there is no store
        yet."""
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

    def open_epoch(self, resume: SnapshotId | None, *, chosen: ResumeChoice | None = None) -> int:
        """Open the next epoch, going on from ``resume``; its number. Makes the store where there is
        none.

        ``chosen``: see ``Journal.open_epoch``.
        """
        if self._journal is None or not self._may_write:
            self._journal = self._open_to_write()
            self._may_write = True
        return self._journal.open_epoch(resume=resume, choice=chosen)

    def tag(self, name: str, snapshot: SnapshotId, *, epoch: int) -> None:
        """Tag a snapshot. Nothing where no log was opened."""
        if self._journal is not None:
            self._journal.tag(name, snapshot, epoch=epoch)

    def place(self, epoch: int, *, rank: int) -> SaveTarget:
        """Where this process makes its share of ``epoch``'s snapshots durable itself."""
        return SaveTarget(
            backend=self._backend,
            writer=writer_name(socket.gethostname(), secrets.token_hex(8)),
            epoch=lambda: epoch,
            journal=self._journal if rank == 0 else None,
        )

    def _open_to_write(self) -> Journal:
        """A store without a log becomes this job's, by the user's name or else its own
        address's."""
        try:
            Journal.open(self._backend, job=self._named)
            job = self._named
        except NotFoundError:
            job = self._job
        return Journal.open(self._backend, job=job, create=True)


# What a session may go on from, and the epochs that go on from it: by its keeper, or, without
# one, by this process.


class SessionLineage:
    """Used by the training thread. ``link``: the keeper, where there is one by now."""

    def __init__(
        self, log: SessionLog, options: SessionOptions, *, link: Callable[[], KeeperLink | None]
    ) -> None:
        self._log = log
        self._options = options
        self._link = link
        self._chosen: ResumeChoice | None = None
        """What the log's newest snapshot was when it was last read here."""

    def newest_first(self) -> Sequence[RestoreCandidate]:
        """The snapshots on the line, best first, staged ones too; none where there is no store
        yet."""
        link = self._link()
        if link is not None and link.lost is None:
            return [RestoreCandidate(one.snapshot, one.tier == "staged") for one in link.choices()]
        self._chosen = ResumeChoice(None)
        try:
            state = self._log.state()
        except NotFoundError:
            return ()
        self._chosen = ResumeChoice(state.newest())
        found = [RestoreCandidate(snapshot) for snapshot in candidates(state)]
        if not found and state.short:
            # Beginning afresh would leave behind what the silent stores hold.
            raise UnavailableError(
                f"no snapshot can be seen, and there may be some: {state.short} repeat when more "
                "answer"
            )
        return found

    def open_next(self, resume: SnapshotId | None, *, newest: bool = False) -> tuple[int, str]:
        """Rank 0: open the next epoch, going on from ``resume``; its number and what its staged
        indexes carry.

        ``newest``: that was the best of what ``newest_first`` gave last; raises NewerSnapshotError
        where it is that no more.
        """
        link = self._link()
        if link is not None:
            return link.open_epoch(resume, retention=retention_of(self._options), newest=newest)
        return self._log.open_epoch(resume, chosen=self._chosen if newest else None), ""

    def open_for_ranks(self, resume: SnapshotId | None, *, newest: bool) -> str:
        """As ``open_next``; what the other ranks are to hear of it, an error too. See
        ``parse_opened``."""
        try:
            epoch, origin = self.open_next(resume, newest=newest)
            return f"{epoch} {origin}"
        except CkptError as error:
            message = from_error(error, rank=0)
            return f"{message.code} {message.text}"


def parse_opened(word: str) -> tuple[int, str]:
    """The epoch and origin of rank 0's word about it. Raises the error that it met."""
    code, _, text = word.partition(" ")
    if not code.isdigit():
        raise to_error(RemoteError(code, text, 0))
    return int(code), text


# Before a store is read: let a keeper that nobody uses any more finish what the last run left
# staged.
#
# Only looks, as a tool does: reading must not become a launch, and must not take a lingering
# keeper's slots from it.

FLUSH_WAIT_S = 60.0
"""How long reading waits for it; then the store is read as it is."""

ANSWER_WAIT_S = 5.0
FLUSH_POLL_S = 0.1

LINGERING = "lingering"
"""The state of a keeper to which nobody is connected."""


def await_final_flush(
    spec: KeeperSpec,
    emit: Emit,
    *,
    has: Callable[[SnapshotId], bool],
    timeout_s: float | None = None,
) -> None:
    """Wait, ``timeout_s`` seconds at most (None: SETTLE_WAIT_S), until the job's keeper has made
    durable what it holds.

    Returns at once where no keeper lives or a run uses it. ``has`` says whether the store has a
    snapshot already: a keeper that took over from another one doesn't know. Raises nothing: what is
    not durable then isn't read.
    """
    calls = _call(spec)
    if calls is None:
        return
    wait_s = FLUSH_WAIT_S if timeout_s is None else timeout_s
    until_s = time.monotonic() + wait_s
    told = False
    try:
        calls.call(
            Hello(version=WIRE_VERSION, role="tool", pid=os.getpid()), timeout_s=ANSWER_WAIT_S
        )
        while True:
            report = calls.ask(GetStatus(), Status, timeout_s=ANSWER_WAIT_S).report
            left = unflushed(report)
            if report is None or left is None:
                return
            if time.monotonic() > until_s:
                text = f"{left} is not durable after {wait_s:.0f} s, the store is read without it. store={spec.store}"
                emit(Event("unsettled", text, {"waited_s": wait_s}, alarm=True))
                return
            if not told:
                if not report.uploads and report.complete is not None and has(report.complete):
                    return
                told = True
                emit(
                    Event(
                        "settling",
                        f"waiting until {left} of the last run is durable, at most {wait_s:.0f} s",
                    )
                )
            time.sleep(FLUSH_POLL_S)
    except (
        CkptError,
        OSError,
    ) as error:  # it ended, or is of another release: the store has what is durable
        emit(
            Event(
                "keeper-silent",
                f"the last run's keeper says nothing, the store is read as it is: {error}",
            )
        )
    finally:
        calls.close()


def unflushed(report: KeeperReport | None) -> str | None:
    """What a keeper that nobody uses still brings to the store, in words; None where there is
    nothing, or somebody uses it."""
    if report is None or report.state != LINGERING:
        return None
    durable = report.durable.id if report.durable is not None else None
    if report.complete is not None and (durable is None or report.complete > durable):
        return f"the snapshot of {report.complete}"
    return f"what is being uploaded ({report.uploads})" if report.uploads else None


def _call(spec: KeeperSpec) -> KeeperClient | None:
    try:
        found = JobFolder(spec.store, spec.job).try_connect()
    except UsageError:  # a folder that can't be trusted has no keeper of ours
        return None
    return KeeperClient(MessageSocket(found)) if found is not None else None
