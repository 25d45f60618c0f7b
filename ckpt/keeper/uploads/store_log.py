"""A job's log and store as its keeper uses them: the calls that may wait for a store. Never called
by the keeper's loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import TimeoutError as WaitTimeoutError
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import (
    CkptError,
    ConflictError,
    FencedError,
    InternalError,
    NotFoundError,
    SupersededError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event
from ckpt.format.records import Open
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import Retention, StoreBehind
from ckpt.keeper.uploads.choices import (
    LAUNCH_PREFIX_CHARS,
    NOT_WRITTEN,
    launch_prefix,
    missing_opens,
    own_staged,
    restorable,
)
from ckpt.log.fold import empty
from ckpt.log.journal import Journal, new_write_id
from ckpt.log.select import ResumeChoice, require_newest
from ckpt.log.state import LogState, OpenedEpoch
from ckpt.maintenance.caretaker import StoreCaretaker
from ckpt.maintenance.gc.rounds import GcRounds, RetentionSettings
from ckpt.maintenance.retention import parse_policy
from ckpt.threads import start_thread
from ckpt.values import MembershipEpoch, SnapshotId

T = TypeVar("T")

RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0
"""Pauses between tries to write an epoch's record to a store that does not take it: doubled from
the first to the last."""

CARE_WAIT_S = 5.0
"""How long the end waits for the maintenance of the stores to stop."""


@dataclass(frozen=True, slots=True)
class IssuedEpoch:
    """An epoch that was issued before its record is written. ``write_id`` makes repeating the write
    harmless."""

    epoch: int
    resume: SnapshotId | None
    write_id: str


@dataclass(frozen=True, slots=True)
class LogReading:
    """The log as it was read. ``ids``: write ids of its opens, those asked for and some more.

    ``log_id`` is "" if there is no store.
    """

    state: LogState
    ids: Mapping[int, str]
    log_id: str


class Term:
    """While this keeper may open epochs of the log: on one node always, with several nodes as long
    as the same nodes hold the same ranks and this one may act. Thread-safe.

    ``membership``: the newest membership epoch of the term, None on one node.
    """

    def __init__(self) -> None:
        self.membership: MembershipEpoch | None = None
        self._may_act: Callable[[], bool] = lambda: True
        self._over = False
        self._lock = threading.Lock()

    def begin_attempt(
        self, membership: MembershipEpoch | None, may_act: Callable[[], bool]
    ) -> None:
        """The term goes on in a later membership epoch. ``may_act``: whether this node may act now;
        asked in any thread."""
        self.membership, self._may_act = membership, may_act

    def end(self) -> None:
        """Nothing may be opened in this term any more."""
        with self._lock:
            self._over = True

    def require(self) -> None:
        """To be called right before each claim of a position in the log.

        Raises SupersededError once the term is over, UnavailableError while this node may not act.
        """
        if self._over:
            raise SupersededError(
                "cluster membership changed; the attempt that opens an epoch is over. "
                f"membership={self.membership}"
            )
        if not self._may_act():
            raise UnavailableError(
                "this node may not act now, as its lease was not renewed in time. "
                f"membership={self.membership} wait"
            )

    def while_lasting(self, do: Callable[[], T]) -> T:
        """The result of ``do``, which is quick, unless the term is over: it does not end
        meanwhile."""
        with self._lock:
            if self._over:
                raise SupersededError("cluster membership changed meanwhile.")
            return do()


@dataclass(frozen=True, slots=True)
class FirstOpen:
    """The first epoch of a launch, as it is asked for: what it continues from, and what is staged,
    with origins.

    ``settling``: no trainer runs, and it is opened only to commit the staged ``resume``.
    ``write_id`` makes repeating it harmless. ``chosen``: see ``Journal.open_epoch``. ``term``: in
    which it may be opened.
    """

    resume: SnapshotId | None
    staged: Mapping[SnapshotId, str]
    settling: bool
    write_id: str
    chosen: ResumeChoice | None = None
    term: Term = field(default_factory=Term)


@dataclass(frozen=True, slots=True)
class FirstOpened:
    """The log when the first epoch was opened: as it was before, the opens written then with the
    new one last, and their ids."""

    seen: LogReading
    opens: tuple[OpenedEpoch, ...]
    ids: Mapping[int, str]


def open_job_of(spec: KeeperSpec, emit: Emit) -> Backend:
    """The stores of a keeper's job."""
    # Imported only now, so that a keeper listens before it has loaded what stores need.
    opening = import_module("ckpt.backends.replicated.open")
    opened: Backend = opening.open_job_stores(
        spec.stores,
        spec.storage_options,
        write_quorum=spec.write_quorum,
        encryption_key=spec.encryption_key,
        emit=emit,
    )
    return opened


LOG_ID_WAIT_S = 2.0
"""How long a node that joins waits for its stores to say which log they hold."""


def log_id_of(spec: KeeperSpec, emit: Emit) -> str | None:
    """The id of the log that a job's stores hold now; None if they hold none, "" if they do not say
    so in time. Writes nothing."""

    def read() -> str | None:
        backend = open_job_of(spec, emit)
        try:
            return _log_id_at(backend)
        except NotFoundError:
            return None
        finally:
            backend.close()

    try:
        return start_thread(read, name="ckpt-log-id").result(LOG_ID_WAIT_S)
    except (CkptError, WaitTimeoutError):
        return ""  # whatever it is, the next use of the stores reports it


class StoreLog:
    """The store of one job. ``read`` and the first ``begin`` belong to one thread, all writing
    after it to that of rank 0.

    ``job`` names a store that is made here. ``named``: the user chose that name, so a store of
    another name is refused.

    It has more attributes than usual: reader, writer and maintenance share one store, which
    ``_renew`` replaces for all of them together.
    """

    def __init__(
        self,
        open_store: Callable[[], Backend],
        *,
        job: str,
        named: bool,
        emit: Emit,
        retry_first_s: float = RETRY_FIRST_S,
        scrub_every_s: float | None = None,
    ) -> None:
        self._open_store = open_store
        self._job = job
        self._named = named
        self._emit = emit
        self._retry_first_s = retry_first_s
        self._backend: Backend | None = None
        self._reader: Journal | None = None
        self._writer: Journal | None = None
        self._left: list[Backend] = []
        self._recheck = threading.Event()
        self._renewing = threading.Lock()
        self._tidying = threading.Lock()
        self._due: deque[tuple[IssuedEpoch, Term]] = deque()
        self._recorded = 0
        self._stopped = threading.Event()
        self._caretaker: StoreCaretaker | None = None
        self._scrub_every_s = scrub_every_s
        self._retention: Retention | None = None
        self._rounds: GcRounds | None = None

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

    def behind(self) -> tuple[StoreBehind, ...]:
        """The stores that are known to lack what others have. Opens and asks none."""
        backend = self._backend
        while backend is not None and not isinstance(backend, ReplicatedBackend):
            backend = getattr(backend, "inner", None)  # below encryption
        if backend is None:
            return ()
        return tuple(
            StoreBehind(store=found.url, objects=found.keys, more=found.overflow)
            for found in backend.behind()
            if found.keys or found.overflow
        )

    def check_log(self, log_id: str) -> None:
        """Raise UsageError if the stores hold another log, NotFoundError if they hold none."""
        found = _log_id_at(self.backend)
        if found != log_id:
            raise UsageError(f"found_log={found} log={log_id}")

    def recheck_store(self) -> None:
        """The store may have been replaced or removed: before it is used next, check which it
        is."""
        self.set_retention(None)
        self._recheck.set()

    def set_retention(self, retention: Retention | None) -> None:
        """What to drop from now on; None: nothing. It takes effect with the next snapshot that is
        submitted."""
        with self._tidying:
            if retention != self._retention:
                self._retention = retention
                self._stop_rounds(0.0)
            self._start_rounds()

    def committed(self) -> None:
        """A snapshot was committed: others may be dropped."""
        rounds = self._rounds
        if rounds is not None:
            rounds.on_commit()

    def store_full(self) -> None:
        """A snapshot was not stored, because a store is full: make room if a policy allows it."""
        rounds = self._rounds
        if rounds is not None:
            rounds.on_store_full()

    def restoring(self, busy: bool) -> None:
        """Whether trainers are about to restore: then nothing is dropped or deleted, whatever the
        grace is."""
        rounds = self._rounds
        if rounds is not None:
            (rounds.pause if busy else rounds.resume)()

    def tidy(self, *, begin: bool) -> bool:
        """The job is over: ``begin`` to drop and delete what is due without pauses; whether that is
        done."""
        rounds = self._rounds
        if begin and rounds is not None:
            rounds.start_last_round()
        return rounds is None or rounds.idle

    def read(self, epochs: Collection[int]) -> LogReading:
        """The log, fresh from the store, with the ids of the opens of ``epochs`` at least; empty if
        there is no store."""
        self._renew()
        if self._reader is None:
            try:
                self._reader = Journal.open(self.backend, job=self._job if self._named else None)
            except NotFoundError:
                return LogReading(empty(self._job), {}, "")
        # A journal of its own: the writer's serves one call at a time, and one to a dead store
        # takes long.
        return _read_log(self._reader, epochs)

    def begin(self, opening: FirstOpen) -> FirstOpened:
        """Make the store if there is none, and open a launch's first epoch. Raises whatever keeps
        it from being written.

        Epochs that are staged but have no record get theirs first. Raises ConflictError if another
        writer continued the job since the log was last read, so that ``resume`` is no staged
        snapshot of its lineage; if it committed a newer one (NewerSnapshotError); and if the store
        is another one.
        """
        term = opening.term
        term.require()
        if self._renew():
            opening = replace(opening, staged={})  # staged for another store, under its epochs
        # Epochs of an earlier launch, which must not be written any more.
        term.while_lasting(self._due.clear)
        if self._writer is None:
            self._writer = self._open_to_write(create=not opening.settling)
        journal = self._writer
        epochs = {pair.epoch for pair in opening.staged}
        reading = _read_log(journal, epochs)
        # ``again``: an earlier try wrote the record, and its answer was lost. Then all that follows
        # must end as it would have, so nothing is checked against a log that has this very record.
        resume, again = opening.resume, reading.state.seq_of(opening.write_id) is not None
        counted = own_staged(reading.state, reading.ids, opening.staged)
        if not again:
            require_newest(reading.state, resume, opening.chosen)
        if resume is not None and not again:
            _check_resume(reading, opening, resume)
        missing = missing_opens(reading.state, counted)
        named = {pair.epoch: origin for pair, origin in counted.items() if origin}
        # In order, before the new epoch: an open record must not precede those below it.
        for opened in missing:
            journal.append(
                Open(opened.epoch, opened.resume, term.membership),
                epoch=opened.epoch,
                write_id=named.get(opened.epoch),
                before_claim=term.require,
            )
        if opening.settling and not again:
            # Exactly the next epoch after the log as it was read: if another writer opened one in
            # between, it trains, and this append must fail instead of fencing it.
            epoch = max(reading.state.epoch, *(opened.epoch for opened in missing), 0) + 1
            journal.append(
                Open(epoch, resume, term.membership),
                epoch=epoch,
                write_id=opening.write_id,
                before_claim=term.require,
            )
        else:
            epoch = journal.open_epoch(
                resume=resume,
                write_id=opening.write_id,
                choice=opening.chosen,
                membership=term.membership,
                before_claim=term.require,
            )
        term.while_lasting(lambda: self._set_recorded(epoch))
        self._start_maintenance()
        ids = _read_log(journal, epochs | {epoch}).ids
        return FirstOpened(reading, (*missing, OpenedEpoch(epoch, NOT_WRITTEN, resume)), ids)

    def record(self, issued: IssuedEpoch, term: Term) -> None:
        """Write the record of an epoch that was issued in ``term``. Repeated, with an alarm, until
        the store takes it or the term is over.

        Raises FencedError if another writer opened an epoch in between, SupersededError if the
        job's nodes have another one now. An error that repeating can't help (a hole in the log) is
        raised too, and the record is tried again before the next one.
        """
        term.while_lasting(lambda: self._due.append((issued, term)))
        self._record_due()

    def writer_epoch(self) -> int:
        """The newest epoch whose record is written: this keeper is its writer. Writes records that
        are due first."""
        self._record_due()
        return self._recorded

    def is_newest_writer(self, journal: Journal) -> bool:
        """Whether the newest epoch in the log is the one that was recorded here last."""
        return self._recorded == journal.refresh().epoch

    def stop(self) -> None:
        """End all pauses between tries, and the maintenance of the stores."""
        self._stopped.set()
        self._stop_rounds(CARE_WAIT_S)
        if self._caretaker is not None:
            self._caretaker.stop(CARE_WAIT_S)

    def close(self) -> None:
        """Close the store."""
        for backend in (self._backend, *self._left):
            if backend is not None:
                backend.close()

    def _start_maintenance(self) -> None:
        backend = self.backend
        if self._caretaker is None and (
            isinstance(backend, MultiStoreBackend) or self._scrub_every_s is not None
        ):
            self._caretaker = StoreCaretaker(
                backend,
                has_newest_epoch=self.is_newest_writer,
                emit=self._emit,
                scrub_every_s=self._scrub_every_s,
            )
        with self._tidying:
            self._start_rounds()

    def _start_rounds(self) -> None:
        if self._rounds is None and self._retention is not None and self._writer is not None:
            keep = RetentionSettings(
                policy=parse_policy(self._retention.keep),
                grace_s=self._retention.grace_s,
                adapts=self._retention.adapts,
            )
            self._rounds = GcRounds(
                self.backend, keep, epoch=lambda: self._recorded, emit=self._emit
            )
            self._rounds.pause()  # trainers that open an epoch restore next

    def _stop_rounds(self, timeout_s: float) -> None:
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            rounds.stop(timeout_s)

    def _open_to_write(self, *, create: bool) -> Journal:
        job = self._job
        if not self._named:
            try:
                job = Journal.open(self.backend).job
            except NotFoundError:
                job = self._job
        return Journal.open(self.backend, job=job, create=create)

    def _renew(self) -> bool:
        """Leave the journals of a store that is no longer there, if that is to be checked; whether
        it was so."""
        with self._renewing:
            if not self._recheck.is_set():
                return False
            journal = self._reader or self._writer
            backend = self._open_store() if journal is not None else None
            self._recheck.clear()
            if journal is None or backend is None:
                return False
            try:
                same = Journal.open(backend).log_id == journal.log_id
            except NotFoundError:
                same = False
            except BaseException:
                self._recheck.set()
                self._close_unless_used(backend)
                raise
            if same:
                self._close_unless_used(backend)
                return False
            if self._backend is not None and self._backend is not backend:
                self._left.append(self._backend)  # closed at the end: uploads may still use it
            self._backend, self._reader, self._writer = backend, None, None
            with self._tidying:
                self._stop_rounds(0.0)
            if self._caretaker is not None:
                self._caretaker.stop(CARE_WAIT_S)
                self._caretaker = None
            return True

    def _close_unless_used(self, backend: Backend) -> None:
        if backend is not self._backend:
            backend.close()

    def _record_due(self) -> None:
        while self._due:
            issued, term = self._due[0]
            self._record(issued, term)

            def recorded(epoch: int = issued.epoch) -> None:
                self._due.popleft()
                self._set_recorded(epoch)

            # In another term the queue is another thread's, whose first epoch emptied it.
            term.while_lasting(recorded)

    def _set_recorded(self, epoch: int) -> None:
        self._recorded = epoch

    def _record(self, issued: IssuedEpoch, term: Term) -> None:
        pause_s, reported = self._retry_first_s, ""
        while True:
            try:
                self._append(issued, term)
                return
            except CkptError as error:
                if not error.retry:
                    raise
                if str(error) != reported:
                    reported = str(error)
                    text = (
                        f"epoch {issued.epoch} is issued but not in the log yet; commits wait for "
                        f"it: {reported}"
                    )
                    self._emit(
                        Event(
                            "open-waits",
                            text,
                            {"epoch": issued.epoch, "code": error.code},
                            alarm=True,
                        )
                    )
            if self._stopped.wait(pause_s):
                raise UnavailableError(
                    f"the keeper ends before the log could be written. epoch={issued.epoch} "
                    f"why={reported}"
                )
            pause_s = min(2 * pause_s, RETRY_LAST_S)

    def _append(self, issued: IssuedEpoch, term: Term) -> None:
        try:
            self.journal.append(
                Open(issued.epoch, issued.resume, term.membership),
                epoch=issued.epoch,
                write_id=issued.write_id,
                before_claim=term.require,
            )
        except SupersededError:
            raise
        except ConflictError as error:
            newest = self.journal.refresh().epoch
            if newest < issued.epoch:
                raise
            raise FencedError(
                f"another writer opened an epoch of this job. newest={newest} mine={issued.epoch} "
                "stop this one"
            ) from error


def new_origin(after: str = "") -> str:
    """A write id for an open: with the launch prefix of ``after``, or with a new one."""
    return launch_prefix(after or new_write_id()) + new_write_id()[LAUNCH_PREFIX_CHARS:]


def _log_id_at(backend: Backend) -> str:
    """The id of the log that a store holds; raises NotFoundError if it holds none, also not at a
    second look."""
    try:
        return Journal.open(backend).log_id
    except NotFoundError:
        # A network file system remembers that a file is missing until its folder is opened.
        next(iter(backend.list("")), None)
        return Journal.open(backend).log_id


def _read_log(journal: Journal, epochs: Collection[int]) -> LogReading:
    state = journal.refresh()
    ids = {}
    for opened in state.opens:
        write_id = state.write_id_at(opened.seq)
        if write_id is None and (opened.epoch in epochs or opened.epoch == state.epoch):
            write_id = journal.write_id_of(opened.seq)
        if write_id is not None:
            ids[opened.epoch] = write_id
    return LogReading(state, ids, journal.log_id)


def _check_resume(reading: LogReading, opening: FirstOpen, resume: SnapshotId) -> None:
    """Raise ConflictError if ``resume`` is only staged, and the log has another writer's epoch
    under its epoch's number."""
    if resume not in opening.staged or (
        not opening.settling and reading.state.find(resume) is not None
    ):
        return
    may_continue = reading.state.epoch > 0 or not opening.settling
    if not may_continue or resume not in restorable(
        reading.state, reading.ids, {resume: opening.staged[resume]}
    ):
        raise ConflictError(
            f"another writer continued this job, not from what is staged here. resume={resume} "
            f"newest={reading.state.epoch} restore anew"
        )
