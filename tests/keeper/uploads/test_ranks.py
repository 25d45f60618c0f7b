"""Ranks that die, refuse or are all gone: what they staged becomes durable all the same, or fails
for all alike."""

from __future__ import annotations

import pytest

from ckpt.errors import UsageError
from ckpt.ipc.messages import Choice, RemoteError
from ckpt.log.catalog import load_manifest
from ckpt.values import SnapshotId

WAIT_S = 60.0


@pytest.mark.parametrize("staged_by", [(0, 1), (0,)])
def test_rank_that_died_is_handed_in_from_its_slot_or_refused(
    make_world, staged_by: tuple[int, ...]
) -> None:
    world = make_world(3)
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    pair = SnapshotId(1, 1)
    uploads.persist(2, world.stage(2, pair), ("end",))
    for rank in staged_by:
        world.stage_only(rank, pair)
    uploads.attempt_ended(world.sealed_of)
    if len(staged_by) == 2:
        infos = world.infos(world.outcomes(uploads, pair))
        assert [info.tags for info in infos] == [("end",)] * 3
        assert world.readable(pair)
    else:
        world.until(lambda: uploads.in_flight == 0)
        assert [(rank, error.code) for rank, _, _, error in world.told] == [(2, "unavailable")]
        assert "died before they staged" in world.told[0][3].text
    world.result(uploads.open_epoch(None))
    assert all(world.infos(world.save(uploads, SnapshotId(2, 1)))), (
        "the ranks' queues are equal again"
    )
    assert world.pinned() == 0
    uploads.close(WAIT_S)


def test_shares_that_do_not_fit_are_not_handed_in_for_a_dead_rank(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    uploads.persist(0, world.stage(0, SnapshotId(1, 1), rows=3), ())
    world.stage_only(1, SnapshotId(1, 1))
    uploads.attempt_ended(world.sealed_of)
    world.until(lambda: uploads.in_flight == 0)
    assert "disagree on a leaf" in world.told[0][3].text
    assert world.state().snapshots == ()
    assert world.pinned() == 0
    uploads.close(WAIT_S)


def test_refusal_of_one_rank_fails_the_snapshot_for_all(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    uploads.refuse(0, SnapshotId(1, 1), UsageError("no room"))
    uploads.persist(1, world.stage(1, SnapshotId(1, 1)), ())
    world.until(lambda: uploads.in_flight == 0)
    assert [(rank, error) for rank, *_, error in world.told] == [
        (1, RemoteError("usage", "no room", 0))
    ]
    assert all(world.infos(world.save(uploads, SnapshotId(1, 2))))
    uploads.close(WAIT_S)


def test_settling_is_repeated_until_the_store_takes_it(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.down = True
    assert world.codes(world.save(uploads, SnapshotId(1, 1))) == ["unavailable"] * 2
    uploads.flush_newest([SnapshotId(1, 1)], world.sealed_of)
    assert not uploads.idle
    world.store.down = False
    world.until(lambda: uploads.idle)
    assert uploads.durable is not None
    assert uploads.durable.id == SnapshotId(1, 1)
    assert world.readable(SnapshotId(1, 1))
    uploads.close(WAIT_S)


def test_settling_leaves_alone_what_an_unanswered_commit_made_durable(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.lost_reply = "log/"
    assert world.codes(world.save(uploads, SnapshotId(1, 1))) == ["commit-unknown"] * 2
    uploads.flush_newest([SnapshotId(1, 1)], world.sealed_of)
    world.store.down = False
    world.until(lambda: uploads.idle)
    assert world.state().lineage == (SnapshotId(1, 1),)
    assert world.readable(SnapshotId(1, 1)), "its part was not written over"
    assert world.result(uploads.choices([])) == (Choice(SnapshotId(1, 1), "durable"),)
    uploads.close(WAIT_S)


def test_settling_again_leaves_the_bytes_of_the_first_try_as_they_are(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.lost_request = "log/"
    pair = SnapshotId(1, 1)
    assert world.codes(world.save(uploads, pair)) == ["commit-unknown"] * 2
    first = {stat.key for stat in world.store.list(f"parts/{pair.key}/")}
    uploads.flush_newest([pair], world.sealed_of)
    world.store.lost_request = ""
    world.until(lambda: uploads.idle)
    assert world.readable(pair)
    manifest = load_manifest(world.store, world.state(), pair)
    assert len(first) == 1, "one part for all ranks of the node"
    assert not first & {part.key for part in manifest.parts}, (
        "that commit may land yet, and names the first parts"
    )
    uploads.close(WAIT_S)


def test_settling_what_is_in_flight_waits_for_it(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.held = "packs/"
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, SnapshotId(1, 1)), ())
    assert world.store.waits.wait(WAIT_S)
    uploads.flush_newest([SnapshotId(1, 1)], world.sealed_of)
    world.store.go_on.set()
    assert all(world.infos(world.outcomes(uploads, SnapshotId(1, 1))))
    world.until(lambda: uploads.idle)
    assert len(world.told) == 2
    uploads.close(WAIT_S)


def test_settling_gives_up_where_the_slots_were_reused(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.stage_only(0, SnapshotId(1, 1))
    uploads.flush_newest([SnapshotId(1, 1)], world.sealed_of)
    world.until(lambda: uploads.idle)
    world.until(lambda: any(event.kind == "settle-failed" for event in world.events))
    assert world.pinned() == 0
    uploads.close(WAIT_S)
