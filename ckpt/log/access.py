"""How a journal reaches its log: in one store, or (``several``) in many. What stands there is the
journal's to judge."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.manifest import MANIFEST_BYTES_MAX
from ckpt.format.records import Record
from ckpt.format.store import JOB_BYTES_MAX, SEQUENCER_STORE, JobRecord
from ckpt.log.reader import LogNote, read_new, read_start, record_bytes
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

# Finding or making a store: ``ckpt.json``.


def open_store(backend: Backend, *, job: str | None, create: bool) -> JobRecord:
    """The store's job record; made for ``job`` where the store is empty and ``create`` is set.

    Raises as ``Journal.open`` says. Two that create at once get the same record.
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
            f"asked={job!r} "
            f"use another prefix, or that job's name"
        )
    return record


def require_same_store(backend: Backend, record: JobRecord) -> None:
    """Raises UnavailableError where another store, or none, now stands where ``record`` was read.
    Reads one small object.

    A disk that was unmounted, or a folder that was moved, leaves an empty place that takes objects
    as readily as the store did. A record written there would be called durable, and be found by
    nobody.
    """
    found = _read(backend)
    if found != record:
        what = (
            "gone"
            if found is None
            else f"that of another store. store_id={found.store_id} wanted={record.store_id}"
        )
        raise UnavailableError(
            f"the store is not where it was: its {keys.JOB_KEY} is {what} store={backend.url} "
            f"mount it or move it back, then repeat"
        )


def _read(backend: Backend) -> JobRecord | None:
    try:
        return JobRecord.decode(read_alone(backend, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
    except NotFoundError:
        return None


def _refuse_headless(backend: Backend) -> None:
    """A log without its ``ckpt.json`` is damage, not an empty store: a new id over old records
    would hide it."""
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
    mine = JobRecord(job=job, store_id=secrets.token_hex(16))
    match create_once(backend, keys.JOB_KEY, mine.encode(), bytes_max=JOB_BYTES_MAX):
        case Appended():
            return mine
        case KeyTaken(data):
            return JobRecord.decode(data)
        case WriteUnknown(why):
            raise UnavailableError(
                f"the store did not answer while it was made. store={backend.url} why={why}"
            )


class LogAccess(Protocol):
    """One job's log, wherever it lies."""

    @property
    def job(self) -> str:
        """The job's name."""
        ...

    @property
    def log_id(self) -> str:
        """The log's id."""
        ...

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        """The state to begin at, and what was passed over on the way to it."""
        ...

    def read_new(self, state: LogState) -> LogState:
        """``state`` and all records after it. Raises UnavailableError, and FormatVersionError for a
        newer release's record."""
        ...

    def record_at(self, seq: int) -> bytes:
        """The bytes of a record that counts. Raises NotFoundError, IntegrityError,
        UnavailableError."""
        ...

    def require_sequencer(self, state: LogState) -> None:
        """Raises UsageError where this process can't give out places after ``state``. May ask
        stores what they can do."""
        ...

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        """Make ``record`` the one at its place after ``state``, durable on enough stores. Repeating
        it is harmless.

        Raises UnavailableError where the log is not where it was, or its last record could not be
        made durable first; StoreFullError or StoreDeniedError where nothing can have landed.
        """
        ...

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        """Make sure that the last record of ``state``, as it was read last, counts for good; None
        where it does.

        Lost where another has its place: the log is to be read again. Raises as ``claim`` does.
        """
        ...

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Store a fold, where it is not there yet."""
        ...

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Store a manifest, durable, where it is not there yet."""
        ...


class SingleStoreLog:
    """A log in one store, whose own create-if-absent gives out the places."""

    __slots__ = ("_backend", "_record", "_sequencer")

    def __init__(self, backend: Backend, record: JobRecord) -> None:
        self._backend = backend
        self._record = record
        self._sequencer: Sequencer | None = None

    @property
    def job(self) -> str:
        """See LogAccess."""
        return self._record.job

    @property
    def log_id(self) -> str:
        """See LogAccess."""
        return self._record.log_id

    @property
    def store_id(self) -> str:
        """The store's own id."""
        return self._record.store_id

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        """See LogAccess."""
        return read_start(self._backend, self._record.job)

    def read_new(self, state: LogState) -> LogState:
        """See LogAccess. What is newest can't be known where this is one of several stores."""
        state = read_new(self._backend, state)
        if state.stores is None or state.stores.answers_min == 1:
            return state
        return replace(
            state,
            short=(
                f"one of the log's {len(state.stores.ids)} stores was asked, "
                f"{state.stores.answers_min} are needed to know what is "
                f"newest. store={self._backend.url} name the others too"
            ),
        )

    def record_at(self, seq: int) -> bytes:
        """See LogAccess."""
        return record_bytes(self._backend, seq)

    def require_sequencer(self, state: LogState) -> None:
        """See LogAccess. Asked for at the first write only: finding out what a store can do may
        write to it."""
        if state.stores is not None and len(state.stores.ids) > 1:
            raise UsageError(
                f"this log is on {len(state.stores.ids)} stores, and one alone can't be written "
                f"to. store={self._backend.url} "
                "name all of them"
            )
        if self._sequencer is None:
            if self._record.sequencer != SEQUENCER_STORE:
                raise UsageError(
                    f"places in this log are not given out by the store. store={self._backend.url} "
                    f"sequencer={self._record.sequencer!r} write through that sequencer"
                )
            require_create_only(self._backend)
            self._sequencer = StoreSequencer(self._backend)

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess."""
        self.require_sequencer(state)
        assert self._sequencer is not None
        require_same_store(self._backend, self._record)
        return self._sequencer.append(record.seq, record.encode())

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        """See LogAccess. What is there counts."""
        return None

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess."""
        return create_once(self._backend, key, data, bytes_max=len(data) + 1)

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess."""
        return create_once(self._backend, key, data, bytes_max=MANIFEST_BYTES_MAX)
