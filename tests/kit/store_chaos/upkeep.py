"""What people and keepers do for stores: fill them, read and mend everything, sweep what nobody
needs."""

from __future__ import annotations

import random

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.events import Event
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.maintenance.gc.sweep import SweepReport, store_clock, sweep
from ckpt.maintenance.replica import SyncLimits
from ckpt.maintenance.scrub.scrub import Scrub, ScrubReport
from ckpt.maintenance.store_set import catch_up, reachable_members, replace, returned_empty


def sweep_now(backend: Backend, state: LogState, dice: random.Random) -> SweepReport:
    """Delete what nothing needs, the grace being over: there is none, or the clocks say so."""
    if dice.random() < 0.5:
        return sweep(backend, state, grace_s=0.0)
    return sweep(backend, state, grace_s=3600.0, clock=lambda store: store_clock(store) + 7200.0)


def care(backend: Backend) -> str:
    """Fill what came back empty, and bring each other store what it missed. Says what was
    filled."""
    journal = Journal.open(backend)
    journal.refresh()
    filled = []
    for store, store_id in returned_empty(journal, backend):
        replace(journal, backend, store, store_id, limits=SyncLimits(), emit=nobody)
        filled.append(f"filled {store.url}")
    for store, _ in reachable_members(journal, backend):
        catch_up(journal, backend, store, limits=SyncLimits(), emit=nobody)
    return ", ".join(filled) or "all count"


def scrub_all(backend: Backend, *, mend: bool = True) -> ScrubReport:
    """Read everything everywhere."""
    report = Scrub(stores_of(backend), write_quorum_of(backend), repair=mend).run(threads=2)
    assert report is not None
    return report


def told(report: ScrubReport) -> str:
    """The report in a line."""
    stores = [f"{one.role} {one.repaired}/{one.missing}+{one.damaged}" for one in report.stores]
    return f"scrub ok={report.ok} {stores}" + (
        "" if report.ok else f" unmended={report.unrepaired} hole={report.hole}"
    )


def nobody(event: Event) -> None:
    """Nobody listens."""
