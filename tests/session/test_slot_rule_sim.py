"""Ranks at different speeds, uploads, and kills at any moment: once a complete snapshot existed,
one always does.

One seed is one run. Every change and every look at shared state is a step of its own, so any
interleaving can happen: a look at the board is torn across ranks, a rank dies between its header
and the board. What a header says is the truth; the board lags behind it.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import pytest

from ckpt.ipc.board import newest_common
from ckpt.session.slot_rule import BoardView, passed, reason_kept
from ckpt.values import SnapshotId

Steps = Generator[None, None, None]


@dataclass
class SimSlot:
    """``header`` is what the memory holds, ``board`` what all others see, ``in_use`` the mark of an
    upload."""

    header: SnapshotId | None = None
    board: SnapshotId | None = None
    in_use: bool = False
    writing: bool = False


@dataclass
class SimJob:
    """All ranks of one job. ``lag``: how far they may drift apart (1: all must have begun a step
    before one ends it).

    ``upload`` and ``refuse`` are how likely a snapshot is uploaded, and not taken by one rank.
    """

    ranks: int
    slots: int
    rng: random.Random
    overlapped: bool = False
    lag: int = 1
    upload: float = 0.0
    refuse: float = 0.0
    epoch: int = 0
    resume: SnapshotId = field(default_factory=lambda: SnapshotId(0, 0))
    begun: list[int] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    met: int = 0
    best: SnapshotId | None = None
    slots_of: list[list[SimSlot]] = field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        self.slots_of = [[SimSlot() for _ in range(self.slots)] for _ in range(self.ranks)]

    # ---- the truth

    def complete(self) -> SnapshotId | None:
        return newest_common(
            {one.header for one in slots if one.header is not None} for slots in self.slots_of
        )

    def check(self) -> None:
        """Invariant 8: the newest complete pair is never lost, only replaced by a newer one."""
        now = self.complete()
        assert self.best is None or (now is not None and now >= self.best), (
            now,
            self.best,
            self.slots_of,
        )
        self.best = now

    # ---- one attempt

    def begin(self) -> list[Steps]:
        self.epoch += 1
        complete = self.complete()
        self.resume = complete or SnapshotId(0, 0)
        self.begun = [self.resume.step] * self.ranks
        self.completed = list(self.begun)
        self.met = 0
        for slots in self.slots_of:
            for slot in slots:
                slot.writing = False
        return [self.trainer(rank) for rank in range(self.ranks)]

    def trainer(self, rank: int) -> Steps:
        for slot in self.slots_of[rank]:
            slot.board = slot.header
            yield
        self.met += 1
        while self.met < self.ranks:
            yield
        late: tuple[SimSlot, SnapshotId] | None = None
        while True:
            self.begun[rank] += 1
            while self.begun[rank] - min(self.begun) >= self.lag:
                yield
            if late is not None:
                yield from self.seal(*late)
            late = None
            self.completed[rank] += 1
            yield
            pair = SnapshotId(self.epoch, self.completed[rank])
            slot = None if self.rng.random() < self.refuse else (yield from self.acquire(rank))
            if slot is None:
                self.skipped += 1
                continue
            slot.writing = True
            slot.header = None
            yield
            slot.board = None
            yield
            if self.overlapped:
                late = slot, pair
            else:
                yield from self.seal(slot, pair)

    def seal(self, slot: SimSlot, pair: SnapshotId) -> Steps:
        yield
        slot.header = pair
        yield
        slot.in_use = self.rng.random() < self.upload
        yield
        slot.board = pair
        slot.writing = False
        yield

    def acquire(self, rank: int) -> Generator[None, None, SimSlot | None]:
        for slot in self.slots_of[rank]:
            if slot.writing:
                continue
            come, sealed = [], []
            for other, slots in enumerate(self.slots_of):
                pairs = []
                for one in slots:
                    pairs.append(one.board)
                    yield
                come.append(passed(pairs, completed=self.completed[other], epoch=self.epoch))
            for slots in self.slots_of:
                found = set()
                for one in slots:
                    if one.board is not None:
                        found.add(one.board)
                    yield
                sealed.append(frozenset(found))
            seen = BoardView(tuple(come), tuple(sealed))
            if reason_kept(slot.header, in_use=slot.in_use, view=seen, epoch=self.epoch) is None:
                return slot
        return None

    def keeper(self) -> Iterator[None]:
        """Ends uploads, one slot at a time, whether trainers live or not."""
        while True:
            busy = [slot for slots in self.slots_of for slot in slots if slot.in_use]
            if busy and self.rng.random() < 0.05:
                self.rng.choice(busy).in_use = False
            yield


def run(job: SimJob, *, steps: int, speeds: list[float] | None = None) -> None:
    """One attempt of that many steps, cut off anywhere."""
    trainers = job.begin()
    keeper = job.keeper()
    weights = speeds or [job.rng.uniform(0.1, 1.0) for _ in trainers]
    for _ in range(steps):
        next(job.rng.choices(trainers, weights)[0])
        next(keeper)
        job.check()


SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("overlapped", [False, True])
def test_complete_snapshot_is_never_lost(seed: int, overlapped: bool) -> None:
    rng = random.Random(f"{seed} {overlapped}")
    job = SimJob(
        ranks=rng.randint(2, 4),
        slots=rng.randint(2, 4),
        rng=rng,
        overlapped=overlapped,
        lag=rng.randint(1, 6),
        upload=rng.choice([0.0, 0.3, 1.0]),
        refuse=rng.choice([0.0, 0.2]),
    )
    for _ in range(25):
        run(job, steps=rng.randint(1, 400))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("slots", "overlapped", "lag"), [(2, False, 1), (3, False, 4), (3, True, 1), (3, True, 6)]
)
def test_after_any_chaos_a_quiet_job_stages_again(
    seed: int, slots: int, overlapped: bool, lag: int
) -> None:
    """Pairs that some ranks lost or refused fill nobody's slots for ever."""
    rng = random.Random(seed)
    job = SimJob(
        ranks=rng.randint(2, 4),
        slots=slots,
        rng=rng,
        overlapped=overlapped,
        lag=lag,
        upload=0.5,
        refuse=0.5,
    )
    for _ in range(6):
        run(job, steps=rng.randint(1, 600))
    job.upload = job.refuse = 0.0
    run(job, steps=8_000, speeds=[1.0] * job.ranks)
    assert job.best is not None
    assert job.best.epoch == job.epoch
    assert min(job.completed) - job.best.step <= 2 * lag + 6, (job.best, job.completed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("overlapped", "redone_max"), [(False, 1), (True, 2)])
def test_three_free_slots_bound_what_is_redone(
    seed: int, overlapped: bool, redone_max: int
) -> None:
    rng = random.Random(seed)
    job = SimJob(ranks=rng.randint(2, 4), slots=3, rng=rng, overlapped=overlapped)
    for _ in range(25):
        run(job, steps=rng.randint(1, 500))
        resume = job.complete() or SnapshotId(0, 0)
        redone = max(job.completed) - max(resume.step, job.resume.step)
        assert redone <= redone_max + (resume.epoch < job.epoch), (
            job.completed,
            resume,
            job.resume,
        )


def test_without_the_rule_the_simulation_finds_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest slot that is not in use: what a rank alone would choose."""
    monkeypatch.setattr(
        f"{__name__}.reason_kept", lambda pair, *, in_use, view, epoch: "in use" if in_use else None
    )
    with pytest.raises(AssertionError):
        for seed in SEEDS:
            test_complete_snapshot_is_never_lost(seed, True)
