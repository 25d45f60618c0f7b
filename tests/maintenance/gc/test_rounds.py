"""Dropping and sweeping beside a job: after commits, as the newest writer alone, never raised,
tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from kit.collected_store import ClockedStore, Watched

from ckpt.backends.base import Backend, Buffer
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import (
    CommitUnknownError,
    ConflictError,
    FencedError,
    StoreFullError,
    UnavailableError,
)
from ckpt.events import Event
from ckpt.format import keys
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.maintenance.gc import plan as gc_due
from ckpt.maintenance.gc.drop import drop, fenced_journal, preview
from ckpt.maintenance.gc.plan import PREFIXES
from ckpt.maintenance.gc.rounds import GcRounds, RetentionSettings
from ckpt.maintenance.gc.sweep import RESERVE_KEY, full_stores, keep_reserves, sweep
from ckpt.maintenance.retention import (
    KeepPolicy,
    keep_best,
    keep_for,
    keep_last,
    keep_tagged,
)
from ckpt.restore.verify import verify
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.testing.sample import SampleWriter, sample_ranks, write_sample_store
from ckpt.values import SnapshotId

WAIT_S = 60.0
STEPS = (10, 20, 30, 40)
"""Of the sample: 20 is tagged ``best``."""


@dataclass
class Rounds:
    """Rounds under test, and what they told."""

    make: Callable[..., GcRounds]
    events: list[Event] = field(default_factory=list)

    def over(
        self,
        store: Backend,
        policy: KeepPolicy,
        *,
        grace_s: float = 0.0,
        epoch: Callable[[], int] = lambda: 1,
        wall: Callable[[], float] = time.time,
    ) -> GcRounds:
        keep = RetentionSettings(policy=policy, grace_s=grace_s)
        return self.make(store, keep, epoch=epoch, emit=self.events.append, wall=wall)

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


@pytest.fixture
def rounds() -> Iterator[Rounds]:
    made: list[GcRounds] = []

    def make(*args: object, **options: object) -> GcRounds:
        made.append(GcRounds(*args, **options))
        return made[-1]

    yield Rounds(make)
    for one in made:
        one.stop(WAIT_S)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds follow each other without much rest."""
    monkeypatch.setattr(gc_due, "ROUND_S", 0.01)


def until(there: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < deadline_s, "nothing came of it"
        time.sleep(0.002)


def steps(store: Backend) -> list[int]:
    return [entry.snapshot.step for entry in Journal.open(store).refresh().snapshots]


def everything(store: Backend) -> set[str]:
    return {stat.key for stat in store.list("")}


def needed(store: Backend) -> set[str]:
    """What the snapshots that exist refer to."""
    state = Journal.open(store).refresh()
    found: set[str] = set()
    for entry in state.snapshots:
        index = load_index(store, state, entry.snapshot)
        found |= {keys.manifest_key(entry.snapshot, entry.manifest_digest), *index.packs()}
        found |= {ref.key for ref in index.manifest.parts}
    return found


def objects(store: Backend) -> set[str]:
    return {stat.key for prefix in PREFIXES for stat in store.list(prefix)}


def test_commit_is_followed_by_what_gc_would_do(rounds: Rounds) -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=STEPS)
    planned = preview(store, writer.journal.refresh(), keep_last(1), now_unix_s=time.time())
    made = rounds.over(store, keep_last(1))
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 40] == [one.info.step for one in planned.decisions if one.kept]
    assert objects(store) == needed(store)
    until(lambda: rounds.told("gc"))
    [event] = rounds.told("gc")
    assert (event.facts["dropped"], event.facts["kept"]) == (2, 2)
    assert not any(event.alarm for event in rounds.events)


def test_nothing_is_done_before_something_was_committed(rounds: Rounds) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    before = everything(store)
    made = rounds.over(store, keep_last(1))
    made.start_last_round()
    assert made.idle
    made.stop(WAIT_S)
    assert everything(store) == before


def test_bytes_stay_for_the_grace(rounds: Rounds) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    before = objects(store)
    made = rounds.over(store, keep_last(1), grace_s=3600.0)
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 40]
    assert objects(store) == before


def test_commits_that_come_at_once_make_one_round(rounds: Rounds) -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=STEPS)
    made = rounds.over(store, keep_last(1))
    made.on_commit()
    assert made.await_idle(WAIT_S)
    writer.write(SnapshotId(1, 50), sample_ranks(50))
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 40, 50], "not yet: a round was just over"
    made.start_last_round()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 50]


@pytest.mark.slow
def test_rounds_go_on_with_the_job(rounds: Rounds, quick: None) -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=STEPS)
    made = rounds.over(store, keep_last(2))
    for step in range(50, 90, 10):
        writer.write(SnapshotId(1, step), sample_ranks(step))
        made.on_commit()
        until(lambda step=step: steps(store) == [20, step - 10, step])


def test_whoever_was_overtaken_drops_nothing(rounds: Rounds) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    assert Journal.open(store).open_epoch(resume=SnapshotId(1, 30)) == 2
    before = everything(store)
    made = rounds.over(store, keep_last(1))
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert everything(store) == before
    until(lambda: rounds.told("gc-fenced"))
    assert not any(event.alarm for event in rounds.events)


def test_epoch_opened_between_the_decision_and_its_record_makes_the_record_impossible(
    rounds: Rounds,
) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    opened: list[int] = []

    def before(op: str, key: str) -> None:
        if op == "put" and key.startswith(keys.LOG) and not opened:
            opened.append(Journal.open(store).open_epoch(resume=SnapshotId(1, 10)))

    made = rounds.over(Watched(store, before), keep_tagged())
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert opened == [2]
    state = Journal.open(store).refresh()
    assert [entry.snapshot.step for entry in state.snapshots] == list(STEPS)
    assert state.voids_total == 0
    until(lambda: rounds.told("gc-fenced"))


def test_fence_gives_every_kind_of_record_a_place_until_it_is_overtaken() -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    journal = fenced_journal(store, lambda: 1)
    journal.tag("kept", SnapshotId(1, 40))
    assert journal.drop([SnapshotId(1, 10)]).find(SnapshotId(1, 10)) is None
    assert journal.job == Journal.open(store).job
    assert journal.log_id == Journal.open(store).log_id
    with pytest.raises(ConflictError) as refused:
        journal.drop([SnapshotId(1, 40)])
    assert not isinstance(refused.value, FencedError), "the newest is kept by the log itself"
    Journal.open(store).open_epoch(resume=SnapshotId(1, 40))
    for append in (
        lambda: journal.drop([SnapshotId(1, 30)]),
        lambda: journal.untag("kept"),
        lambda: journal.tag("x", SnapshotId(1, 40)),
    ):
        with pytest.raises(FencedError, match="writer=1 newest=2"):
            append()


def test_store_that_does_not_answer_is_told_once_and_tried_again(
    rounds: Rounds, quick: None
) -> None:
    inner = MemoryBackend()
    write_sample_store(inner, steps=STEPS)
    tries, down = [0], [True]

    def before(op: str, key: str) -> None:
        tries[0] += 1
        if down[0]:
            raise UnavailableError("the store is down.")

    made = rounds.over(Watched(inner, before), keep_last(1))
    made.on_commit()
    until(lambda: tries[0] > 5)
    assert steps(inner) == list(STEPS)
    assert [event.alarm for event in rounds.told("gc-failed")] == [True]
    down[0] = False
    until(lambda: steps(inner) == [20, 40])
    until(lambda: objects(inner) == needed(inner))


def test_what_nobody_foresaw_is_an_alarm_and_the_next_round_comes(
    rounds: Rounds, quick: None
) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    times = iter([0.0])

    def wall() -> float:
        if next(times, None) is not None:
            raise ZeroDivisionError("no time")
        return time.time()

    made = rounds.over(store, keep_last(1), wall=wall)
    made.on_commit()
    until(lambda: steps(store) == [20, 40])
    [alarm] = rounds.told("gc-failed")
    assert alarm.facts["code"] == "internal"
    assert "no time" in alarm.text


@pytest.mark.slow
def test_deletes_that_fail_are_left_for_the_next_round(rounds: Rounds, quick: None) -> None:
    inner = MemoryBackend()
    write_sample_store(inner, steps=STEPS)
    store = FaultyBackend(
        inner, [Fault(op="delete", key=keys.PACKS, harm=Harm.LOST_REQUEST, times=2)]
    )
    made = rounds.over(store, keep_last(1))
    made.on_commit()
    until(lambda: steps(inner) == [20, 40])
    until(lambda: objects(inner) == needed(inner))
    assert [event.alarm for event in rounds.told("sweep-stopped")] == [True]


def test_nothing_is_begun_while_somebody_restores(rounds: Rounds, quick: None) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    made = rounds.over(store, keep_last(1))
    made.pause()
    made.on_commit()
    assert made.idle
    assert steps(store) == list(STEPS)
    made.resume()
    until(lambda: steps(store) == [20, 40])


def test_end_of_the_job_waits_for_no_restore(rounds: Rounds) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    made = rounds.over(store, keep_last(1))
    made.pause()
    made.on_commit()
    made.start_last_round()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 40]


def test_end_that_comes_in_the_middle_of_a_round_is_followed_by_one_more(rounds: Rounds) -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=STEPS)
    sweeps, go_on = threading.Event(), threading.Event()

    def before(op: str, key: str) -> None:
        if op == "delete" and key.startswith(keys.MANIFESTS):
            sweeps.set()
            assert go_on.wait(WAIT_S)

    made = rounds.over(Watched(store, before), keep_last(1))
    made.on_commit()
    assert sweeps.wait(WAIT_S)
    writer.write(SnapshotId(1, 50), sample_ranks(50))
    made.on_commit()
    made.start_last_round()
    go_on.set()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 50]
    assert objects(store) == needed(store)


def test_stop_waits_no_longer_than_it_is_told_and_nothing_is_told_after_it(rounds: Rounds) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    hangs, go_on = threading.Event(), threading.Event()

    def before(op: str, key: str) -> None:
        if op == "delete" and key.startswith(keys.MANIFESTS):
            hangs.set()
            assert go_on.wait(WAIT_S)

    made = rounds.over(Watched(store, before), keep_last(1))
    made.on_commit()
    assert hangs.wait(WAIT_S)
    assert not made.idle
    began_s = time.monotonic()
    made.stop(0.05)
    assert time.monotonic() - began_s < WAIT_S / 2
    go_on.set()
    assert made.await_idle(WAIT_S)
    assert rounds.events == []
    assert objects(store) == needed(store)


def test_too_few_stores_drop_nothing(rounds: Rounds) -> None:
    inner = [MemoryBackend(str(place)) for place in range(3)]
    whole = ReplicatedBackend(inner, emit=lambda _: None, seed=1)
    write_sample_store(whole, steps=STEPS)
    assert whole.await_caught_up(WAIT_S)
    whole.close()
    before = [everything(one) for one in inner]
    dead = [FaultyBackend(one, [Fault(harm=Harm.LOST_REQUEST, times=None)]) for one in inner[1:]]
    partly = ReplicatedBackend([inner[0], *dead], emit=lambda _: None, seed=1)
    made = rounds.over(partly, keep_last(1))
    made.on_commit()
    assert made.await_idle(WAIT_S)
    made.stop(WAIT_S)
    partly.close()
    assert [everything(one) for one in inner] == before


@pytest.mark.slow
def test_restore_that_began_before_the_drop_reads_all_within_the_grace(
    rounds: Rounds, quick: None
) -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=STEPS)
    index = load_index(store, writer.journal.refresh(), SnapshotId(1, 10))
    made = rounds.over(store, keep_last(1), grace_s=3600.0)
    for step in range(50, 70, 10):
        writer.write(SnapshotId(1, step), sample_ranks(step))
        made.on_commit()
        until(lambda step=step: steps(store) == [20, step])
    assert verify(index, store).ok


def test_another_process_goes_on_where_a_round_died(rounds: Rounds) -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=STEPS)

    def dies(op: str, key: str) -> None:
        if op == "delete" and key.startswith(keys.PARTS):
            raise SystemExit

    first = rounds.over(Watched(store, dies), keep_last(1))
    first.on_commit()
    assert first.await_idle(WAIT_S)
    assert objects(store) > needed(store)
    fresh = SampleWriter(store)
    epoch = fresh.open_epoch(resume=writer.journal.refresh().newest())
    fresh.write(SnapshotId(epoch, 50), sample_ranks(50))
    second = rounds.over(store, keep_last(1), epoch=lambda: epoch)
    second.on_commit()
    assert second.await_idle(WAIT_S)
    assert steps(store) == [20, 50]
    assert objects(store) == needed(store)


def test_rule_whose_metric_no_snapshot_has_drops_nothing_and_names_those_there_are(
    rounds: Rounds,
) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    made = rounds.over(store, keep_best("accuracy"))
    for _ in range(2):  # said once
        made.on_commit()
        assert made.await_idle(WAIT_S)
    made.stop(WAIT_S)
    assert steps(store) == list(STEPS)
    [event] = rounds.told("gc-rule")
    assert event.alarm and "metric='accuracy' metrics='loss'" in event.text


@pytest.mark.parametrize("off_s", [-366 * 86400.0, 366 * 86400.0])
def test_clock_of_this_machine_that_is_a_year_off_makes_nothing_old(
    rounds: Rounds, off_s: float
) -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=STEPS)
    made = rounds.over(store, keep_for("7d"), wall=lambda: time.time() + off_s)
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert steps(store) == list(STEPS)
    [event] = rounds.told("gc-rule")
    assert event.alarm and "clocks" in event.text


def test_store_that_is_away_keeps_no_rule_by_age_from_being_applied(rounds: Rounds) -> None:
    stores = [MemoryBackend(f"store-{n}") for n in range(3)]
    away = FaultyBackend(stores[2], [Fault(harm=Harm.LOST_REQUEST, op="list", times=None)])
    policy = keep_last(1) | keep_for("1s")
    now_s = time.time()
    several = ReplicatedBackend([*stores[:2], away], emit=lambda _: None, seed=1)
    writer = write_sample_store(several, steps=STEPS)
    planned = preview(several, writer.journal.refresh(), policy, now_unix_s=now_s + 5.0)
    assert [one.info.step for one in planned.decisions if one.kept] == [20, 40]
    several.close()


def test_age_is_by_the_stores_stamps_whatever_the_trainers_clock_was(rounds: Rounds) -> None:
    now_s = [1_000_000.0]
    store = ClockedStore(MemoryBackend(), lambda: now_s[0])
    writer = write_sample_store(store, steps=())
    for step in STEPS:  # the sample's snapshots say that they were made in 1970
        writer.write(SnapshotId(1, step), sample_ranks(step))
        now_s[0] += 86400.0
    made = rounds.over(store, keep_for("2d"), wall=lambda: now_s[0])
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [30, 40], "two days old and newer"
    assert not rounds.told("gc-rule")


class FullStore(MemoryBackend):
    """A store that takes ``room`` bytes more and no more; what is deleted makes room."""

    def __init__(self, name: str = "full") -> None:
        super().__init__(name)
        self.room: int | None = None

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        size = sum(len(memoryview(piece).cast("B")) for piece in data)
        if self.room is not None and size > self.room:
            raise StoreFullError(f"no space. key={key}")
        super().put(key, data, create_only=create_only)
        if self.room is not None:
            self.room -= size

    def delete(self, key: str) -> None:
        stat = self.stat(key)
        super().delete(key)
        if self.room is not None and stat is not None:
            self.room += stat.size_bytes


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
def test_full_store_is_collected_also_if_not_one_record_fits(
    rounds: Rounds, grace_s: float
) -> None:
    store = FullStore()
    write_sample_store(store, steps=STEPS)
    store.room = 0
    made = rounds.over(store, keep_last(1), grace_s=grace_s)
    made.on_commit()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 40] and not any(event.alarm for event in rounds.events)
    assert (objects(store) == needed(store)) == (grace_s == 0.0)
    assert verify(load_index(store, Journal.open(store).refresh(), SnapshotId(1, 40)), store).ok


@pytest.mark.parametrize("by", ["keeper", "command"])
def test_several_full_stores_without_garbage_are_collected_with_their_reserves(
    rounds: Rounds, by: str
) -> None:
    """There are no older folds and no second copies: nothing else could make room for a record."""
    stores = [FullStore(f"full-{n}") for n in range(3)]
    several = ReplicatedBackend(stores, emit=lambda _: None, seed=1)
    write_sample_store(several, steps=STEPS)
    keep_reserves(several, Journal.open(several).refresh())
    assert all(store.stat(RESERVE_KEY) is not None for store in stores)
    for store in stores:
        store.room = 0
    if by == "keeper":
        made = rounds.over(several, keep_last(1), grace_s=0.0)
        made.on_commit()
        assert made.await_idle(WAIT_S)
        assert not any(event.alarm for event in rounds.events)
    else:
        journal = Journal.open(several)
        _, state = drop(several, journal, keep_last(1), now_unix_s=time.time(), grace_s=0.0)
        assert all(store.stat(RESERVE_KEY) is None for store in stores)
        sweep(several, state, grace_s=0.0)
        keep_reserves(several, state)
    assert steps(several) == [20, 40]
    for store in stores:
        assert objects(store) == needed(several)
        assert store.stat(RESERVE_KEY) is not None, "made again for the next time"
    several.close()


def test_a_store_that_is_away_keeps_no_full_ones_from_being_collected() -> None:
    stores = [FullStore(f"full-{n}") for n in range(3)]
    several = ReplicatedBackend(stores, emit=lambda _: None, seed=1)
    write_sample_store(several, steps=STEPS)
    keep_reserves(several, Journal.open(several).refresh())
    several.close()
    for store in stores:
        store.room = 0
    away = FaultyBackend(stores[0], [Fault(harm=Harm.LOST_REQUEST, times=None)])
    left = ReplicatedBackend([away, *stores[1:]], emit=lambda _: None, seed=1)
    assert [store.url for store in full_stores(left)] == [store.url for store in stores[1:]]
    drop(left, Journal.open(left), keep_last(1), now_unix_s=time.time(), grace_s=0.0)
    assert steps(left) == [20, 40]
    left.close()


def test_full_stores_that_never_had_a_reserve_say_so_and_keep_everything() -> None:
    stores = [FullStore(f"full-{n}") for n in range(3)]
    several = ReplicatedBackend(stores, emit=lambda _: None, seed=1)
    write_sample_store(several, steps=STEPS)
    for store in stores:
        store.room = 0
    with pytest.raises(CommitUnknownError, match="no space"):
        drop(several, Journal.open(several), keep_last(1), now_unix_s=time.time(), grace_s=0.0)
    keep_reserves(several, Journal.open(several).refresh())
    assert steps(several) == list(STEPS) and all(store.room == 0 for store in stores)
    several.close()


def test_store_that_fills_is_swept_at_once_and_with_a_shorter_grace(rounds: Rounds) -> None:
    store, now_s = MemoryBackend(), [0.0]
    writer = write_sample_store(store, steps=STEPS)
    writer.journal.drop([SnapshotId(1, 10)])
    keep = RetentionSettings(policy=keep_last(2), grace_s=900.0, adapts=True)
    made = rounds.make(
        store, keep, epoch=lambda: 1, emit=rounds.events.append, clock=lambda: now_s[0]
    )
    assert (made.grace_s(), made.grace_s(full=True)) == (900.0, 60.0)
    made.pause()
    now_s[0] += 300.0
    made.resume()  # a restore took five minutes
    assert (made.grace_s(), made.grace_s(full=True)) == (1200.0, 300.0)
    made.on_store_full()
    assert made.await_idle(WAIT_S)
    assert steps(store) == [20, 30, 40], "nothing is dropped before the job's own first commit"
    fixed = RetentionSettings(policy=keep_last(2), grace_s=900.0)
    set_by_the_user = rounds.make(store, fixed, epoch=lambda: 1, emit=rounds.events.append)
    assert set_by_the_user.grace_s(full=True) == 900.0


def test_full_store_that_took_nothing_for_hours_is_still_judged_by_age() -> None:
    now_s = [1_000_000.0]
    inner = ClockedStore(MemoryBackend(), lambda: now_s[0])
    writer = write_sample_store(inner, steps=())
    for step in STEPS:
        writer.write(SnapshotId(1, step), sample_ranks(step))
        now_s[0] += 86400.0
    full = FaultyBackend(inner, [Fault(harm=Harm.FULL, op="put", key="probes/", times=None)])
    planned = preview(
        full,
        writer.journal.refresh(),
        keep_for("36h"),
        now_unix_s=now_s[0],
        asks_clocks=True,
    )
    assert planned.problems == ()
    assert planned.drops == (SnapshotId(1, 10), SnapshotId(1, 20))


def test_parts_of_a_snapshot_that_stays_are_read_in_the_first_round_only(
    rounds: Rounds, quick: None
) -> None:
    inner = MemoryBackend()
    writer = write_sample_store(inner, steps=STEPS)
    store = CountingBackend(inner)
    made = rounds.over(store, keep_last(3))
    parts = f"{keys.PARTS}{SnapshotId(1, 40).key}/"
    for step, left, read in ((50, [20, 30, 40, 50], 2), (60, [20, 40, 50, 60], 0)):
        writer.write(SnapshotId(1, step), sample_ranks(step))
        store.forget()
        made.on_commit()
        until(lambda left=left: steps(inner) == left and objects(inner) == needed(inner))
        assert made.await_idle(WAIT_S)
        assert len({call.key for call in store.calls("read_into", prefix=parts)}) == read
