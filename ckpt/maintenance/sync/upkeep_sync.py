"""Making a store a full replica of another one, or of several: objects first, then the log in order, then what came meanwhile.

At every moment the replica's log names only what the replica holds (but for snapshots that were dropped further on in it, and
for what the source itself has nowhere rightly). So it may be stopped, die, and be repeated anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.errors import UnavailableError, UsageError
from ckpt.events import Tell
from ckpt.format import keys
from ckpt.format.store import JobRecord
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.maintenance.copies_pace import Pace, Stopped
from ckpt.maintenance.replica import claim_replica
from ckpt.maintenance.scrub.scrub_roles import READY, seat_all
from ckpt.maintenance.sync.sync import Filling
from ckpt.maintenance.sync_facts import USUAL, Effort, Progress, SyncReport

ROUNDS_MAX = 100
"""How often what came meanwhile is copied before the caller is told that the source is quicker."""


def sync(
    source: Backend,
    store: Backend,
    *,
    deep: bool = False,
    effort: Effort = USUAL,
    on_progress: Progress | None = None,
    tell: Tell | None = None,
) -> SyncReport:
    """Make ``store`` a full replica of ``source`` (one store or several). See ``fill``.

    Raises NotFoundError where the source is no store, UsageError or ConflictError where ``store`` is another job's or has a
    history of its own, UnavailableError and StoreFullError: repeat it then, it goes on.
    """
    journal = Journal.open(source)
    record = source_record(source)
    return fill(
        source, store, journal.refresh, record=record, deep=deep, effort=effort, on_progress=on_progress, tell=tell
    )


def source_record(source: Backend) -> JobRecord:
    """The ``ckpt.json`` of the first store of ``source`` that has one. Raises UnavailableError where none can be read."""
    seats = seat_all(stores_of(source))
    found = next((seat.record for seat in seats if seat.role == READY), None)
    if found is None:
        raise UnavailableError(
            f"the source's {keys.JOB_KEY} can't be read. why={[seat.problem for seat in seats]} repeat later"
        )
    return found


def fill(  # noqa: PLR0913  all but three are keywords
    source: Backend,
    store: Backend,
    log: Callable[[], LogState],
    *,
    record: JobRecord,
    upto_seq: int | None = None,
    deep: bool = True,
    effort: Effort = USUAL,
    on_progress: Progress | None = None,
    tell: Tell | None = None,
) -> SyncReport:
    """Copy to ``store`` what ``log`` names, until it has caught up with it, or, with ``upto_seq``, has all up to that record.

    ``source`` may be several stores: each object is then read from whichever has it rightly. ``record`` is one of theirs: a
    ``store`` that holds nothing becomes a replica of the same log, with an id of its own. ``deep``: what is there already is
    read and compared too, not just listed. Stopped, or outrun by the source for a hundred rounds, it returns with ``complete``
    False. Raises as ``sync`` does.
    """
    pace = Pace(effort.rate_bytes_per_s, stop=effort.stop)
    claimed = claim_replica(store, record)
    if claimed.store_id == record.store_id and len(stores_of(source)) == 1:
        raise UsageError(
            f"the store is the source itself, or a plain copy of it. store={store.url} store_id={claimed.store_id} "
            f"name another place; make replicas with ckpt sync, not by copying files"
        )
    filling = Filling(source, store, claimed.store_id, log, deep, effort, pace, on_progress, tell)
    try:
        for _ in range(ROUNDS_MAX):
            if filling.round(upto_seq):
                return filling.report(complete=True)
    except Stopped:
        pass
    return filling.report(complete=False)
