"""The writer's side of the log: each record is decided on the state that it follows.

Every append is the same loop: read what is new, decide on that state, try to create the record at
the next position, and start over if another writer was faster. Each record is created once.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from ckpt.backends.base import Backend
from ckpt.errors import (
    CkptError,
    CommitUnknownError,
    ConflictError,
    FencedError,
    IntegrityError,
    InternalError,
    NotFoundError,
    SupersededError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import Manifest
from ckpt.format.records import (
    Body,
    Commit,
    Drop,
    Open,
    Record,
    Stores,
    Tag,
    Untag,
    decode_record,
    make_record,
)
from ckpt.log.access import LogAccess
from ckpt.log.catalog import info_of
from ckpt.log.fold import fold, require_counted, void_error, void_if_appended
from ckpt.log.high_water import FILES, HighWaterMark
from ckpt.log.open import open_log
from ckpt.log.quorum import is_placeholder
from ckpt.log.reader import LogNote
from ckpt.log.replicated import ReplicatedLog
from ckpt.log.select import ResumeChoice, require_newest
from ckpt.log.sequencers import STATE_VARIABLE, Appended, KeyTaken, WriteUnknown
from ckpt.log.state import LogState, StoreSet
from ckpt.log.stored_fold import encode_fold, fold_due
from ckpt.values import MembershipEpoch, SnapshotId, SnapshotInfo

RACES_MAX = 64
"""How many other writers' records one append lets pass before it gives up."""
NOTES_MAX = 100
"""How many notes a journal keeps."""
ACCEPT_WAIT_S = 30.0
"""How long accepting a rollback waits until that is noted in the user's home."""

Draft = Callable[[LogState], tuple[Body, int]]
"""The record to write after a state, and its writer's epoch. Called again after each lost race."""


class Journal:
    """One process's access to one job's log, on one store or several.

    Thread-safe; calls wait for each other. Make one with ``Journal.open``. It keeps the last state
    that it read, so that ``refresh`` reads only what is new.
    """

    __slots__ = ("_access", "_lock", "_mark", "_notes", "_state", "_url")

    def __init__(self, access: LogAccess, url: str, mark: HighWaterMark | None = None) -> None:
        self._access = access
        self._url = url
        self._lock = threading.RLock()
        self._state: LogState | None = None
        self._mark = mark
        self._notes: deque[LogNote] = deque(maxlen=NOTES_MAX)

    @classmethod
    def open(cls, backend: Backend, *, job: str | None = None, create: bool = False) -> Journal:
        """The log of the stores behind ``backend``; ``create`` makes empty stores ``job``'s.

        Raises NotFoundError for empty stores without ``create``; UsageError if they belong to
        another job, to several logs, or are not the log's stores, and with ``create`` if one store
        cannot create a key only once; IntegrityError if a lone store's ``ckpt.json`` is damaged or
        missing; UnavailableError. Cost: reads one small object of each store.
        """
        mark = HighWaterMark(backend.url)
        return cls(open_log(backend, job=job, create=create, mark=mark), backend.url, mark)

    @property
    def access(self) -> LogAccess:
        """How the log is reached, for store maintenance."""
        return self._access

    @property
    def job(self) -> str:
        """The job's name."""
        return self._access.job

    @property
    def log_id(self) -> str:
        """The log's own id, 32 hex digits: the same on all its stores."""
        return self._access.log_id

    @property
    def notes(self) -> tuple[LogNote, ...]:
        """Problems that were worked around: folds passed over or not written. The last 100."""
        return tuple(self._notes)

    def refresh(self) -> LogState:
        """The state of the log now. Cost: one list, and one read per record that is new to this
        journal.

        A log that continues but cannot be read is no error here: see ``LogState.hole``. Raises
        UnavailableError; FormatVersionError for a record of a newer release.
        """
        with self._lock:
            return self._seen(self._access.read_new(self._started()))

    def accept_rollback(self) -> LogState:
        """Go on with what the stores hold, though more was seen from here before.

        Raises UnavailableError if the newest record there cannot be known, or if it cannot be noted
        on this machine that it is accepted: the next process would refuse the log again.
        """
        with self._lock:
            state = self._access.read_new(self._started())
            if state.stale_reason:
                raise UnavailableError(
                    f"what the stores hold is not known. why={state.stale_reason} repeat later"
                )
            if self._mark is not None:
                refused = self._mark.seen is not None
                self._mark.accept(state)
                if refused and (not FILES.settle(ACCEPT_WAIT_S) or FILES.trouble()):
                    raise UnavailableError(
                        f"what is accepted cannot be noted on this machine. why={FILES.trouble()} "
                        f"look after your home, or set {STATE_VARIABLE} to a folder on a local disk"
                    )
            return self._seen(state)

    @property
    def mark(self) -> HighWaterMark | None:
        """What was seen of the log from here before."""
        return self._mark

    def _seen(self, state: LogState) -> LogState:
        """Keep ``state`` as last read. If less is there than was seen before, that is said in
        ``LogState.short``: the newest record is not known then."""
        access = self._access
        silent = isinstance(access, ReplicatedLog) and bool(access.silent)
        if self._mark is not None and (reason := self._mark.judge(state, silent=silent)):
            state = replace(state, short=reason)
        elif self._mark is not None and not state.stale_reason:
            # A record counts for certain once another one follows.
            self._mark.advance(state, state.next_seq - 2)
        self._state = state
        return state

    def _started(self) -> LogState:
        """The state as last read; the one to start from if none was read."""
        if self._mark is not None:
            self._mark.look()
        if self._state is None:
            self._state, notes = self._access.read_start()
            self._notes.extend(notes)
        return self._state

    def _require_not_older(self) -> None:
        """Raise IntegrityError if more of the log was seen from here than the stores hold.

        UnavailableError if a store is silent, which may have it.
        """
        if self._mark is not None and self._mark.older:
            raise (UnavailableError if self._mark.silent else IntegrityError)(
                f"nothing is written to an older log. job={self.job!r} why={self._mark.older}"
            )

    def refresh_confirmed(self) -> LogState:
        """As ``refresh``, with a last record that certainly counts.

        A reader may take a last record whose writer has not finished, and which may not count in
        the end. Callers that delete, or that report a snapshot as durable, need it confirmed: it is
        first copied to enough stores. Raises CommitUnknownError if too few stores answer for that.
        """
        with self._lock:
            for _ in range(RACES_MAX):
                state = self.refresh()
                if self._confirmed(state):
                    return state
        raise ConflictError(
            f"other writers came first every time. races={RACES_MAX} job={self.job!r} repeat later"
        )

    def look_at_stores(self) -> int:
        """Before objects are written: learn on which stores they count. Returns a number for
        ``prove_stores``.

        Raises UnavailableError if a lone store is another one now, or none. Cost: one small read
        of a lone store; as ``refresh`` with several.
        """
        with self._lock:
            started = self._started()
            state, since = self._access.look_at_stores(started)
            if state is not started:  # else nothing was read that could be older than what was seen
                self._seen(state)
            return since

    def prove_stores(self, since: int) -> tuple[str, ...]:
        """The ids of the stores on which objects count. Cost: as ``refresh``.

        ``since``: from ``look_at_stores``, called before the objects were written. Raises
        UnavailableError if a store on which they counted at any time since then became another
        one, or none, whatever read the log meanwhile: what it acknowledged may be nowhere.
        """
        with self._lock:
            state, ids = self._access.prove_stores(self._started(), since)
            self._seen(state)
            return ids

    def append(
        self,
        body: Body,
        *,
        epoch: int,
        write_id: str | None = None,
        before_claim: Callable[[], object] = lambda: None,
    ) -> LogState:
        """Write ``body`` as the next record, for a writer of ``epoch``; the returned state includes
        it.

        Give a ``write_id``, and repeat it, if the call may be repeated after CommitUnknownError;
        that must happen before 1,024 other records are written. Raises FencedError if a newer epoch
        is open, ConflictError if the record would be void for another reason, CommitUnknownError if
        the store did not answer, IntegrityError if the log has a hole, UsageError if this process
        cannot append. ``before_claim``: see ``open_epoch``.
        """

        def draft(_: LogState) -> tuple[Body, int]:
            before_claim()
            return body, epoch

        state, seq = self._append(draft, write_id or new_write_id())
        require_counted(state, seq)
        return state

    def write_id_of(self, seq: int) -> str:
        """The write id of the record at ``seq``; empty if the record cannot be read.

        Reads the record if it is not among the last 1,024.
        """
        write_id = (
            self.refresh().write_id_at(seq) if self._state is None else self._state.write_id_at(seq)
        )
        if write_id is not None:
            return write_id
        try:
            return decode_record(self._access.record_at(seq)).write_id
        except (IntegrityError, NotFoundError):
            return ""

    def open_epoch(
        self,
        *,
        resume: SnapshotId | None,
        write_id: str | None = None,
        choice: ResumeChoice | None = None,
        membership: MembershipEpoch | None = None,
        before_claim: Callable[[], object] = lambda: None,
    ) -> int:
        """Open the next epoch, whose training resumes ``resume`` (None: starts afresh); returns its
        number.

        If several writers open one at the same time, each gets its own number and the greater
        fences the lower. Give a ``write_id`` if the call may be repeated, as for ``append``.
        ``choice``: when ``resume`` was chosen as the newest; raises NewerSnapshotError, and writes
        nothing, if a newer snapshot was committed since. ``membership``: of a job with several
        nodes; raises SupersededError if a later one has opened an epoch. ``before_claim`` is called
        right before each try to take a position in the log, and may raise.
        """

        def draft(state: LogState) -> tuple[Body, int]:
            require_newest(state, resume, choice)
            before_claim()
            epoch = state.epoch + 1
            return Open(epoch, resume, membership), epoch

        state, seq = self._append(draft, write_id or new_write_id())
        require_counted(state, seq)
        number = next((opened.epoch for opened in state.opens if opened.seq == seq), None)
        if number is None:
            raise InternalError(f"an open that counts is not in the state. seq={seq}")
        return number

    def commit(
        self, manifest: Manifest, *, epoch: int, proven: Sequence[Sequence[str]] | None = None
    ) -> SnapshotInfo:
        """Make the snapshot exist: store its manifest, then the commit record.

        All its parts must be stored before. ``proven``: for each node, the ids of the stores that
        took its objects (None: the caller wrote all of them through this journal's stores).
        Repeating the call with an equal manifest is always harmless. Raises as ``append`` does;
        UnavailableError if the manifest could not be stored, or if a node's objects are on stores
        that do not hold the log (then nothing is committed).
        """
        if manifest.job != self.job:
            raise UsageError(
                f"manifest of another job. manifest={manifest.job!r} store={self.job!r}"
            )
        data = manifest.encode()
        digest = digest_hex(data)
        body = Commit(manifest.snapshot, digest, manifest.base)
        with self._lock:
            # The order is a promise: parts before the manifest, the manifest before the record. So
            # a record that counts never names bytes that were not stored.
            state = self._before_commit(body, epoch)
            if not _committed(state, body):
                for ids in proven or ():
                    self._require_members(state, ids)
                self._put_manifest(keys.manifest_key(manifest.snapshot, digest), data)
                state = self._commit_record(body, epoch)
        return info_of(manifest, state)

    def drop(self, snapshots: Sequence[SnapshotId], *, floor: SnapshotId | None = None) -> LogState:
        """Drop snapshots; their bytes are deleted by a sweep later. Commits below ``floor`` become
        void.

        Snapshots that were dropped before are no error unless all were. Raises ConflictError for
        the newest snapshot and for tagged ones.
        """
        body = Drop(tuple(sorted(set(snapshots))), floor)
        return self._append_now(body)

    def change_stores(self, body: Stores, *, before: StoreSet | None) -> LogState:
        """Write the set of stores that holds the log, in place of ``before``, from which ``body``
        was made.

        Raises ConflictError if the set changed in the meantime, because that change would be
        undone; UsageError for a write quorum that the stores which exist can't meet: no record
        could ever follow, not even one that takes it back.
        """
        never_made = [store_id for store_id in body.ids if is_placeholder(store_id)]
        if body.write_quorum > len(body.ids) - len(never_made):
            raise UsageError(
                "the write quorum is more than the stores of the set that exist, so nothing could "
                f"be recorded any more. write_quorum={body.write_quorum} ids={list(body.ids)} "
                f"never_made={never_made} take a smaller one, or remove or replace those first"
            )

        def draft(state: LogState) -> tuple[Body, int]:
            if state.stores != before:
                raise ConflictError(
                    f"the set of stores was changed meanwhile. expected={before} "
                    f"found={state.stores} look again, then decide"
                )
            return body, state.epoch

        state, seq = self._append(draft, new_write_id())
        require_counted(state, seq)
        return state

    def tag(self, name: str, snapshot: SnapshotId, *, epoch: int | None = None) -> LogState:
        """Name a snapshot, which keeps it from being dropped; an existing name moves. Raises
        ConflictError.

        ``epoch`` is the writer's (None: the open one, for people's tools); FencedError if a newer
        is open.
        """

        def draft(state: LogState) -> tuple[Body, int]:
            if epoch is not None and epoch < state.epoch:
                kind = SupersededError if state.superseded_since(epoch) else FencedError
                raise kind(
                    f"a newer epoch is open. writer={epoch} newest={state.epoch} tag={name!r} stop "
                    "this writer: a newer one is active"
                )
            return Tag(name, snapshot), state.epoch

        state, seq = self._append(draft, new_write_id())
        require_counted(state, seq)
        return state

    def untag(self, name: str) -> LogState:
        """Remove a name. Raises ConflictError if there is no such tag."""
        return self._append_now(Untag(name))

    def _append_now(self, body: Body) -> LogState:
        state, seq = self._append(lambda state: (body, state.epoch), new_write_id())
        require_counted(state, seq)
        return state

    def _before_commit(self, body: Commit, epoch: int) -> LogState:
        """A state in which the snapshot is committed, or may be.

        Checked before the manifest is stored, so that a fenced writer leaves none behind.
        """
        for _ in range(RACES_MAX):
            state = self.refresh()
            if _committed(state, body):
                return self.refresh_confirmed()
            if self._check(state, self._make(state, body, epoch, new_write_id())):
                return state
        raise ConflictError(
            f"other writers came first every time. races={RACES_MAX} job={self.job!r} repeat later"
        )

    def _require_members(self, state: LogState, ids: Sequence[str]) -> None:
        """Raise UnavailableError unless objects on the stores ``ids`` are as durable as this log
        promises."""
        members, needed = self._access.members(state)
        if len(ids) < needed or not set(ids) <= set(members):
            raise UnavailableError(
                "a node wrote its share to stores that do not hold this log, or to too few. "
                f"its_stores={list(ids)} stores={list(members)} needed={needed}; mount the right "
                "store there, or name the same stores on all nodes; the next snapshot tries again"
            )

    def _commit_record(self, body: Commit, epoch: int) -> LogState:
        try:
            return self.append(body, epoch=epoch)
        except ConflictError:
            # Another keeper may have committed the very same snapshot in between.
            state = self.refresh_confirmed()
            if _committed(state, body):
                return state
            raise

    def _append(self, draft: Draft, write_id: str) -> tuple[LogState, int]:
        """The state that holds the record of ``write_id``, and that record's seq. The record may be
        void."""
        with self._lock:
            for _ in range(RACES_MAX):
                state = self.refresh()
                if (seq := state.seq_of(write_id)) is not None:
                    # Written by an earlier call whose reply was lost. Like any record it is
                    # reported only once it counts for good.
                    if self._confirmed(state):
                        return state, seq
                    continue
                record = self._make(state, *draft(state), write_id)
                if not self._check(state, record):
                    continue
                match self._access.append(state, record):
                    case Appended():
                        self._state = state = fold(state, [record])
                        if self._mark is not None:
                            self._mark.advance(state, record.seq)
                        self._store_fold(state)
                        return state, record.seq
                    case KeyTaken():
                        continue  # the next refresh reads what is there
                    case WriteUnknown(reason):
                        # Reading back proves nothing: the put may still land. Only repeating the
                        # same bytes settles it, so the caller decides.
                        raise CommitUnknownError(
                            "the store did not answer; the record may be there or appear later. "
                            f"key={keys.log_key(record.seq)} write_id={write_id} why={reason} "
                            "repeat the same call"
                        )
        raise ConflictError(
            f"other writers came first every time. races={RACES_MAX} job={self.job!r} repeat later"
        )

    def _confirmed(self, state: LogState) -> bool:
        """Whether the last record of ``state`` counts for good; False if another one has its
        position."""
        self._require_not_older()
        match self._access.confirm_last(state):
            case None:
                if self._mark is not None:
                    self._mark.advance(state, state.next_seq - 1)
                return True
            case KeyTaken():
                return False
            case WriteUnknown(reason):
                raise CommitUnknownError(
                    "the log's last record is on too few stores, and cannot be copied to more "
                    f"now. seq={state.next_seq - 1} why={reason} repeat the same call"
                )

    def _make(self, state: LogState, body: Body, epoch: int, write_id: str) -> Record:
        return make_record(
            body,
            job=self.job,
            seq=state.next_seq,
            epoch=epoch,
            write_id=write_id,
            prev=state.head_digest,
        )

    def _check(self, state: LogState, record: Record) -> bool:
        """Raise unless ``record`` may be written after ``state``, by this journal, and would count.

        False if it might count: the last record, on which that depends, does not count after all.
        The log must then be read again.
        """
        if state.hole is not None:
            raise IntegrityError(
                f"the log has a hole, so nothing can be added. key={keys.log_key(state.hole.seq)} "
                f"why={state.hole.reason} bring that object back from a copy of the store "
                f"({self._url})"
            )
        self._require_not_older()
        self._access.require_sequencer(state)
        if (void := void_if_appended(state, record)) is not None:
            # Void because of the last record, perhaps, which may not count: confirm that first.
            if not self._confirmed(state):
                return False
            raise void_error(void)
        return True

    def _put_manifest(self, key: str, data: bytes) -> None:
        match self._access.put_manifest(key, data):
            case KeyTaken(stored) if stored != data:
                raise IntegrityError(
                    f"a manifest's bytes differ from the digest in its key. key={key} "
                    f"store={self._url} delete that object and repeat"
                )
            case WriteUnknown(reason):
                raise UnavailableError(
                    "the manifest could not be stored, nothing is committed. "
                    f"key={key} why={reason}"
                )
            case _:
                return

    def _store_fold(self, state: LogState) -> None:
        seq = state.next_seq - 1
        if not fold_due(seq):
            return
        key = keys.fold_key(seq)
        try:
            data = encode_fold(state)
            result = self._access.put_fold(key, data)
        except CkptError as error:
            # A fold only saves reading time; the appended record counts without it.
            self._notes.append(LogNote("fold not written", key, str(error)))
            return
        if isinstance(result, WriteUnknown):
            self._notes.append(LogNote("fold not written", key, result.reason))
        elif isinstance(result, KeyTaken) and result.data != data:
            self._notes.append(LogNote("fold not written", key, "other bytes are there"))
        else:
            self._prune_folds()

    def _prune_folds(self) -> None:
        try:
            self._access.prune_folds()
        except CkptError as error:
            # They cost space alone; the writer of the next fold tries again.
            self._notes.append(LogNote("old folds not deleted", keys.FOLDS, str(error)))


class StoreProof:
    """Which stores take the objects of one node. Thread-safe.

    A disk that was unmounted leaves an empty place that takes objects like the store did. So the
    stores are looked at before the objects of each snapshot are written, which also excludes those
    that do not count and finds again those that came back, and once more after its part.
    ``journal``: the node's access to the log, if it has one; else one is opened on ``backend``.

    Snapshots are told apart by a number that rises with each submission, not by their id: one that
    is submitted again is written again, maybe to other stores.
    """

    __slots__ = ("_backend", "_journal", "_lock", "_looked", "_since")

    def __init__(self, backend: Backend, journal: Journal | None = None) -> None:
        self._backend = backend
        self._journal = journal
        self._lock = threading.Lock()
        self._looked = 0
        """The newest snapshot before which the stores were looked at."""
        self._since = 0

    def begin(self, number: int) -> None:
        """Before objects of the snapshot ``number`` are written: learn which stores count.

        The first of the node's ranks looks, for all. Cost and errors: ``Journal.look_at_stores``;
        after an error the next rank looks again.
        """
        with self._lock:
            if number > self._looked:
                self._since = self._log().look_at_stores()
                self._looked = number

    def finish(self, number: int) -> tuple[str, ...]:
        """After the objects of the snapshot ``number`` were written: the ids of the stores that
        took them.

        See ``Journal.prove_stores``. Raises InternalError unless ``begin`` was called for it last.
        """
        with self._lock:
            looked, since = self._looked, self._since
        if looked != number:
            raise InternalError(
                "the stores were not looked at before this snapshot, or for a later one since. "
                f"number={number} looked={looked}"
            )
        return self._log().prove_stores(since)

    def _log(self) -> Journal:
        if self._journal is None:
            self._journal = Journal.open(self._backend)
        return self._journal


def new_write_id() -> str:
    """A name for one attempt to write: 32 random hex digits."""
    return secrets.token_hex(16)


def _committed(state: LogState, body: Commit) -> bool:
    entry = state.find(body.snapshot)
    return entry is not None and entry.manifest_digest == body.manifest_digest
