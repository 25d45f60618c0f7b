"""Making a place a replica of a log: its own ``ckpt.json``, created once."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
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
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.state import Hole
from ckpt.save.chunks import PACK_BYTES_MAX

CLAIM_TRIES_MAX = 5
"""How often a claim whose reply was lost is looked at or made again; backends wait and retry
beneath this."""


def claim_replica(store: Backend, source: JobRecord) -> JobRecord:
    """The record of ``store`` as a replica of the log of ``source``: the one it has, or a new one
    with an id of its own.

    An id that no ``stores`` record names counts for nothing, so a replica that is being filled
    can't be taken for a full one. Two that claim at once get the same record where the store
    creates a key only once; where it doesn't, the later one may win, and both see it. Raises
    UsageError where the store is another job's, ConflictError where it holds another log of the
    job, IntegrityError where it has a log without ``ckpt.json``, UnavailableError.
    """
    why = "no answer"
    once = store.capabilities().create_only
    for _ in range(CLAIM_TRIES_MAX):
        found = _read(store)
        if found is not None:
            _require_same_log(store, found, source)
            return found
        first = next(iter(store.list(keys.LOG)), None)
        if first is not None:
            raise IntegrityError(
                f"the store holds a log but no {keys.JOB_KEY}. store={store.url} found={first.key} "
                f"bring {keys.JOB_KEY} back with ckpt scrub, or name an empty place"
            )
        try:
            store.put(
                keys.JOB_KEY,
                [replace(source, store_id=secrets.token_hex(16)).encode()],
                create_only=once,
            )
        except KeyExistsError:
            continue
        except (StoreFullError, StoreDeniedError):
            raise
        except UnavailableError as error:
            why = str(error)
    found = _read(store)
    if found is None:
        raise UnavailableError(
            f"the store did not answer while it was made a replica. store={store.url} why={why}"
        )
    _require_same_log(store, found, source)
    return found


def _read(store: Backend) -> JobRecord | None:
    try:
        return JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
    except NotFoundError:
        return None


def _require_same_log(store: Backend, found: JobRecord, source: JobRecord) -> None:
    if found.job != source.job:
        raise UsageError(
            f"the store belongs to another job. store={store.url} its_job={found.job!r} "
            f"wanted={source.job!r} "
            f"use another prefix"
        )
    if found.log_id != source.log_id:
        raise ConflictError(
            "the store holds another log of the same job: its records and those of the source "
            "never were one. "
            f"store={store.url} its_log={found.log_id} wanted={source.log_id} use another prefix"
        )


# How much a sync may take, and what it did.

BUDGET_BYTES = 2 * PACK_BYTES_MAX
"""Memory for copies in flight, when the caller names no limit: two of the largest packs."""

ProgressCallback = Callable[[int], None]
"""Told how many bytes were just copied; called by one thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncLimits:
    """What a sync may take. ``threads`` objects are copied at once, as far as they fit into
    ``budget_bytes`` together; ``rate_bytes_per_s`` bounds what is read and written (None: not at
    all); setting ``stop`` ends it early."""

    threads: int = 4
    budget_bytes: int = BUDGET_BYTES
    rate_bytes_per_s: float | None = None
    stop: threading.Event | None = None


DEFAULT_LIMITS = SyncLimits()
"""What a sync takes that nobody waits for, and nothing is in the way of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What was copied. ``next_seq``: the replica holds the log below it. ``damaged``: objects, with
    the reason, that the source has nowhere rightly, so that the replica lacks them too; ``hole``:
    where the source's log can't be read on."""

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
        """Whether the replica holds everything that the source's log named when it was last
        read."""
        return self.complete and not self.damaged and self.hole is None


# How much memory copies in flight may take together.


class MemoryBudget:
    """Lets in what fits below ``limit_bytes``, and what is larger alone. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Wait until ``size_bytes`` fit, and hold them. Never hold two at once: both would wait for
        each other."""
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
