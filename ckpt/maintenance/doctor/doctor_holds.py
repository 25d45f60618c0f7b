"""What lies in a store already. Reads little: a list of its first keys, ``ckpt.json`` and the log."""

from __future__ import annotations

from itertools import islice

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError
from ckpt.format import keys
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.reader import read_on, read_start
from ckpt.maintenance.doctor.doctor_facts import Holds

PROBES = "probe/"
"""Below this, examinations put their short-lived objects."""
LISTED_MAX = 100
"""How many keys of a place without a store are looked at."""


def look_inside(store: Backend) -> Holds:
    """What ``store`` holds. Raises UnavailableError and its kinds where it does not answer or denies."""
    try:
        record = JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
    except NotFoundError:
        return _without_record(store)
    except IntegrityError as error:
        return Holds(kind="headless", problem=str(error))
    except FormatVersionError as error:
        return Holds(kind="unknown", problem=str(error))
    try:
        state, _ = read_start(store, record.job)
        state = read_on(store, state)
    except FormatVersionError as error:
        return Holds(kind="unknown", job=record.job, problem=str(error))
    newest = state.newest()
    return Holds(
        kind="store",
        job=record.job,
        store_id=record.store_id,
        log_id=record.log_id,
        snapshots=len(state.snapshots),
        newest="" if newest is None else str(newest),
        next_seq=state.next_seq,
        members=() if state.stores is None else state.stores.ids,
        write_quorum=0 if state.stores is None else state.stores.write_quorum,
        hole="" if state.hole is None else f"{state.hole.reason} seq={state.hole.seq}",
    )


def _without_record(store: Backend) -> Holds:
    if next(iter(store.list(keys.LOG)), None) is not None:
        return Holds(kind="headless", problem=f"{keys.JOB_KEY} is gone")
    # What an earlier examination could not remove says nothing about whose place it is.
    first = [stat.key for stat in islice(store.list(""), LISTED_MAX) if not stat.key.startswith(PROBES)]
    return Holds(kind="foreign") if first else Holds(kind="empty")
