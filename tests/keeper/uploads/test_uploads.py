"""Epochs, uploads and choices of one job over several attempts and launches."""

from __future__ import annotations

import pytest

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.errors import ConflictError, NotFoundError, UsageError
from ckpt.format.records import Commit
from ckpt.ipc.messages import Choice
from ckpt.log.catalog import load_index, load_manifest
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId

WAIT_S = 60.0


def test_no_store_yet_gives_no_choices_and_the_first_epoch_makes_one(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    assert world.result(uploads.choices([])) == ()
    assert world.result(uploads.open_epoch(None)) == 1
    assert world.state().epoch == 1
    infos = world.infos(world.save(uploads, SnapshotId(1, 5), ("best",)))
    assert infos[0] == infos[1]
    assert (infos[0].step, infos[0].tags, infos[0].world_size) == (5, ("best",), 2)
    assert uploads.durable == infos[0]
    assert world.readable(SnapshotId(1, 5))
    assert world.pinned() == 0
    world.until(lambda: uploads.idle)
    uploads.close(WAIT_S)


@pytest.mark.slow
def test_attempts_go_on_from_what_is_staged_and_commit_it_under_their_own_epoch(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    assert world.result(uploads.open_epoch(None)) == 1
    world.save(uploads, SnapshotId(1, 1))
    staged = SnapshotId(1, 2)
    for rank in range(2):
        world.stage_only(rank, staged)
    uploads.attempt_ended(world.sealed_of)
    choices = uploads.choices([staged])
    assert choices.done(), "no store is asked"
    assert choices.result() == (Choice(staged, "staged"), Choice(SnapshotId(1, 1), "durable"))
    opened = uploads.open_epoch(staged)
    assert opened.done(), "no store is asked"
    assert opened.result() == uploads.epoch == 2
    uploads.flush_newest([staged], world.sealed_of)
    assert all(world.infos(world.outcomes(uploads, staged)))
    world.save(uploads, SnapshotId(2, 3))
    state = world.state()
    assert state.lineage == (SnapshotId(2, 3), staged, SnapshotId(1, 1))
    assert [entry.writer_epoch for entry in state.snapshots] == [1, 2, 2]
    uploads.close(WAIT_S)


def test_chunks_are_written_once_over_all_attempts(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    first = world.infos(world.save(uploads, SnapshotId(1, 1)))[0]
    assert first.new_bytes >= first.size_bytes
    uploads.attempt_ended(world.sealed_of)
    world.result(uploads.open_epoch(SnapshotId(1, 1)))
    second = world.infos(world.save(uploads, SnapshotId(2, 2)))[0]
    assert second.new_bytes < first.new_bytes / 2
    assert load_manifest(
        FileBackend(world.root), world.state(), SnapshotId(2, 2)
    ).base == SnapshotId(1, 1)
    assert world.readable(SnapshotId(2, 2))
    uploads.close(WAIT_S)


def test_what_trainers_read_may_be_referred_to_by_a_new_keeper(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    first = world.infos(world.save(uploads, SnapshotId(1, 1)))[0]
    uploads.close(WAIT_S)
    again = world.uploads()
    assert world.result(again.choices([])) == (Choice(SnapshotId(1, 1), "durable"),)
    world.result(again.open_epoch(SnapshotId(1, 1)))
    known = load_index(FileBackend(world.root), world.state(), SnapshotId(1, 1)).locations()
    again.refer_next(
        1, SnapshotId(1, 1), known
    )  # one rank alone: the commit names the base all the same
    second = world.infos(world.save(again, SnapshotId(2, 2)))[0]
    assert second.new_bytes < first.new_bytes
    assert load_manifest(
        FileBackend(world.root), world.state(), SnapshotId(2, 2)
    ).base == SnapshotId(1, 1)
    again.close(WAIT_S)


def test_snapshot_whose_base_is_dropped_meanwhile_is_written_whole(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    for step in (1, 2):
        world.save(uploads, SnapshotId(1, step))
    outside = Journal.open(FileBackend(world.root))
    outside.append(Commit(SnapshotId(1, 3), "0" * 32, None), epoch=1)
    outside.drop([SnapshotId(1, 1), SnapshotId(1, 2)])
    for step, base in ((4, None), (5, SnapshotId(1, 4))):
        assert all(world.infos(world.save(uploads, SnapshotId(1, step))))
        saved = load_manifest(FileBackend(world.root), world.state(), SnapshotId(1, step))
        assert saved.base == base
    uploads.close(WAIT_S)


def test_unknown_place_is_an_error_of_the_caller(make_world) -> None:
    world = make_world()

    def refuse() -> Backend:
        raise UsageError("no such kind of store")

    uploads = world.uploads(open_store=refuse)
    with pytest.raises(UsageError):
        world.result(uploads.open_epoch(None))
    uploads.close(WAIT_S)


def test_tags_are_set_after_what_was_handed_in_before(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    with pytest.raises(UsageError):
        uploads.tag("best", SnapshotId(1, 1)).result(0)
    world.result(uploads.open_epoch(None))
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, SnapshotId(1, 1)), ())
    world.result(uploads.tag("best", SnapshotId(1, 1)))
    assert world.state().tags == {"best": SnapshotId(1, 1)}
    uploads.close(WAIT_S)


def test_tag_that_cannot_be_set_leaves_the_snapshot_durable(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    told = world.save(uploads, SnapshotId(1, 1), ("a\x00b",))
    assert all(world.infos(told))
    assert all(error is not None for *_, error in told)
    assert uploads.durable is not None
    uploads.close(WAIT_S)


def test_snapshot_before_any_epoch_is_refused(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    uploads.persist(0, world.stage(0, SnapshotId(1, 1)), ())
    assert world.codes(world.told) == ["usage"]
    assert world.pinned() == 0
    uploads.flush_newest([SnapshotId(1, 1)], world.sealed_of)
    world.until(lambda: uploads.idle)
    world.stage_only(1, SnapshotId(1, 1))
    uploads.flush_newest([SnapshotId(1, 1)], world.sealed_of)
    world.until(lambda: uploads.idle)
    with pytest.raises(NotFoundError):
        world.state()
    uploads.close(WAIT_S)


def test_store_of_another_job_is_refused_by_name_and_taken_without_one(make_world) -> None:
    world = make_world()
    uploads = world.uploads(job="mine")
    world.result(uploads.open_epoch(None))
    uploads.close(WAIT_S)
    other = world.uploads(job="yours")
    with pytest.raises(UsageError):
        world.result(other.open_epoch(None))
    other.close(WAIT_S)
    unnamed = world.uploads(job=world.root.name)
    assert world.result(unnamed.choices([])) == ()
    assert world.result(unnamed.open_epoch(None)) == 2
    unnamed.close(WAIT_S)


def test_new_launch_goes_on_after_others(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.save(uploads, SnapshotId(1, 1))
    other = Journal.open(FileBackend(world.root))
    assert other.open_epoch(resume=SnapshotId(1, 1)) == 2
    assert world.codes(world.save(uploads, SnapshotId(1, 2))) == ["fenced"] * 2
    uploads.new_launch()
    assert world.result(uploads.choices([SnapshotId(1, 2)])) == (
        Choice(SnapshotId(1, 1), "durable"),
    ), "off the line by now"
    opened = uploads.open_epoch(SnapshotId(1, 1))
    assert not opened.done(), "the log is read first"
    assert world.result(opened) == 3
    assert uploads.open_epoch(SnapshotId(1, 1)).result(0) == 4
    assert all(world.infos(world.save(uploads, SnapshotId(4, 2))))
    assert world.state().lineage == (SnapshotId(4, 2), SnapshotId(1, 1))
    uploads.close(WAIT_S)


def test_new_launch_forgets_an_epoch_that_others_took(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    Journal.open(FileBackend(world.root)).open_epoch(resume=None)
    assert uploads.open_epoch(None).result(0) == 2
    world.until(lambda: world.fences)
    uploads.new_launch()
    assert world.result(uploads.open_epoch(None)) == 3
    assert all(world.infos(world.save(uploads, SnapshotId(3, 1))))
    assert [opened.epoch for opened in world.state().opens] == [1, 2, 3]
    uploads.close(WAIT_S)


def test_new_launch_opens_its_epoch_behind_what_is_in_flight(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.result(uploads.open_epoch(None))
    world.store.held = "packs/"
    pair = SnapshotId(1, 1)
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, pair), ())
    assert world.store.waits.wait(WAIT_S)
    uploads.new_launch()
    assert world.result(uploads.choices([pair])) == (Choice(pair, "staged"),)
    opened = uploads.open_epoch(pair)
    world.store.go_on.set()
    assert world.result(opened) == 2
    assert all(world.infos(world.outcomes(uploads, pair)))
    assert world.state().lineage == (pair,)
    assert not world.fences
    uploads.close(WAIT_S)


def take_over(world, marks: dict[SnapshotId, tuple[str, ...]], resume: SnapshotId) -> None:
    """The next keeper finds slots with marks and opens an epoch; then it is idle."""
    uploads = world.uploads()
    world.told.clear()
    world.events.clear()
    uploads.slots_came(lambda: marks, world.sealed_of)
    world.opened(uploads, resume)
    world.until(lambda: uploads.idle)
    uploads.close(WAIT_S)


def saved_twice(world, *tags: str) -> Journal:
    """Two snapshots that a keeper made durable, the second with tags; then it died."""
    uploads = world.uploads()
    world.opened(uploads, None)
    world.save(uploads, SnapshotId(1, 1))
    assert all(world.infos(world.save(uploads, SnapshotId(1, 2), tags)))
    world.until(lambda: uploads.idle)
    uploads.close(WAIT_S)
    return Journal.open(FileBackend(world.root))


@pytest.mark.parametrize("tags", [(), ("best",), ("removed",)])
def test_dropped_snapshot_that_an_earlier_keeper_made_durable_is_not_told_as_lost(
    make_world, tags: tuple[str, ...]
) -> None:
    world = make_world()
    outside = saved_twice(world, "best")
    outside.tag("removed", SnapshotId(1, 1))
    outside.untag("removed")
    outside.drop([SnapshotId(1, 1)])
    take_over(world, {SnapshotId(1, 1): tags, SnapshotId(1, 2): ("best",)}, SnapshotId(1, 2))
    assert world.told == []
    assert not any(event.alarm for event in world.events)
    assert world.state().tags == {"best": SnapshotId(1, 2)}


@pytest.mark.parametrize("tags", [(), ("best",), ("never",)])
def test_snapshot_that_no_keeper_made_durable_is_told_as_lost_though_a_later_one_is(
    make_world, tags: tuple[str, ...]
) -> None:
    world = make_world()
    saved_twice(world, "best")
    take_over(world, {SnapshotId(1, 0): tags}, SnapshotId(1, 2))
    assert world.codes(world.told) == ["conflict", "conflict"]
    (text,) = world.alarms("save-failed")
    assert "is not durable" in text


def test_tag_that_was_removed_or_moved_since_is_not_set_again_by_the_next_keeper(
    make_world,
) -> None:
    world = make_world()
    outside = saved_twice(world, "gone", "back")
    outside.untag("gone")
    outside.tag("back", SnapshotId(1, 1))
    take_over(world, {SnapshotId(1, 2): ("gone", "back", "late")}, SnapshotId(1, 2))
    assert world.state().tags == {"back": SnapshotId(1, 1), "late": SnapshotId(1, 2)}


def test_late_tag_that_can_not_be_set_is_told(make_world, monkeypatch) -> None:
    world = make_world()
    saved_twice(world)

    def refuse(*_: object, **__: object) -> None:
        raise ConflictError("no tag today")

    monkeypatch.setattr(Journal, "tag", refuse)
    take_over(world, {SnapshotId(1, 2): ("late",)}, SnapshotId(1, 2))
    (text,) = world.alarms("tag-failed")
    assert "no tag today" in text
    assert world.told == []
