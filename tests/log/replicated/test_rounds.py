"""Writers that meet while a store is lost: the vote is divided, and the stores that are left decide
it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest
from kit.logs.small import Store, Watch, calm, commit, made, several, three, wipe

from ckpt.backends.checked import read_alone
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.cli.commands.log import history
from ckpt.errors import (
    CommitUnknownError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Event
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, Stores, Tag, make_record
from ckpt.log.journal import Journal
from ckpt.log.quorum import is_placeholder
from ckpt.log.replicated import ReplicatedLog
from ckpt.maintenance import store_set
from ckpt.maintenance.replica import SyncLimits
from ckpt.maintenance.scrub.scrub import scrub
from ckpt.values import SnapshotId

NEWEST = SnapshotId(1, 1)


def _ignore(_: Event) -> None:
    pass


def _begun() -> tuple[list[Store], Journal, Journal]:
    """Three stores with a snapshot, one of which is lost then; and two writers."""
    stores = three()
    first = made(stores)
    commit(first, first.open_epoch(resume=None), 1)
    second = made(stores)
    second.refresh()
    return stores, first, second


def _lose(stores: list[Store], *, wiped: bool) -> None:
    if wiped:
        wipe(stores[2])
    else:
        stores[2].up = False


def _meet(
    stores: list[Store], first: Journal, second: Journal, at: int, *, settle: bool = True
) -> bool:
    """``second`` tags at the ``at``-th operation of ``first``, which does too; whether it got there.

    The first store does not answer ``second``, so each gets another store.
    """
    met: list[str] = []

    def act() -> None:
        for store in stores:
            store.before = lambda: None
        met.append("met")
        stores[0].on_put = _refuse
        with contextlib.suppress(CommitUnknownError):
            second.tag("b", NEWEST)
        stores[0].on_put = _allow if settle else _refuse_settled

    Watch(stores, at, act)
    with contextlib.suppress(CommitUnknownError):
        first.tag("a", NEWEST)
    for store in stores:
        store.before = lambda: None
        store.on_put = _allow
    return bool(met)


def _allow(_: str) -> None:
    pass


def _refuse(key: str) -> None:
    raise UnavailableError(f"no route. key={key}")


def _every_meeting(lose: Callable[[list[Store]], None]) -> int:
    """How many meetings divided the vote; after each, both writers go on."""
    divided = 0
    at = 0
    while True:
        at += 1
        stores, first, second = _begun()
        lose(stores)
        if not _meet(stores, first, second, at):
            return divided
        divided += any(map(_is_divided, stores))
        for name, journal in (("x", first), ("y", second), ("z", made(stores))):
            journal.tag(name, NEWEST)
        tags = Journal.open(several(stores)).refresh().tags
        assert set("xyz") <= set(tags) <= set("abxyz"), f"operation {at}"


def _is_divided(store: Store) -> bool:
    """Whether the store has a vote of a later round."""
    return any(keys.parse_round_key(stat.key) for stat in store.inner.list(keys.LOG))


@pytest.mark.parametrize("wiped", [True, False], ids=["wiped", "silent"])
def test_a_vote_that_is_divided_while_a_store_is_lost_is_decided_by_the_others(
    one_by_one: None, wiped: bool
) -> None:
    assert _every_meeting(lambda stores: _lose(stores, wiped=wiped)) > 0


def test_a_store_that_is_lost_with_its_vote_is_replaced(one_by_one: None) -> None:
    """The two others hold another record each: neither was told to its writer, and what replaces
    the store is recorded behind one of them."""
    divided = 0
    for at in range(1, 60):
        stores, first, second = _begun()
        members = first.refresh().stores
        assert members is not None
        _lose(stores, wiped=True)
        # Neither writer lives to see who won.
        for store in stores[:2]:
            store.on_put = _refuse_settled
        if not _meet(stores, first, second, at, settle=False):
            break
        seq = first.refresh().next_seq
        votes = {_vote(store, seq) for store in stores[:2]}
        if None in votes or len(votes) == 1:
            continue
        divided += 1
        with closing(ReplicatedBackend(stores, write_quorum=2, emit=_ignore)) as backend:
            journal = Journal.open(backend)
            after = store_set.replace(journal, backend, stores[2], members.ids[2], emit=_ignore)
            assert members.ids[2] not in after.ids
        made(stores).tag("c", NEWEST)
        state = Journal.open(several(stores)).refresh()
        assert "c" in state.tags and not state.stale_reason, f"operation {at}"
    assert divided


def _vote(store: Store, seq: int) -> bytes | None:
    try:
        return read_alone(store.inner, keys.log_key(seq), bytes_max=RECORD_BYTES_MAX)
    except NotFoundError:
        return None


def _refuse_settled(key: str) -> None:
    if keys.parse_settled_key(key) is not None:
        raise UnavailableError(f"no route. key={key}")


def test_the_store_that_was_away_learns_what_the_others_decided(one_by_one: None) -> None:
    """It comes back with the vote that lost: readers and writers go by the later round."""
    divided = 0
    for at in range(1, 60):
        stores, first, second = _begun()
        stores[2].up = False
        if not _meet(stores, first, second, at):
            break
        if not any(map(_is_divided, stores)):
            continue
        divided += 1
        told = Journal.open(several(stores)).refresh()
        calm(stores)
        for pair in ((0, 2), (1, 2), (0, 1, 2)):
            for n, store in enumerate(stores):
                store.up = n in pair
            state = Journal.open(several(stores)).refresh()
            assert state.head_digest == told.head_digest, f"operation {at}"
        calm(stores)
        made(stores).tag("c", NEWEST)
    assert divided


def test_one_store_that_answers_decides_nothing(one_by_one: None) -> None:
    stores, first, _ = _begun()
    _lose(stores, wiped=True)
    stores[1].up = False
    with pytest.raises((CommitUnknownError, UnavailableError)):
        first.tag("a", NEWEST)


def _divided(at_most: int = 60) -> tuple[list[Store], int]:
    """Stores of which the third missed how the others decided a divided vote, and its position."""
    for at in range(1, at_most):
        stores, first, second = _begun()
        seq = first.refresh().next_seq
        lost = Tag("lost", NEWEST)
        state = first.refresh()
        dead = make_record(
            lost, job=state.job, seq=seq, epoch=1, write_id="dead", prev=state.head_digest
        )
        stores[2].inner.put(keys.log_key(seq), [dead.encode()])
        stores[2].up = False
        _meet(stores, first, second, at)
        if _is_divided(stores[0]):
            calm(stores)
            return stores, seq
    raise AssertionError("no vote was divided")


@pytest.mark.parametrize("way", ["catch-up", "scrub"])
def test_the_store_that_was_away_is_brought_what_the_others_decided(
    one_by_one: None, way: str
) -> None:
    stores, seq = _divided()
    with closing(ReplicatedBackend(stores, write_quorum=2, emit=_ignore)) as backend:
        journal = Journal.open(backend)
        right = journal.access.record_at(seq)
        assert _vote(stores[2], seq) not in (None, right)
        if way == "catch-up":
            store_set.catch_up(journal, backend, stores[2], limits=SyncLimits(), emit=_ignore)
        else:
            assert keys.settled_key(seq) in _log_problems(stores)
        settled = read_alone(stores[2].inner, keys.settled_key(seq), bytes_max=RECORD_BYTES_MAX)
        assert settled == right
        records = [entry.record for entry in history(backend, journal.refresh())]
        assert records[seq].encode() == right
    assert _log_problems(stores) == []


def _log_problems(stores: list[Store]) -> list[str]:
    """The keys of the log that a scrub finds wrong, and repairs."""
    report = scrub(stores, 2)
    assert report is not None and report.complete and report.hole is None
    return [trouble.key for trouble in report.problems if trouble.key.startswith(keys.LOG)]


@pytest.mark.parametrize(
    ("size", "once"),
    [(2, True), (3, True), (3, False)],
    ids=["two vote", "three vote", "file"],
)
@pytest.mark.parametrize("wiped", [True, False], ids=["wiped", "silent"])
def test_where_every_store_must_hold_a_record_a_lost_one_is_removed_on_a_persons_word(
    one_by_one: None, size: int, once: bool, wiped: bool
) -> None:
    stores = [Store(f"s{number}", once=once) for number in range(size)]
    journal = made(stores, size)
    commit(journal, journal.open_epoch(resume=None), 1)
    members = journal.refresh().stores
    assert members is not None
    lost_id = members.ids[-1]
    # A writer dies: its record has votes, and is told to nobody.
    state = journal.refresh()
    dead = make_record(
        Tag("dead", NEWEST),
        job=state.job,
        seq=state.next_seq,
        epoch=1,
        write_id="dead",
        prev=state.head_digest,
    )
    stores[-1].inner.put(keys.log_key(dead.seq), [dead.encode()])
    if once and size == 3:
        stores[0].inner.put(keys.log_key(dead.seq), [dead.encode()])
    if wiped:
        wipe(stores[-1])
    else:
        stores[-1].up = False
    with pytest.raises(CommitUnknownError):
        journal.tag("x", NEWEST)
    with closing(ReplicatedBackend(stores, write_quorum=size, emit=_ignore)) as backend:
        journal = Journal.open(backend)
        with pytest.raises(UnavailableError, match="--lost"):
            store_set.remove(journal, backend, [lost_id], emit=_ignore)
        after = store_set.remove(journal, backend, [lost_id], lost=True, emit=_ignore)
        assert lost_id not in after.ids and len(after.ids) == size - 1
    left = stores[:-1]
    again = Journal.open(left[0] if size == 2 else several(left))
    again.tag("y", NEWEST)
    state = again.refresh()
    assert state.newest() == NEWEST and "y" in state.tags and not state.stale_reason


def test_a_store_that_overwrites_is_not_left_with_a_log_of_its_own(one_by_one: None) -> None:
    stores = [Store(f"s{number}", once=False) for number in range(2)]
    journal = made(stores, 2)
    members = journal.refresh().stores
    assert members is not None
    with closing(ReplicatedBackend(stores, write_quorum=2, emit=_ignore)) as backend:
        with pytest.raises(UsageError, match="create a key only once"):
            gone = [members.ids[1]]
            stores[1].up = False
            store_set.remove(Journal.open(backend), backend, gone, lost=True, emit=_ignore)
        assert Journal.open(backend).refresh().stores == members


def test_all_lost_stores_are_given_up_together_or_none(one_by_one: None) -> None:
    stores = three()
    journal = made(stores, 3)
    commit(journal, journal.open_epoch(resume=None), 1)
    members = journal.refresh().stores
    assert members is not None
    stores[1].up = stores[2].up = False
    with closing(ReplicatedBackend(stores, write_quorum=3, emit=_ignore)) as backend:
        journal = Journal.open(backend)
        with pytest.raises(UnavailableError, match="all stores but the lost ones must answer"):
            store_set.remove(journal, backend, [members.ids[2]], lost=True, emit=_ignore)
        assert Journal.open(backend).refresh().stores == members
        after = store_set.remove(journal, backend, members.ids[1:], lost=True, emit=_ignore)
    assert after.ids == members.ids[:1]
    again = Journal.open(stores[0])
    again.tag("y", NEWEST)
    assert not again.refresh().stale_reason


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("lost", [True, False])
def test_where_every_store_must_hold_a_record_one_is_replaced_by_a_store_elsewhere(
    one_by_one: None, size: int, lost: bool
) -> None:
    stores = [Store(f"s{number}") for number in range(size)]
    journal = made(stores, size)
    commit(journal, journal.open_epoch(resume=None), 1)
    members = journal.refresh().stores
    assert members is not None
    stores[-1].up = not lost
    new = Store("new")
    with closing(ReplicatedBackend(stores, write_quorum=size, emit=_ignore)) as backend:
        store_set.replace(
            Journal.open(backend), backend, new, members.ids[-1], lost=lost, emit=_ignore
        )
    again = Journal.open(several([*stores[:-1], new], size))
    again.tag("y", NEWEST)
    # The store that went out is back, with the vote of a writer that knew it as a member.
    calm(stores)
    late = made([*stores[:-1], new], size)
    assert "y" in late.refresh().tags
    now = late.refresh().stores
    assert now is not None
    with (
        closing(ReplicatedBackend([*stores[:-1], new], write_quorum=size, emit=_ignore)) as backend,
        pytest.raises(UsageError, match="answers is not lost"),
    ):
        store_set.replace(
            Journal.open(backend), backend, Store("x"), now.ids[0], lost=True, emit=_ignore
        )


@pytest.mark.slow
def test_two_who_give_up_different_stores_make_one_history(one_by_one: None) -> None:
    """Each reaches only the store in the middle, and the one that the other gives up.

    If both get there, the later one did so under the set that the earlier one left.
    """
    alone = 0
    for at in range(1, 400, 2):
        stores = three()
        journal = made(stores, 3)
        commit(journal, journal.open_epoch(resume=None), 1)
        members = journal.refresh().stores
        assert members is not None
        told: list[str] = []
        ways, others = _reached(stores, away=2), _reached(stores, away=0)
        first, last = members.ids[0], members.ids[2]
        watch = Watch(ways, at, partial(_give_up, others, first, told))
        _give_up(ways, last, told)
        if watch.count < at:
            break
        alone += len(told) == 1
        state = Journal.open(several(stores, 3)).refresh()
        assert told and state.stores is not None, f"operation {at}"
        assert set(state.stores.ids) <= set(members.ids).difference(told), f"operation {at}"
        assert state.hole is None and not state.stale_reason
    assert alone


def _give_up(ways: list[Store], lost: str, told: list[str]) -> None:
    """Record a set without a store, as one does who says that it is lost; if it can be, ``told``
    has it."""
    journal = Journal.open(several(ways, 3))
    members = journal.refresh().stores
    assert members is not None and isinstance(journal.access, ReplicatedLog)
    ids = tuple(store_id for store_id in members.ids if store_id != lost)
    with (
        contextlib.suppress(CommitUnknownError, UnavailableError, ConflictError),
        journal.access.declared_lost([lost]),
    ):
        body = Stores(ids, len(ids) // 2 + 1, members.sequencer)
        journal.change_stores(body, before=members)
        told.append(lost)


def _reached(stores: list[Store], *, away: int) -> list[Store]:
    """The same stores as one sees them who cannot reach one of them."""
    ways = [Store(store.url.removeprefix("memory:"), inner=store.inner) for store in stores]
    ways[away].up = False
    return ways


def test_two_stores_that_were_declared_lost_against_each_other_are_not_read_as_one(
    one_by_one: None,
) -> None:
    stores = [Store("s0"), Store("s1")]
    journal = made(stores, 2)
    commit(journal, journal.open_epoch(resume=None), 1)
    members = journal.refresh().stores
    assert members is not None
    for number in range(2):
        ways = _reached(stores, away=1 - number)
        with closing(ReplicatedBackend(ways, write_quorum=2, emit=_ignore)) as backend:
            gone = members.ids[1 - number]
            store_set.remove(Journal.open(backend), backend, [gone], lost=True, emit=_ignore)
    state = Journal.open(several(stores)).refresh()
    assert state.hole is not None and "two histories" in state.hole.reason
    with pytest.raises(IntegrityError, match="two histories"):
        Journal.open(several(stores)).tag("x", NEWEST)
    Journal.open(stores[0]).tag("x", NEWEST)


def test_a_write_quorum_that_the_stores_which_exist_cannot_meet_is_refused() -> None:
    """A store that did not answer when the log was made is in the set by name alone: with it
    counted, no record could ever follow, not even one that takes the quorum back."""
    stores = three()
    stores[2].up = False
    journal = made(stores)
    members = journal.refresh().stores
    assert members is not None
    body = Stores(members.ids, 3, members.sequencer)
    with pytest.raises(UsageError, match="more than the stores of the set that exist"):
        journal.change_stores(body, before=members)
    commit(journal, journal.open_epoch(resume=None), 1)
    assert journal.refresh().newest() == NEWEST


def test_a_log_whose_quorum_counts_on_a_store_that_was_never_made_is_freed_by_removing_that(
    one_by_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier releases took such a quorum. Nothing could be acknowledged since, so a person's word
    that the store does not exist is enough."""
    stores = three()
    stores[2].up = False
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    members = journal.refresh().stores
    assert members is not None
    monkeypatch.setattr("ckpt.log.journal.is_placeholder", lambda store_id: False)
    with pytest.raises(CommitUnknownError):  # it counts, and cannot be brought to three stores
        journal.change_stores(Stores(members.ids, 3, members.sequencer), before=members)
    monkeypatch.undo()
    journal = Journal.open(several(stores))
    with pytest.raises((UnavailableError, CommitUnknownError)):
        journal.tag("x", NEWEST)
    (never_made,) = (store_id for store_id in members.ids if is_placeholder(store_id))
    two = stores[:2]
    with closing(ReplicatedBackend(two, write_quorum=2, emit=_ignore)) as backend:
        journal = Journal.open(backend)
        with pytest.raises(UnavailableError, match="repeat with --lost"):
            store_set.remove(journal, backend, [never_made], emit=_ignore)
        stores[1].up = False
        with pytest.raises(UnavailableError, match="all stores but the lost ones must answer"):
            store_set.remove(journal, backend, [never_made], lost=True, emit=_ignore)
        stores[1].up = True
        after = store_set.remove(journal, backend, [never_made], lost=True, emit=_ignore)
    assert (len(after.ids), after.write_quorum) == (2, 2)
    Journal.open(several(two)).tag("x", NEWEST)
    assert Journal.open(several(two)).refresh().tags["x"] == NEWEST
