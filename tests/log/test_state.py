"""A state's lookups: handed on from fold to fold, never shared with what a later fold changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import pytest

from ckpt.format.records import Body, Commit, Drop, Open, Record, make_record
from ckpt.log.fold import empty, fold, void_if_appended
from ckpt.log.state import LogIndex, LogState
from ckpt.log.stored_fold import decode_fold, encode_fold
from ckpt.values import MembershipEpoch, SnapshotId

A = "a" * 32
Key = TypeVar("Key")
Value = TypeVar("Value")


def pair(epoch: int, step: int) -> SnapshotId:
    return SnapshotId(epoch, step)


def commit(epoch: int, step: int) -> tuple[int, Body]:
    return epoch, Commit(pair(epoch, step), A, None)


def more(state: LogState, *entries: tuple[int, Body]) -> list[Record]:
    """The records that follow ``state``, with these writers' epochs and bodies."""
    records: list[Record] = []
    for epoch, body in entries:
        seq = state.next_seq + len(records)
        prev = records[-1].digest if records else state.head_digest
        records.append(
            make_record(body, job="run-a", seq=seq, epoch=epoch, write_id=f"w{seq}", prev=prev)
        )
    return records


def after(state: LogState, *entries: tuple[int, Body]) -> LogState:
    return fold(state, more(state, *entries))


OPEN1: tuple[int, Body] = (1, Open(1, None))


def state() -> LogState:
    return after(empty("run-a"), OPEN1, commit(1, 10), commit(1, 20))


def answers(found: LogState) -> object:
    """What the lookups say."""
    pairs = [pair(1, step) for step in (10, 20, 30)]
    index = found.index
    return found.newest(), [found.find(one) for one in pairs], dict(index.opens), str(index.steps)


@pytest.mark.parametrize(
    "later",
    [commit(1, 30), (0, Drop((pair(1, 10),), None)), (2, Open(2, pair(1, 10)))],
    ids=["commit", "drop", "open"],
)
def test_a_later_fold_changes_nothing_that_an_earlier_state_answers(
    later: tuple[int, Body],
) -> None:
    before = state()
    said = answers(before)
    changed = after(before, later)
    assert changed != before and answers(changed) != said
    assert answers(before) == said == answers(state())


def test_lookups_are_made_once_and_handed_on_by_each_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making them is O(snapshots), which no later record should cost."""
    made: list[LogIndex] = []
    build = LogIndex.build

    def counted(*of: object) -> LogIndex:
        made.append(build(*of))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(LogIndex, "build", counted)
    found = state()
    assert len(made) == 1, "of the state before the first record"
    for entries in (
        [commit(1, 30)],
        [commit(1, 30)],  # void: taken already
        [(2, Open(2, pair(1, 10))), commit(1, 30), commit(2, 11)],
        [(0, Drop((pair(1, 10),), None))],
    ):
        found = after(found, *entries)
        assert found.newest() is not None and found.lineage
        assert void_if_appended(found, more(found, commit(1, 10))[0]) is not None
    assert len(made) == 1
    read = decode_fold(encode_fold(found))
    assert read.newest() == found.newest() and read.lineage == found.lineage
    assert after(read, commit(2, 12)).newest() == pair(2, 12)
    assert len(made) == 2, "of the state that was read"


def test_records_that_are_void_leave_lists_and_lookups_as_they_are() -> None:
    before = state()
    found = after(before, commit(1, 20), commit(1, 5))
    assert found.voids_total == 2
    assert found.snapshots is before.snapshots and found.opens is before.opens
    assert found.index is before.index


class Counted(dict[Key, Value]):
    """A dict whose copies, and theirs, are counted together."""

    def __init__(self, items: dict[Key, Value], copies: list[str], name: str) -> None:
        super().__init__(items)
        self._copies = copies
        self._name = name

    def copy(self) -> Counted[Key, Value]:
        self._copies.append(self._name)
        return Counted(self, self._copies, self._name)


def test_a_fold_copies_each_lookup_once_however_many_records_change_it() -> None:
    before, copies = state(), list[str]()
    steps = {
        epoch: Counted(of, copies, f"steps of {epoch}") for epoch, of in before.index.steps.items()
    }
    index = LogIndex(
        before.opens,
        before.snapshots,
        Counted(before.index.opens, copies, "opens"),
        Counted(before.index.snapshots, copies, "snapshots"),
        Counted(dict(steps), copies, "steps"),
    )
    before = replace(before, _index=index)
    found = after(before, *(commit(1, step) for step in range(30, 40)), (2, Open(2, None)))
    assert len(found.snapshots) == 12 and found.voids_total == 0
    assert sorted(copies) == ["opens", "snapshots", "steps", "steps of 1"]


def test_a_state_with_other_lists_has_other_lookups() -> None:
    whole, part = state(), state()
    assert whole.newest() == part.newest() == pair(1, 20)
    fewer = replace(part, snapshots=part.snapshots[:1])
    assert fewer.newest() == pair(1, 10) and fewer.find(pair(1, 20)) is None
    closed = replace(part, opens=())
    assert closed.index.opens == {} and closed.newest() is None
    renamed = replace(part, opens=(replace(part.opens[0], epoch=2),))
    assert list(renamed.index.opens) == [2]


def test_lookups_count_for_nothing_where_states_are_compared_and_shown() -> None:
    def same() -> LogState:
        return replace(state(), _index=None)

    used, unused = same(), same()
    assert used.newest() is not None
    assert used == unused and hash(used) == hash(unused)
    assert repr(used) == repr(unused) and "_index" not in repr(used)


def _epochs(*memberships: MembershipEpoch | None) -> LogState:
    entries = [
        (epoch, Open(epoch, None, membership)) for epoch, membership in enumerate(memberships, 1)
    ]
    return after(empty("run-a"), *entries)


@pytest.mark.parametrize(
    ("opened", "superseded"),
    [
        ((MembershipEpoch("a", 3), MembershipEpoch("a", 4)), [False, True, False]),
        ((MembershipEpoch("a", 3), MembershipEpoch("a", 3)), [False, False, False]),
        ((MembershipEpoch("a", 3), None), [False, False, False]),
        ((None, MembershipEpoch("a", 3)), [False, False, False]),
        ((MembershipEpoch("a", 3), MembershipEpoch("b", 4)), [False, False, False]),
        ((), [False, False, False]),
    ],
)
def test_an_epoch_is_superseded_by_a_later_membership_epoch_of_its_line(
    opened: Iterable[MembershipEpoch | None], superseded: list[bool]
) -> None:
    """Epoch 0 was never opened: what wrote in it is of no membership."""
    found = _epochs(*opened)
    assert [found.superseded_since(epoch) for epoch in (0, 1, 2)] == superseded
