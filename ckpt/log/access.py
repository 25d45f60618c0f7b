"""How a journal reaches its log: in one store, or (``several``) in many. What stands there is the journal's to judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.errors import UsageError
from ckpt.format.manifest import MANIFEST_BYTES_MAX
from ckpt.format.records import Record
from ckpt.format.store import SEQUENCER_STORE, JobRecord
from ckpt.log.place import require_same_store
from ckpt.log.reader import Note, read_on, read_start, record_bytes
from ckpt.log.sequencer import Claimed, Lost, Sequencer, StoreSequencer, Unknown, create_once, require_create_only
from ckpt.log.state import LogState


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

    def start(self) -> tuple[LogState, tuple[Note, ...]]:
        """The state to begin at, and what was passed over on the way to it."""
        ...

    def read_on(self, state: LogState) -> LogState:
        """``state`` and all records after it. Raises UnavailableError, and FormatVersionError for a newer release's record."""
        ...

    def record_at(self, seq: int) -> bytes:
        """The bytes of a record that counts. Raises NotFoundError, IntegrityError, UnavailableError."""
        ...

    def require_giver(self, state: LogState) -> None:
        """Raises UsageError where this process can't give out places after ``state``. May ask stores what they can do."""
        ...

    def claim(self, state: LogState, record: Record) -> Claimed | Lost | Unknown:
        """Make ``record`` the one at its place after ``state``, durable on enough stores. Repeating it is harmless.

        Raises UnavailableError where the log is not where it was, or its last record could not be made durable first;
        StoreFullError or StoreDeniedError where nothing can have landed.
        """
        ...

    def finish(self, state: LogState) -> Lost | Unknown | None:
        """Make sure that the last record of ``state``, as it was read last, counts for good; None where it does.

        Lost where another has its place: the log is to be read again. Raises as ``claim`` does.
        """
        ...

    def put_fold(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """Store a fold, where it is not there yet."""
        ...

    def put_manifest(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """Store a manifest, durable, where it is not there yet."""
        ...


class OneStore:
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

    def start(self) -> tuple[LogState, tuple[Note, ...]]:
        """See LogAccess."""
        return read_start(self._backend, self._record.job)

    def read_on(self, state: LogState) -> LogState:
        """See LogAccess. What is newest can't be known where this is one of several stores."""
        state = read_on(self._backend, state)
        if state.stores is None or state.stores.answers_min == 1:
            return state
        return replace(state, short=(
            f"one of the log's {len(state.stores.ids)} stores was asked, {state.stores.answers_min} are needed to know what is "
            f"newest. store={self._backend.url} name the others too"
        ))  # fmt: skip

    def record_at(self, seq: int) -> bytes:
        """See LogAccess."""
        return record_bytes(self._backend, seq)

    def require_giver(self, state: LogState) -> None:
        """See LogAccess. Asked for at the first write only: finding out what a store can do may write to it."""
        if state.stores is not None and len(state.stores.ids) > 1:
            raise UsageError(
                f"this log is on {len(state.stores.ids)} stores, and one alone can't be written to. store={self._backend.url} "
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

    def claim(self, state: LogState, record: Record) -> Claimed | Lost | Unknown:
        """See LogAccess."""
        self.require_giver(state)
        assert self._sequencer is not None
        require_same_store(self._backend, self._record)
        return self._sequencer.claim(record.seq, record.encode())

    def finish(self, state: LogState) -> Lost | Unknown | None:
        """See LogAccess. What is there counts."""
        return None

    def put_fold(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """See LogAccess."""
        return create_once(self._backend, key, data, bytes_max=len(data) + 1)

    def put_manifest(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """See LogAccess."""
        return create_once(self._backend, key, data, bytes_max=MANIFEST_BYTES_MAX)
