"""A keeper keeps to its launch's policy: after commits, never under a restore, never for somebody
else's epoch."""

from __future__ import annotations

import threading

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.errors import UnavailableError
from ckpt.format import keys
from ckpt.ipc.messages import Retention
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.maintenance.gc import plan as gc_due
from ckpt.maintenance.gc.plan import PREFIXES
from ckpt.values import SnapshotId

WAIT_S = 60.0
LAST_TWO = Retention(keep="last=2", grace_s=0.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_due, "ROUND_S", 0.01)


def steps(world) -> list[int]:
    return [entry.snapshot.step for entry in world.state().snapshots]


def objects(world) -> set[str]:
    return {stat.key for prefix in PREFIXES for stat in FileBackend(world.root).list(prefix)}


def needed(world) -> set[str]:
    """What the snapshots that exist refer to."""
    state, store = world.state(), FileBackend(world.root)
    found: set[str] = set()
    for entry in state.snapshots:
        index = load_index(store, state, entry.snapshot)
        found |= {keys.manifest_key(entry.snapshot, entry.manifest_digest), *index.packs()}
        found |= {ref.key for ref in index.manifest.parts}
    return found


def tidy(world, uploads) -> None:
    """The job is over."""
    if not uploads.finish_retention(begin=True):
        world.until(lambda: uploads.finish_retention(begin=False))


@pytest.mark.slow
def test_old_snapshots_and_their_bytes_go_while_the_job_commits(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    for step in range(1, 8):
        assert all(world.infos(world.save(uploads, SnapshotId(1, step))))
        world.until(lambda step=step: steps(world) == list(range(max(1, step - 1), step + 1)))
    tidy(world, uploads)
    assert objects(world) == needed(world)
    assert world.readable(SnapshotId(1, 7)) and world.readable(SnapshotId(1, 6))
    assert not any(event.alarm for event in world.events)
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_job_that_ends_between_two_rounds_is_tidied_at_its_end(make_world, monkeypatch) -> None:
    monkeypatch.setattr(gc_due, "ROUND_S", 3600.0)
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    for step in range(1, 8):
        world.save(uploads, SnapshotId(1, step))
    tidy(world, uploads)
    assert steps(world) == [6, 7]
    assert objects(world) == needed(world)
    assert uploads.finish_retention(begin=True), "nothing is left to do"
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_tagged_snapshots_and_those_that_a_rule_keeps_stay(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, Retention(keep="last=1,every=4", grace_s=0.0)))
    for step in range(1, 8):
        world.save(uploads, SnapshotId(1, step), ("good",) if step == 3 else ())
    tidy(world, uploads)
    assert steps(world) == [3, 4, 7]
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_nothing_is_dropped_or_deleted_while_trainers_restore(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, Retention(keep="last=1", grace_s=0.0)))
    world.save(uploads, SnapshotId(1, 1))
    world.until(lambda: uploads.finish_retention(begin=False))
    before = objects(world)
    world.store.held = "packs/"
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, SnapshotId(1, 2)), ())
    assert world.store.waits.wait(WAIT_S)
    uploads.attempt_ended(world.sealed_of)
    [choice] = world.result(uploads.choices([]))
    assert choice.snapshot == SnapshotId(1, 1)
    assert uploads.open_epoch(choice.snapshot, Retention(keep="last=1", grace_s=0.0)).result(0) == 2
    world.store.held = ""
    world.store.go_on.set()
    world.outcomes(uploads, SnapshotId(1, 2))
    assert uploads.finish_retention(begin=False), "nothing is even begun"
    assert before <= objects(world), (
        "what is restored now is there, though a newer one is committed"
    )
    # (1, 2) may be dropped in the moment in which the next one refers to it: that is refused, the
    # one after refers to none.
    saved = next(
        step for step in (3, 4) if all(world.infos(world.save(uploads, SnapshotId(2, step))))
    )
    world.until(lambda: steps(world) == [saved])
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_keeper_that_was_overtaken_drops_nothing(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    for step in (1, 2):
        world.save(uploads, SnapshotId(1, step))
    world.until(lambda: uploads.finish_retention(begin=False))
    hangs, go_on = threading.Event(), threading.Event()
    # The keeper is paused right before it writes the record of a drop, and another writer goes on
    # meanwhile.
    put = world.store.put

    def slow(key: str, data, *, create_only: bool = False) -> None:
        body = b"".join(bytes(one) for one in data)
        if key.startswith(keys.LOG) and b'"drop"' in body and not hangs.is_set():
            hangs.set()
            assert go_on.wait(WAIT_S)
        put(key, data, create_only=create_only)

    world.store.put = slow
    world.save(uploads, SnapshotId(1, 3))
    assert hangs.wait(WAIT_S)
    other = Journal.open(FileBackend(world.root))
    assert other.open_epoch(resume=SnapshotId(1, 1)) == 2
    go_on.set()
    world.until(lambda: [event for event in world.events if event.kind == "gc-fenced"])
    assert steps(world) == [1, 2, 3]
    assert world.state().newest() == SnapshotId(1, 1)
    assert objects(world) == needed(world)
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_store_that_is_down_holds_up_no_upload_and_is_tidied_later(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    world.store.down = False
    put = world.store.put

    def no_drops(key: str, data, *, create_only: bool = False) -> None:
        if world.store.held == "drops" and b'"drop"' in b"".join(bytes(one) for one in data):
            raise UnavailableError("not now.")
        put(key, data, create_only=create_only)

    world.store.put, world.store.held = no_drops, "drops"
    for step in range(1, 6):
        assert all(world.infos(world.save(uploads, SnapshotId(1, step))))
    world.until(lambda: world.alarms("gc-failed"))
    assert steps(world) == [1, 2, 3, 4, 5]
    world.store.held = ""
    world.until(lambda: steps(world) == [4, 5])
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_each_launch_has_its_own_policy_and_the_last_ones_ends_with_it(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    for step in range(1, 4):
        world.save(uploads, SnapshotId(1, step))
    world.until(lambda: steps(world) == [2, 3])
    uploads.new_launch()
    assert (
        world.result(uploads.open_epoch(SnapshotId(1, 3), Retention(keep="last=4", grace_s=0.0)))
        == 2
    )
    for step in range(4, 9):
        world.save(uploads, SnapshotId(2, step))
    world.until(lambda: steps(world) == [5, 6, 7, 8])
    uploads.new_launch()
    assert world.result(uploads.open_epoch(SnapshotId(2, 8))) == 3
    for step in range(9, 15):
        world.save(uploads, SnapshotId(3, step))
    tidy(world, uploads)
    assert steps(world) == list(range(5, 15)), "nobody asked for anything to be dropped"
    uploads.close(WAIT_S)


def test_hung_store_holds_up_neither_the_loop_nor_the_end(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    hangs, go_on = threading.Event(), threading.Event()

    def stuck(key: str) -> None:
        hangs.set()
        assert go_on.wait(WAIT_S)

    world.store.delete = stuck
    for step in range(1, 4):
        world.save(uploads, SnapshotId(1, step))
    assert hangs.wait(WAIT_S)
    assert all(world.infos(world.save(uploads, SnapshotId(1, 4))))
    assert uploads.idle
    assert not uploads.finish_retention(begin=True)
    go_on.set()
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_epoch_that_is_opened_with_another_policy_is_kept_to_that_one(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None, LAST_TWO))
    for step in range(1, 4):
        world.save(uploads, SnapshotId(1, step))
    world.until(lambda: steps(world) == [2, 3])
    assert uploads.open_epoch(SnapshotId(1, 3), None).result(0) == 2
    for step in range(4, 8):
        world.save(uploads, SnapshotId(2, step))
    tidy(world, uploads)
    assert steps(world) == [2, 3, 4, 5, 6, 7]
    assert (
        uploads.open_epoch(SnapshotId(2, 7), Retention(keep="last=3", grace_s=0.0)).result(0) == 3
    )
    world.save(uploads, SnapshotId(3, 8))
    world.until(lambda: steps(world) == [6, 7, 8])
    uploads.close(WAIT_S)
