"""Writing the log: one record at a time, each decided on the state that it follows, each created
once."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ckpt.backends.base import Backend
from ckpt.errors import (
    CkptError,
    CommitUnknownError,
    ConflictError,
    FencedError,
    IntegrityError,
    InternalError,
    NotFoundError,
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
from ckpt.log.open import open_log
from ckpt.log.reader import LogNote
from ckpt.log.select import ResumeChoice, require_newest
from ckpt.log.sequencers import Appended, KeyTaken, WriteUnknown
from ckpt.log.state import LogState, StoreSet
from ckpt.log.stored_fold import encode_fold, fold_due
from ckpt.values import SnapshotId, SnapshotInfo

RACES_MAX = 64
"""How many other writers' records one append lets pass before it gives up."""
NOTES_MAX = 100
"""How many notes a journal keeps."""

Draft = Callable[[LogState], tuple[Body, int]]
"""What to write after a state, and the epoch of its writer; asked anew after each lost race."""


class Journal:
    """One process's access to one job's log, in one store or several. Thread-safe; calls wait for
    each other.

    Make one with ``Journal.open``. It holds the last state that it read, so that ``refresh`` reads
    only what is new.
    """

    __slots__ = ("_access", "_lock", "_notes", "_state", "_url")

    def __init__(self, access: LogAccess, url: str) -> None:
        self._access = access
        self._url = url
        self._lock = threading.RLock()
        self._state: LogState | None = None
        self._notes: deque[LogNote] = deque(maxlen=NOTES_MAX)

    @classmethod
    def open(cls, backend: Backend, *, job: str | None = None, create: bool = False) -> Journal:
        """The log of the stores behind ``backend``; ``create`` makes them ``job``'s where they are
        empty.

        Raises NotFoundError for empty stores without ``create``; UsageError where they are another
        job's, several jobs', or not those that the log knows, and with ``create`` where one store
        can't create a key only once; IntegrityError where a lone store's ``ckpt.json`` is damaged
        or gone. Reads one small object of each store.
        """
        return cls(open_log(backend, job=job, create=create), backend.url)

    @property
    def access(self) -> LogAccess:
        """How the log is reached, for those who look after its stores."""
        return self._access

    @property
    def job(self) -> str:
        """The job's name."""
        return self._access.job

    @property
    def log_id(self) -> str:
        """The log's own id, 32 hex digits: the same in all its stores."""
        return self._access.log_id

    @property
    def notes(self) -> tuple[LogNote, ...]:
        """What went wrong beside the point and was got around: folds passed over or not written.
        The last 100."""
        return tuple(self._notes)

    def refresh(self) -> LogState:
        """The state of the log now. Cost: one list, and one read per record that is new to this
        journal.

        A log that goes on but can't be read is no error here: see ``LogState.hole``. Raises
        UnavailableError, and FormatVersionError for a record of a newer release.
        """
        with self._lock:
            if self._state is None:
                self._state, notes = self._access.read_start()
                self._notes.extend(notes)
            self._state = self._access.read_new(self._state)
            return self._state

    def refresh_confirmed(self) -> LogState:
        """As ``refresh``, with a last record that certainly counts: for who deletes, or tells that
        something is durable.

        A reader may take a record for the last one whose writer is not done, and which may come to
        nothing; here it is first brought to where it counts for good. Raises CommitUnknownError
        where too few stores answer for that.
        """
        with self._lock:
            for _ in range(RACES_MAX):
                state = self.refresh()
                if self._sure(state):
                    return state
        raise ConflictError(
            f"other writers came first every time. races={RACES_MAX} job={self.job!r} repeat later"
        )

    def append(self, body: Body, *, epoch: int, write_id: str | None = None) -> LogState:
        """Write ``body`` as the next record, for a writer of ``epoch``; the state returned includes
        it.

        Give a ``write_id`` (and repeat it) where the call itself may be repeated after
        CommitUnknownError; it must then be repeated before 1,024 other records are written. Raises
        FencedError where a newer epoch is open, ConflictError where the record would count for
        nothing for another reason, CommitUnknownError where the store did not answer,
        IntegrityError where the log has a hole, UsageError where this store can't give out places.
        """
        state, seq = self._append(lambda _: (body, epoch), write_id or new_write_id())
        require_counted(state, seq)
        return state

    def write_id_of(self, seq: int) -> str:
        """The write id of the record at ``seq``; empty where it can't be read. Reads it where it is
        old."""
        found = (
            self.refresh().write_id_at(seq) if self._state is None else self._state.write_id_at(seq)
        )
        if found is not None:
            return found
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
    ) -> int:
        """Open the next epoch, whose training goes on from ``resume`` (None: afresh), and return
        its number.

        Where another writer opens one at the same time, each gets its own number and the greater
        fences the lower. Give a ``write_id`` where the call may be repeated, as for ``append``.
        With ``chosen``, of when ``resume`` was taken for the newest there is: raises
        NewerSnapshotError, and nothing is written, where a newer one was committed since.
        """

        def draft(state: LogState) -> tuple[Body, int]:
            require_newest(state, resume, choice)
            epoch = state.epoch + 1
            return Open(epoch, resume), epoch

        state, seq = self._append(draft, write_id or new_write_id())
        require_counted(state, seq)
        found = next((opened.epoch for opened in state.opens if opened.seq == seq), None)
        if found is None:
            raise InternalError(f"an open that counts is not in the state. seq={seq}")
        return found

    def commit(self, manifest: Manifest, *, epoch: int) -> SnapshotInfo:
        """Make the snapshot exist: store its manifest, then the commit record. All its parts must
        be stored before.

        Repeating the call with an equal manifest is harmless at any time. Raises as ``append``
        does, and UnavailableError where the manifest could not be stored (then nothing is
        committed).
        """
        if manifest.job != self.job:
            raise UsageError(
                f"manifest of another job. manifest={manifest.job!r} store={self.job!r}"
            )
        data = manifest.encode()
        digest = digest_hex(data)
        body = Commit(manifest.snapshot, digest, manifest.base)
        with self._lock:
            state = self._before_commit(body, epoch)
            if not _committed(state, body):
                self._put_manifest(keys.manifest_key(manifest.snapshot, digest), data)
                state = self._commit_record(body, epoch)
        return info_of(manifest, state)

    def drop(self, snapshots: Sequence[SnapshotId], *, floor: SnapshotId | None = None) -> LogState:
        """Make snapshots no longer exist; their bytes are a sweep's to delete. ``floor``: commits
        below it count no more.

        Snapshots that are gone already are no error unless all are. Raises ConflictError for the
        newest and for tagged ones.
        """
        body = Drop(tuple(sorted(set(snapshots))), floor)
        return self._append_now(body)

    def change_stores(self, body: Stores, *, before: StoreSet | None) -> LogState:
        """Write which stores hold the log, in place of the set ``before``, on which ``body`` was
        made.

        Raises ConflictError where another change came first: what it took in or out would be
        undone.
        """

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
        """Name a snapshot, which keeps it from being dropped; a name that exists moves. Raises
        ConflictError.

        ``epoch`` is the writer's (None: whichever is open, for people's tools); FencedError where a
        newer one is open.
        """

        def draft(state: LogState) -> tuple[Body, int]:
            if epoch is not None and epoch < state.epoch:
                raise FencedError(
                    f"a newer epoch is open. writer={epoch} newest={state.epoch} tag={name!r} stop "
                    "this writer: another one "
                    "goes on"
                )
            return Tag(name, snapshot), state.epoch

        state, seq = self._append(draft, new_write_id())
        require_counted(state, seq)
        return state

    def untag(self, name: str) -> LogState:
        """Take a name away. Raises ConflictError where there is no such tag."""
        return self._append_now(Untag(name))

    def _append_now(self, body: Body) -> LogState:
        state, seq = self._append(lambda state: (body, state.epoch), new_write_id())
        require_counted(state, seq)
        return state

    def _before_commit(self, body: Commit, epoch: int) -> LogState:
        """The state in which the snapshot is committed, or may be: also a fenced writer's manifest
        shall not be left behind."""
        for _ in range(RACES_MAX):
            state = self.refresh()
            if _committed(state, body):
                return self.refresh_confirmed()
            if self._check(state, self._make(state, body, epoch, new_write_id())):
                return state
        raise ConflictError(
            f"other writers came first every time. races={RACES_MAX} job={self.job!r} repeat later"
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
        """The state that holds the record of ``write_id``, and that record's seq, which may be
        void."""
        with self._lock:
            for _ in range(RACES_MAX):
                state = self.refresh()
                if (seq := state.seq_of(write_id)) is not None:
                    if self._sure(state):
                        return state, seq
                    continue
                record = self._make(state, *draft(state), write_id)
                if not self._check(state, record):
                    continue
                match self._access.append(state, record):
                    case Appended():
                        self._state = state = fold(state, [record])
                        self._store_fold(state)
                        return state, record.seq
                    case KeyTaken():
                        continue  # the next refresh reads what is there
                    case WriteUnknown(why):
                        raise CommitUnknownError(
                            f"the store did not answer; the record may be there or come yet. "
                            f"key={keys.log_key(record.seq)} write_id={write_id} why={why} repeat "
                            "the same call"
                        )
        raise ConflictError(
            f"other writers came first every time. races={RACES_MAX} job={self.job!r} repeat later"
        )

    def _sure(self, state: LogState) -> bool:
        """Whether the last record of ``state`` counts for good; False where another came first."""
        match self._access.confirm_last(state):
            case None:
                return True
            case KeyTaken():
                return False
            case WriteUnknown(why):
                raise CommitUnknownError(
                    "the log's last record is on too few stores, and can't be brought to more "
                    f"now. seq={state.next_seq - 1} "
                    f"why={why} repeat the same call"
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
        """Raises unless ``record`` may be written after ``state``, by this journal, and would
        count.

        False where it might count, since the last record that the judgement rests on came to
        nothing: read the log again.
        """
        if state.hole is not None:
            raise IntegrityError(
                f"the log has a hole, so nothing can be added. key={keys.log_key(state.hole.seq)} "
                f"why={state.hole.reason} bring that object back from a copy of the store "
                f"({self._url})"
            )
        self._access.require_sequencer(state)
        if (void := void_if_appended(state, record)) is not None:
            if not self._sure(state):
                return False
            raise void_error(void)
        return True

    def _put_manifest(self, key: str, data: bytes) -> None:
        match self._access.put_manifest(key, data):
            case KeyTaken(found) if found != data:
                raise IntegrityError(
                    f"a manifest's bytes differ from the digest in its key. key={key} "
                    f"store={self._url} "
                    f"delete that object and repeat"
                )
            case WriteUnknown(why):
                raise UnavailableError(
                    f"the manifest could not be stored, nothing is committed. key={key} why={why}"
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
            found = self._access.put_fold(key, data)
        except CkptError as error:
            # Readers do without it; the record that was appended counts all the same.
            self._notes.append(LogNote("fold not written", key, str(error)))
            return
        if isinstance(found, WriteUnknown):
            self._notes.append(LogNote("fold not written", key, found.reason))
        elif isinstance(found, KeyTaken) and found.data != data:
            self._notes.append(LogNote("fold not written", key, "other bytes are there"))


def new_write_id() -> str:
    """A name for one attempt to write: 32 random hex digits."""
    return secrets.token_hex(16)


def _committed(state: LogState, body: Commit) -> bool:
    known = state.find(body.snapshot)
    return known is not None and known.manifest_digest == body.manifest_digest
