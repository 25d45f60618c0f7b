"""Dropping and sweeping beside a job that trains: after commits, in a thread of its own, at a low
rate.

Nobody waits for it and nothing is raised: what fails is told as an alarm and tried again in the
next round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, FencedError, InternalError
from ckpt.events import Emit, Event, Fact
from ckpt.log.journal import Journal
from ckpt.maintenance.gc.drop import drop, fenced_journal, require_newest_epoch
from ckpt.maintenance.gc.plan import GcHistory, GcIdle, GcPlan, GcRound, next_round
from ckpt.maintenance.gc.sweep import SweepReport, sweep
from ckpt.maintenance.retention import KeepPolicy
from ckpt.threads import start_thread


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """What is kept, and how long the bytes of dropped snapshots stay, by the stores' clocks."""

    policy: KeepPolicy
    grace_s: float


@dataclass(frozen=True, slots=True)
class _DueRound:
    """A round: whether it sweeps, how many commits there were when it began, and whether it is the
    hurried one."""

    sweep: bool
    commits: int
    hurried: bool


class GcRounds:
    """Keeps to a policy until ``stop``. ``epoch``: the writer's, as whom it drops. All calls are
    quick; from any thread.

    ``clock`` is monotonic, ``wall`` the time that ages of snapshots are counted from.
    """

    def __init__(
        self,
        backend: Backend,
        settings: RetentionSettings,
        *,
        epoch: Callable[[], int],
        tell: Emit,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._keep = settings
        self._epoch = epoch
        self._tell = tell
        self._clock = clock
        self._wall = wall
        self._changed = threading.Condition()
        self._past = GcHistory()
        self._commits = 0
        self._held = self._hurry = self._running = self._stopped = self._ended = False
        self._journal: Journal | None = None
        self._told: set[str] = set()
        start_thread(self._run, name="ckpt-gc")

    def on_commit(self) -> None:
        """A snapshot was committed."""
        with self._changed:
            self._commits += 1
            self._changed.notify_all()

    def pause(self) -> None:
        """Somebody restores: begin nothing until ``let_go``, whatever the grace is."""
        with self._changed:
            self._held = True

    def resume(self) -> None:
        """What was to be restored is."""
        with self._changed:
            if self._held:
                self._held = False
                self._changed.notify_all()

    def start_last_round(self) -> None:
        """The job is over: do what is owed now, once, without rest."""
        with self._changed:
            self._hurry = True
            self._hurry = isinstance(self._next(), GcRound)
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing is being done, nor left to be done at once."""
        with self._changed:
            return self._ended or not (self._running or isinstance(self._next(), GcRound))

    def await_idle(self, timeout_s: float) -> bool:
        """Wait until it is idle, ``timeout_s`` seconds at most; whether it is."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: self.idle, max(0.0, until_s - time.monotonic()))

    def stop(self, timeout_s: float) -> None:
        """Begin nothing any more, and wait for what is being done, ``timeout_s`` seconds at most:
        dying in it is no harm."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, timeout_s)

    def _run(self) -> None:
        try:
            while (found := self._await_round()) is not None:
                event = self._round(found)
                with self._changed:
                    self._running = False
                    self._hurry = self._hurry and not found.hurried
                    self._changed.notify_all()
                if event is not None and not self._stopped:
                    self._tell(event)
        finally:
            with self._changed:
                self._running, self._ended = False, True
                self._changed.notify_all()

    def _next(self) -> GcRound | GcIdle:
        if self._held and not self._hurry:
            return GcIdle(None)
        return next_round(
            self._past,
            self._clock(),
            commits=self._commits,
            grace_s=self._keep.grace_s,
            hurry=self._hurry,
        )

    def _await_round(self) -> _DueRound | None:
        """The next round, when it is time; None where there is none any more."""
        with self._changed:
            while not self._stopped:
                found = self._next()
                if isinstance(found, GcRound):
                    self._running = True
                    return _DueRound(found.sweep, self._commits, self._hurry)
                self._changed.wait(found.seconds)
            return None

    def _round(self, begun: _DueRound) -> Event | None:
        """Do it; what to tell."""
        began_s = self._clock()
        past, commits = self._past, begun.commits
        try:
            plan, report = self._drop_and_sweep(sweeps=begun.sweep)
            went_well = report is None or not any(one.problem for one in report.stores)
            past = replace(past, commits=commits if went_well else past.commits)
            if report is not None and went_well:
                past = replace(past, swept_s=began_s)
            return self._dropped(plan, report)
        except FencedError as error:
            # Whoever overtook this writer keeps to what it was told; the next commit here, if there
            # is one, asks again.
            past = replace(past, commits=commits, swept_s=began_s)
            return Event("gc-fenced", f"nothing is dropped any more: {error}")
        except CkptError as error:
            return self._failed(error)
        except Exception as error:  # noqa: BLE001  a thread's border
            wrapped = InternalError(
                f"dropping old snapshots failed in an unforeseen way. cause={error!r}"
            )
            return self._failed(wrapped)
        finally:
            with self._changed:
                self._past = replace(past, began_s=began_s, ended_s=self._clock())

    def _drop_and_sweep(self, *, sweeps: bool) -> tuple[GcPlan, SweepReport | None]:
        self._journal = self._journal or fenced_journal(self._backend, self._writer)
        require_newest_epoch(self._journal.refresh(), self._writer())
        plan, state = drop(self._backend, self._journal, self._keep.policy, now_unix_s=self._wall())
        report = (
            sweep(self._backend, state, grace_s=self._keep.grace_s, emit=self._tell_alarm)
            if sweeps
            else None
        )
        return plan, report

    def _writer(self) -> int:
        """As whom to drop. A round that was stopped in the middle must not record what nobody wants
        any more."""
        return -1 if self._stopped else self._epoch()

    def _dropped(self, plan: GcPlan, report: SweepReport | None) -> Event | None:
        if report is None or report.ok:
            self._told.clear()
        deleted = sum(one.deleted_bytes for one in report.stores) if report is not None else 0
        if not plan.drops and not deleted:
            return None
        left = len(plan.judged) - len(plan.drops)
        facts: dict[str, Fact] = {
            "dropped": len(plan.drops),
            "kept": left,
            "deleted_bytes": deleted,
        }
        return Event("gc", f"{len(plan.drops)} snapshots were dropped, {left} are kept", facts)

    def _failed(self, error: CkptError) -> Event | None:
        text = f"old snapshots could not be dropped or deleted, tried again: {error}"
        return self._new(Event("gc-failed", text, {"code": error.code}, alarm=True))

    def _tell_alarm(self, event: Event) -> None:
        if event.alarm and not self._stopped and self._new(event) is not None:
            self._tell(event)

    def _new(self, event: Event) -> Event | None:
        """Each alarm once, until a round went well."""
        if event.text in self._told:
            return None
        self._told.add(event.text)
        return event
