"""A session's log: reading it, opening epochs, and waiting for the final flush of the last run's
keeper.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format.keys import writer_name
from ckpt.ipc.client import KeeperClient, KeeperSpec
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    WIRE_VERSION,
    Choices,
    GetChoices,
    GetStatus,
    Hello,
    KeeperReport,
    Number,
    OpenEpoch,
    RemoteError,
    Status,
    from_error,
    to_error,
)
from ckpt.log.catalog import candidates, info_of, load_manifest
from ckpt.log.journal import Journal
from ckpt.log.select import ResumeChoice
from ckpt.log.state import LogState
from ckpt.save.persister import SaveTarget
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.options import SessionOptions, retention_of
from ckpt.session.restoring import RestoreCandidate
from ckpt.values import SnapshotId, SnapshotInfo


class SessionLog:
    """The log of one store. ``named``: the job's name as the user gave it, if any; ``job``: that,
    or the name made of the address.
    """

    def __init__(self, backend: Backend, *, job: str, named: str | None) -> None:
        self._backend = backend
        self._job = job
        self._named = named
        self._journal: Journal | None = None
        self._may_write = False

    def state(self) -> LogState:
        """The log's fold, fresh from the store. Raises NotFoundError if there is no store yet."""
        if self._journal is None:
            self._journal = Journal.open(self._backend)
        return self._journal.refresh()

    def newest_epoch(self) -> int:
        """The newest epoch that the store knows; 0 if there is no store yet."""
        try:
            return self.state().epoch
        except NotFoundError:
            return 0

    def committed(self, snapshot: SnapshotId) -> SnapshotInfo | None:
        """The facts of a snapshot if the store has it committed. None also if the store does not
        answer.
        """
        try:
            return next(iter(self.infos([snapshot])), None)
        except CkptError:
            return None

    def has(self, snapshot: SnapshotId) -> bool:
        """Whether the store has the snapshot committed. False if the store does not answer."""
        try:
            return any(entry.snapshot == snapshot for entry in self.state().snapshots)
        except CkptError:
            return False

    def infos(self, snapshots: Sequence[SnapshotId]) -> tuple[SnapshotInfo, ...]:
        """The facts of those of ``snapshots`` that the log has committed."""
        if not snapshots:
            return ()
        state = self.state()
        return tuple(
            info_of(load_manifest(self._backend, state, snapshot), state)
            for snapshot in snapshots
            if state.find(snapshot) is not None
        )

    def open_epoch(self, resume: SnapshotId | None, *, chosen: ResumeChoice | None = None) -> int:
        """Open the next epoch as the continuation of ``resume``; returns its number. Makes the
        store if there is none.

        ``chosen``: what was seen as the newest snapshot, see ``Journal.open_epoch``.
        """
        if self._journal is None or not self._may_write:
            self._journal = self._open_to_write()
            self._may_write = True
        return self._journal.open_epoch(resume=resume, choice=chosen)

    def tag(self, name: str, snapshot: SnapshotId, *, epoch: int) -> None:
        """Tag a snapshot. Nothing if no log was opened."""
        if self._journal is not None:
            self._journal.tag(name, snapshot, epoch=epoch)

    def save_target(self, epoch: int, *, rank: int) -> SaveTarget:
        """Where this process itself makes its share of an epoch's snapshots durable. Rank 0 writes
        the log.
        """
        return SaveTarget(
            backend=self._backend,
            writer=writer_name(socket.gethostname(), secrets.token_hex(8)),
            epoch=lambda: epoch,
            journal=self._journal if rank == 0 else None,
        )

    def _open_to_write(self) -> Journal:
        """A store without a log becomes this job's: named by the user, else by the address."""
        try:
            Journal.open(self._backend, job=self._named)
            job = self._named
        except NotFoundError:
            job = self._job
        return Journal.open(self._backend, job=job, create=True)


class SessionLineage:
    """The snapshots that a session may continue from, and the epochs that continue from them. For
    the training thread.

    The keeper answers and opens if there is one (``link``), else this process does.
    """

    def __init__(
        self, log: SessionLog, options: SessionOptions, *, link: Callable[[], KeeperLink | None]
    ) -> None:
        self._log = log
        self._options = options
        self._link = link
        self._chosen: ResumeChoice | None = None
        """The log's newest snapshot, as it was when this process last read the log."""

    def newest_first(self) -> Sequence[RestoreCandidate]:
        """The snapshots of the lineage, best first, with staged ones; empty if there is no store
        yet.

        Raises UnavailableError if none can be seen but some may exist on stores that do not answer.
        """
        link = self._link()
        if link is not None and link.lost is None:
            choices = link.ask(GetChoices(), Choices).choices
            return [
                RestoreCandidate(choice.snapshot, choice.tier == "staged") for choice in choices
            ]
        self._chosen = ResumeChoice(None)
        try:
            state = self._log.state()
        except NotFoundError:
            return ()
        self._chosen = ResumeChoice(state.newest())
        committed = [RestoreCandidate(snapshot) for snapshot in candidates(state)]
        if not committed and state.hole is not None:
            # Damage must not pass for absence: a fresh start would abandon what is behind it.
            raise IntegrityError(
                "no snapshot can be seen, and the log is damaged: "
                f"{state.hole.reason} run ckpt scrub"
            )
        if not committed and state.short:
            # A fresh start would abandon the snapshots of the stores that do not answer.
            raise UnavailableError(
                f"no snapshot can be seen, but some may exist: {state.short} repeat when more "
                "stores answer"
            )
        return committed

    def open_next(self, resume: SnapshotId | None, *, newest: bool = False) -> tuple[int, str]:
        """On rank 0, open the next epoch as the continuation of ``resume``; returns its number and
        its origin.

        The origin is the write id of the record that opens it, which staged indexes carry; ""
        without a keeper. ``newest``: ``resume`` was the best of the last ``newest_first``; raises
        NewerSnapshotError if it no longer is.
        """
        link = self._link()
        if link is not None:
            retention = retention_of(self._options)
            request = OpenEpoch(resume=resume, retention=retention, newest=newest)
            opened = link.ask(request, Number)
            return opened.number, opened.origin
        return self._log.open_epoch(resume, chosen=self._chosen if newest else None), ""

    def open_for_ranks(self, resume: SnapshotId | None, *, newest: bool) -> str:
        """As ``open_next``, with the result or the error as a message for all ranks: see
        ``parse_opened``.
        """
        try:
            epoch, origin = self.open_next(resume, newest=newest)
            return f"{epoch} {origin}"
        except CkptError as error:
            message = from_error(error, rank=0)
            return f"{message.code} {message.text}"


def parse_opened(text: str) -> tuple[int, str]:
    """The epoch and origin in rank 0's message. Raises the error that the message holds instead."""
    number, _, rest = text.partition(" ")
    if not number.isdigit():
        raise to_error(RemoteError(number, rest, 0))
    return int(number), rest


# ---- final flush: before a store is read, an idle keeper finishes what the last run left staged.
# It is only asked for its status, as a tool does: reading must neither become a launch nor take a
# lingering keeper's slots from it.

FLUSH_WAIT_S = 60.0
"""How long a reader waits for it; then it reads the store as it is."""

ANSWER_WAIT_S = 5.0
FLUSH_POLL_S = 0.1

LINGERING = "lingering"
"""The state of a keeper without connected ranks."""


def await_final_flush(
    spec: KeeperSpec,
    emit: Emit,
    *,
    has: Callable[[SnapshotId], bool],
    timeout_s: float | None = None,
) -> None:
    """Wait, ``timeout_s`` seconds at most (None: FLUSH_WAIT_S), until the job's keeper has made
    durable what it holds.

    Returns at once if no keeper is alive or a run uses it. ``has`` says whether the store has a
    snapshot already: a keeper that took over from another one does not know. Raises nothing: what
    is not durable by then is not read.
    """
    calls = _call(spec)
    if calls is None:
        return
    wait_s = FLUSH_WAIT_S if timeout_s is None else timeout_s
    until_s = time.monotonic() + wait_s
    reported = False
    try:
        calls.call(
            Hello(version=WIRE_VERSION, role="tool", pid=os.getpid()), timeout_s=ANSWER_WAIT_S
        )
        while True:
            report = calls.ask(GetStatus(), Status, timeout_s=ANSWER_WAIT_S).report
            remaining = unflushed(report)
            if report is None or remaining is None:
                return
            if time.monotonic() > until_s:
                text = (
                    f"{remaining} is not durable after {wait_s:.0f} s, "
                    f"the store is read without it. store={spec.store}"
                )
                emit(Event("unsettled", text, {"waited_s": wait_s}, alarm=True))
                return
            if not reported:
                if not report.uploads and report.complete is not None and has(report.complete):
                    return
                reported = True
                emit(
                    Event(
                        "settling",
                        f"waiting until {remaining} of the last run is durable, "
                        f"at most {wait_s:.0f} s",
                    )
                )
            time.sleep(FLUSH_POLL_S)
    except (CkptError, OSError) as error:
        # The keeper ended, or is of another release: the store has what is durable.
        emit(
            Event(
                "keeper-silent",
                f"the last run's keeper does not answer, the store is read as it is: {error}",
            )
        )
    finally:
        calls.close()


def unflushed(report: KeeperReport | None) -> str | None:
    """What an idle keeper still has to make durable, for a message; None if there is nothing or a
    run uses the keeper.
    """
    if report is None or report.state != LINGERING:
        return None
    durable = report.durable.id if report.durable is not None else None
    if report.complete is not None and (durable is None or report.complete > durable):
        return f"the snapshot of {report.complete}"
    return f"the uploads in progress ({report.uploads})" if report.uploads else None


def _call(spec: KeeperSpec) -> KeeperClient | None:
    try:
        connection = spec.folder.try_connect()
    except UsageError:  # a folder that can't be trusted has no keeper of ours
        return None
    return KeeperClient(MessageSocket(connection)) if connection is not None else None
