"""The ``Run`` of a decorated call: tracks state, counts steps, takes snapshots when due."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress

import torch

from ckpt.elastic.boundaries import (
    Loop,
    MemoryTier,
    Milestones,
    ProtectionWatch,
    StepIterator,
    StepWatch,
    was_exhausted,
)
from ckpt.elastic.failure import ExitReporter, Preempted, describe_failure
from ckpt.elastic.processes.trainer import TrainerProcess
from ckpt.elastic.schedule import EverySeconds, Schedule, capture_rule, is_due, next_due
from ckpt.errors import CkptError, FencedError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.session.agreement import SnapshotRequest
from ckpt.session.c10d_mailbox import world_of_process
from ckpt.session.options import check_tag
from ckpt.session.saving import Metrics
from ckpt.session.session import Session
from ckpt.session.staging import SLOT_WAIT_S
from ckpt.values import SnapshotInfo, TrainerPhase


class RankInfo:
    """This process's rank and device."""

    @property
    def rank(self) -> int:
        """This process's rank, from 0."""
        return world_of_process()[0]

    @property
    def local_rank(self) -> int:
        """This process's number on its node, from 0."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        """The number of ranks that train together."""
        return world_of_process()[1]

    @property
    def device(self) -> torch.device:
        """Where this rank's model belongs: its CUDA device if there is one, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


BOUNDARY_WAIT_S = 60.0
"""How long a requested snapshot may block training while uploads hold all slots.

Then the request is given up.
"""


class Run(RankInfo):
    """One call of a decorated function: its state, its steps, its snapshots.

    Made by ``ckpt.resilient``. Not thread-safe except for ``save`` and ``log``: the training
    thread owns it. With several ranks, every rank makes the same calls of ``track``, ``steps``
    and ``completed`` in the same order.

    The class has more than 12 attributes: they are one state machine of a loop, and every
    boundary reads most of them.
    """

    def __init__(
        self,
        session: Session,
        schedule: Schedule,
        *,
        stale_s_max: float | None = None,
        memory_every: int | None = 1,
        trainer: TrainerProcess | None = None,
        milestones: Milestones | None = None,
        end_wait_s: float = 0.0,
        exit_reporter: ExitReporter | None = None,
    ) -> None:
        self._trainer = trainer
        self._milestones = milestones or Milestones()
        self._session = session
        self._exit_reporter = exit_reporter or ExitReporter(session)
        self._memory_every = memory_every
        self._memory: MemoryTier | None = None
        self._schedule = schedule
        self._stale_s_max = stale_s_max
        self._step_watch = StepWatch()
        self._protection = ProtectionWatch()
        self._metrics = Metrics(session.emit, rank=world_of_process()[0])
        self._completed: int | None = None
        self._taken: int | None = None
        self._staged: int | None = None
        self._first_step_reported = False
        self._postponed_due: int | None = None
        self._postponed_orders: list[SnapshotRequest] = []
        self._rng_waits = False
        self._stepped = False
        self._partial_body = False
        self._paused = False
        self._exit_error: CkptError | Preempted | None = None
        self._asked_at_s = time.monotonic()

        self._stop_at_s = float("inf")
        self._stopping = threading.Event()
        self._end_wait_s = end_wait_s
        self.returned = False
        """Whether the decorated function has returned: nothing of it may run again."""

    @property
    def membership_epoch(self) -> int:
        """The number of the membership that this attempt opened; grows with every start.

        Waits for the other ranks.
        """
        self._open()
        return self._session.epoch

    @property
    def restored(self) -> SnapshotInfo | None:
        """The snapshot from which this attempt continues, or None for a fresh start.

        Waits for the other ranks.
        """
        self._open()
        return self._session.restored

    @property
    def completed_steps(self) -> int:
        """The number of completed steps: where a hand-written loop starts.

        The first reading after ``track`` also restores the random number generators, so read it
        right before the loop.
        """
        self._start()
        if self._done:  # a loop of one's own may have nothing left to do
            self._protection.looped()
        return self._done

    def track(self, **items: object) -> None:
        """Name what makes up the state; each item is restored in place at once.

        Nothing is restored at a fresh start. An item is a module, optimizer, scheduler, scaler,
        stateful loader, generator, anything with ``state_dict`` and ``load_state_dict``, or a
        dict or list of these, of tensors and of plain values. May be called several times. All
        items of a run are restored from one snapshot. Random number generators are tracked
        automatically. Raises UsageError, naming the item and the remedy, if an item can't be
        captured or doesn't fit what is stored.
        """
        if not items:
            raise UsageError(
                "nothing to track; name the items: run.track(model=model, optimizer=optimizer)"
            )
        self._milestones.reach("tracked")
        self._open()
        if self._stepped:
            raise UsageError(
                "tracked after a step was completed, so after a restart it would be restored from "
                "another step than the rest. "
                f"items={sorted(items)} completed={self._done}; track everything before the first "
                "step"
            )
        before = self._session.restored
        self._session.track(items)
        after = self._session.restored
        if (
            self._completed is not None
            and before is not None
            and after is not None
            and after.id != before.id
        ):
            raise UsageError(
                "the snapshot turned out damaged after its step count was given out, so this run "
                "would continue from an older one under the wrong number. "
                f"items={sorted(items)} completed={self._done} older={after.id}; "
                "track everything before completed_steps is read and before steps() begins"
            )
        self._step_watch.add(items)
        self._protection.tracked(items)
        self._rng_waits = self._session.restored is not None

    def steps(self, total: int) -> Iterator[int]:
        """Yield the remaining steps, from the restored one on, up to ``total`` completed ones.

        Takes the snapshots that are due after each body of the loop, and one at the end.
        ``break`` and ``return`` complete the current body, an exception does not. May be called
        again with a larger total.
        """
        if total < 0:
            raise UsageError(f"a total counts steps from 0 on. total={total}")
        return StepIterator(lambda loop: self._steps(total, loop))

    def _steps(self, total: int, loop: Loop) -> Generator[int, None, None]:
        self._start()
        self._protection.looped()
        while self._done < total:
            step = self._done
            loop.ask(sys._getframe(1))
            try:
                yield step
            except GeneratorExit:
                frame = sys._getframe(1)
                if loop.completes(frame):
                    self._leave(step + 1)
                else:
                    self._partial_body = not was_exhausted(frame)
                raise
            self.completed(step + 1)
        if self._stepped:
            self._snapshot_last()
            return
        # There was nothing to do here, and another loop may follow: a store may delay it no longer
        # than a boundary.
        with suppress(UnavailableError):
            self._snapshot_last(wait_s=BOUNDARY_WAIT_S)

    def completed(self, steps: int) -> None:
        """Report that ``steps`` steps are complete: the boundary of a hand-written loop.

        ``steps()`` calls it by itself.

        Takes a snapshot if one is due. A boundary at which no tracked optimizer stepped
        (gradients are being accumulated) takes none; what was due is taken at the next boundary
        with a step. Costs microseconds otherwise. Raises FencedError if a newer attempt has taken
        over, UnavailableError if the staleness budget is exceeded.
        """
        self._start()
        if self._paused:
            raise UsageError(
                f"a step was completed inside `with run.paused()`. step={steps}; end the pause "
                "first"
            )
        if steps <= self._done:
            raise UsageError(f"completed steps only grow. completed={self._done} reported={steps}")
        since = self._done
        due = steps if is_due(self._schedule, steps, since=since) else self._postponed_due
        self._completed = steps
        self._stepped, self._partial_body = True, False
        self._raise_if_futile()
        decisions = self._session.decisions
        point = self._step_watch.at_snapshot_point()
        if (gap := self._protection.boundary(steps, point=point)) is not None:
            self._tell_gap(gap)
        order = decisions.reached(steps, due=due if point else None)
        if order is not None:
            self._postponed_orders.append(order)
        self._postponed_due = None if point else due
        self._ask_by_time(steps)
        if point and self._postponed_orders:
            orders, self._postponed_orders = self._postponed_orders, []
            self._serve(orders)
        elif point and self._memory is not None and self._memory.should_stage(steps, since=since):
            self._stage()
        if self._memory is not None:
            self._memory.complete_boundary(steps, staged=steps in (self._taken, self._staged))
        self._exit_reporter.progress(steps)
        self._report_first_step()
        upcoming = next_due(self._schedule, steps)
        if upcoming == steps + 1:
            decisions.announce(upcoming)  # only now: the snapshot above takes a slot too

    def ready(self) -> None:
        """Mark the point up to which a prepared trainer may run.

        Before it: late imports, CUDA contexts, models; after it: process groups. With
        ``prepared=True`` a second process waits here until the first one dies, and continues in
        its place. Returns at once otherwise. Nothing before it may communicate with other ranks.
        """
        if self._trainer is not None and not self._trainer.attempt:
            self._trainer = self._trainer.promoted()
            self._session.join_attempt(self._trainer.attempt)

    def failing(self, error: BaseException) -> None:
        """Report the exception because of which this process is about to exit.

        Called by the decorator.
        """
        facts = describe_failure(error)
        if self.returned:
            facts["final"] = True
        self._exit_reporter.failing(facts, self._done)

    def log(self, **values: float | int | str | bool | torch.Tensor | None) -> None:
        """Record facts of the current step, such as the loss.

        Rank 0's latest are stored in the next snapshot's metadata.

        A tensor of one element is read at once if it is on the CPU, else at the next snapshot, so
        that no step waits for a GPU.
        """
        self._metrics.log(values)

    def save(self, tag: str | None = None) -> None:
        """Request a snapshot at the next boundary, optionally under a tag.

        The tag keeps it until it is untagged or the tag moves on. From any rank and thread;
        returns at once. With several ranks the request takes effect at the first boundary that no
        rank has passed. Several requests before one boundary become one snapshot. If uploads hold
        all slots, that boundary waits up to 60 s for one; then the request is given up, with an
        alarm.
        """
        self._open()
        if tag is not None:
            check_tag(tag)
        if not self._stepped:
            self._protection.saved_early(tag)
        self._session.decisions.request(
            SnapshotRequest((tag,) if tag is not None else (), forced=True)
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mark time that belongs to no step, such as an evaluation.

        It must not contain a boundary.
        """
        if self._paused:
            raise UsageError("pauses don't nest; one `with run.paused()` at a time")
        self._paused = True
        self._session.emit(Event("paused", "training pauses"))
        self._mark(TrainerPhase.PAUSED)
        try:
            yield
        finally:
            self._paused = False
            self._mark(TrainerPhase.TRAINING)
            self._session.emit(Event("resumed", "training continues"))

    def finish(self) -> None:
        """End well: a last snapshot if the last boundary has none, and everything durable.

        Called by the decorator. While the store does not take the last snapshot it is tried again,
        for ``RestartPolicy.end_wait``.
        """
        self.returned = True
        if self._exit_error is not None:
            raise self._exit_error
        for gap in self._protection.gaps():
            self._tell_gap(gap)
        if self._session.opened:
            self._take_last()
        self._session.retry_last(self._end_wait_s, stop=self._stopping)
        try:
            self._session.finish()
        except UnavailableError as error:
            raise type(error)(
                f"the training is finished with {self._done} steps, but its end is not durable: "
                f"{error}; what was saved before is, and the keeper goes on trying for some minutes"
            ) from error
        self._exit_reporter.finished()

    def _take_last(self) -> None:
        self._start()
        last = self._session.decisions.end(self._done)
        orders = [*self._postponed_orders, *([last] if last is not None else [])]
        self._postponed_orders = []
        if orders and self._taken == self._done:
            self._session.tag_last([tag for order in orders for tag in order.tags])
        elif orders:
            self._snapshot(orders)
        else:
            self._snapshot_last()
        self._step_watch.close()
        self._mark(TrainerPhase.FINISHED)

    def abandon(self) -> None:
        """End after an exception: staged snapshots still get time to become durable.

        Called by the decorator.
        """
        self._step_watch.close()
        self._session.abandon()

    @property
    def _done(self) -> int:
        return self._completed or 0

    def _open(self) -> None:
        self.ready()
        self._session.open_run(capture_rule(self._schedule, self._memory_every))

    def _start(self) -> None:
        """Before the first step: find the snapshot's step count, and restore the generators."""
        self._open()
        if self._rng_waits:
            self._session.begin()
            self._rng_waits = False
        if self._completed is None:
            restored = self._session.restored
            self._completed = restored.step if restored is not None else 0
            self._taken = (
                restored.step
                if restored is not None and not self._session.must_save_restored
                else None
            )
            self._begin()

    def _begin(self) -> None:
        """Everything is restored, and the first step is next."""
        self._milestones.reach("restored")
        self._milestones.report_to(self._session.reporter.report)
        board = self._session.board
        if board is not None:
            self._memory = MemoryTier(
                board,
                rank=self._session.local_rank,
                every=self._memory_every,
                leads=self.rank == 0,
                forward_decision=self._session.announce_decision,
            )
            self._memory.begin(self._done)
            if self._memory_every != 0:
                self._session.saving.reserve_slots(2)
        self._session.on_stop(self.stop)

    def stop(self, within_s: float) -> bool:
        """Ask all ranks to stop at a boundary, durable, within that many seconds.

        From any thread. False if no step has begun.
        """
        if self._completed is None:
            return False
        self._stop_at_s = time.monotonic() + within_s
        self._stopping.set()
        # One request is every rank's. With several nodes any node may be the one that is taken
        # away.
        if self._session.local_rank == 0:
            self._session.decisions.request(SnapshotRequest(forced=True, stop=True))
        return True

    def _tell_gap(self, text: str) -> None:
        """Tell once for the job in which way nothing is protected."""
        if self.rank == 0:
            self._session.emit(Event("unprotected", text, alarm=True))

    def _mark(self, phase: TrainerPhase) -> None:
        if self._memory is not None:
            self._memory.set_phase(phase)

    def _report_first_step(self) -> None:
        if not self._first_step_reported:
            self._first_step_reported = True
            self._milestones.reach("first-step")
            self._milestones.report_to(self._session.reporter.report)
            if self._trainer is not None:
                self._trainer.first_step_done()

    def _stage(self) -> None:
        """Stage a snapshot in memory only. Skipped, without waiting, if no slot is free."""
        assert self._memory is not None, "it decides about copies in memory"
        copied = self._session.stage(self._done, metadata=self._metrics.facts())
        if copied is None:
            self._memory.count_skipped()
            return
        self._staged = self._done
        pace = self._memory.copied(self._done, began_s=copied.began_s, ended_s=copied.ended_s)
        if pace is not None:
            text = (
                f"state is copied into memory at each {pace.every}th step from here on, so that it "
                "costs 1 to 2 % of the time; a restart repeats that many steps at most"
            )
            facts = {
                "every": pace.every,
                "copy_s": round(pace.copy_s, 4),
                "step_s": round(pace.step_s, 4),
            }
            self._session.emit(Event("memory-every", text, facts, alarm=True))

    def _serve(self, orders: list[SnapshotRequest]) -> None:
        """Take the snapshot that is due or requested; end here if it precedes a preemption."""
        stop = any(order.stop for order in orders)
        if self._memory is not None:
            self._memory.interrupted()
        # A failure was reported as an alarm, and all ranks know it: a slow store doesn't stop
        # training.
        with suppress(UnavailableError):
            self._snapshot(orders, wait_s=BOUNDARY_WAIT_S)
        if stop:
            self._mark(TrainerPhase.FINISHED)
            self._session.await_durable(min(3600.0, max(0.0, self._stop_at_s - time.monotonic())))
            durable = self._session.is_durable(self._done)
            outcome = "is durable" if durable else "is not durable yet: the keeper goes on with it"
            text = f"preempted: step {self._done} {outcome}"
            if self._session.mailbox.rank == 0:
                self._session.emit(Event("preempted", text, {"step": self._done}, alarm=True))
            raise Preempted(self._done, durable=durable)

    def _ask_by_time(self, steps: int) -> None:
        """Request a snapshot when rank 0's clock says so; the ranks agree on its boundary."""
        if not isinstance(self._schedule, EverySeconds) or self._session.mailbox.rank != 0:
            return
        now_s = time.monotonic()
        if self._taken == steps or not self._session.saving.idle:
            return
        if now_s - self._asked_at_s >= self._schedule.seconds:
            self._asked_at_s = now_s
            self._session.decisions.request(SnapshotRequest())

    def _leave(self, steps: int) -> None:
        """Complete the body that ``break`` left.

        Runs inside a closing generator, in which Python drops exceptions: the error is kept for
        ``finish``.
        """
        try:
            self.completed(steps)
            self._snapshot_last()
        except (CkptError, Preempted) as error:
            self._exit_error = error

    def _snapshot_last(self, *, wait_s: float = SLOT_WAIT_S) -> None:
        """The snapshot of a loop's last boundary, if it is a snapshot point and has none yet."""
        if self._taken == self._done or not self._step_watch.was_snapshot_point or self._done == 0:
            return
        self._snapshot([SnapshotRequest(forced=True)], wait_s=wait_s)

    def _snapshot(self, orders: list[SnapshotRequest], *, wait_s: float = SLOT_WAIT_S) -> None:
        # Only at the end: the loop was left in the middle of a body.
        if self._partial_body or self._step_watch.stepped:
            self._session.refuse(
                self._done,
                "the loop was left in the middle of a step, whose half-done work is no snapshot. "
                f"completed={self._done}; "
                "leave it by break, or let the exception out",
            )
            return
        tags = tuple(dict.fromkeys(tag for order in orders for tag in order.tags))
        facts, restored = self._metrics.facts(), self._session.restored
        if not self._stepped and restored is not None:
            facts = {**restored.metadata, **facts}  # no step since: it is the same state
        self._session.snapshot(self._done, metadata=facts, tags=tags, wait_s=wait_s)
        self._taken = self._done
        self._asked_at_s = time.monotonic()

    def _raise_if_futile(self) -> None:
        """Raise if a newer attempt fenced this one or the staleness budget is exceeded.

        More training would be lost work.
        """
        failure = self._session.saving.last_failure
        if isinstance(failure, FencedError):
            raise failure
        if self._stale_s_max is None:
            return
        stale_s = self._session.saving.stale_s()
        if stale_s > self._stale_s_max:
            raise UnavailableError(
                f"no snapshot became durable within the staleness budget. stale_s={stale_s:.0f} "
                f"max_stale_s={self._stale_s_max:.0f} store={self._session.url}; repair the store "
                "or raise max_stale"
            ) from failure
