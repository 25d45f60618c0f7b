"""Garbage collection beside a training job: a thread that drops and sweeps after commits.

Nothing waits for it and it raises nothing: an error becomes an alarm, and the next round tries
again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, FencedError, InternalError
from ckpt.events import Emit, Event, Fact
from ckpt.log.journal import Journal
from ckpt.maintenance.gc.drop import drop, fenced_journal, require_newest_epoch
from ckpt.maintenance.gc.plan import ROUND_S, GcHistory, GcIdle, GcPlan, GcRound, next_round
from ckpt.maintenance.gc.sweep import ReferenceCache, SweepReport, keep_reserves, sweep
from ckpt.maintenance.retention import KeepPolicy
from ckpt.threads import start_thread

RESTORES_PER_GRACE = 4.0
"""An adapting grace is so many times the longest restore seen: others may have a slower link."""
FULL_GRACE_S = 60.0
"""The least grace while a store is full, where it adapts: saving comes before reading what was
dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """What is kept, and how long the bytes of dropped snapshots stay, by the stores' clocks.

    ``adapts``: longer where a restore took longer, and shorter while a store is full.
    """

    policy: KeepPolicy
    grace_s: float
    adapts: bool = False


@dataclass(frozen=True, slots=True)
class _DueRound:
    """A round to run. ``commits``: the count when it began. ``is_last``: the job is over.
    ``full``: a store takes no more.
    """

    sweep: bool
    commits: int
    is_last: bool
    full: bool


@dataclass(slots=True)
class _KnownStore:
    """The store, and what earlier rounds learned of it. Used by the rounds' thread alone.

    ``journal``: None until the first round.
    """

    backend: Backend
    journal: Journal | None = None
    references: ReferenceCache = field(default_factory=ReferenceCache)


class GcRounds:
    """Applies a policy to a store until ``stop``.

    ``epoch`` returns the epoch of the writer on whose behalf it drops. ``clock`` is monotonic;
    ``wall`` is the time by which the age of snapshots counts. Thread-safe; apart from
    ``await_idle`` and ``stop``, all calls return at once. Its flags are one state machine under
    one lock, so they are not split.
    """

    def __init__(
        self,
        backend: Backend,
        settings: RetentionSettings,
        *,
        epoch: Callable[[], int],
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = _KnownStore(backend)
        self._settings = settings
        self._epoch = epoch
        self._emit = emit
        self._clock = clock
        self._wall = wall
        self._changed = threading.Condition()
        self._history = GcHistory()
        self._commits = 0
        self._paused = self._hurry = self._running = self._stopped = self._ended = False
        self._full = False
        self._paused_at_s = 0.0
        self._restore_s = 0.0
        self._reported: set[str] = set()
        start_thread(self._run, name="ckpt-gc")

    def on_commit(self) -> None:
        """A snapshot was committed."""
        with self._changed:
            self._commits += 1
            self._changed.notify_all()

    def on_store_full(self) -> None:
        """A snapshot was not stored, because a store is full: make room as soon as possible."""
        with self._changed:
            self._full = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Start no round until ``resume``: a restore is running.

        With a grace of 0 s a round could delete the snapshot that is being restored.
        """
        with self._changed:
            if not self._paused:
                self._paused, self._paused_at_s = True, self._clock()

    def resume(self) -> None:
        """The restore is complete."""
        with self._changed:
            if self._paused:
                self._paused = False
                self._restore_s = max(self._restore_s, self._clock() - self._paused_at_s)
                self._changed.notify_all()

    def grace_s(self, *, full: bool = False) -> float:
        """How long the bytes of dropped snapshots stay. ``full``: while a store takes no more."""
        if not self._settings.adapts:
            return self._settings.grace_s
        if full:
            return max(FULL_GRACE_S, self._restore_s)
        return max(self._settings.grace_s, RESTORES_PER_GRACE * self._restore_s)

    def start_last_round(self) -> None:
        """The job is over: do what is due now, once, without rest."""
        with self._changed:
            # Hurry only if that makes a round due: otherwise a later commit would be hurried too.
            self._hurry = True
            self._hurry = isinstance(self._next(), GcRound)
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether no round is running or due now."""
        with self._changed:
            return self._ended or not (self._running or isinstance(self._next(), GcRound))

    def await_idle(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` seconds until it is idle; whether it is."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: self.idle, max(0.0, until_s - time.monotonic()))

    def stop(self, timeout_s: float) -> None:
        """Start no further round, and wait up to ``timeout_s`` seconds for the running one.

        A process may also die during a round: a drop is one record, and a sweep can be repeated.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, timeout_s)

    def _run(self) -> None:
        try:
            while (due := self._await_round()) is not None:
                event = self._round(due)
                with self._changed:
                    self._running = False
                    self._hurry = self._hurry and not due.is_last
                    self._changed.notify_all()
                if event is not None and not self._stopped:
                    self._emit(event)
        finally:
            with self._changed:
                self._running, self._ended = False, True
                self._changed.notify_all()

    def _next(self) -> GcRound | GcIdle:
        if self._paused and not self._hurry:
            return GcIdle(None)
        if self._full and not self._paused:
            ended_s, now_s = self._history.round_ended_s, self._clock()
            rested_s = now_s if ended_s is None else ended_s + ROUND_S
            return GcRound(sweep=True) if rested_s <= now_s else GcIdle(rested_s - now_s)
        return next_round(
            self._history,
            self._clock(),
            commits=self._commits,
            grace_s=self.grace_s(),
            hurry=self._hurry,
        )

    def _await_round(self) -> _DueRound | None:
        """Wait for the next round; None after ``stop``."""
        with self._changed:
            while not self._stopped:
                step = self._next()
                if isinstance(step, GcRound):
                    self._running = True
                    full, self._full = self._full, False
                    return _DueRound(step.sweep, self._commits, self._hurry, full)
                self._changed.wait(step.seconds)
            return None

    def _round(self, due: _DueRound) -> Event | None:
        """Run a round; the event to emit."""
        started_s = self._clock()
        history = self._history
        try:
            plan, report = self._drop_and_sweep(due)
            complete = report is None or not any(store.problem for store in report.stores)
            # A round that failed counts as not run: its commits stay due.
            history = replace(history, commits=due.commits if complete else history.commits)
            if report is not None and complete:
                history = replace(history, sweep_started_s=started_s)
            return self._done_event(plan, report)
        except FencedError as error:
            # The newer epoch's writer applies its own policy. This one asks again only after a
            # further commit of its own.
            history = replace(history, commits=due.commits, sweep_started_s=started_s)
            return Event("gc-fenced", f"nothing more is dropped: {error}")
        except CkptError as error:
            return self._failed(error)
        except Exception as error:  # noqa: BLE001  the outermost frame of a thread
            wrapped = InternalError(f"unexpected error while dropping snapshots. cause={error!r}")
            return self._failed(wrapped)
        finally:
            with self._changed:
                self._history = replace(
                    history, round_started_s=started_s, round_ended_s=self._clock()
                )

    def _drop_and_sweep(self, due: _DueRound) -> tuple[GcPlan, SweepReport | None]:
        # A journal of its own: no upload waits for a round. The fence checks the epoch again at the
        # very seq that a drop gets.
        store = self._store
        backend = store.backend
        journal = store.journal = store.journal or fenced_journal(backend, self._writer)
        require_newest_epoch(journal.refresh(), self._writer())
        grace_s = self.grace_s(full=due.full)
        plan, state = drop(
            backend,
            journal,
            # Before the first commit it is not certain that the job continues from here: nothing
            # is dropped then, and a full store loses only what is garbage already.
            self._settings.policy if due.commits else None,
            now_unix_s=self._wall(),
            grace_s=grace_s,
        )
        for problem in plan.problems:
            self._emit_alarm(Event("gc-rule", problem, alarm=True))
        if not due.sweep:
            return plan, None
        report = sweep(
            backend, state, grace_s=grace_s, emit=self._emit_alarm, cache=store.references
        )
        keep_reserves(backend, state)
        return plan, report

    def _writer(self) -> int:
        """The epoch to drop for. After ``stop`` no epoch, so a round in progress records nothing.

        Its policy may be out of date by then.
        """
        return -1 if self._stopped else self._epoch()

    def _done_event(self, plan: GcPlan, report: SweepReport | None) -> Event | None:
        if (report is None or report.ok) and not plan.problems:
            self._reported.clear()
        deleted_bytes = (
            sum(store.deleted_bytes for store in report.stores) if report is not None else 0
        )
        if not plan.drops and not deleted_bytes:
            return None
        kept = len(plan.decisions) - len(plan.drops)
        facts: dict[str, Fact] = {
            "dropped": len(plan.drops),
            "kept": kept,
            "deleted_bytes": deleted_bytes,
        }
        return Event("gc", f"{len(plan.drops)} snapshots were dropped, {kept} are kept", facts)

    def _failed(self, error: CkptError) -> Event | None:
        text = f"dropping or deleting old snapshots failed; trying again: {error}"
        return self._once(Event("gc-failed", text, {"code": error.code}, alarm=True))

    def _emit_alarm(self, event: Event) -> None:
        if event.alarm and not self._stopped and self._once(event) is not None:
            self._emit(event)

    def _once(self, event: Event) -> Event | None:
        """``event``, or None if its text was emitted since the last successful round."""
        if event.text in self._reported:
            return None
        self._reported.add(event.text)
        return event
