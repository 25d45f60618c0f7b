"""Which pairs can never be committed again, tried against the real rules of the log; and verdicts
on objects."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.backends.base import Stat
from ckpt.format import keys
from ckpt.format.records import Body, Commit, Drop, Open, make_record
from ckpt.log.fold import empty, fold, void_if_appended
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import (
    GarbageClassifier,
    ObjectStatus,
    SnapshotReferences,
    snapshot_of,
)
from ckpt.values import SnapshotId

LONG = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WRITER = keys.writer_name("node", "0" * 16)
GRACE_S = 100.0
NOW = 1000.0


def judge(
    state: LogState,
    *,
    exist: dict[SnapshotId, SnapshotReferences] | None = None,
    dropped: tuple[SnapshotReferences, ...] = (),
    grace_s: float = GRACE_S,
) -> GarbageClassifier:
    found = [
        (exist or {}).get(entry.snapshot, SnapshotReferences(entry.snapshot))
        for entry in state.snapshots
    ]
    return GarbageClassifier(state, existing=found, dropped=dropped, grace_s=grace_s)


def after(state: LogState, body: Body, epoch: int, *, write_id: str = "") -> LogState | None:
    """The state after one more record, or None where it would not count."""
    record = make_record(
        body,
        job="job",
        seq=state.next_seq,
        epoch=epoch,
        write_id=write_id or f"w{state.next_seq}",
        prev=state.head_digest,
    )
    return fold(state, [record]) if void_if_appended(state, record) is None else None


def step(state: LogState, dice: random.Random) -> LogState:
    """Any record that an honest or a late writer may add."""
    held = [entry.snapshot for entry in state.snapshots]
    pair = SnapshotId(dice.randint(1, max(1, state.epoch)), dice.randrange(8))
    match dice.random():
        case x if x < 0.25 or not state.epoch:
            epoch = state.epoch + dice.choice(
                [1, 1, 1, 2]
            )  # an epoch may be skipped: two writers may have taken it
            resume = (
                SnapshotId(dice.choice(state.opens).epoch, dice.randrange(8))
                if state.opens
                else None
            )
            body: Body = Open(epoch, dice.choice([resume, None]))
            return after(state, body, epoch) or state
        case x if x < 0.75:
            base = dice.choice([*held, None])
            body = Commit(pair, f"{dice.randrange(3):032x}", None if base == pair else base)
            return after(state, body, dice.choice([state.epoch, state.epoch, 1])) or state
        case _:
            floor = dice.choice([None, state.newest()])
            some = tuple(sorted(dice.sample(held, min(len(held), dice.randrange(3)))))
            return (
                after(state, Drop(some, floor), state.epoch) if some or floor else None
            ) or state


def some_state(seed: int, records: int) -> LogState:
    dice = random.Random(seed)
    state = empty("job")
    for _ in range(records):
        state = step(state, dice)
    return state


@pytest.mark.slow
@LONG
@given(st.integers(0, 2**32), st.integers(0, 25), st.integers(0, 25))
def test_pair_that_is_settled_is_never_committed_later(seed: int, before: int, later: int) -> None:
    state = some_state(seed, before)
    pairs = [
        SnapshotId(epoch, number) for epoch in range(1, state.epoch + 2) for number in range(8)
    ]
    settled = [pair for pair in pairs if judge(state).commit_impossible(pair)]
    existed = {entry.snapshot for entry in state.snapshots}
    dice = random.Random(seed + 1)
    for _ in range(later):
        state = step(state, dice)
        assert {entry.snapshot for entry in state.snapshots} & set(settled) <= existed
        assert all(judge(state).commit_impossible(pair) for pair in settled), (
            "once settled, settled for good"
        )
        for pair in settled:
            found = state.find(pair)
            if found is None:
                assert after(state, Commit(pair, "f" * 32, None), state.epoch) is None


@LONG
@given(st.integers(0, 2**32), st.integers(0, 25))
def test_pair_that_is_not_settled_can_still_be_committed(seed: int, before: int) -> None:
    state = some_state(seed, before)
    for epoch in range(1, state.epoch + 3):
        for number in range(8):
            pair = SnapshotId(epoch, number)
            if judge(state).commit_impossible(pair):
                continue
            opened: LogState | None = state
            if epoch > state.epoch:
                opened = after(state, Open(epoch, None), epoch)
            assert opened is not None
            assert after(opened, Commit(pair, "f" * 32, None), opened.epoch) is not None, (
                state,
                pair,
            )


def committed(*steps: int, floor: int | None = None, drop: tuple[int, ...] = ()) -> LogState:
    state: LogState | None = after(empty("job"), Open(1, None), 1)
    for number in steps:
        assert state is not None
        state = after(state, Commit(SnapshotId(1, number), f"{number:032x}", None), 1)
    if drop or floor is not None:
        assert state is not None
        pairs = tuple(SnapshotId(1, number) for number in drop)
        state = after(state, Drop(pairs, None if floor is None else SnapshotId(1, floor)), 1)
    assert state is not None
    return state


def stat(key: str, age_s: float = 2 * GRACE_S) -> Stat:
    return Stat(key, 1, NOW - age_s)


def part(number: int, epoch: int = 1) -> str:
    return keys.part_key(SnapshotId(epoch, number), WRITER)


def verdict_of(found: GarbageClassifier, key: str, age_s: float = 2 * GRACE_S) -> ObjectStatus:
    return found.classify(stat(key, age_s), now_unix_s=NOW)


def test_what_exists_refers_to_is_live_and_other_objects_of_its_pair_are_garbage() -> None:
    pair = SnapshotId(1, 20)
    other = keys.part_key(pair, keys.writer_name("node", "1" * 16))
    found = judge(
        committed(20), exist={pair: SnapshotReferences(pair, frozenset((part(20), part(7))))}
    )
    assert verdict_of(found, part(20)) is ObjectStatus.LIVE
    assert verdict_of(found, part(7)) is ObjectStatus.LIVE, "whatever pair it was written for"
    assert verdict_of(found, other) is ObjectStatus.GARBAGE
    assert verdict_of(found, keys.manifest_key(pair, "a" * 32)) is ObjectStatus.GARBAGE


def test_snapshot_that_may_still_be_committed_keeps_its_objects() -> None:
    found = judge(committed(20))
    assert verdict_of(found, part(10)) is ObjectStatus.GARBAGE, "steps grow"
    assert verdict_of(found, part(30)) is ObjectStatus.OPEN
    assert verdict_of(found, part(10, epoch=2)) is ObjectStatus.OPEN, "an epoch that may be opened"
    assert verdict_of(found, part(10, epoch=0)) is ObjectStatus.GARBAGE, (
        "one that can't be opened any more"
    )


def test_floor_settles_what_older_epochs_never_committed() -> None:
    state = after(committed(20), Open(2, SnapshotId(1, 25)), 2)
    assert state is not None
    assert verdict_of(judge(state), part(25)) is ObjectStatus.OPEN
    state = after(state, Commit(SnapshotId(2, 30), "b" * 32, None), 2)
    assert state is not None
    assert verdict_of(judge(state), part(25)) is ObjectStatus.OPEN, (
        "a keeper may commit what an older epoch captured"
    )
    state = after(state, Drop((), SnapshotId(2, 30)), 2)
    assert state is not None
    assert verdict_of(judge(state), part(25)) is ObjectStatus.GARBAGE


def test_dropped_within_the_grace_keeps_all_that_it_refers_to() -> None:
    gone = SnapshotId(1, 10)
    state = committed(10, 20, drop=(10,))
    found = judge(state, dropped=(SnapshotReferences(gone, frozenset((part(10), part(5)))),))
    assert verdict_of(found, part(10)) is ObjectStatus.GRACE
    assert verdict_of(found, part(5)) is ObjectStatus.GRACE
    assert verdict_of(found, keys.manifest_key(gone, "a" * 32)) is ObjectStatus.GRACE, (
        "its pair's other objects too"
    )
    assert verdict_of(judge(state), part(10)) is ObjectStatus.GARBAGE


def test_young_garbage_stays_for_the_grace() -> None:
    found = judge(committed(20))
    assert verdict_of(found, part(10), age_s=GRACE_S - 1) is ObjectStatus.YOUNG
    assert verdict_of(found, part(10), age_s=GRACE_S) is ObjectStatus.GARBAGE
    assert verdict_of(found, part(10), age_s=-5.0) is ObjectStatus.YOUNG
    assert (
        verdict_of(judge(committed(20), grace_s=0.0), part(10), age_s=-5.0) is ObjectStatus.GARBAGE
    )


@pytest.mark.parametrize("dropped", [False, True])
def test_snapshot_whose_records_cannot_be_read_holds_all_packs_and_its_own_objects(
    dropped: bool,
) -> None:
    pair = SnapshotId(1, 20)
    broken = SnapshotReferences(pair, frozenset((part(20),)), "damaged")
    gone = judge(committed(20, 30, drop=(20,)), dropped=(broken,))
    found = gone if dropped else judge(committed(20), exist={pair: broken})
    other = keys.part_key(pair, keys.writer_name("node", "1" * 16))
    assert verdict_of(found, other) is ObjectStatus.HELD
    assert verdict_of(found, part(10)) is ObjectStatus.GARBAGE, (
        "what is no pack is needed by its own pair alone"
    )


@LONG
@given(
    st.text(max_size=60)
    | st.sampled_from(
        [
            "packs/x",
            "parts/",
            "notes.txt",
            "log/00000000000000000000.json",
            "folds/00000000000000000000.json",
            "ckpt.json",
            ".probe/a",
        ]
    )
)
def test_key_that_is_not_ours_is_never_garbage(key: str) -> None:
    found = judge(committed(20), grace_s=0.0)
    if snapshot_of(key) is None:
        assert verdict_of(found, key) is ObjectStatus.FOREIGN
