"""How a journal reaches its log: on one store, or (``replicated``) on several.

What the records there mean is for the journal to decide.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.manifest import MANIFEST_BYTES_MAX
from ckpt.format.records import Record
from ckpt.format.store import JOB_BYTES_MAX, SEQUENCER_STORE, JobRecord
from ckpt.log.reader import (
    LogNote,
    prune_folds,
    read_job_record,
    read_new,
    read_start,
    record_alone,
    second_job_record,
    second_record,
)
from ckpt.log.sequencers import (
    Appended,
    KeyTaken,
    Sequencer,
    StoreSequencer,
    WriteUnknown,
    create_once,
    require_create_only,
)
from ckpt.log.state import LogState

# ---- one store's ``ckpt.json``


def open_store(backend: Backend, *, job: str | None, create: bool) -> JobRecord:
    """The store's job record; created for ``job`` if the store is empty and ``create`` is set.

    Raises as ``Journal.open`` does. Two processes that create it at once get the same record.
    """
    record = _read(backend)
    if record is None:
        _refuse_headless(backend)
        if not create:
            raise NotFoundError(
                f"no ckpt store here yet. store={backend.url} save a snapshot first, or check the "
                "address"
            )
        record = _create(backend, job)
    if job is not None and record.job != job:
        raise UsageError(
            f"the store belongs to another job. store={backend.url} its_job={record.job!r} "
            f"asked={job!r} use another prefix, or that job's name"
        )
    return record


def require_same_store(backend: Backend, record: JobRecord) -> None:
    """Raise UnavailableError if another store, or none, is now at the address of ``record``.

    A disk that was unmounted, or a folder that was moved, leaves an empty place that accepts
    objects like the store did. A record written there would be called durable, and no reader would
    find it. Cost: reads one small object.
    """
    current = _read(backend)
    if current != record:
        problem = (
            "missing."
            if current is None
            else f"another store's. store_id={current.store_id} expected={record.store_id}"
        )
        raise UnavailableError(
            f"store identity changed: its {keys.JOB_KEY} is {problem} store={backend.url} "
            "mount it or move it back, then repeat"
        )


def _read(backend: Backend) -> JobRecord | None:
    try:
        return read_job_record(backend)
    except NotFoundError:
        return None


def _refuse_headless(backend: Backend) -> None:
    """A log without ``ckpt.json`` is damage, not an empty store: a new id over old records would
    hide it."""
    first = next(iter(backend.list(keys.LOG)), None)
    if first is not None:
        raise IntegrityError(
            f"the store holds a log but no {keys.JOB_KEY}. store={backend.url} found={first.key} "
            f"bring {keys.JOB_KEY} back from a copy of the store"
        )


def _create(backend: Backend, job: str | None) -> JobRecord:
    if job is None:
        raise UsageError(f"a new store needs its job's name. store={backend.url} pass job=")
    require_create_only(backend)
    record = JobRecord(job=job, store_id=secrets.token_hex(16))
    match create_once(backend, keys.JOB_KEY, record.encode(), bytes_max=JOB_BYTES_MAX):
        case Appended():
            # Not before it is created: of two processes that create it, one has another id.
            backend.put(keys.copy_key(keys.JOB_KEY), [record.encode()])
            return record
        case KeyTaken(data):
            return JobRecord.decode(data)
        case WriteUnknown(reason):
            raise UnavailableError(
                f"the store did not answer while it was made. store={backend.url} why={reason}"
            )


class LogAccess(Protocol):
    """One job's log, on one store or several."""

    @property
    def job(self) -> str:
        """The job's name."""
        ...

    @property
    def log_id(self) -> str:
        """The log's id."""
        ...

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        """The state to start from, and notes about folds that were passed over."""
        ...

    def read_new(self, state: LogState) -> LogState:
        """``state`` and all records after it.

        Raises UnavailableError; FormatVersionError if a newer release wrote a record.
        """
        ...

    def record_at(self, seq: int) -> bytes:
        """The bytes of a record that counts. Raises NotFoundError, IntegrityError,
        UnavailableError."""
        ...

    def look_at_stores(self, state: LogState) -> tuple[LogState, int]:
        """Before objects are written: learn on which stores they count. The number is for
        ``prove_stores``; the state may be ``state``.

        Raises UnavailableError if a lone store is another one now, or none.
        """
        ...

    def prove_stores(self, state: LogState, since: int) -> tuple[LogState, tuple[str, ...]]:
        """``state`` and all records after it, and the ids of the stores on which objects count now.

        ``since``: the number that ``look_at_stores`` gave before the objects were written. Raises
        UnavailableError if a store on which objects counted at any time since then became another
        one, or none: what it acknowledged may be nowhere.
        """
        ...

    def members(self, state: LogState) -> tuple[tuple[str, ...], int]:
        """The ids of the stores that hold the log, and on how many an object must be."""
        ...

    def require_sequencer(self, state: LogState) -> None:
        """Raise UsageError if this process cannot append after ``state``. May query the stores."""
        ...

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        """Make ``record`` the one at its position after ``state``, on enough stores to be durable.

        Repeating it is harmless. Raises UnavailableError if the log is no longer at its address, or
        if its last record could not be made durable first; StoreFullError or StoreDeniedError if
        nothing can have been written.
        """
        ...

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        """Ensure that the last record of ``state``, as last read, counts for good. None if it does.

        KeyTaken: another record has its position, so the log must be read again. Raises as
        ``append``.
        """
        ...

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Store a fold unless it is there."""
        ...

    def prune_folds(self) -> None:
        """Delete all folds but the newest three. Raises as a backend's ``delete``."""
        ...

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Store a manifest durably unless it is there."""
        ...


class SingleStoreLog:
    """A log on one store, whose create-if-absent is the sequencer (a ``LogAccess``).

    Each small object gets a second copy after it, for readers that find the first one damaged: with
    several stores another store's copy serves, here one flipped bit would hide all later snapshots.
    A copy that is missing (the writer died, or the store is from before there were any) is written
    by the next writer for the last record, and by scrub for all.
    """

    __slots__ = ("_backend", "_copies_due", "_record", "_sequencer", "_unanswered")

    def __init__(self, backend: Backend, record: JobRecord) -> None:
        self._backend = backend
        self._record = record
        self._sequencer: Sequencer | None = None
        self._copies_due: dict[str, bytes] | None = None
        """Second copies to write, by the key of their object; None before the first append."""
        self._unanswered: dict[int, Record] = {}
        """Records that may have their position, by seq; no second copy before it is known."""

    @property
    def job(self) -> str:
        return self._record.job

    @property
    def log_id(self) -> str:
        return self._record.log_id

    @property
    def store_id(self) -> str:
        """The store's own id."""
        return self._record.store_id

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        return read_start(self._backend, self._record.job)

    def read_new(self, state: LogState) -> LogState:
        """If the log is on several stores, one alone cannot tell what counts: ``short`` is set."""
        state = read_new(self._backend, state)
        return replace(state, short=self._short(state))

    def _short(self, state: LogState) -> str:
        if state.stores is None or len(state.stores.ids) == 1:
            return ""
        # Also if every store has everything that was told: what one holds beyond that may lose its
        # place to what the others hold.
        needed = max(state.stores.answers_min, 2)
        return (
            f"one of the log's {len(state.stores.ids)} stores was asked, {needed} are needed to "
            f"know what is newest. store={self._backend.url} name the others too"
        )

    def record_at(self, seq: int) -> bytes:
        return record_alone(self._backend, seq).encode()

    def look_at_stores(self, state: LogState) -> tuple[LogState, int]:
        """Also lets a folder store that was mounted anew take objects again: it reads
        ``ckpt.json``."""
        require_same_store(self._backend, self._record)
        return state, 0

    def prove_stores(self, state: LogState, since: int) -> tuple[LogState, tuple[str, ...]]:
        del since  # any other store than this one's own is an error, whenever it came
        require_same_store(self._backend, self._record)
        return self.read_new(state), (self._record.store_id,)

    def members(self, state: LogState) -> tuple[tuple[str, ...], int]:
        return (self._record.store_id,), 1

    def require_sequencer(self, state: LogState) -> None:
        """Queried at the first write only: finding out what a store can do may write to it."""
        if state.stores is not None and len(state.stores.ids) > 1:
            raise UsageError(
                f"this log is on {len(state.stores.ids)} stores, and one alone cannot be written "
                f"to. store={self._backend.url} name all of them"
            )
        if self._sequencer is None:
            if self._record.sequencer != SEQUENCER_STORE:
                raise UsageError(
                    f"the store does not give out positions in this log. store={self._backend.url} "
                    f"sequencer={self._record.sequencer!r} write through that sequencer"
                )
            require_create_only(self._backend)
            self._sequencer = StoreSequencer(self._backend)

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        self.require_sequencer(state)
        assert self._sequencer is not None
        # Before each append: the store may have been unmounted since the last one.
        require_same_store(self._backend, self._record)
        data = record.encode()
        result = self._sequencer.append(record.seq, data)
        match result:
            case Appended():
                self._unanswered.pop(record.seq, None)
                self._write_copies(state, {keys.log_key(record.seq): data})
            case WriteUnknown():
                self._unanswered[record.seq] = record
        return result

    def _write_copies(self, state: LogState, appended: dict[str, bytes]) -> None:
        """Write the second copies of records that were appended after ``state``, and those that are
        due.

        The records count whatever becomes of their copies, so what cannot be written stays due.
        """
        try:
            if self._copies_due is None:
                self._copies_due = self._missing_copies(state.next_seq - 1)
            self._copies_due |= appended
            for seq in [seq for seq in self._unanswered if seq < state.next_seq]:
                record = self._unanswered.pop(seq)
                if state.write_id_at(seq) == record.write_id:  # else another one has the position
                    self._copies_due[keys.log_key(seq)] = record.encode()
            for due in list(self._copies_due):
                self._backend.put(keys.copy_key(due), [self._copies_due[due]])
                del self._copies_due[due]
        except UnavailableError:
            return

    def _missing_copies(self, last: int) -> dict[str, bytes]:
        """``ckpt.json`` and the record at ``last``, unless they have a right second copy.

        The store is from before there were any, or their writer died in between.
        """
        missing = {}
        if second_job_record(self._backend) != self._record:
            missing[keys.JOB_KEY] = self._record.encode()
        if last >= 0 and second_record(self._backend, last) is None:
            missing[keys.log_key(last)] = record_alone(self._backend, last).encode()
        return missing

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        short = self._short(state)
        if short:
            return WriteUnknown(short)
        if any(seq < state.next_seq for seq in self._unanswered):
            # A repeated call found its record: it is not appended again, so its copy is due here.
            require_same_store(self._backend, self._record)
            self._write_copies(state, {})
        return None  # on one store, what is there counts

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        return create_once(self._backend, key, data, bytes_max=len(data) + 1)

    def prune_folds(self) -> None:
        prune_folds(self._backend)

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        result = create_once(self._backend, key, data, bytes_max=MANIFEST_BYTES_MAX)
        if isinstance(result, Appended) or (isinstance(result, KeyTaken) and result.data == data):
            self._backend.put(keys.copy_key(key), [data])
        return result
