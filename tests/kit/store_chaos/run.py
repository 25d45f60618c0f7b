"""One run: a job on three stores does what its schedule says, and each answer is held against the
truth."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import ckpt
from ckpt.backends.base import Backend
from ckpt.backends.replicated.open import open_job_stores
from ckpt.errors import CkptError, CommitUnknownError, ConflictError, NotFoundError
from ckpt.log.journal import Journal
from ckpt.maintenance.gc.drop import drop, preview
from ckpt.maintenance.retention import parse_policy
from ckpt.maintenance.sync.sync import sync
from ckpt.values import SnapshotInfo
from kit.store_chaos.bounds import OPERATION_S, closing, within
from kit.store_chaos.content import Content, State, changed, draw_sizes, held_by, state_of
from kit.store_chaos.places import FolderPlace, Place
from kit.store_chaos.schedule import AT_ONCE, Fault, Schedule, Step
from kit.store_chaos.truth import Pair, Truth
from kit.store_chaos.upkeep import care, nobody, scrub_all, sweep_now, told

QUORUM = 2
BEARING = frozenset({"save", "restore", "restore-step", "look", "rewind", "reopen", "gc", "scrub"})
"""Operations that one store with anything wrong keeps from nothing."""

MENDS_MAX = 3
"""So many rounds of mending have to do where no fault is in force."""


class Run:
    """The job, its places, and what must be true of it."""

    def __init__(
        self, schedule: Schedule, places: Sequence[Place], folder: Path, key: str | None
    ) -> None:
        self.schedule = schedule
        self.places = places
        self.truth = Truth()
        self.sizes = draw_sizes(random.Random(schedule.seed))
        self._folder = folder
        self._key = key
        self._way = "proxied"
        self._checkpointer: ckpt.Checkpointer | None = None
        self._content: Content = (0,) * len(self.sizes)
        self._step = 0
        self._versions = 0

    def play(self) -> None:
        """Do all steps."""
        active: dict[int, Fault] = {}
        for number, step in enumerate(self.schedule.steps):
            began_s = time.monotonic()
            for fault in step.ends:
                self.places[fault.place].heal(fault.kind)
                del active[fault.place]
            waiting = []
            for fault in step.begins:
                if fault.kind not in AT_ONCE:
                    active[fault.place] = fault
                strike = partial(self.places[fault.place].strike, fault.kind, fault.seed)
                if fault.at_request is None:
                    strike()
                else:
                    place, count = fault.at_request
                    self.places[place].spoiler.when_seen(count, strike)
                    waiting.append(place)
            try:
                outcome = within(OPERATION_S, partial(self._do, step))
            except BaseException as error:
                print(
                    f"{number:2}: {step}\n      FAILED after {time.monotonic() - began_s:.1f} s  "
                    f"{error!r}"
                )
                raise
            finally:
                for place in waiting:
                    self.places[place].spoiler.hasten()
            print(f"{number:2}: {step}\n      {time.monotonic() - began_s:5.1f} s  {outcome}")
        for fault in active.values():
            self.places[fault.place].heal(fault.kind)

    def go_direct(self) -> None:
        """From here on nothing stands between, and there is time."""
        self.leave()
        self._way = "direct"

    def _do(self, step: Step) -> str:
        dice = random.Random(step.seed)
        work: dict[str, Callable[[random.Random, bool], str]] = {
            "save": self.save,
            "restore": self.restore,
            "restore-step": self.restore_step,
            "look": self.look,
            "rewind": self.rewind,
            "reopen": self.reopen,
            "scrub": self.scrub,
            "gc": self.gc,
            "care": self.care,
            "sync": self.sync,
            "mend": self.mend,
        }
        try:
            return work[step.operation](dice, step.quiet)
        except CkptError as error:
            must = step.quiet or (step.bearable and step.operation in BEARING)
            if isinstance(error, ConflictError):
                self.leave()  # what the session goes on from is not there any more
                if must:
                    return f"{_short(error)} / then {work[step.operation](dice, step.quiet)}"
            if must and not (isinstance(error, NotFoundError) and None in self.truth.newest()):
                raise
            return _short(error)

    # The job.

    def save(self, dice: random.Random, quiet: bool) -> str:
        """Train on and save; after a start, from the newest snapshot."""
        checkpointer = self._live()
        self._versions += 1
        content = changed(self._content, self._versions, dice)
        step = self._step + dice.randint(1, 3)
        session = checkpointer._session
        opened = session.opened
        try:
            info = checkpointer.save(state_of(self.sizes, content), step=step)
        except CkptError as error:
            self._step = step
            if not session.opened:
                self.truth.maybe_opened(session.restored.id if session.restored else None)
            else:
                if not opened:
                    self.truth.opened(
                        session.epoch, session.restored.id if session.restored else None
                    )
                if isinstance(error, CommitUnknownError):
                    self.truth.maybe_committed(Pair(session.epoch, step), content)
            raise
        if not opened:
            self.truth.opened(session.epoch, session.restored.id if session.restored else None)
        assert info.id == Pair(session.epoch, step)
        self.truth.committed(info.id, content)
        self._content, self._step = content, step
        return f"saved {info.id}, {info.new_bytes} new bytes"

    def rewind(self, dice: random.Random, quiet: bool) -> str:
        """Go on from some older snapshot, in the job's own session."""
        steps = self.truth.steps()
        return self._restored(self._live(), step=dice.choice(steps) if steps else None, mine=True)

    def reopen(self, dice: random.Random, quiet: bool) -> str:
        """End the process, as it were."""
        self.leave()
        return "left"

    def leave(self) -> None:
        """Close the job's session. What it could not save it has told."""
        if self._checkpointer is not None:
            with suppress(CkptError):
                self._checkpointer.close()
            self._checkpointer = None

    def _live(self) -> ckpt.Checkpointer:
        if self._checkpointer is None:
            checkpointer = self.reader()
            try:
                self._restored(checkpointer, step=None, mine=True)
            except NotFoundError:
                if None not in self.truth.newest():
                    raise
                self._content, self._step = (0,) * len(self.sizes), 0
            except BaseException:
                checkpointer.close()
                raise
            self._checkpointer = checkpointer
        return self._checkpointer

    # Who reads.

    def reader(self, *, dead: Sequence[int] = ()) -> ckpt.Checkpointer:
        """A session of one's own, for which the ``dead`` stores do not answer."""
        urls, options = self._stores(dead)
        return ckpt.Checkpointer(
            urls,
            job="chaos",
            storage_options=options,
            write_quorum=QUORUM,
            encryption_key=self._key,
            threads=2,
        )

    def restore(self, dice: random.Random, quiet: bool) -> str:
        """The newest, by a reader."""
        with closing(self.reader()) as checkpointer:
            return self._restored(checkpointer, step=None, sure=quiet)

    def restore_step(self, dice: random.Random, quiet: bool) -> str:
        """One by its step, by a reader."""
        steps = self.truth.steps()
        with closing(self.reader()) as checkpointer:
            return self._restored(checkpointer, step=dice.choice(steps) if steps else 1, sure=quiet)

    def look(self, dice: random.Random, quiet: bool) -> str:
        """All snapshots there are."""
        with closing(self.reader()) as checkpointer:
            found = checkpointer.snapshots()
            newest = checkpointer.latest()
        if any(info.maybe_stale for info in found) or (newest is not None and newest.maybe_stale):
            assert not quiet, f"flagged as stale, though enough stores answer. newest={newest}"
            return f"{len(found)} snapshots, maybe stale"
        if quiet:
            broken = [info for info in found if info.problem]
            assert not broken, f"manifests can't be read: {broken}"
            wrong = self.truth.see(
                frozenset(info.id for info in found), newest.id if newest else None
            )
            assert not wrong, wrong
        return f"{len(found)} snapshots, newest {newest.id if newest else None}"

    def check_restored(self, checkpointer: ckpt.Checkpointer, pair: Pair) -> SnapshotInfo:
        """Restore just that one: it has to be there, to the last bit."""
        state = state_of(self.sizes, None)
        info = checkpointer.restore(state, step=pair.step, epoch=pair.epoch)
        assert info.id == pair
        self._check_bytes(info, state)
        return info

    def _restored(
        self,
        checkpointer: ckpt.Checkpointer,
        *,
        step: int | None,
        mine: bool = False,
        sure: bool = False,
    ) -> str:
        state = state_of(self.sizes, None)
        expected = self.truth.newest() if step is None else self.truth.of_step(step)
        try:
            info = checkpointer.restore(state, step=step, stale="allow")
        except NotFoundError:
            assert None in expected, (
                f"not found, though it has to be there. step={step} expected={expected}"
            )
            raise
        content = self._check_bytes(info, state)
        assert info.maybe_stale or info.id in expected, (
            f"another snapshot than it has to be, and not flagged. found={info.id} step={step} "
            f"expected={expected}"
        )
        assert not (sure and info.maybe_stale), (
            f"flagged as stale, though enough stores answer. found={info.id}"
        )
        if mine:
            self._content, self._step = content, info.step
        return f"restored {info.id}{', maybe stale' if info.maybe_stale else ''}"

    def _check_bytes(self, info: SnapshotInfo, state: State) -> Content:
        known = self.truth.contents(info.id)
        if info.maybe_stale:
            known = [content for pair, content in self.truth.ever if pair == info.id]
        content = held_by(self.sizes, state, known)
        assert content is not None, (
            f"WRONG BYTES or a snapshot that does not exist. found={info} known={len(known)}"
        )
        return content

    # Who looks after the stores.

    def scrub(self, dice: random.Random, quiet: bool) -> str:
        """Read and mend everything; an empty store is left alone."""
        with closing(self.backend()) as backend:
            report = scrub_all(backend)
        assert not report.lost, f"lost to all stores: {report.problems}"
        return told(report)

    def gc(self, dice: random.Random, quiet: bool) -> str:
        """Drop what is not among the newest few, and sweep."""
        if quiet:
            self.look(dice, quiet)
        last = dice.randint(1, 4)
        policy = parse_policy(f"last={last}")
        with closing(self.backend()) as backend:
            journal = Journal.open(backend)
            state = journal.refresh()
            plan = preview(backend, state, policy, now_unix_s=time.time())
            # What is in doubt may be decided by the drop itself: only what was seen counts here.
            seen = self.truth.fitting(
                frozenset(entry.snapshot for entry in state.snapshots), state.newest()
            )
            for world in seen if plan.drops and quiet else ():
                kept = set(world.line()[:last])
                assert not kept & set(plan.drops), (
                    f"drops what the policy keeps. drops={plan.drops} keep={sorted(kept)}"
                )
            try:
                done, state = drop(backend, journal, policy, now_unix_s=time.time(), approved=plan)
            except CkptError:
                if plan.drops:
                    self.truth.maybe_dropped(plan.drops)
                raise
            if done.drops:
                self.truth.dropped(done.drops)
            report = sweep_now(backend, state, dice)
        if quiet:
            assert not report.held, f"records can't be read: {report.held}"
        return f"dropped {len(done.drops)}, deleted {[one.problem or one.deleted for one in report.stores]}"

    def care(self, dice: random.Random, quiet: bool) -> str:
        """Fill again what came back empty, and bring the others what they missed."""
        with closing(self.backend()) as backend:
            return care(backend)

    def sync(self, dice: random.Random, quiet: bool) -> str:
        """Make a replica in a new folder, and look whether it holds everything."""
        url = str(self._folder / f"replica-{dice.getrandbits(40):x}")
        target = open_job_stores([url], encryption_key=self._key, emit=nobody)
        with closing(self.backend()) as backend, closing(target):
            report = sync(backend, target, deep=dice.random() < 0.5)
        if not quiet:
            return f"complete={report.complete} damaged={len(report.damaged)}"
        assert report.complete
        assert not report.damaged
        with closing(ckpt.Checkpointer(url, job="chaos", encryption_key=self._key)) as checkpointer:
            return f"replica: {self._restored(checkpointer, step=None)}"

    def mend(self, dice: random.Random, quiet: bool) -> str:
        """No fault is in force: afterwards every store has everything and counts."""
        words = []
        with closing(self.backend()) as backend:
            for _ in range(MENDS_MAX):
                words.append(care(backend))
                report = scrub_all(backend)
                words.append(told(report))
                assert not report.lost, f"lost to all stores: {report.problems}"
                members = Journal.open(backend).refresh().stores
                if (
                    report.ok
                    and members is not None
                    and {one.store_id for one in report.stores} == set(members.ids)
                ):
                    return "; ".join(words)
        raise AssertionError(
            f"not everything is mended, though all stores answer: {words} {report}"
        )

    def _stores(self, dead: Sequence[int]) -> tuple[list[str], list[dict[str, object] | None]]:
        urls, options = [], []
        for number, place in enumerate(self.places):
            gone = number in dead
            urls.append(place.dead_url if gone and isinstance(place, FolderPlace) else place.url)
            options.append(place.options(way="dead" if gone else self._way))
        return urls, options

    def backend(self, dead: Sequence[int] = ()) -> Backend:
        urls, options = self._stores(dead)
        return open_job_stores(
            urls, options, write_quorum=QUORUM, encryption_key=self._key, emit=nobody
        )


def _short(error: CkptError) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
