"""Sweeps of real stores: what goes, what stays, what stops them, and dying half-way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from kit.collected_store import ClockedStore, CollectedStore, Death, Watched, sweep_and_die
from kit.damage import without_second_copies

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.backends.encrypted.keys import load_keys, write_new_key
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import IntegrityError, UnavailableError
from ckpt.format import keys
from ckpt.format.records import Commit, make_record
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.state import Hole
from ckpt.maintenance.gc import sweep as sweep_refs
from ckpt.maintenance.gc.drop import drop, newest_intact, preview
from ckpt.maintenance.gc.plan import (
    NEWEST_INTACT,
    NEWEST_VERIFIED,
    PREFIXES,
    ObjectStatus,
    snapshot_of,
)
from ckpt.maintenance.gc.sweep import (
    CLOCK_PROBES,
    ReferenceCache,
    SweepReport,
    snapshot_references,
    sweep,
)
from ckpt.maintenance.retention import keep_last, keep_tagged
from ckpt.maintenance.scrub.history import last_record, record_scrub
from ckpt.maintenance.scrub.scrub import Scrub
from ckpt.testing.crashes import CrashMode, run_in_child
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.testing.sample import SampleWriter, damage, sample_ranks, tensor, write_sample_store
from ckpt.values import SnapshotId


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return MemoryBackend() if request.param == "memory" else FileBackend(tmp_path / "store")


def objects(store: Backend) -> set[str]:
    return {stat.key for prefix in PREFIXES for stat in store.list(prefix)}


def of(store: Backend, step: int, epoch: int = 1) -> set[str]:
    return {key for key in objects(store) if SnapshotId(epoch, step).key in key}


def swept(store: Backend, *, grace_s: float = 0.0) -> SweepReport:
    return sweep(store, Journal.open(store).refresh(), grace_s=grace_s)


def test_sweep_deletes_what_was_dropped_and_nothing_else(store: Backend) -> None:
    writer = write_sample_store(store)
    gone, rest = of(store, 10), objects(store) - of(store, 10)
    shared = {key for key in gone if key.startswith(keys.PACKS)}
    assert swept(store).ok
    assert objects(store) == gone | rest, "nothing was dropped"
    writer.journal.drop([SnapshotId(1, 10)])
    second = {keys.copy_key(key) for key in gone if not key.startswith(keys.PACKS)}
    others = {stat.key for stat in store.list("")} - objects(store)
    assert second <= others
    report = swept(store)
    assert report.ok
    # The bias and structures never change: the pack that the first snapshot put them in is needed
    # by all others.
    assert shared & objects(store)
    assert objects(store) == rest | (shared & objects(store))
    assert report.stores[0].deleted == len(gone) - len(shared & objects(store))
    assert {stat.key for stat in store.list("")} - objects(store) == others - second
    again = swept(store)
    assert (again.stores[0].deleted, again.stores[0].objects[ObjectStatus.GARBAGE]) == (0, 0)


def test_dry_run_counts_what_would_go_and_deletes_nothing(store: Backend) -> None:
    writer = write_sample_store(store)
    state = writer.journal.drop([SnapshotId(1, 10)])
    before = objects(store)
    report = sweep(store, state, grace_s=0.0, dry_run=True)
    assert report.stores[0].objects[ObjectStatus.GARBAGE] > 0
    assert report.stores[0].deleted == 0
    assert objects(store) == before
    assert (
        sweep(store, state, grace_s=0.0).stores[0].deleted
        == report.stores[0].objects[ObjectStatus.GARBAGE]
    )


def test_bytes_go_when_the_grace_after_the_drop_is_over() -> None:
    now = 1000.0
    store = ClockedStore(MemoryBackend(), lambda: now)
    writer = write_sample_store(store)
    before = objects(store)
    now = 5000.0
    writer.journal.drop([SnapshotId(1, 10)])
    now = 5099.0
    report = swept(store, grace_s=100.0)
    assert objects(store) == before
    assert report.stores[0].objects[ObjectStatus.GRACE] > 0
    now = 5100.0
    assert swept(store, grace_s=100.0).stores[0].deleted > 0
    assert objects(store) < before


def test_pack_of_a_snapshot_swept_long_ago_stays_for_one_that_was_dropped_just_now() -> None:
    now = 1000.0
    store = ClockedStore(MemoryBackend(), lambda: now)
    writer = write_sample_store(store)
    shared = {key for key in of(store, 10) if key.startswith(keys.PACKS)}
    now = 2000.0
    writer.journal.drop([SnapshotId(1, 10)])
    now = 3000.0
    fresh = SampleWriter(store)  # refers to nothing older
    epoch = fresh.open_epoch(resume=SnapshotId(1, 30))
    fresh.write(SnapshotId(epoch, 40), sample_ranks(40))
    fresh.journal.untag("best")
    fresh.journal.drop([SnapshotId(1, 20), SnapshotId(1, 30)])
    now = 3050.0
    swept(store, grace_s=100.0)
    assert shared & objects(store), "a restore of 20 or 30 may be reading it"
    assert not [key for key in of(store, 10) if not key.startswith(keys.PACKS)]
    now = 3100.0
    swept(store, grace_s=100.0)
    assert objects(store) == of(store, 40, epoch)


def test_grace_is_walked_back_over_more_records_than_are_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep_refs, "WINDOW", 3)
    now = 1000.0
    store = ClockedStore(MemoryBackend(), lambda: now)
    writer = write_sample_store(store)
    now = 2000.0
    writer.journal.drop([SnapshotId(1, 10)])
    for n in range(10):
        writer.journal.tag(f"t{n}", SnapshotId(1, 30))
    before = objects(store)
    now = 2050.0
    swept(store, grace_s=100.0)
    assert objects(store) == before
    now = 2100.0
    swept(store, grace_s=100.0)
    assert objects(store) < before


def reads(store: CountingBackend) -> set[str]:
    """Manifests and parts that were read since this was asked last."""
    found = {call.key for call in store.calls("read_into")}
    store.forget()
    return {key for key in found if key.startswith((keys.MANIFESTS, keys.PARTS))}


def test_second_sweep_reads_only_what_is_new_and_keeps_what_the_first_would() -> None:
    now = 1000.0
    inner = ClockedStore(MemoryBackend(), lambda: now)
    store, cache = CountingBackend(inner), ReferenceCache()
    writer = write_sample_store(inner)

    def again() -> SweepReport:
        return sweep(store, Journal.open(inner).refresh(), grace_s=100.0, cache=cache)

    assert again().ok
    records = {key for key in objects(inner) if not key.startswith(keys.PACKS)}
    assert reads(store) == records
    assert again().ok and reads(store) == set()
    now = 2000.0
    writer.journal.drop([SnapshotId(1, 10)])
    writer.write(SnapshotId(1, 40), sample_ranks(40))
    before = objects(inner)
    assert again().stores[0].objects[ObjectStatus.GRACE] > 0
    assert objects(inner) == before, "also what was dropped needs no reading within the grace"
    assert reads(store) == {key for key in of(inner, 40) if not key.startswith(keys.PACKS)}
    now = 2100.0
    expected = sweep(inner, Journal.open(inner).refresh(), grace_s=100.0, dry_run=True)
    found = again()
    assert found.stores[0].objects == expected.stores[0].objects
    assert found.stores[0].deleted == expected.stores[0].objects[ObjectStatus.GARBAGE] > 0
    assert reads(store) == set()
    assert cache.find(SnapshotId(1, 10)) is None, "what is over is forgotten"


def test_snapshot_that_was_not_read_completely_is_read_again_by_the_next_sweep() -> None:
    store, cache = MemoryBackend(), ReferenceCache()
    write_sample_store(store)
    state = Journal.open(store).refresh()
    key = next(key for key in sorted(of(store, 30)) if key.startswith(keys.PARTS))
    whole = read_alone(store, key, bytes_max=1 << 20)
    damage(store, key, 20)
    assert [one.snapshot for one in sweep(store, state, cache=cache).held] == [SnapshotId(1, 30)]
    assert not sweep(store, state, cache=cache).ok
    store.put(key, [whole])
    assert sweep(store, state, cache=cache).ok


def test_references_that_do_not_fit_are_read_again() -> None:
    inner = MemoryBackend()
    write_sample_store(inner)
    state = Journal.open(inner).refresh()
    sizes = {one.snapshot: len(one.keys) for one in snapshot_references(inner, state)}
    store = CountingBackend(inner)
    for room, kept in (
        (0, 0),
        (sizes[SnapshotId(1, 10)] - 1, 0),
        (sizes[SnapshotId(1, 10)], 1),
        (sum(sizes.values()) - 1, 2),
        (sum(sizes.values()), 3),
    ):
        cache = ReferenceCache(keys_max=room)
        for _ in range(3):  # what is forgotten makes room again
            cache.retain(())
            for _ in range(2):
                reads(store)
                assert sweep(store, state, cache=cache).ok
            read = {snapshot_of(key) for key in reads(store)}
            assert len(sizes.keys() - read) == kept, room


def test_grace_is_that_of_the_manifest_that_was_committed_not_of_one_that_came_late() -> None:
    """A commit of another manifest for the same snapshot is void, and newer in the log."""
    now = 1000.0
    store = ClockedStore(MemoryBackend(), lambda: now)
    writer = write_sample_store(store)
    shared = {key for key in of(store, 10) if key.startswith(keys.PACKS)}
    writer.journal.untag("best")
    fresh = SampleWriter(store)  # refers to nothing older
    epoch = fresh.open_epoch(resume=SnapshotId(1, 30))
    fresh.write(SnapshotId(epoch, 40), sample_ranks(40))
    state = fresh.journal.drop([SnapshotId(1, 10), SnapshotId(1, 30)])
    now = 2000.0
    late = make_record(
        Commit(SnapshotId(1, 20), "f" * 32, None),
        job=state.job,
        seq=state.next_seq,
        epoch=epoch,
        write_id="late",
        prev=state.head_digest,
    )
    store.put(keys.log_key(late.seq), [late.encode()])
    void = fresh.journal.drop([SnapshotId(1, 20)]).void_at(late.seq)
    assert void is not None and void.code == "pair-taken"
    now = 2050.0
    swept(store, grace_s=100.0)
    assert shared & objects(store), "a restore of 20 may be reading it"
    now = 2100.0
    swept(store, grace_s=100.0)
    assert not shared & objects(store)


def test_what_was_swept_with_a_shorter_grace_holds_nothing_back() -> None:
    now = 1000.0
    store = ClockedStore(MemoryBackend(), lambda: now)
    writer = write_sample_store(store, steps=(10, 20, 30, 40))
    gone = {key for key in of(store, 10) if not key.startswith(keys.PACKS)}
    writer.journal.drop([SnapshotId(1, 10)])
    assert swept(store).ok
    assert not gone & objects(store)
    writer.journal.drop([SnapshotId(1, 30)])
    store.delete(next(key for key in sorted(of(store, 30)) if key.startswith(keys.PARTS)))
    before = objects(store)
    report = swept(store, grace_s=100.0)
    assert report.ok, report
    assert objects(store) == before


def test_drop_that_did_not_count_takes_nothing() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store)
    before = objects(store)
    with pytest.raises(Exception, match="never dropped"):
        writer.journal.drop([SnapshotId(1, 30)])
    swept(store)
    assert objects(store) == before


def test_snapshot_never_committed_goes_when_a_newer_one_is_and_the_floor_is_above() -> None:
    store = MemoryBackend()
    first = write_sample_store(store)
    lost = SampleWriter(
        FaultyBackend(store, [Fault(harm=Harm.LOST_REQUEST, op="put", key="parts/", skip=1)])
    )
    lost.open_epoch(resume=SnapshotId(1, 30))
    with pytest.raises(UnavailableError):
        lost.write(SnapshotId(2, 40), sample_ranks(40))
    left = of(store, 40, 2)
    assert left
    swept(store)
    assert of(store, 40, 2) == left, "its keeper may still finish it"
    first.open_epoch(resume=SnapshotId(1, 30))
    first.write(SnapshotId(3, 35), sample_ranks(35))
    swept(store)
    assert of(store, 40, 2) == left
    drop(store, first.journal, None, now_unix_s=0.0)
    swept(store)
    assert of(store, 40, 2) == set()


def test_foreign_objects_are_never_touched(store: Backend) -> None:
    writer = write_sample_store(store)
    foreign = [
        "packs/notes.txt",
        "parts/0000000001-00000000000010/readme",
        "manifests/x.json",
        "probes/readme",
        "a/b",
    ]
    for key in foreign:
        store.put(key, [b"mine"])
    writer.journal.drop([SnapshotId(1, 10)])
    report = swept(store)
    assert {stat.key for stat in store.list("")} >= set(foreign)
    assert report.stores[0].objects[ObjectStatus.FOREIGN] == 3


def test_damaged_part_of_an_existing_snapshot_keeps_every_pack() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store)
    writer.journal.drop([SnapshotId(1, 10)])
    packs = {key for key in objects(store) if key.startswith(keys.PACKS)}
    damage(store, next(key for key in sorted(of(store, 30)) if key.startswith(keys.PARTS)), 20)
    report = swept(store)
    assert not report.ok
    assert [one.snapshot for one in report.held] == [SnapshotId(1, 30)]
    assert {key for key in objects(store) if key.startswith(keys.PACKS)} == packs
    assert not [key for key in of(store, 10) if not key.startswith(keys.PACKS)]


def test_damaged_manifest_keeps_every_object_of_its_pair_and_every_pack() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store)
    before = of(store, 20)
    writer.journal.untag("best")
    without_second_copies(store)
    damage(store, next(key for key in before if key.startswith(keys.MANIFESTS)), 20)
    assert not swept(store).ok
    assert of(store, 20) == before
    # It is of no use to a restore, so a policy may drop it; then nothing is held any more.
    plan, _ = drop(store, writer.journal, keep_last(2), now_unix_s=0.0)
    assert plan.drops == (SnapshotId(1, 20),)
    assert swept(store).ok


def test_hole_or_too_few_stores_let_nothing_be_deleted() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store)
    state = writer.journal.drop([SnapshotId(1, 10)])
    before = objects(store)
    with pytest.raises(IntegrityError, match="hole"):
        sweep(store, replace(state, hole=Hole(3, "gone")), grace_s=0.0)
    with pytest.raises(UnavailableError, match="too few"):
        sweep(store, replace(state, short="1 of 3 stores"), grace_s=0.0)
    assert objects(store) == before
    with pytest.raises(IntegrityError, match="hole"):
        preview(store, replace(state, hole=Hole(3, "gone")), None, now_unix_s=0.0)


def test_store_that_stops_answering_is_told_and_a_repeat_finishes() -> None:
    inner = MemoryBackend()
    writer = write_sample_store(inner)
    writer.journal.drop([SnapshotId(1, 10)])
    faulty = FaultyBackend(
        inner, [Fault(harm=Harm.LOST_REQUEST, op="delete", key="parts/", times=None)]
    )
    told = []
    report = sweep(faulty, Journal.open(inner).refresh(), grace_s=0.0, emit=told.append)
    assert not report.ok
    assert report.stores[0].deleted == 1, "its manifest"
    assert [(event.kind, event.alarm) for event in told] == [("sweep-stopped", True)]
    assert swept(inner).ok
    assert swept(inner).stores[0].deleted == 0


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.DENIED])
def test_store_without_a_clock_is_left_alone(harm: Harm, grace_s: float) -> None:
    inner = MemoryBackend()
    writer = write_sample_store(inner)
    writer.journal.drop([SnapshotId(1, 10)])
    before = objects(inner)
    report = sweep(
        FaultyBackend(inner, [Fault(harm=harm, op="put")]),
        Journal.open(inner).refresh(),
        grace_s=grace_s,
    )
    assert report.stores[0].problem
    assert objects(inner) == before


def test_probes_of_dead_sweeps_are_removed() -> None:
    now = 1000.0
    store = ClockedStore(MemoryBackend(), lambda: now)
    write_sample_store(store)
    store.put(f"{CLOCK_PROBES}{'a' * 32}", [b"ckpt"])
    swept(store)
    assert [stat.key for stat in store.list(CLOCK_PROBES)] == [f"{CLOCK_PROBES}{'a' * 32}"]
    now = 5000.0
    swept(store)
    assert list(store.list(CLOCK_PROBES)) == []


@pytest.mark.slow
def test_death_at_each_delete_harms_nothing_and_a_repeat_finishes() -> None:
    for at in range(1000):
        world = CollectedStore(7)
        process = world.start()
        for _ in range(4):
            process.capture(world.store)
            process.commit()
        drop(world.store, process.journal, keep_last(1), now_unix_s=world.now)
        left = at

        def before(op: str, key: str) -> None:
            nonlocal left
            if op == "delete" and not key.startswith(CLOCK_PROBES):
                if not left:
                    raise Death
                left -= 1

        try:
            sweep(Watched(world.store, before), world.state(), grace_s=0.0)
        except Death:
            world.check()
            assert sweep(world.store, world.state(), grace_s=0.0).ok
            assert world.objects() == world.needed()
        else:
            assert at > 5
            return


@pytest.mark.slow
@pytest.mark.parametrize("mode", [CrashMode.BEFORE, CrashMode.AFTER])
@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_killed_sweep_of_a_folder_leaves_what_is_needed(
    tmp_path: Path, at: int, mode: CrashMode
) -> None:
    store = FileBackend(tmp_path / "store")
    writer = write_sample_store(store)
    writer.journal.drop([SnapshotId(1, 10)])
    needed = objects(store) - of(store, 10)
    assert (
        run_in_child(partial(sweep_and_die, str(tmp_path / "store"), at, mode)) == -signal.SIGKILL
    )
    assert needed <= objects(store)
    assert newest_intact(store, Journal.open(store).refresh()) == SnapshotId(1, 30)
    assert swept(store).ok
    clean = MemoryBackend()
    other = write_sample_store(clean)
    other.journal.drop([SnapshotId(1, 10)])
    swept(clean)
    assert len(objects(store)) == len(objects(clean))


def test_newest_whose_pack_is_gone_or_short_lets_the_one_before_it_stay() -> None:
    for cut in (False, True):
        store = MemoryBackend()
        writer = write_sample_store(store, steps=(10, 20, 30, 40))
        writer.journal.untag("best")
        pack = next(key for key in sorted(of(store, 40)) if key.startswith(keys.PACKS))
        store.delete(pack)
        if cut:
            store.put(pack, [b"short"])
        plan = preview(store, writer.journal.refresh(), keep_tagged(), now_unix_s=0.0)
        assert plan.drops == (SnapshotId(1, 10), SnapshotId(1, 20))
        assert [one.reasons for one in plan.decisions if one.info.step == 30] == [(NEWEST_INTACT,)]


def scrubbed(store: Backend) -> None:
    """A scrub of the store, recorded as its callers do."""
    run = Scrub([store], 1, repair=False)
    assert run.run(on_verified=lambda verified: record_scrub([store], verified, now_unix_ms=1))


def test_newest_that_was_really_read_is_never_dropped_for_one_of_the_right_length() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store, steps=(10, 20))
    writer.journal.untag("best")
    scrubbed(store)
    for step in (30, 40, 50):
        writer.write(SnapshotId(1, step), sample_ranks(step))
    for step in (40, 50):  # rotten sectors, which no length shows
        pack = next(key for key in sorted(of(store, step)) if key.startswith(keys.PACKS))
        damage(store, pack, 5)
    plan = preview(store, writer.journal.refresh(), keep_last(2), now_unix_s=0.0)
    assert plan.drops == (SnapshotId(1, 10), SnapshotId(1, 30))
    assert [one.reasons for one in plan.decisions if one.info.step == 20] == [(NEWEST_VERIFIED,)]
    scrubbed(store)
    plan = preview(store, writer.journal.refresh(), keep_last(2), now_unix_s=0.0)
    assert plan.drops == (SnapshotId(1, 10), SnapshotId(1, 20)), "30 was read meanwhile"


def test_only_snapshots_that_need_a_damaged_chunk_are_not_verified() -> None:
    store = MemoryBackend()
    writer = SampleWriter(store)
    epoch = writer.open_epoch()
    frozen, changing = tensor("frozen", np.arange(4096)), tensor("other", np.arange(4096) + 1)
    writer.write(SnapshotId(epoch, 1), [[frozen, changing]])
    writer.write(SnapshotId(epoch, 2), [[frozen]])
    state = writer.journal.refresh()
    place = load_index(store, state, SnapshotId(epoch, 1)).shards("other")[0].locations[0]
    damage(store, place.pack, place.offset_bytes)
    scrubbed(store)
    record = last_record([store])
    assert record is not None
    assert {snapshot.step for snapshot, _ in record.verified} == {2}


@pytest.mark.parametrize("budget_bytes", [1, 1 << 20])
@pytest.mark.parametrize("times", [1, None])
def test_snapshot_that_needs_a_damaged_chunk_is_not_verified_whichever_reads_fail(
    budget_bytes: int, times: int | None
) -> None:
    store = MemoryBackend()
    writer = SampleWriter(store)
    epoch = writer.open_epoch()
    writer.write(SnapshotId(epoch, 1), [[tensor("a", np.arange(4096))], [tensor("b", np.ones(8))]])
    index = load_index(store, writer.journal.refresh(), SnapshotId(epoch, 1))
    place = index.shards("b")[0].locations[0]
    damage(store, place.pack, place.offset_bytes)
    for prefix in (keys.MANIFESTS, keys.PARTS):
        for skip in range(100):
            fault = Fault(
                harm=Harm.LOST_REQUEST, op="read_into", key=prefix, skip=skip, times=times
            )
            faulty = FaultyBackend(store, [fault])
            verified: list[object] = []
            run = Scrub([faulty], 1, repair=False, budget_bytes=budget_bytes)
            assert run.run(on_verified=verified.extend)
            assert not verified
            if not faulty.struck:
                break
        assert 2 <= skip < 99, "each read failed once"


def test_nothing_is_dropped_that_nobody_agreed_to() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store)
    writer.journal.untag("best")
    agreed = preview(store, writer.journal.refresh(), keep_last(2), now_unix_s=0.0)
    assert agreed.drops == (SnapshotId(1, 10),)
    writer.write(SnapshotId(1, 40), sample_ranks(40))  # now 20 is to go, too
    plan, state = drop(store, writer.journal, keep_last(2), now_unix_s=0.0, approved=agreed)
    assert plan.drops == agreed.drops
    assert [entry.snapshot.step for entry in state.snapshots] == [20, 30, 40]


def test_drop_is_decided_anew_when_the_log_changed_under_it() -> None:
    store = MemoryBackend()
    write_sample_store(store)
    raced = False

    def race(op: str, key: str) -> None:
        nonlocal raced
        if op == "put" and key.startswith(keys.LOG) and not raced:
            raced = True
            Journal.open(store).tag("late", SnapshotId(1, 10))

    watched = Watched(store, race)
    _, state = drop(watched, Journal.open(watched), keep_last(1), now_unix_s=0.0)
    assert raced
    assert SnapshotId(1, 10) in {entry.snapshot for entry in state.snapshots}


# ---- several stores


def three(
    now: Callable[[], float] = lambda: 1000.0,
) -> tuple[list[MemoryBackend], ReplicatedBackend]:
    inner = [MemoryBackend(str(place)) for place in range(3)]
    return inner, ReplicatedBackend(
        [ClockedStore(one, now) for one in inner], emit=lambda _: None, seed=1
    )


def test_encrypted_stores_are_swept_alike(tmp_path: Path) -> None:
    write_new_key(str(tmp_path / "key"))
    inner = [MemoryBackend(str(place)) for place in range(3)]
    plain = ReplicatedBackend(inner, emit=lambda _: None, seed=1)
    backend = encrypted(plain, load_keys(f"file:{tmp_path / 'key'}"))
    writer = write_sample_store(backend)
    assert plain.await_caught_up(20.0)
    _, state = drop(backend, writer.journal, keep_tagged(), now_unix_s=0.0)
    assert plain.await_caught_up(20.0)
    assert sweep(backend, state, grace_s=0.0).ok
    for one in inner:
        assert [key for key in of(one, 10) if not key.startswith(keys.PACKS)] == []
    assert newest_intact(backend, state) == SnapshotId(1, 30)
    backend.close()


def test_each_of_several_stores_is_swept() -> None:
    inner, backend = three()
    with_closed(backend, lambda: write_and_drop(backend))
    assert len({frozenset(objects(one)) for one in inner}) == 1
    gone = [key for key in of(inner[0], 10) if not key.startswith(keys.PACKS)]
    assert gone == []


def test_store_that_is_down_is_left_out_and_swept_when_it_is_back() -> None:
    inner, backend = three()
    writer = write_sample_store(backend)
    assert backend.await_caught_up(20.0)
    writer.journal.drop([SnapshotId(1, 10)])
    assert backend.await_caught_up(20.0)
    before = objects(inner[1])
    down = FaultyBackend(inner[1], [Fault(harm=Harm.LOST_REQUEST, times=None)])
    backend.close()
    partly = ReplicatedBackend([inner[0], down, inner[2]], emit=lambda _: None, seed=1)
    state = Journal.open(partly).refresh()
    report = sweep(partly, state, grace_s=0.0)
    partly.close()
    assert [bool(one.problem) for one in report.stores] == [False, True, False]
    assert objects(inner[1]) == before
    assert objects(inner[0]) == objects(inner[2]) < before
    again = ReplicatedBackend(inner, emit=lambda _: None, seed=1)
    assert sweep(again, Journal.open(again).refresh(), grace_s=0.0).ok
    again.close()
    assert objects(inner[1]) == objects(inner[0])


def test_copy_of_the_log_made_late_does_not_make_its_drops_young() -> None:
    now = 1000.0
    _, backend = three(lambda: now)
    writer = write_sample_store(backend)
    writer.journal.drop([SnapshotId(1, 10)])
    assert backend.await_caught_up(20.0)
    now = 2000.0
    for stat in list(backend.stores[2].list("")):  # as if the third store had been filled just now
        data = bytearray(stat.size_bytes)
        backend.stores[2].read_into(stat.key, memoryview(data))
        backend.stores[2].put(stat.key, [bytes(data)])
    report = sweep(backend, writer.journal.refresh(), grace_s=500.0)
    backend.close()
    assert report.ok
    assert [one.deleted > 0 for one in report.stores] == [True, True, False], (
        "garbage of the third is young itself"
    )
    assert report.stores[2].objects[ObjectStatus.YOUNG] == report.stores[0].deleted


def test_part_that_one_store_alone_has_whole_is_enough() -> None:
    inner, backend = three()
    writer = write_sample_store(backend)
    writer.journal.drop([SnapshotId(1, 10)])
    assert backend.await_caught_up(20.0)
    part = next(key for key in sorted(of(inner[0], 30)) if key.startswith(keys.PARTS))
    damage(inner[0], part, 20)
    inner[1].delete(part)
    report = sweep(backend, writer.journal.refresh(), grace_s=0.0)
    backend.close()
    assert report.ok
    assert all(one.deleted for one in report.stores)


def test_another_jobs_store_among_them_is_not_touched() -> None:
    store = MemoryBackend()
    writer = write_sample_store(store)
    writer.journal.drop([SnapshotId(1, 10)])
    state = writer.journal.refresh()
    other = MemoryBackend()
    SampleWriter(other, job="another").open_epoch()
    for key in objects(store):
        other.put(key, [b"x"])
    before = objects(other)
    report = sweep_beside(store, other, state)
    assert [bool(one.problem) for one in report.stores] == [False, True]
    assert "not a store of this log" in report.stores[1].problem
    assert objects(other) == before


def sweep_beside(store: Backend, other: Backend, state) -> SweepReport:
    both = ReplicatedBackend([store, other], emit=lambda _: None, seed=1)
    report = sweep(both, state, grace_s=0.0)
    both.close()
    return report


def write_and_drop(backend: ReplicatedBackend) -> None:
    writer = write_sample_store(backend)
    state = writer.journal.drop([SnapshotId(1, 10)])
    assert backend.await_caught_up(20.0)
    assert sweep(backend, state, grace_s=0.0).ok


def with_closed(backend: ReplicatedBackend, act: Callable[[], None]) -> None:
    try:
        act()
    finally:
        backend.close()
