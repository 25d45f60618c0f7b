"""Stores that are down, slow, gone or taken by another writer: epochs stay in order, and nothing
waits in the loop."""

from __future__ import annotations

import shutil
import time

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.errors import FencedError, UnavailableError, UsageError
from ckpt.ipc.messages import Choice
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId

WAIT_S = 60.0


def test_store_that_is_down_at_the_first_open_tells_the_caller(make_world) -> None:
    world = make_world()
    world.store.down = True
    uploads = world.uploads()
    with pytest.raises(UnavailableError):
        world.result(uploads.choices([]))
    first, second = uploads.open_epoch(None), uploads.open_epoch(None)
    with pytest.raises(UnavailableError):
        world.result(first)
    with pytest.raises(UnavailableError):
        world.result(second)
    world.store.down = False
    third, fourth = uploads.open_epoch(None), uploads.open_epoch(None)
    assert (world.result(third), world.result(fourth)) == (1, 2)
    uploads.close(WAIT_S)


def test_epochs_opened_while_the_store_is_down_are_recorded_in_order_before_their_commits(
    make_world,
) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.save(uploads, SnapshotId(1, 1))
    world.store.down = True
    numbers = [
        uploads.open_epoch(SnapshotId(1, 1)),
        uploads.open_epoch(SnapshotId(2, 4)),
        uploads.open_epoch(None),
    ]
    assert [number.result(0) for number in numbers] == [2, 3, 4], "given out at once"
    with pytest.raises(UsageError):
        uploads.open_epoch(SnapshotId(9, 1)).result(0)
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, SnapshotId(4, 5)), ())
    world.until(lambda: any(event.kind == "open-waits" for event in world.events))
    assert not uploads.idle
    world.store.down = False
    world.outcomes(uploads, SnapshotId(4, 5))
    world.until(lambda: uploads.idle)
    state = world.state()
    assert [(opened.epoch, opened.resume) for opened in state.opens] == [
        (1, None),
        (2, SnapshotId(1, 1)),
        (3, SnapshotId(2, 4)),
        (4, None),
    ]
    assert all(world.infos(world.save(uploads, SnapshotId(4, 6))))
    assert state.voids_total == 0
    uploads.close(WAIT_S)


def test_open_whose_reply_was_lost_is_recorded_once(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.lost_reply = "log/"
    assert uploads.open_epoch(None).result(0) == 2
    world.until(lambda: any(event.kind == "open-waits" for event in world.events))
    world.store.down = False
    world.until(lambda: uploads.idle)
    assert [opened.epoch for opened in world.state().opens] == [1, 2]
    assert not world.fences
    uploads.close(WAIT_S)


def test_store_that_vanishes_and_comes_back_loses_only_what_was_on_its_way(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.save(uploads, SnapshotId(1, 1))
    away = world.root.with_name("away")
    world.root.rename(away)
    assert world.codes(world.save(uploads, SnapshotId(1, 2))) == ["unavailable"] * 2
    assert uploads.open_epoch(SnapshotId(1, 1)).result(0) == 2
    world.until(lambda: any(event.kind == "open-waits" for event in world.events))
    shutil.rmtree(world.root, ignore_errors=True)  # what was written to the empty place
    away.rename(world.root)
    assert all(world.infos(world.save(uploads, SnapshotId(2, 3))))
    assert world.readable(SnapshotId(2, 3))
    assert world.state().lineage == (SnapshotId(2, 3), SnapshotId(1, 1))
    uploads.close(WAIT_S)


def test_hung_store_holds_up_neither_loop_nor_end(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.save(uploads, SnapshotId(1, 1))
    world.store.held = "packs/"
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, SnapshotId(1, 2)), ())
    assert world.store.waits.wait(WAIT_S)
    uploads.attempt_ended(world.sealed_of)
    staged = SnapshotId(1, 2)
    assert uploads.choices([staged]).result(0)[0] == Choice(staged, "staged")
    assert uploads.open_epoch(staged).result(0) == 2
    assert world.result(uploads.choices([])) == (Choice(SnapshotId(1, 1), "durable"),)
    began_s = time.monotonic()
    uploads.close(0.1)
    assert time.monotonic() - began_s < 5
    world.store.go_on.set()
    world.until(lambda: world.pinned() == 0)


def test_foreign_epoch_fences_at_the_next_commit(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.save(uploads, SnapshotId(1, 1))
    assert Journal.open(FileBackend(world.root)).open_epoch(resume=SnapshotId(1, 1)) == 2
    assert world.codes(world.save(uploads, SnapshotId(1, 2))) == ["fenced"] * 2
    assert len(world.fences) == 1
    for call in (
        uploads.open_epoch(SnapshotId(1, 1)),
        uploads.choices([SnapshotId(1, 2)]),
        uploads.tag("x", SnapshotId(1, 1)),
    ):
        with pytest.raises(FencedError):
            call.result(0)
    assert world.codes(world.save(uploads, SnapshotId(1, 3))) == ["fenced"] * 2
    uploads.flush_newest([SnapshotId(1, 3)], world.sealed_of)
    world.until(lambda: uploads.idle)
    assert world.pinned() == 0
    assert world.state().lineage == (SnapshotId(1, 1),)
    uploads.close(WAIT_S)


def test_foreign_epoch_between_two_attempts_fences_when_the_number_is_recorded(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    Journal.open(FileBackend(world.root)).open_epoch(resume=None)
    assert uploads.open_epoch(None).result(0) == 2
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, SnapshotId(2, 1)), ())
    assert world.codes(world.outcomes(uploads, SnapshotId(2, 1))) == ["fenced"] * 2
    assert len(world.fences) == 1
    assert world.state().snapshots == ()
    uploads.close(WAIT_S)


def test_foreign_epoch_is_met_when_the_log_is_read(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    Journal.open(FileBackend(world.root)).open_epoch(resume=None)
    with pytest.raises(FencedError):
        world.result(uploads.choices([]))
    assert len(world.fences) == 1
    uploads.close(WAIT_S)


def test_new_keeper_records_epochs_that_the_old_one_gave_out_and_never_wrote(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.save(uploads, SnapshotId(1, 1))
    world.store.down = True
    assert uploads.open_epoch(SnapshotId(1, 1)).result(0) == 2
    uploads.close(WAIT_S)  # as good as dead: its records never land
    world.store.down = False
    staged = SnapshotId(2, 3)
    for rank in range(2):
        world.stage_only(rank, staged)
    again = world.uploads()
    assert world.result(again.choices([staged])) == (
        Choice(staged, "staged"),
        Choice(SnapshotId(1, 1), "durable"),
    )
    assert world.result(again.open_epoch(staged)) == 3
    assert [(one.epoch, one.resume) for one in world.state().opens] == [
        (1, None),
        (2, SnapshotId(1, 1)),
        (3, staged),
    ]
    again.flush_newest([staged], world.sealed_of)
    assert all(world.infos(world.outcomes(again, staged)))
    assert world.state().lineage == (staged, SnapshotId(1, 1))
    again.close(WAIT_S)


def test_upload_that_a_new_attempt_overtakes_is_committed_before_the_new_epoch(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.held = "packs/"
    pair = SnapshotId(1, 1)
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, pair), ())
    assert world.store.waits.wait(WAIT_S)
    uploads.attempt_ended(world.sealed_of)
    assert uploads.choices([pair]).result(0) == (Choice(pair, "staged"),)
    assert uploads.open_epoch(pair).result(0) == 2
    world.store.go_on.set()
    assert all(world.infos(world.save(uploads, SnapshotId(2, 2))))
    state = world.state()
    assert state.lineage == (SnapshotId(2, 2), pair)
    assert [entry.writer_epoch for entry in state.snapshots] == [1, 2]
    uploads.close(WAIT_S)
