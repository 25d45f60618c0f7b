"""A store that is removed or replaced between two launches of one keeper: the next starts
afresh."""

from __future__ import annotations

import shutil

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.ipc.messages import Choice
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId

WAIT_S = 60.0


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("origins", [True, False])
def test_new_launch_starts_afresh(make_world, asked: bool, replaced: bool, origins: bool) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    world.save(uploads, SnapshotId(1, 1))
    world.opened(uploads, SnapshotId(1, 1))
    pair = world.stage_all(SnapshotId(2, 5))
    world.until(lambda: uploads.idle)
    shutil.rmtree(world.root)
    if replaced:
        Journal.open(FileBackend(world.root), job="job", create=True)
    uploads.new_launch()
    if asked:
        held = {pair: world.origins[2]} if origins else {}
        assert world.result(uploads.choices([pair], held)) == ()
    assert world.opened(uploads, None) == 1
    world.until(lambda: len(world.alarms("store-changed")) == 1)
    assert all(world.infos(world.save(uploads, SnapshotId(1, 2))))
    assert world.readable(SnapshotId(1, 2))
    assert world.state().lineage == (SnapshotId(1, 2),)
    assert world.result(uploads.choices([])) == (Choice(SnapshotId(1, 2), "durable"),)
    assert uploads.open_epoch(None).result(0) == 2
    world.until(lambda: uploads.idle)
    assert world.pinned() == 0
    uploads.close(WAIT_S)


def test_store_that_is_still_there_is_gone_on_with(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    first = world.infos(world.save(uploads, SnapshotId(1, 1)))[0]
    pair = world.stage_all(SnapshotId(1, 2))
    uploads.new_launch()
    assert world.result(uploads.choices([pair], {pair: world.origins[1]}))[0] == Choice(
        pair, "staged"
    )
    assert world.opened(uploads, pair) == 2
    second = world.infos(world.save(uploads, SnapshotId(2, 3)))[0]
    assert second.new_bytes < first.new_bytes / 2, "chunks are still known"
    assert not world.alarms("store-changed")
    uploads.close(WAIT_S)


def test_what_was_on_its_way_to_a_removed_store_fails_and_frees_its_slots(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    world.store.held = "packs/"
    for step in (1, 2):
        for rank in range(2):
            uploads.persist(rank, world.stage(rank, SnapshotId(1, step)), ())
    assert world.store.waits.wait(WAIT_S)
    shutil.rmtree(world.root)
    uploads.new_launch()
    assert world.result(uploads.choices([])) == ()
    assert world.opened(uploads, None) == 1
    world.store.held = ""
    world.store.go_on.set()
    world.until(lambda: uploads.in_flight == 0)
    world.until(lambda: world.pinned() == 0)
    assert all(world.infos(world.save(uploads, SnapshotId(1, 3))))
    assert world.state().lineage == (SnapshotId(1, 3),)
    uploads.close(WAIT_S)
