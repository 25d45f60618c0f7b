"""Finding or making a store: ``ckpt.json``."""

from __future__ import annotations

import secrets

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.sequencer import Claimed, Lost, Unknown, create_once, require_create_only


def open_store(backend: Backend, *, job: str | None, create: bool) -> JobRecord:
    """The store's job record; made for ``job`` where the store is empty and ``create`` is set.

    Raises as ``Journal.open`` says. Two that create at once get the same record.
    """
    record = _read(backend)
    if record is None:
        _refuse_headless(backend)
        if not create:
            raise NotFoundError(
                f"no ckpt store here yet. store={backend.url} save a snapshot first, or check the address"
            )
        record = _create(backend, job)
    if job is not None and record.job != job:
        raise UsageError(
            f"the store belongs to another job. store={backend.url} its_job={record.job!r} asked={job!r} "
            f"use another prefix, or that job's name"
        )
    return record


def require_same_store(backend: Backend, record: JobRecord) -> None:
    """Raises UnavailableError where another store, or none, now stands where ``record`` was read. Reads one small object.

    A disk that was unmounted, or a folder that was moved, leaves an empty place that takes objects as readily as the store
    did. A record written there would be called durable, and be found by nobody.
    """
    found = _read(backend)
    if found != record:
        what = "gone" if found is None else f"that of another store. store_id={found.store_id} wanted={record.store_id}"
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
    """A log without its ``ckpt.json`` is damage, not an empty store: a new id over old records would hide it."""
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
        case Claimed():
            return mine
        case Lost(data):
            return JobRecord.decode(data)
        case Unknown(why):
            raise UnavailableError(f"the store did not answer while it was made. store={backend.url} why={why}")
