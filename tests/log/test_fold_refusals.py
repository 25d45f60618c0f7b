"""What a record may and may not do to the log, at the edges of each rule; and what its writer is
told."""

from __future__ import annotations

import pytest

from ckpt.errors import ConflictError, FencedError, SupersededError
from ckpt.format.records import Body, Commit, Drop, Open, Record, Stores, Tag, Untag, make_record
from ckpt.log.fold import Unreadable, empty, fold, require_counted, void_error, void_if_appended
from ckpt.log.state import LogState, Void, VoidCode
from ckpt.log.stored_fold import decode_fold, encode_fold
from ckpt.values import MembershipEpoch, SnapshotId

A, B = "a" * 32, "b" * 32


def pair(epoch: int, step: int) -> SnapshotId:
    return SnapshotId(epoch, step)


def commit(epoch: int, step: int) -> Commit:
    return Commit(pair(epoch, step), A, None)


def folded(*entries: tuple[int, Body]) -> LogState:
    """The fold of a log with these writers' epochs and bodies."""
    records: list[Record] = []
    for seq, (epoch, body) in enumerate(entries):
        prev = records[-1].digest if records else ""
        records.append(
            make_record(body, job="run-a", seq=seq, epoch=epoch, write_id=f"w{seq}", prev=prev)
        )
    return fold(empty("run-a"), records)


def codes(state: LogState) -> list[tuple[int, str]]:
    return [(void.seq, void.code) for void in state.voids]


TWO_EPOCHS: tuple[tuple[int, Body], ...] = (
    (1, Open(1, None)),
    (1, commit(1, 5)),
    (2, Open(2, pair(1, 9))),
    (2, commit(2, 10)),
)
"""Epoch 1 may still commit what it captured up to step 9; 2/10 is the newest."""


def test_a_tag_that_was_taken_off_keeps_nothing_and_can_be_taken_off_once() -> None:
    state = folded(
        *TWO_EPOCHS,
        (2, Tag("x", pair(1, 5))),
        (2, Untag("x")),
        (0, Drop((pair(1, 5),), None)),
        (2, Untag("x")),
    )
    assert state.tags == {} and state.lineage == (pair(2, 10),)
    assert codes(state) == [(7, "no-such-tag")]


def test_a_floor_only_ever_rises_and_stays_where_a_drop_names_none() -> None:
    lower = folded(*TWO_EPOCHS, (0, Drop((), pair(2, 3))), (0, Drop((pair(1, 5),), pair(1, 7))))
    assert lower.floor == pair(2, 3) and not lower.voids
    higher = folded(*TWO_EPOCHS, (0, Drop((), pair(1, 7))), (0, Drop((), pair(2, 3))))
    assert higher.floor == pair(2, 3) and not higher.voids
    without = folded(*TWO_EPOCHS, (0, Drop((), pair(1, 7))), (0, Drop((pair(1, 5),), None)))
    assert without.floor == pair(1, 7) and not without.voids
    same = folded(*TWO_EPOCHS, (0, Drop((), pair(1, 7))), (0, Drop((), pair(1, 7))))
    assert codes(same) == [(5, "nothing-to-drop")]


@pytest.mark.parametrize(("step", "counts"), [(6, False), (7, True), (8, True)])
def test_what_was_captured_at_the_floor_may_still_be_committed(step: int, counts: bool) -> None:
    state = folded(*TWO_EPOCHS, (0, Drop((), pair(1, 7))), (2, commit(1, step)))
    assert (state.find(pair(1, step)) is not None) == counts
    assert codes(state) == ([] if counts else [(5, "below-floor")])


def test_a_floor_may_be_as_high_as_the_newest_and_no_higher() -> None:
    assert not folded(*TWO_EPOCHS, (0, Drop((), pair(2, 10)))).voids
    assert codes(folded(*TWO_EPOCHS, (0, Drop((), pair(2, 11))))) == [(4, "floor-too-high")]


def test_a_dropped_snapshot_never_comes_back() -> None:
    state = folded(
        *TWO_EPOCHS, (0, Drop((pair(1, 5),), None)), (2, commit(1, 5)), (2, commit(1, 6))
    )
    assert codes(state) == [(5, "step-not-newer")]
    assert state.lineage == (pair(2, 10), pair(1, 6))


def test_stores_are_fixed_by_whoever_may_train_and_by_nobody_else() -> None:
    two, three = Stores((A,), 1), Stores((A, B), 2)
    state = folded(*TWO_EPOCHS, (2, two), (1, three))
    assert state.stores is not None and state.stores.ids == (A,)
    assert codes(state) == [(5, "fenced")]
    after = folded(*TWO_EPOCHS, (2, two), (3, three))
    assert after.stores is not None and after.stores.ids == (A, B) and not after.voids


def test_a_record_at_the_place_of_another_is_missing_also_where_it_is_unreadable() -> None:
    state = fold(folded(*TWO_EPOCHS), [Unreadable(7, "rot")])
    assert state.hole is not None and (state.hole.seq, state.next_seq) == (4, 4)
    assert state.hole.reason == "record is missing. next_found=7"
    here = fold(folded(*TWO_EPOCHS), [Unreadable(4, "rot")])
    assert here.hole is not None and (here.hole.seq, here.hole.reason) == (4, "rot")


def test_a_verdict_on_a_record_that_counts_is_none() -> None:
    state = folded(*TWO_EPOCHS)
    good = make_record(
        commit(2, 11), job="run-a", seq=4, epoch=2, write_id="x", prev=state.head_digest
    )
    assert void_if_appended(state, good) is None


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        ("fenced", FencedError, "stop this writer"),
        ("base-gone", ConflictError, "without that base"),
        ("newest-kept", ConflictError, "leave it out"),
        ("tag-kept", ConflictError, "leave it out"),
        ("pair-taken", ConflictError, "code=pair-taken"),
        ("epoch-not-new", ConflictError, "code=epoch-not-new"),
    ],
)
def test_who_wrote_a_void_record_is_told_what_to_do(
    code: VoidCode, kind: type[ConflictError], says: str
) -> None:
    error = void_error(Void(3, code, "the reason."))
    assert type(error) is kind and str(error).startswith("the reason.") and says in str(error)


def test_only_the_writer_of_a_void_record_is_told() -> None:
    state = folded(*TWO_EPOCHS, (1, commit(1, 6)), (2, commit(2, 11)))
    with pytest.raises(FencedError, match="a newer epoch is open"):
        require_counted(state, 4)
    require_counted(state, 3)
    require_counted(state, 5)


def _open_by(epoch: int, line: str, number: int) -> tuple[int, Body]:
    return epoch, Open(epoch, None, MembershipEpoch(line, number))


def test_an_open_of_a_membership_epoch_below_one_already_seen_is_void_and_fences_nobody() -> None:
    state = folded(
        _open_by(1, "a", 5),
        _open_by(2, "a", 6),
        _open_by(3, "a", 5),  # paused right before its open, or waiting for the store
        (2, commit(2, 1)),
    )
    assert codes(state) == [(2, "superseded")]
    assert (state.epoch, state.newest()) == (2, pair(2, 1))
    with pytest.raises(SupersededError):
        require_counted(state, 2)


def test_membership_epochs_are_compared_within_one_line_only() -> None:
    state = folded(
        _open_by(1, "a", 5),
        _open_by(2, "a", 5),  # the next attempt's first try, by the same node
        _open_by(3, "b", 1),  # the membership lost its data, or it is another job's
        (4, Open(4, None)),  # one node alone
        _open_by(5, "b", 2),
    )
    assert (codes(state), state.epoch) == ([], 5)
    assert codes(folded(_open_by(1, "a", 5), (2, Open(2, None)), _open_by(3, "a", 4))) == [
        (2, "superseded")
    ]


def test_an_old_membership_epoch_opens_nothing_though_another_line_opened_in_between() -> None:
    state = folded(
        _open_by(1, "a", 3),
        _open_by(2, "a", 5),
        _open_by(3, "b", 1),
    )
    state = decode_fold(encode_fold(state))  # readers may start here
    late = make_record(
        _open_by(4, "a", 4)[1],
        job="run-a",
        seq=3,
        epoch=4,
        write_id="late",
        prev=state.head_digest,
    )
    state = fold(state, [late])
    assert codes(state) == [(3, "superseded")]
    assert state.epoch == 3, "the writer of the other line goes on"


@pytest.mark.parametrize(("line", "code"), [("a", "superseded"), ("b", "fenced")])
def test_commit_of_a_writer_that_its_own_job_replaced_is_no_fence(line: str, code: str) -> None:
    state = folded(_open_by(1, "a", 5), _open_by(2, line, 6), (1, commit(1, 1)))
    assert codes(state) == [(2, code)]
    assert state.superseded_since(1) == (code == "superseded")
    error = void_error(state.voids[0])
    assert isinstance(error, SupersededError if code == "superseded" else FencedError)
    assert isinstance(error, FencedError) == (code == "fenced")
