"""Looking after a job's stores while it runs: one that came back empty is filled again, one that
was away catches up.

In a thread of its own, at a low rate, with a journal of its own. Nothing waits for it: what it
leaves undone at the end, the next run's caretaker or `ckpt scrub` does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.backends.file.store import FileBackend
from ckpt.errors import CkptError, InternalError
from ckpt.events import Emit, Event
from ckpt.log.journal import Journal
from ckpt.maintenance.replica import SyncLimits
from ckpt.maintenance.scrub.scrub import Scrub
from ckpt.maintenance.store_set import (
    LogCoverage,
    catch_up,
    reachable_members,
    replace,
    returned_empty,
)
from ckpt.threads import start_thread

CHECK_INTERVAL_S = 10.0
"""How often the stores are looked at: one small read and a short list each."""

RATE_BYTES_PER_S = 200e6
"""How fast a store is filled beside the training that goes on."""

SCRUB_BYTES_PER_S = 50e6
"""How fast a scrub reads beside the training."""


class StoreCaretaker:
    """Looks after the stores of ``backend`` until ``stop``. ``mine``: whether this keeper's epoch
    is the log's newest.

    ``scrub_every_s``: how often all is read and compared, None for never.
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
        self._mine = has_newest_epoch
        self._tell = emit
        self._look_s = interval_s
        self._stop = threading.Event()
        self._told: set[str] = set()
        self._places = LogCoverage()
        self._upto_seq = 0
        self._scrub_every_s = scrub_every_s
        self._scrub_due_s = (
            time.monotonic() + scrub_every_s if scrub_every_s is not None else math.inf
        )
        self._scrub = Scrub(
            stores_of(backend),
            write_quorum_of(backend),
            rate_bytes_per_s=SCRUB_BYTES_PER_S,
            tell=emit,
        )
        self._done = start_thread(self._run, name="ckpt-caretaker")

    def stop(self, timeout_s: float) -> None:
        """End soon. What is being filled is left as far as it came."""
        self._stop.set()
        deadline_s = time.monotonic() + timeout_s
        while not self._done.done() and (left_s := deadline_s - time.monotonic()) > 0:
            threading.Event().wait(min(left_s, 0.05))

    def _run(self) -> None:
        journal: Journal | None = None
        while not self._stop.wait(self._look_s):
            try:
                journal = journal or Journal.open(self._backend)
                self._look(journal)
                self._catch_up(journal)
                self._scrub_when_due()
            except CkptError as error:
                # A store that does not answer is told of by whoever needs it; here it is only
                # looked at again.
                self._say(
                    "care-waits",
                    f"the stores could not be looked after, tried again: {error}",
                    alarm=False,
                )
            except Exception as error:  # noqa: BLE001  a thread's border
                wrapped = InternalError(
                    f"looking after the stores failed in an unforeseen way. cause={error!r}"
                )
                self._say("care-failed", str(wrapped), alarm=True)

    def _look(self, journal: Journal) -> None:
        for store, store_id in returned_empty(journal, self._backend):
            if not self._mine(journal):
                return
            if is_folder(store):
                # It may be a disk that is not mounted: filling its place would fill another disk.
                text = (
                    "a store does not hold this log any more and counts for nothing. "
                    f"store={store.url} store_id={store_id}; "
                    "mount it again, or declare it lost with `ckpt stores replace`"
                )
                self._say("store-empty", text, alarm=True)
                continue
            self._say(
                "store-returns", f"{store.url} came back empty and is filled again", alarm=False
            )
            effort = SyncLimits(rate_bytes_per_s=RATE_BYTES_PER_S, stop=self._stop)
            replace(journal, self._backend, store, store_id, limits=effort, emit=self._tell)
            self._told.clear()
            self._tell(
                Event(
                    "store-full",
                    f"{store.url} holds everything again and counts",
                    {"store": store.url},
                )
            )

    def _catch_up(self, journal: Journal) -> None:
        # Up to where the log went at the last look: what is newer may still be on its way to a
        # store.
        upto_seq, self._upto_seq = self._upto_seq, journal.refresh().next_seq
        for store, store_id in reachable_members(journal, self._backend):
            gap = self._places.first_gap(store, store_id, upto_seq=upto_seq)
            if gap is None:
                continue
            if not self._mine(journal):
                return
            self._say(
                "store-behind",
                f"{store.url} lacks the log's record {gap}, and catches up",
                alarm=False,
            )
            effort = SyncLimits(rate_bytes_per_s=RATE_BYTES_PER_S, stop=self._stop)
            catch_up(journal, self._backend, store, limits=effort, emit=self._tell)

    def _scrub_when_due(self) -> None:
        if self._scrub_every_s is not None and time.monotonic() >= self._scrub_due_s:
            report = self._scrub.run(self._stop)
            if report is not None and report.complete:
                self._scrub_due_s = time.monotonic() + self._scrub_every_s

    def _say(self, kind: str, text: str, *, alarm: bool) -> None:
        """Each thing once, until something changed."""
        if text not in self._told:
            self._told.add(text)
            self._tell(Event(kind, text, alarm=alarm))


def is_folder(store: Backend) -> bool:
    """Whether a store is a folder, whatever is wrapped around it."""
    while (inner := getattr(store, "inner", None)) is not None:
        store = inner
    return isinstance(store, FileBackend)
