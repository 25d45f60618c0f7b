"""A replica of a log: how a place becomes one, what a sync may use, and what it reports."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
from ckpt.errors import (
    ConflictError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.store import JobRecord
from ckpt.log.reader import read_job_record
from ckpt.log.state import Hole
from ckpt.save.chunks import PACK_BYTES_MAX

CLAIM_TRIES_MAX = 5
"""How often a claim without a reply is read back or repeated; backends retry below this too."""


def claim_replica(store: Backend, source: JobRecord) -> JobRecord:
    """Make ``store`` a replica of the log of ``source``; its record, existing or new.

    A new record has a fresh store id. An id that no ``stores`` record names does not count, so a
    replica that is still being filled cannot be taken for a full one. Two concurrent claims get the
    same record if the store supports create-if-absent; otherwise the later one may win, and both
    see it.

    Raises UsageError if the store is another job's, ConflictError if it holds another log of the
    job, IntegrityError if it has a log without ``ckpt.json``, and UnavailableError.
    """
    reason = "no answer"
    create_only = store.capabilities().create_only
    for _ in range(CLAIM_TRIES_MAX):
        # Read first, also after a put: its reply may have been lost although the record landed.
        record = _read(store)
        if record is not None:
            _require_same_log(store, record, source)
            return record
        first = next(iter(store.list(keys.LOG)), None)
        if first is not None:
            raise IntegrityError(
                f"the store holds a log but no {keys.JOB_KEY}. store={store.url} found={first.key} "
                f"restore {keys.JOB_KEY} with ckpt scrub, or name an empty place"
            )
        new_record = replace(source, store_id=secrets.token_hex(16))
        try:
            store.put(keys.JOB_KEY, [new_record.encode()], create_only=create_only)
        except KeyExistsError:
            continue
        except (StoreFullError, StoreDeniedError):
            raise
        except UnavailableError as error:
            reason = str(error)
    record = _read(store)
    if record is None:
        raise UnavailableError(
            f"the store did not answer while it was made a replica. store={store.url} why={reason}"
        )
    _require_same_log(store, record, source)
    return record


def _read(store: Backend) -> JobRecord | None:
    try:
        return read_job_record(store)
    except NotFoundError:
        return None


def _require_same_log(store: Backend, record: JobRecord, source: JobRecord) -> None:
    if record.job != source.job:
        raise UsageError(
            f"the store belongs to another job. store={store.url} its_job={record.job!r} "
            f"wanted={source.job!r} use another prefix"
        )
    if record.log_id != source.log_id:
        raise ConflictError(
            f"the store holds another log of the same job: it does not share its records with the "
            f"source. store={store.url} its_log={record.log_id} wanted={source.log_id} use another "
            f"prefix"
        )


# ---- limits and report of a sync

BUDGET_BYTES = 2 * PACK_BYTES_MAX
"""Default memory for copies in flight: two of the largest packs."""

ProgressCallback = Callable[[int], None]
"""Receives the number of bytes just copied; called by one thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncLimits:
    """What a sync may use.

    Up to ``threads`` objects are copied at once, as far as they fit into ``budget_bytes`` together.
    ``rate_bytes_per_s`` bounds the bytes read and written (None: no limit). Setting ``stop`` ends
    the sync early.
    """

    threads: int = 4
    budget_bytes: int = BUDGET_BYTES
    rate_bytes_per_s: float | None = None
    stop: threading.Event | None = None


DEFAULT_LIMITS = SyncLimits()
"""Limits of a sync that runs alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync copied. The replica holds the log below ``next_seq``.

    ``damaged``: objects, with the reason, that the source has no right copy of, so that the replica
    lacks them too. ``hole``: the position from which the source's log cannot be read.
    """

    complete: bool
    store_id: str
    next_seq: int
    rounds: int
    copied_objects: int
    copied_bytes: int
    present_objects: int
    records: int
    folds: int
    damaged: tuple[tuple[str, str], ...]
    hole: Hole | None

    @property
    def ok(self) -> bool:
        """Whether the replica holds everything that the source's log named when last read."""
        return self.complete and not self.damaged and self.hole is None


class MemoryBudget:
    """Admits reservations that fit into ``limit_bytes``, and a larger one alone. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Wait until ``size_bytes`` fit, and reserve them.

        A thread must not hold two reservations: two such threads would wait for each other.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self._used_bytes or self._used_bytes + size_bytes <= self._limit_bytes
            )
            self._used_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= size_bytes
                self._changed.notify_all()
