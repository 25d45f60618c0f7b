"""Writers that meet while a store is lost: the vote is divided, and the stores that are left decide
it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import closing

import pytest
from kit.logs.small import Store, Watch, calm, commit, made, several, three, wipe

from ckpt.backends.checked import read_alone
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.cli.commands.log import history
from ckpt.errors import CommitUnknownError, NotFoundError, UnavailableError
from ckpt.events import Event
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, Tag, make_record
from ckpt.log.journal import Journal
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
