"""What can be restored, compared with a naive model of the line over every small log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from ckpt.ipc.messages import Choice
from ckpt.keeper.uploads.choices import (
    best_first,
    missing_opens,
    not_needed,
    on_lineage,
    own_staged,
    restorable,
    superseded,
    with_pending,
)
from ckpt.log.state import Committed, LogState, OpenedEpoch
from ckpt.values import SnapshotId

STEPS = (0, 1)
EPOCHS = (1, 2, 3)
PAIRS = tuple(SnapshotId(epoch, step) for epoch in EPOCHS for step in STEPS)


def _log(opens: dict[int, SnapshotId | None], commits: tuple[SnapshotId, ...] = ()) -> LogState:
    return LogState(
        job="job",
        opens=tuple(
            OpenedEpoch(epoch, seq, resume)
            for seq, (epoch, resume) in enumerate(sorted(opens.items()))
        ),
        snapshots=tuple(
            Committed(pair, "", None, 100 + seq, 0) for seq, pair in enumerate(commits)
        ),
    )


def _is_on_line(opens: dict[int, SnapshotId | None], pair: SnapshotId) -> bool:
    """The line by its definition: all that the newest epoch captured, and the line of what it
    resumed up to that."""

    def within(epoch: int, last_step: int | None) -> bool:
        if epoch not in opens:
            return False
        if pair.epoch == epoch and (last_step is None or pair.step <= last_step):
            return True
        resume = opens[epoch]
        return resume is not None and within(resume.epoch, resume.step)

    return bool(opens) and within(max(opens), None)


def _histories() -> Iterator[dict[int, SnapshotId | None]]:
    """Every way in which up to three epochs can go on from one another."""
    for count in range(4):
        before = [
            [None, *(pair for pair in PAIRS if pair.epoch < epoch)] for epoch in EPOCHS[:count]
        ]
        for resumes in itertools.product(*before):
            yield dict(zip(EPOCHS, resumes, strict=False))


def _subsets() -> Iterator[tuple[SnapshotId, ...]]:
    for size in range(len(PAIRS) + 1):
        yield from itertools.combinations(PAIRS, size)


def test_choices_are_the_line_newest_first_and_staged_before_durable() -> None:
    for opens in _histories():
        for staged in _subsets():
            commits = tuple(
                pair for pair in PAIRS if pair.epoch in opens and pair not in staged[1:]
            )
            found = best_first(_log(opens, commits), staged)
            expected = [
                Choice(pair, tier)
                for pair in sorted(PAIRS, reverse=True)
                if _is_on_line(opens, pair)
                for tier, there in (("staged", staged), ("durable", commits))
                if pair in there
            ]
            assert list(found) == expected, (opens, staged, commits)


def test_what_was_given_out_counts_as_if_it_were_read() -> None:
    for opens in _histories():
        whole = _log(opens, PAIRS[: 2 * len(opens)])
        given_out = whole.opens
        for read in range(len(opens) + 1):
            commits = PAIRS[: 2 * read]
            state = with_pending(
                _log(dict(list(opens.items())[:read]), commits), given_out, PAIRS[: 2 * len(opens)]
            )
            assert (state.epoch, state.lineage) == (whole.epoch, whole.lineage)
            assert with_pending(state, given_out, PAIRS[: 2 * len(opens)]) == state


def test_fallback_to_an_older_snapshot_leaves_the_newer_ones_off_the_line() -> None:
    newest, older = SnapshotId(1, 20), SnapshotId(1, 10)
    state = _log({1: None}, (older, newest))
    assert on_lineage(state, [newest, older]) == (newest, older)
    went_on = with_pending(state, [OpenedEpoch(2, -1, older)])
    assert on_lineage(went_on, [newest, older, SnapshotId(2, 11)]) == (SnapshotId(2, 11), older)
    assert best_first(went_on, [newest]) == (Choice(older, "durable"),)


def test_staged_pair_that_was_never_committed_may_be_resumed_and_stays_on_the_line() -> None:
    staged = SnapshotId(1, 15)
    state = with_pending(
        _log({1: None}, (SnapshotId(1, 10),)),
        [OpenedEpoch(2, -1, staged), OpenedEpoch(3, -1, SnapshotId(2, 16))],
    )
    assert best_first(state, [staged, SnapshotId(1, 16)])[0] == Choice(staged, "staged")


def test_epochs_without_record_are_taken_to_follow_the_newest_pair_below() -> None:
    state = _log({1: None}, (SnapshotId(1, 10),))
    staged = [SnapshotId(2, 30), SnapshotId(4, 50), SnapshotId(1, 12)]
    assert [(one.epoch, one.resume) for one in missing_opens(state, staged)] == [
        (2, SnapshotId(1, 12)),
        (4, SnapshotId(2, 30)),
    ]
    assert missing_opens(state, [SnapshotId(1, 12)]) == ()
    assert [(one.epoch, one.resume) for one in missing_opens(_log({}), [SnapshotId(2, 30)])] == [
        (2, None)
    ]


@given(
    staged=st.sets(st.builds(SnapshotId, st.integers(1, 6), st.integers(0, 5)), max_size=6),
    read=st.integers(0, 3),
    commits=st.integers(0, 6),
)
def test_assumed_opens_put_the_newest_staged_pair_first(
    staged: set[SnapshotId], read: int, commits: int
) -> None:
    opens = {epoch: SnapshotId(epoch - 1, 1) if epoch > 1 else None for epoch in EPOCHS[:read]}
    state = _log(opens, PAIRS[: min(commits, 2 * read)])
    missing = missing_opens(state, staged)
    known = set(opens)
    for opened in missing:
        assert opened.epoch > max(known, default=0), (
            "each record counts where the one before is written"
        )
        assert opened.resume is None or opened.resume.epoch in known
        known.add(opened.epoch)
    beyond = [pair for pair in staged if pair.epoch > read]
    found = best_first(with_pending(state, missing), staged)
    if beyond:
        assert found[0] == Choice(max(beyond), "staged")
    assert {choice.snapshot for choice in found if choice.tier == "durable"} == set(state.lineage)


def test_pair_is_superseded_by_itself_and_by_later_ones_of_its_epoch() -> None:
    state = _log({1: None, 2: SnapshotId(1, 10)}, (SnapshotId(1, 10), SnapshotId(2, 12)))
    assert superseded(state, SnapshotId(1, 10))
    assert superseded(state, SnapshotId(1, 9))
    assert not superseded(state, SnapshotId(1, 11))
    assert not superseded(state, SnapshotId(2, 13))


MINE, THEIRS = "a" * 16, "b" * 16


def test_nobody_needs_what_the_line_has_a_newer_one_of() -> None:
    state = _log({1: None, 2: SnapshotId(1, 10)}, (SnapshotId(1, 10), SnapshotId(2, 12)))
    assert not_needed(state, SnapshotId(1, 11))
    assert not_needed(state, SnapshotId(2, 12))
    assert not not_needed(state, SnapshotId(2, 13))
    off = _log({1: None, 2: None}, (SnapshotId(1, 10),))
    assert not not_needed(off, SnapshotId(2, 1)), "what is durable is on no line any more"


@given(
    opened=st.lists(st.sampled_from((MINE, THEIRS)), min_size=1, max_size=5),
    given_out=st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=8),
)
def test_staged_pairs_count_by_the_record_that_opened_their_epoch(
    opened: list[str], given_out: list[tuple[int, bool]]
) -> None:
    """Of each number there may be one that the log has, and one that this node's keeper gave out
    and nobody recorded."""
    ids = {epoch: f"{who}{epoch:016x}" for epoch, who in enumerate(opened, 1)}
    state = _log(dict.fromkeys(ids))
    for epoch, recorded in given_out:
        origin = ids[epoch] if recorded and epoch in ids else f"{MINE}{100 + epoch:016x}"
        pair = SnapshotId(epoch, 7)
        expected = ids[epoch] == origin if epoch in ids else opened[-1] == MINE
        assert (pair in own_staged(state, ids, {pair: origin})) == expected
        assert (pair in restorable(state, ids, {pair: origin})) == (
            expected and epoch >= state.epoch
        )
        assert pair in own_staged(state, ids, {pair: ""}), "by its number alone"


def test_numbers_that_were_given_out_after_a_foreign_epoch_do_not_count() -> None:
    ids = {1: MINE + "1" * 16, 2: THEIRS + "2" * 16}
    state = _log({1: None, 2: SnapshotId(1, 1)})
    staged = {
        SnapshotId(1, 1): ids[1],
        SnapshotId(2, 5): MINE + "5" * 16,
        SnapshotId(3, 6): MINE + "6" * 16,
    }
    assert restorable(state, ids, staged) == (SnapshotId(1, 1),)
    assert restorable(_log({}), {}, staged) == (), (
        "nothing is ours in a log that has no open of ours"
    )
