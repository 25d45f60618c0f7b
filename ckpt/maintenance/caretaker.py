"""The caretaker: a thread that keeps a job's stores complete while the job runs.

It refills a store that came back empty, brings a store that was away up to date, and runs scrubs.
It works at a low rate and with its own journal, and nothing waits for it. What is unfinished when
the job ends is left to the next run's caretaker or to ``ckpt scrub``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.backends.file.store import FileBackend
from ckpt.errors import CkptError, InternalError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.log.high_water import FILES
from ckpt.log.journal import Journal
from ckpt.log.sequencers import STATE_VARIABLE
from ckpt.log.state import Committed
from ckpt.maintenance.gc.sweep import keep_reserves
from ckpt.maintenance.replica import SyncLimits
from ckpt.maintenance.scrub.history import ScrubCursors, record_scrub, scrubbed_s_ago
from ckpt.maintenance.scrub.scrub import Scrub
from ckpt.maintenance.store_set import (
    LogCoverage,
    catch_up,
    missing_by_listing,
    reachable_members,
    replace,
    returned_empty,
)
from ckpt.threads import start_thread

CHECK_INTERVAL_S = 10.0
"""How often the stores are checked. One check costs each store a small read and a short list."""

RATE_BYTES_PER_S = 200e6
"""Rate limit for filling a store while training runs."""

SCRUB_BYTES_PER_S = 50e6
"""Rate limit for a scrub while training runs."""


class StoreCaretaker:
    """Keeps the stores of ``backend`` complete until ``stop``.

    ``has_newest_epoch`` says whether this keeper's epoch is the newest in the log: a keeper that
    was replaced must not change the set of stores. ``scrub_every_s``: how often everything is read
    and compared, counted over all keepers of the stores; None for never. A store alone is only
    scrubbed: no other could refill it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        has_newest_epoch: Callable[[Journal], bool],
        emit: Emit,
        scrub_every_s: float | None = None,
        interval_s: float = CHECK_INTERVAL_S,
    ) -> None:
        self._backend = backend
        self._has_newest_epoch = has_newest_epoch
        self._emit = emit
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._reported: set[str] = set()
        self._coverage = LogCoverage()
        self._upto_seq = 0
        self._scrub_every_s = scrub_every_s
        self._scrub_due_s = 0.0 if scrub_every_s is not None else math.inf
        self._scrub = Scrub(
            stores_of(backend),
            write_quorum_of(backend),
            rate_bytes_per_s=SCRUB_BYTES_PER_S,
            emit=emit,
        )
        self._done = start_thread(self._run, name="ckpt-caretaker")

    def stop(self, timeout_s: float) -> None:
        """Stop, and wait up to ``timeout_s`` seconds. A store being filled then stays partial."""
        self._stop.set()
        deadline_s = time.monotonic() + timeout_s
        while not self._done.done() and (left_s := deadline_s - time.monotonic()) > 0:
            threading.Event().wait(min(left_s, 0.05))

    def _run(self) -> None:
        journal: Journal | None = None
        reserved = False
        while not self._stop.wait(self._interval_s):
            self._look_at_marks()
            try:
                journal = journal or Journal.open(self._backend)
                if len(stores_of(self._backend)) > 1:
                    self._refill_empty(journal)
                    self._find_missed(journal)
                    self._catch_up(journal)
                if not reserved:
                    keep_reserves(self._backend, journal.refresh())
                    reserved = True
                self._scrub_when_due(journal)
            except CkptError as error:
                # No alarm: commits raise one for a store that does not answer. Here it is retried.
                text = f"the stores could not be checked; trying again: {error}"
                self._emit_once("care-waits", text, alarm=False)
            except Exception as error:  # noqa: BLE001  the outermost frame of a thread
                wrapped = InternalError(f"unexpected error while checking stores. cause={error!r}")
                self._emit_once("care-failed", str(wrapped), alarm=True)

    def _look_at_marks(self) -> None:
        """Nothing waits for the folder of marks, so it is told here if that hangs or fails."""
        if (why := FILES.trouble()) and "mark-unwritten" not in self._reported:
            self._reported.add("mark-unwritten")
            text = (
                "what was seen of the log cannot be noted on this machine, so that a store which "
                f"is rolled back is not noticed: {why} look after your home, or set "
                f"{STATE_VARIABLE} to a folder on a local disk"
            )
            self._emit(Event("mark-unwritten", text, alarm=True))

    def _refill_empty(self, journal: Journal) -> None:
        for store, store_id in returned_empty(journal, self._backend):
            if not self._has_newest_epoch(journal):
                return
            if is_folder(store):
                # It may be a disk that is not mounted: filling the mount point fills another disk.
                text = (
                    f"a store no longer holds this log and does not count. store={store.url} "
                    f"store_id={store_id}; mount it again, or declare it lost with "
                    "`ckpt stores replace`"
                )
                self._emit_once("store-empty", text, alarm=True)
                continue
            text = f"{store.url} came back empty and is being filled again"
            self._emit_once("store-returns", text, alarm=False)
            limits = SyncLimits(rate_bytes_per_s=RATE_BYTES_PER_S, stop=self._stop)
            # ``replace`` fills it under a new id, then records that id in the place of the old one.
            replace(journal, self._backend, store, store_id, limits=limits, emit=self._emit)
            self._reported.clear()
            text = f"{store.url} holds everything again and counts"
            self._emit(Event("store-full", text, {"store": store.url}))

    def _find_missed(self, journal: Journal) -> None:
        """Once for each store, as soon as it answers: bring what an earlier keeper knew it to miss.

        A write needs W stores; what another one missed is remembered by the keeper that wrote, and
        forgotten with it. The log does not show it if only packs or parts were missed, so until the
        next scrub such a snapshot would be on fewer stores than its user believes.
        """
        members = reachable_members(journal, self._backend)
        if len(members) < 2 or all(store_id in self._coverage.compared for _, store_id in members):
            return
        missing = missing_by_listing([store for store, _ in members])
        for (store, store_id), count in zip(members, missing, strict=True):
            if store_id in self._coverage.compared:
                continue
            if count:
                if not self._has_newest_epoch(journal):
                    return
                text = (
                    f"{store.url} lacks {count} objects that another store has, so snapshots are "
                    "on fewer stores than they should be; it is catching up"
                )
                self._emit_once("store-behind", text, alarm=True)
                limits = SyncLimits(rate_bytes_per_s=RATE_BYTES_PER_S, stop=self._stop)
                catch_up(journal, self._backend, store, limits=limits, emit=self._emit)
                text = f"{store.url} has caught up: it has all that the log names"
                self._emit(Event("store-full", text, {"store": store.url}))
            self._coverage.compared.add(store_id)

    def _catch_up(self, journal: Journal) -> None:
        # Only up to the log's end at the previous check: newer records may still be in flight to a
        # store that is merely slower than the others.
        upto_seq, self._upto_seq = self._upto_seq, journal.refresh().next_seq
        for store, store_id in reachable_members(journal, self._backend):
            gap = self._coverage.first_gap(store, store_id, upto_seq=upto_seq)
            if gap is None:
                continue
            if not self._has_newest_epoch(journal):
                return
            text = f"{store.url} lacks the log's record {gap} and is catching up"
            self._emit_once("store-behind", text, alarm=False)
            limits = SyncLimits(rate_bytes_per_s=RATE_BYTES_PER_S, stop=self._stop)
            catch_up(journal, self._backend, store, limits=limits, emit=self._emit)

    def _scrub_when_due(self, journal: Journal) -> None:
        if (
            self._scrub_every_s is None
            or time.monotonic() < self._scrub_due_s
            or not self._has_newest_epoch(journal)  # one node of several, not each
        ):
            return
        # The stores know when the last scrub ended: keepers may live less than a day.
        left_s = self._scrub_left_s(self._scrub_every_s)
        if left_s > 0:
            self._scrub_due_s = time.monotonic() + left_s
            return
        cursors = ScrubCursors(stores_of(self._backend))
        report = self._scrub.run(self._stop, on_verified=self._record_scrub, cursors=cursors)
        if report is not None and report.complete:
            self._scrub_due_s = time.monotonic() + self._scrub_every_s

    def _scrub_left_s(self, every_s: float) -> float:
        """How long until a scrub is due by what the stores say; a store set without a record gets
        one, so that the time counts from now."""
        ago_s = scrubbed_s_ago(stores_of(self._backend), now_unix_ms=int(time.time() * 1000))
        if ago_s is None:
            self._record_scrub(())
            return every_s
        return every_s - ago_s

    def _record_scrub(self, verified: Sequence[Committed]) -> None:
        now_unix_ms = int(time.time() * 1000)
        try:
            record_scrub(stores_of(self._backend), verified, now_unix_ms=now_unix_ms)
        except UnavailableError as error:
            # Full stores, say. What was read need not be read again at once: this keeper knows the
            # time by itself.
            text = f"no store took the record of a scrub, so the next keeper may repeat it: {error}"
            self._emit_once("care-waits", text, alarm=False)

    def _emit_once(self, kind: str, text: str, *, alarm: bool) -> None:
        """Emit each text once, until a store was refilled."""
        if text not in self._reported:
            self._reported.add(text)
            self._emit(Event(kind, text, alarm=alarm))


def is_folder(store: Backend) -> bool:
    """Whether a store is a local folder, whatever wrappers it has."""
    while (inner := getattr(store, "inner", None)) is not None:
        store = inner
    return isinstance(store, FileBackend)
