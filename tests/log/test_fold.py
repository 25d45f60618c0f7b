from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import FormatVersionError, IntegrityError
from ckpt.format.records import Body, Commit, Drop, Open, Record, Stores, Tag, Untag, make_record
from ckpt.log import fold as working
from ckpt.log.fold import Unreadable, empty, fold, void_if_appended
from ckpt.log.state import LogState
from ckpt.log.stored_fold import decode_fold, encode_fold, fold_due
from ckpt.values import SnapshotId

A, B = "a" * 32, "b" * 32


def pair(epoch: int, step: int) -> SnapshotId:
    return SnapshotId(epoch, step)


def chain(
    bodies: Sequence[tuple[int, Body] | tuple[int, Body, str]], *, job: str = "run-a"
) -> list[Record]:
    records: list[Record] = []
    for seq, (epoch, body, *write_id) in enumerate(bodies):
        prev = records[-1].digest if records else ""
        name = write_id[0] if write_id else f"w{seq}"
        records.append(make_record(body, job=job, seq=seq, epoch=epoch, write_id=name, prev=prev))
    return records


def folded(*bodies: tuple[int, Body] | tuple[int, Body, str]) -> LogState:
    return fold(empty("run-a"), chain(bodies))


def commit(epoch: int, step: int, *, base: SnapshotId | None = None, digest: str = A) -> Commit:
    return Commit(pair(epoch, step), digest, base)


def codes(state: LogState) -> list[tuple[int, str]]:
    return [(void.seq, void.code) for void in state.voids]


OPEN1: tuple[int, Body] = (1, Open(1, None))


def test_newest_is_the_greatest_pair_on_the_line_of_the_newest_epoch() -> None:
    state = folded(
        OPEN1,
        (1, commit(1, 10)),
        (1, commit(1, 20)),
        (2, Open(2, pair(1, 10))),
        (2, commit(2, 11)),
        (3, Open(3, pair(1, 10))),
    )
    assert state.newest() == pair(1, 10), "1/20 and 2/11 lie beyond what was resumed"
    assert [entry.snapshot for entry in state.snapshots] == [pair(1, 10), pair(1, 20), pair(2, 11)]
    assert state.lineage_from(pair(2, 11)) == (pair(2, 11), pair(1, 10))


def test_an_older_capture_becomes_durable_under_the_epoch_that_is_open() -> None:
    state = folded(OPEN1, (2, Open(2, pair(1, 10))), (2, commit(1, 10)), (2, commit(1, 12)))
    assert state.newest() == pair(1, 10) and len(state.snapshots) == 2
    entry = state.find(pair(1, 10))
    assert entry is not None and entry.writer_epoch == 2
    later = state.find(pair(1, 12))
    assert later is not None and (later.seq, later.writer_epoch) == (3, 2)


def test_a_resumed_pair_that_was_never_committed_leaves_the_line_below_it() -> None:
    state = folded(OPEN1, (1, commit(1, 10)), (2, Open(2, pair(1, 15))), (2, commit(1, 14)))
    assert state.lineage == (pair(1, 14), pair(1, 10))


@pytest.mark.parametrize(
    ("bodies", "code"),
    [
        ([(1, Open(2, None))], "epoch-not-new"),
        ([(1, Open(1, None))], "epoch-not-new"),
        ([(2, Open(2, pair(7, 1)))], "resume-unknown"),
        ([(2, Open(2, pair(2, 1)))], "resume-unknown"),
        ([(2, Open(2, None)), (1, commit(1, 10))], "fenced"),
        ([(2, commit(1, 10))], "epoch-not-open"),
        ([(1, commit(2, 10))], "captured-epoch-unknown"),
        ([(1, commit(1, 10)), (1, commit(1, 10, digest=B))], "pair-taken"),
        ([(1, commit(1, 10)), (1, commit(1, 10))], "repeat"),
        ([(1, commit(1, 10)), (1, commit(1, 9))], "step-not-newer"),
        ([(1, commit(1, 10)), (1, Untag("x"))], "no-such-tag"),
        ([(1, Tag("x", pair(1, 10)))], "not-committed"),
        ([(1, commit(1, 10, base=pair(1, 9)))], "base-gone"),
        ([(1, commit(1, 10)), (0, Drop((pair(1, 10),), None))], "newest-kept"),
        (
            [
                (1, commit(1, 1)),
                (1, Tag("x", pair(1, 1))),
                (1, commit(1, 2)),
                (0, Drop((pair(1, 1),), None)),
            ],
            "tag-kept",
        ),
        ([(1, commit(1, 1)), (0, Drop((pair(1, 9),), None))], "nothing-to-drop"),
        ([(1, commit(1, 1)), (0, Drop((), pair(1, 2)))], "floor-too-high"),
        ([(0, Drop((), pair(1, 2)))], "floor-too-high"),
        (
            [(1, commit(1, 5)), (0, Drop((), pair(1, 5))), (0, Drop((), pair(1, 4)))],
            "nothing-to-drop",
        ),
        ([(1, commit(1, 10)), (2, Open(2, None)), (0, Drop((pair(1, 10),), None))], "newest-kept"),
    ],
)
def test_a_record_that_may_not_count_is_void_and_says_why(
    bodies: list[tuple[int, Body]], code: str
) -> None:
    records = chain([OPEN1, *bodies])
    before = fold(empty("run-a"), records[:-1])
    after = fold(before, records[-1:])
    assert codes(after)[-1:] == [(len(bodies), code)]
    assert after.voids[-1].reason and after.voids_total == before.voids_total + 1
    assert void_if_appended(before, records[-1]) == after.voids[-1]
    assert (after.snapshots, after.opens, after.tagged) == (
        before.snapshots,
        before.opens,
        before.tagged,
    )


def test_a_commit_whose_base_is_dropped_before_it_is_void_and_dropping_it_after_is_fine() -> None:
    before = folded(
        OPEN1,
        (1, commit(1, 1)),
        (1, commit(1, 2)),
        (0, Drop((pair(1, 1),), None)),
        (1, commit(1, 3, base=pair(1, 1))),
    )
    assert codes(before) == [(4, "base-gone")]
    after = folded(
        OPEN1, (1, commit(1, 1)), (1, commit(1, 2, base=pair(1, 1))), (0, Drop((pair(1, 1),), None))
    )
    assert after.lineage == (pair(1, 2),) and not after.voids


def test_a_commit_below_the_floor_is_void() -> None:
    state = folded(
        OPEN1,
        (2, Open(2, pair(1, 9))),
        (2, commit(2, 10)),
        (0, Drop((), pair(2, 10))),
        (2, commit(1, 8)),
    )
    assert codes(state) == [(4, "below-floor")]


def test_a_drop_of_some_that_are_gone_already_counts_for_the_rest() -> None:
    state = folded(
        OPEN1,
        (1, commit(1, 1)),
        (1, commit(1, 2)),
        (1, commit(1, 3)),
        (0, Drop((pair(1, 1),), None)),
        (0, Drop((pair(1, 1), pair(1, 2)), None)),
    )
    assert state.lineage == (pair(1, 3),) and not state.voids


def test_a_tag_moves_and_lets_go_of_what_it_kept() -> None:
    state = folded(
        OPEN1,
        (1, commit(1, 1)),
        (1, Tag("x", pair(1, 1))),
        (1, commit(1, 2)),
        (1, Tag("x", pair(1, 2))),
        (0, Drop((pair(1, 1),), None)),
    )
    assert state.tags == {"x": pair(1, 2)} and not state.voids


def test_a_stores_record_is_remembered() -> None:
    state = folded(OPEN1, (1, Stores(("0" * 32, "1" * 32, "2" * 32), 2)))
    assert state.stores is not None and state.stores.write_quorum == 2


def test_the_same_write_counts_once() -> None:
    state = folded(OPEN1, (1, commit(1, 1), "mine"), (1, commit(1, 2), "mine"), (1, commit(1, 3)))
    assert state.lineage == (pair(1, 3), pair(1, 1)) and codes(state) == [(2, "repeat")]
    assert state.seq_of("mine") == 1 and state.seq_of("other") is None


def test_a_hole_stops_the_fold_for_good() -> None:
    records = chain([OPEN1, *((1, commit(1, step)) for step in range(1, 5))])
    foreign = make_record(
        Open(2, None), job="run-b", seq=3, epoch=2, write_id="x", prev=records[2].digest
    )
    unchained = make_record(Open(2, None), job="run-a", seq=3, epoch=2, write_id="x", prev=A)
    want = fold(empty("run-a"), records[:3])
    for wrong in (records[4], Unreadable(3, "rot"), foreign, unchained, records[0]):
        state = fold(empty("run-a"), [*records[:3], wrong, records[3]])
        assert state.hole is not None and state.hole.seq == 3
        assert state.without_hole() == want
        assert fold(state, records[3:]) == state
        assert fold(state.without_hole(), records[3:]).newest() == pair(1, 4)


pairs = st.builds(SnapshotId, st.integers(1, 4), st.integers(1, 6))
bodies = st.one_of(
    st.builds(Open, st.integers(1, 5), st.none() | pairs),
    st.builds(Commit, pairs, st.sampled_from([A, B]), st.none() | pairs).filter(
        lambda c: c.base != c.snapshot
    ),
    st.builds(
        Drop,
        st.sets(pairs, min_size=1, max_size=3).map(lambda s: tuple(sorted(s))),
        st.none() | pairs,
    ),
    st.builds(Tag, st.sampled_from(["x", "y"]), pairs),
    st.builds(Untag, st.sampled_from(["x", "y"])),
    st.just(Stores((A, B), 2)),
)


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """Logs where most records count: opens mostly ascend and writers mostly use the epoch that is
    open."""
    entries: list[tuple[int, Body, str]] = []
    epoch = 0
    for n in range(draw(st.integers(0, 30))):
        body = draw(bodies)
        writer = draw(st.sampled_from([epoch, epoch, epoch, 1, 2]))
        if isinstance(body, Open) and draw(st.booleans()):
            body = Open(epoch + 1, body.resume)
        if isinstance(body, Open):
            writer = body.epoch if draw(st.integers(0, 9)) else writer
            epoch = max(epoch, body.epoch)
        entries.append((writer, body, draw(st.sampled_from([f"w{n}"] * 9 + ["again"]))))
    return chain(entries)


class Naive:
    """The fold once more, written to be obvious: everything kept, everything searched."""

    def __init__(self) -> None:
        self.log: list[tuple[int, Record]] = []
        self.voids: list[int] = []

    def opens(self) -> dict[int, SnapshotId | None]:
        return {r.body.epoch: r.body.resume for _, r in self.log if isinstance(r.body, Open)}

    def committed(self) -> list[Commit]:
        return [r.body for _, r in self.log if isinstance(r.body, Commit)]

    def dropped(self) -> set[SnapshotId]:
        gone: set[SnapshotId] = set()
        for _, r in self.log:
            if isinstance(r.body, Drop):
                gone |= set(r.body.snapshots) & {c.snapshot for c in self.committed()}
        return gone

    def live(self) -> list[SnapshotId]:
        return [c.snapshot for c in self.committed() if c.snapshot not in self.dropped()]

    def tags(self) -> dict[str, SnapshotId]:
        found: dict[str, SnapshotId] = {}
        for _, r in self.log:
            if isinstance(r.body, Tag):
                found[r.body.name] = r.body.snapshot
            if isinstance(r.body, Untag):
                del found[r.body.name]
        return found

    def floor(self) -> SnapshotId | None:
        floors = [r.body.floor for _, r in self.log if isinstance(r.body, Drop) and r.body.floor]
        return max(floors, default=None)

    def on_line(self, found: SnapshotId) -> bool:
        opens = self.opens()
        if not opens:
            return False
        epoch, limit = max(opens), 10**9
        while True:
            if found.epoch == epoch:
                return found.step <= limit
            below = opens[epoch]
            if below is None:
                return False
            epoch, limit = below.epoch, below.step

    def newest(self) -> SnapshotId | None:
        return max((found for found in self.live() if self.on_line(found)), default=None)

    def counts(self, r: Record) -> bool:
        opens = self.opens()
        highest = max(opens, default=0)
        if r.write_id in self.names:
            return False
        kept = self.newest() or max(self.live(), default=None)
        match r.body:
            case Open(epoch, resume):
                return r.epoch == epoch > highest and (resume is None or resume.epoch in opens)
            case Commit(snapshot, _, base):
                same = [
                    c.snapshot.step for c in self.committed() if c.snapshot.epoch == snapshot.epoch
                ]
                floor = self.floor()
                return (
                    r.epoch == highest
                    and snapshot.epoch in opens
                    and all(step < snapshot.step for step in same)
                    and (floor is None or snapshot >= floor)
                    and (base is None or base in self.live())
                )
            case Drop(snapshots, floor):
                old = self.floor()
                lifts = floor is not None and (old is None or floor > old)
                return (
                    not set(snapshots) & ({kept} | set(self.tags().values()))
                    and (floor is None or (kept is not None and floor <= kept))
                    and (lifts or bool(set(snapshots) & set(self.live())))
                )
            case Tag(_, snapshot):
                return snapshot in self.live()
            case Untag(name):
                return name in self.tags()
            case Stores():
                return r.epoch >= highest

    names: list[str]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Naive:
        model = cls()
        model.names = []
        for r in records:
            if model.counts(r):
                model.log.append((r.seq, r))
            else:
                model.voids.append(r.seq)
            model.names.append(r.write_id)
        return model


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(logs())
def test_the_fold_equals_a_naive_model(records: list[Record]) -> None:
    state = fold(empty("run-a"), records)
    model = Naive.of(records)
    assert state.hole is None and state.next_seq == len(records)
    assert [void.seq for void in state.voids] == model.voids
    assert [entry.snapshot for entry in state.snapshots] == model.live()
    assert {opened.epoch: opened.resume for opened in state.opens} == model.opens()
    assert state.tags == model.tags()
    assert state.floor == model.floor()
    assert state.newest() == model.newest()
    assert list(state.lineage) == sorted(filter(model.on_line, model.live()), reverse=True)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(0, 30), st.integers(1, 30))
def test_the_fold_is_incremental_also_over_holes_and_stored_folds(
    records: list[Record], cut: int, drop: int
) -> None:
    full = fold(empty("run-a"), records)
    half = fold(empty("run-a"), records[:cut])
    assert fold(half, records[cut:]) == full
    torn = [*records[:drop], *records[drop + 1 :]]
    assert fold(fold(empty("run-a"), torn[:cut]), torn[cut:]) == fold(empty("run-a"), torn)
    if full.next_seq:
        data = encode_fold(full)
        assert decode_fold(data) == full and encode_fold(decode_fold(data)) == data
        if half.next_seq:
            assert fold(decode_fold(encode_fold(half)), records[cut:]) == full


@settings(max_examples=30, deadline=None)
@given(logs().filter(bool), st.integers(1, 4))
def test_a_state_remembers_the_last_records_only(records: list[Record], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(working, "RECENT_MAX", limit)
        state = fold(empty("run-a"), records)
        cut = len(records) // 2
        assert fold(fold(empty("run-a"), records[:cut]), records[cut:]) == state
    assert state.recent == tuple(record.write_id for record in records[-limit:])
    assert len(state.voids) <= limit


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    logs().filter(bool), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3)
)
def test_a_mutated_fold_is_the_equal_state_or_an_error(
    records: list[Record], changes: list[tuple[int, int]]
) -> None:
    state = fold(empty("run-a"), records)
    data = bytearray(encode_fold(state))
    for at, byte in changes:
        data[at % len(data)] = byte
    try:
        found = decode_fold(bytes(data))
    except (IntegrityError, FormatVersionError):
        return
    assert found == state


def test_a_fold_that_contradicts_itself_is_refused_whatever_its_digest_says() -> None:
    state = folded(OPEN1, (1, commit(1, 1)), (1, commit(1, 2)), (1, Tag("x", pair(1, 2))))
    first, second = state.snapshots
    opened = state.opens[0]
    for wrong in (
        replace(state, next_seq=9),
        replace(state, head_digest=""),
        replace(state, snapshots=(second, first)),
        replace(state, snapshots=(first,)),
        replace(state, snapshots=(first, second, replace(second, snapshot=pair(7, 1)))),
        replace(state, opens=()),
        replace(state, opens=(replace(opened, epoch=-1),)),
        replace(state, opens=(replace(opened, resume=pair(1, 1)),)),
        replace(state, opens=(replace(opened, last_step=1),)),
        replace(state, opens=(replace(opened, seq=4),)),
        replace(state, voids_total=1),
        replace(state, recent=("w0",)),
        replace(state, floor=pair(-1, 0)),
        replace(state, job=""),
    ):
        with pytest.raises(IntegrityError, match="contradicts itself"):
            decode_fold(encode_fold(wrong))


def test_a_fold_is_due_every_1024_records() -> None:
    assert [seq for seq in range(200) if fold_due(seq)] == [63, 127, 191]
