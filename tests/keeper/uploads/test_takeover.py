"""A keeper that finds slots of an earlier one: it waits for the store, and settles only what is the
job's own line."""

from __future__ import annotations

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.errors import ConflictError, NewerSnapshotError
from ckpt.ipc.messages import Choice
from ckpt.keeper.uploads.choices import launch_prefix
from ckpt.keeper.uploads.store_log import FirstOpen, StoreLog, new_origin
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId

WAIT_S = 60.0
ROW_BYTES = 64 << 10
FIRST = SnapshotId(1, 1)


def _left_behind(world, *epochs: int) -> SnapshotId:
    """A keeper opened epochs (all but the first while the store was away), staged a pair and died;
    the pair."""
    uploads = world.uploads()
    world.opened(uploads, None)
    world.save(uploads, FIRST)
    world.store.down = True
    for _ in epochs:
        world.opened(uploads, FIRST)
    pair = world.stage_all(SnapshotId(uploads.epoch, 9))
    uploads.close(WAIT_S)
    world.store.down = False
    world.events.clear()
    return pair


def test_choices_and_first_epoch_wait_for_the_store_while_slots_hold_something(make_world) -> None:
    world = make_world()
    pair = _left_behind(world)
    world.store.down = True
    again = world.uploads()
    choices = again.choices([pair], {pair: world.origins[1]})
    world.until(lambda: world.alarms("choices-wait"))
    assert not choices.done()
    assert not again.idle
    world.store.down = False
    assert world.result(choices) == (Choice(pair, "staged"), Choice(FIRST, "durable"))
    world.store.down = True
    opened = again.open_epoch(pair)
    behind = again.open_epoch(pair)
    world.until(lambda: world.alarms("open-waits"))
    assert not opened.done()
    assert not again.idle
    world.store.down = False
    assert (world.result(opened), world.result(behind)) == (2, 3)
    world.until(lambda: again.idle)
    assert len(world.alarms("choices-wait")) == len(set(world.alarms("choices-wait")))
    again.close(WAIT_S)


def test_first_epoch_whose_reply_is_lost_is_opened_once(make_world) -> None:
    world = make_world()
    pair = _left_behind(world)
    again = world.uploads()
    world.result(again.choices([pair], {pair: world.origins[1]}))
    world.store.lost_reply = "log/"
    opened = again.open_epoch(pair)
    world.until(lambda: world.alarms("open-waits"))
    world.store.down = False
    assert world.result(opened) == 2
    assert [one.epoch for one in world.state().opens] == [1, 2]
    again.close(WAIT_S)


@pytest.mark.parametrize("epochs", [(), (2,), (2, 3)])
def test_settling_opens_an_epoch_where_nobody_else_went_on(
    make_world, epochs: tuple[int, ...]
) -> None:
    world = make_world()
    pair = _left_behind(world, *epochs)
    world.store.down = True
    again = world.uploads()
    again.flush_newest([pair], world.sealed_of)
    world.until(lambda: world.alarms("settle-waits"))
    assert not again.idle
    world.store.down = False
    world.until(lambda: again.idle)
    assert world.state().newest() == pair
    assert world.readable(pair)
    assert not world.alarms("settle-failed")
    again.close(WAIT_S)


@pytest.mark.parametrize("epochs", [(), (2,), (2, 3)])
def test_settling_leaves_the_job_to_whoever_went_on_with_it(
    make_world, epochs: tuple[int, ...]
) -> None:
    world = make_world()
    pair = _left_behind(world, *epochs)
    assert Journal.open(FileBackend(world.root)).open_epoch(resume=FIRST) == 2
    before = world.state()
    again = world.uploads()
    again.flush_newest([pair, FIRST], world.sealed_of)
    world.until(lambda: again.idle)
    world.until(lambda: world.alarms("settle-failed"))
    assert world.state() == before
    assert world.pinned() == 0
    assert world.sealed_of(0, pair).index.snapshot == pair, "it is kept"
    again.close(WAIT_S)


def test_epoch_to_settle_is_not_opened_over_one_that_came_in_between(make_world) -> None:
    world = make_world()
    pair = _left_behind(world)
    log = StoreLog(lambda: world.store, job="job", named=True, emit=world.events.append)
    opening = FirstOpen(pair, {pair: world.origins[1]}, True, new_origin())
    Journal.open(FileBackend(world.root)).open_epoch(resume=FIRST)
    with pytest.raises(ConflictError):
        log.begin(opening)
    assert [one.epoch for one in world.state().opens] == [1, 2]


def test_epoch_to_settle_yields_to_one_that_is_written_at_the_same_moment(make_world) -> None:
    world = make_world()
    pair = _left_behind(world)
    theirs = Journal.open(FileBackend(world.root))
    put = world.store.put

    def put_second(key, data, **how) -> None:
        if key.startswith("log/") and theirs.refresh().epoch == 1:
            theirs.open_epoch(resume=FIRST)
        put(key, data, **how)

    world.store.put = put_second
    again = world.uploads()
    again.flush_newest([pair], world.sealed_of)
    world.until(lambda: again.idle)
    world.until(lambda: world.alarms("settle-failed"))
    assert [(one.epoch, one.resume) for one in world.state().opens] == [(1, None), (2, FIRST)]
    again.close(WAIT_S)


def test_number_that_two_keepers_gave_out_counts_for_who_recorded_it(make_world) -> None:
    world = make_world()
    pair = _left_behind(world, 2)
    theirs = world.uploads(open_store=lambda: FileBackend(world.root))
    assert world.result(theirs.open_epoch(FIRST)) == pair.epoch
    world.save(theirs, SnapshotId(2, 3), ())
    again = world.uploads()
    mine = {pair: world.origins[2]}
    durable = (Choice(SnapshotId(2, 3), "durable"), Choice(FIRST, "durable"))
    assert world.result(again.choices([pair], mine)) == durable
    with pytest.raises(ConflictError):
        world.result(again.open_epoch(pair))
    assert world.result(again.open_epoch(SnapshotId(2, 3))) == 3
    again.close(WAIT_S)
    theirs.close(WAIT_S)


def test_epochs_given_out_after_a_lost_number_are_lost_too(make_world) -> None:
    world = make_world()
    pair = _left_behind(world, 2, 3)
    theirs = world.uploads(open_store=lambda: FileBackend(world.root))
    assert world.result(theirs.open_epoch(FIRST)) == 2
    again = world.uploads()
    assert world.result(again.choices([pair], {pair: world.origins[3]})) == (
        Choice(FIRST, "durable"),
    )
    again.close(WAIT_S)
    theirs.close(WAIT_S)


def test_keeper_that_lives_on_gives_up_what_it_gave_out_and_others_took(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    world.save(uploads, FIRST)
    world.store.down = True
    world.opened(uploads, FIRST)
    pair = world.stage_all(SnapshotId(world.opened(uploads, FIRST), 9))
    assert Journal.open(FileBackend(world.root)).open_epoch(resume=FIRST) == 2
    uploads.new_launch()
    world.store.down = False
    assert world.result(uploads.choices([pair], {pair: world.origins[3]})) == (
        Choice(FIRST, "durable"),
    )
    assert world.result(uploads.open_epoch(FIRST)) == 3
    assert uploads.origin_of(3) != world.origins[3]
    uploads.close(WAIT_S)


def test_records_written_late_carry_the_ids_that_were_given_out(make_world) -> None:
    world = make_world()
    pair = _left_behind(world, 2, 3)
    again = world.uploads()
    origins = {pair: world.origins[3]}
    assert world.result(again.choices([pair], origins))[0] == Choice(pair, "staged")
    assert world.result(again.open_epoch(pair)) == 4
    state = world.state()
    assert {one.epoch: state.write_id_at(one.seq) for one in state.opens} == {
        1: world.origins[1],
        3: world.origins[3],
        4: again.origin_of(4),
    }
    assert len({launch_prefix(origin) for origin in world.origins.values()}) == 1
    assert launch_prefix(again.origin_of(4)) != launch_prefix(world.origins[1])
    again.close(WAIT_S)


@pytest.mark.slow
def test_ids_of_old_records_are_read(make_world, monkeypatch) -> None:
    monkeypatch.setattr("ckpt.log.fold.RECENT_MAX", 2)
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    for step in range(1, 5):
        world.save(uploads, SnapshotId(1, step))
    pair = world.stage_all(SnapshotId(1, 9))
    uploads.close(WAIT_S)
    for origin, count in ((world.origins[1], 1), (new_origin(), 0)):
        again = world.uploads()
        found = world.result(again.choices([pair], {pair: origin}))
        assert [choice.tier for choice in found].count("staged") == count
        again.close(WAIT_S)


def _damage(world, pair: SnapshotId) -> None:
    sealed = world.sealed_of(0, pair)
    sealed.data[3 * ROW_BYTES] ^= (
        1  # of the leaf that changes: what is in the store already is not read again
    )
    sealed.free()


def test_pair_that_is_damaged_gives_way_to_the_one_before_it(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    world.save(uploads, FIRST)
    older, newest = world.stage_all(SnapshotId(1, 2)), world.stage_all(SnapshotId(1, 3))
    _damage(world, newest)
    uploads.flush_newest([newest, older, FIRST], world.sealed_of)
    world.until(lambda: uploads.idle)
    assert world.state().newest() == older
    assert world.readable(older)
    assert len(world.alarms("settle-failed")) == 1
    uploads.close(WAIT_S)


def test_nothing_older_than_what_is_durable_is_settled(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    older = world.stage_all(SnapshotId(1, 1))
    world.save(uploads, SnapshotId(1, 2))
    newest = world.stage_all(SnapshotId(1, 3))
    _damage(world, newest)
    uploads.flush_newest([newest, older], world.sealed_of)
    world.until(lambda: uploads.idle)
    assert [entry.snapshot for entry in world.state().snapshots] == [SnapshotId(1, 2)]
    uploads.close(WAIT_S)


def test_end_with_something_unsettled_is_told(make_world) -> None:
    world = make_world()
    pair = _left_behind(world)
    world.store.down = True
    again = world.uploads()
    again.flush_newest([pair], world.sealed_of)
    world.until(lambda: world.alarms("settle-waits"))
    again.close(WAIT_S)
    assert [str(pair) in text for text in world.alarms("dropped")] == [True], (
        "at once: the loop turns no more"
    )
    quiet = world.uploads()
    quiet.close(WAIT_S)
    assert len(world.alarms("dropped")) == 1


@pytest.mark.parametrize("again", [False, True], ids=["first choice", "after a wait"])
def test_choice_that_a_paused_keeper_overtakes_is_made_anew(make_world, again: bool) -> None:
    world = make_world()
    paused = world.uploads()
    world.opened(paused, None)
    world.save(paused, FIRST)
    pair, newest = SnapshotId(1, 2), SnapshotId(1, 5)
    world.stage_all(pair)
    successor = world.uploads()
    held = {pair: world.origins[1]}
    assert world.result(successor.choices([pair], held))[0] == Choice(pair, "staged")
    world.told.clear()
    world.save(paused, newest)  # what it had begun before it was paused
    if again:
        world.store.down = True
    opened = successor.open_epoch(pair, newest=True)
    if again:
        world.until(lambda: world.alarms("open-waits"))
        world.store.down = False
    with pytest.raises(NewerSnapshotError):
        world.result(opened)
    assert world.state().epoch == 1
    assert world.result(successor.choices([pair], held))[0] == Choice(newest, "durable")
    assert world.result(successor.open_epoch(newest, newest=True)) == 2
    world.told.clear()
    assert world.codes(world.save(paused, SnapshotId(1, 6))) == ["fenced"] * 2
    assert world.state().newest() == newest
    for one in (paused, successor):
        one.close(WAIT_S)


def test_what_an_era_left_on_its_way_is_committed_under_no_later_epoch(make_world) -> None:
    world = make_world()
    uploads = world.uploads()
    world.opened(uploads, None)
    world.store.held = "parts/"
    for rank in range(2):
        uploads.persist(rank, world.stage(rank, FIRST), ())
    assert world.store.waits.wait(WAIT_S)
    uploads.new_generation(root=True)
    world.result(uploads.choices([]))
    world.opened(uploads, None)
    world.store.held = ""
    world.store.go_on.set()
    world.until(lambda: len(world.told) == 2)
    assert world.codes(sorted(world.told)) == ["unavailable"] * 2
    assert world.state().snapshots == ()
    world.told.clear()
    world.save(uploads, SnapshotId(2, 1))
    assert world.readable(SnapshotId(2, 1))
    uploads.close(WAIT_S)
