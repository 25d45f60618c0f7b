"""A stored fold is believed as far as it can be checked: each number at its limits, each list in
its order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import seal
from ckpt.log import stored_fold as folds
from ckpt.log.reader import fold_seqs, prune_folds
from ckpt.log.state import RECENT_MAX, Committed, LogState, OpenedEpoch, StoreSet, TagEntry, Void
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold, encode_fold
from ckpt.values import MembershipEpoch, SnapshotId

A, B, C = "a" * 32, "b" * 32, "c" * 32
NEXT = 100


def pair(epoch: int, step: int) -> SnapshotId:
    return SnapshotId(epoch, step)


def one(
    epoch: int, step: int, seq: int, *, writer: int = 2, base: SnapshotId | None = None, by: str = A
) -> Committed:
    return Committed(pair(epoch, step), by, base, seq, writer)


OPENS = (OpenedEpoch(1, 0, None, 30), OpenedEpoch(2, 9, pair(1, 10), 0), OpenedEpoch(5, 20, None))
SNAPSHOTS = (one(1, 10, 5), one(1, 30, 6), one(2, 0, 12))
STATE = LogState(
    job="run-a",
    next_seq=NEXT,
    head_digest=A,
    opens=OPENS,
    snapshots=SNAPSHOTS,
    tagged=(TagEntry("a", pair(1, 30)), TagEntry("b", pair(1, 30))),
    floor=pair(1, 5),
    stores=StoreSet((A, B, C), 2),
    voids=(Void(3, "repeat", "x"), Void(7, "fenced", "y")),
    voids_total=2,
    recent=tuple(f"w{n}" for n in range(NEXT)),
)


def believed(state: LogState) -> bool:
    try:
        found = decode_fold(encode_fold(state))
    except IntegrityError as error:
        assert "contradicts itself" in str(error)
        return False
    assert found == state
    return True


def test_fold_keeps_membership_epochs_and_without_them_the_bytes_of_older_releases() -> None:
    assert b"membership" not in encode_fold(STATE)
    named = replace(OPENS[0], membership=MembershipEpoch("a", 3))
    state = replace(STATE, opens=(named, *OPENS[1:]))
    assert decode_fold(encode_fold(state)) == state
    broken = replace(
        STATE, opens=(replace(OPENS[0], membership=MembershipEpoch("", 3)), *OPENS[1:])
    )
    assert not believed(broken)


def test_a_fold_comes_back_as_it_was() -> None:
    assert believed(STATE)


def _opens(*opens: OpenedEpoch) -> dict[str, Any]:
    return {"opens": opens, "snapshots": (), "tagged": ()}


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        (_opens(), True),
        (_opens(OpenedEpoch(1, 0, None), OpenedEpoch(2, 1, pair(1, 0))), True),
        (_opens(OpenedEpoch(1, 0, None), OpenedEpoch(1, 1, None)), False),
        (_opens(OpenedEpoch(2, 0, None), OpenedEpoch(1, 1, None)), False),
        (_opens(OpenedEpoch(0, 0, None)), False),
        (_opens(OpenedEpoch(1, -1, None)), False),
        (_opens(OpenedEpoch(1, 5, None), OpenedEpoch(2, 5, None)), False),
        (_opens(OpenedEpoch(1, 6, None), OpenedEpoch(2, 5, None)), False),
        (_opens(OpenedEpoch(1, NEXT - 1, None)), True),
        (_opens(OpenedEpoch(1, NEXT, None)), False),
        (_opens(OpenedEpoch(keys.EPOCH_MAX, 5, None)), True),
        (_opens(OpenedEpoch(keys.EPOCH_MAX + 1, 5, None)), False),
        (_opens(OpenedEpoch(1, 0, pair(1, 3))), False),
        (_opens(OpenedEpoch(1, 0, pair(0, 3))), False),
        (_opens(OpenedEpoch(1, 0, None), OpenedEpoch(3, 1, pair(2, 0))), False),
        (_opens(OpenedEpoch(1, 0, None), OpenedEpoch(2, 1, pair(1, -1))), False),
        (_opens(OpenedEpoch(1, 0, None), OpenedEpoch(2, 1, pair(1, keys.STEP_MAX))), True),
        (_opens(OpenedEpoch(1, 0, None), OpenedEpoch(2, 1, pair(1, keys.STEP_MAX + 1))), False),
        (_opens(OpenedEpoch(1, 0, None, 0)), True),
        (_opens(OpenedEpoch(1, 0, None, -1)), False),
        (_opens(OpenedEpoch(1, 0, None, keys.STEP_MAX)), True),
        (_opens(OpenedEpoch(1, 0, None, keys.STEP_MAX + 1)), False),
    ],
)
def test_opens_ascend_within_their_limits_and_resume_what_was_opened(
    changes: dict[str, Any], fine: bool
) -> None:
    assert believed(replace(STATE, **changes)) == fine


@pytest.mark.parametrize(
    ("snapshots", "fine"),
    [
        ((), True),
        ((one(1, 0, 1, writer=1),), True),
        ((one(1, -1, 1),), False),
        ((one(1, 30, NEXT - 1),), True),
        ((one(1, 30, NEXT),), False),
        ((one(1, 30, 0),), True),
        ((one(1, 30, -1),), False),
        ((one(1, 31, 5),), False),
        ((one(3, 1, 5),), False),
        ((one(5, 0, 25),), False),  # nothing was committed of epoch 5
        ((one(1, 10, 5, writer=3),), False),
        ((one(1, 10, 5), one(1, 10, 6)), False),
        ((one(1, 10, 5), one(1, 9, 6)), False),
        ((one(1, 10, 5), one(1, 11, 5)), False),
        ((one(1, 10, 5), one(1, 11, 4)), False),
        ((one(2, 0, 12), one(1, 10, 13)), True),
        ((one(1, 10, 5), one(2, 0, 12), one(1, 9, 13)), False),
        ((one(1, 10, 5), one(2, 0, 12), one(1, 11, 13)), True),
        ((one(1, 10, 5, base=pair(1, 10)),), False),
        ((one(1, 10, 5, base=pair(1, 3)),), True),
        ((one(1, 10, 5, base=pair(1, -3)),), False),
        ((one(1, 10, 5, by="x"),), False),
    ],
)
def test_snapshots_ascend_within_what_was_opened(
    snapshots: tuple[Committed, ...], fine: bool
) -> None:
    assert believed(replace(STATE, snapshots=snapshots, tagged=())) == fine


@pytest.mark.parametrize(
    ("tagged", "fine"),
    [
        ((), True),
        ((TagEntry("b", pair(1, 30)), TagEntry("a", pair(1, 30))), False),
        ((TagEntry("a", pair(1, 30)), TagEntry("a", pair(1, 10))), False),
        ((TagEntry("a", pair(1, 30)), TagEntry("b", pair(1, 29))), False),
        ((TagEntry("a", pair(1, 29)), TagEntry("b", pair(1, 30))), False),
        ((TagEntry(" a", pair(1, 30)),), False),
    ],
)
def test_tags_are_names_in_order_and_name_what_exists(
    tagged: tuple[TagEntry, ...], fine: bool
) -> None:
    assert believed(replace(STATE, tagged=tagged)) == fine


@pytest.mark.parametrize(
    ("stores", "fine"),
    [
        (None, True),
        (StoreSet((A,), 1), True),
        (StoreSet((A,), 0), False),
        (StoreSet((A,), 2), False),
        (StoreSet((A, B), 1), False),
        (StoreSet((A, B), 2), True),
        (StoreSet((A, B, C), 3), True),
        (StoreSet((A, B, C), 4), False),
        (StoreSet((A, B, C), 1), False),
        (StoreSet((A, B, A), 2), False),
        (StoreSet((A, B, "x"), 2), False),
        (StoreSet(("x", B, A), 2), False),
        (StoreSet((A, B, C), 2, "somebody"), False),
        (StoreSet((), 0), False),
    ],
)
def test_two_quorums_of_the_stores_share_one(stores: StoreSet | None, fine: bool) -> None:
    assert believed(replace(STATE, stores=stores)) == fine


@pytest.mark.parametrize(
    ("floor", "fine"),
    [
        (None, True),
        (pair(0, 0), True),
        (pair(-1, 0), False),
        (pair(1, -1), False),
        (pair(1, keys.STEP_MAX + 1), False),
    ],
)
def test_a_floor_is_a_pair(floor: SnapshotId | None, fine: bool) -> None:
    assert believed(replace(STATE, floor=floor)) == fine


def _voids(*seqs: int, total: int | None = None) -> dict[str, Any]:
    return {
        "voids": tuple(Void(seq, "repeat", "x") for seq in seqs),
        "voids_total": len(seqs) if total is None else total,
    }


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        (_voids(), True),
        (_voids(0, NEXT - 1), True),
        (_voids(5, NEXT), False),
        (_voids(-1, 5), False),
        (_voids(5, 5), False),
        (_voids(6, 5), False),
        (_voids(5, 6, total=3), False),
        (_voids(5, 6, total=1), False),
        (_voids(total=-1), False),
        (_voids(*range(NEXT)), True),
    ],
)
def test_voids_are_counted_and_ascend(changes: dict[str, Any], fine: bool) -> None:
    assert believed(replace(STATE, **changes)) == fine


def _long(
    voids: int, total: int, *, next_seq: int = 2 * RECENT_MAX, recent: int = RECENT_MAX
) -> LogState:
    return replace(
        STATE,
        next_seq=next_seq,
        recent=tuple(f"w{n}" for n in range(recent)),
        voids_total=total,
        voids=tuple(Void(seq, "repeat", "x") for seq in range(voids)),
    )


def test_of_many_voids_and_write_ids_the_last_1024_are_kept() -> None:
    assert believed(_long(RECENT_MAX, RECENT_MAX)) and believed(_long(RECENT_MAX, RECENT_MAX + 1))
    assert not believed(_long(RECENT_MAX - 1, RECENT_MAX)) and not believed(
        _long(RECENT_MAX + 1, RECENT_MAX + 1)
    )
    assert believed(_long(RECENT_MAX, 2 * RECENT_MAX)) and not believed(
        _long(RECENT_MAX, 2 * RECENT_MAX + 1)
    )
    assert not believed(_long(0, 0, recent=RECENT_MAX - 1)) and not believed(
        _long(0, 0, recent=RECENT_MAX + 1)
    )
    assert believed(_long(0, 0, next_seq=RECENT_MAX)) and not believed(
        _long(0, 0, next_seq=RECENT_MAX - 1)
    )


@pytest.mark.parametrize(
    ("changes", "fine"), [({"job": ""}, False), ({"head_digest": "x"}, False), ({"job": "b"}, True)]
)
def test_the_job_and_the_head_are_what_they_ought_to_be(
    changes: dict[str, Any], fine: bool
) -> None:
    assert believed(replace(STATE, **changes)) == fine


@pytest.mark.parametrize(
    ("seq", "fine"), [(0, True), (-1, False), (keys.SEQ_MAX - 1, True), (keys.SEQ_MAX, False)]
)
def test_the_last_record_of_a_fold_has_a_place_and_leaves_one_for_the_next(
    seq: int, fine: bool
) -> None:
    recent = ["w"] * min(max(seq, 0) + 1, RECENT_MAX)
    wire = folds._Wire(
        format_version=1,
        job="run-a",
        seq=seq,
        head_digest=A,
        opens=[],
        snapshots=[],
        tags=[],
        floor=None,
        stores=None,
        voids=[],
        voids_total=0,
        recent=recent,
    )
    data = seal(wire, label="fold", bytes_max=FOLD_BYTES_MAX)[0]
    if fine:
        assert decode_fold(data).next_seq == seq + 1
    else:
        with pytest.raises(IntegrityError, match=f"seq out of range. seq={seq}"):
            decode_fold(data)


def test_a_fold_is_refused_above_its_size_before_it_is_parsed() -> None:
    assert FOLD_BYTES_MAX == 256 << 20, "docs/format.md names it, and other readers rely on it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "FOLD_BYTES_MAX", len(encode_fold(STATE)) - 1)
        with pytest.raises(IntegrityError, match=r"too large to be read\. what=fold"):
            decode_fold(encode_fold_unlimited(STATE))
        with pytest.raises(UsageError, match=r"too large\. what=fold"):
            encode_fold(STATE)


def encode_fold_unlimited(state: LogState) -> bytes:
    """The fold of somebody who knows no limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "FOLD_BYTES_MAX", 1 << 40)
        return encode_fold(state)


def test_newest_three_folds_stay() -> None:
    store = MemoryBackend("s")
    prune_folds(store)
    for seq in (63, 127, 191, 255, 1023):
        store.put(keys.fold_key(seq), [b"fold"])
    prune_folds(store)
    assert fold_seqs(store) == [191, 255, 1023]
    prune_folds(store)
    assert fold_seqs(store) == [191, 255, 1023]
