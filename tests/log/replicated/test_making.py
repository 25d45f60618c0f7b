"""Logs that are made by several at once, or by one who dies on the way."""

from __future__ import annotations

import contextlib

import pytest
from kit.logs.small import Death, Store, Watch, calm, commit, made, operations, several, three

from ckpt.backends.checked import read_alone
from ckpt.errors import (
    CommitUnknownError,
    ConflictError,
    IntegrityError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.store import JobRecord
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False], ids=["vote", "file"])
@pytest.mark.parametrize("quorum", [2, 3])
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_a_maker_that_dies_anywhere_is_followed_by_one_that_finishes(
    one_by_one: None, once: bool, quorum: int, after: bool
) -> None:
    def die() -> None:
        raise Death

    for at in operations(lambda: three(once=once), quorum, after=after):
        stores = three(once=once)
        Watch(stores, at, die, after=after)
        with pytest.raises(Death):
            made(stores, quorum)
        calm(stores)
        journal = made(stores, quorum)
        commit(journal, journal.open_epoch(resume=None), 1)
        state = Journal.open(several(stores, quorum)).refresh()
        assert state.newest() == SnapshotId(1, 1) and not state.stale_reason, f"operation {at}"
        assert {
            JobRecord.decode(read_alone(one, keys.JOB_KEY, bytes_max=1 << 16)).log_id
            for one in stores
        } == {journal.log_id}


@pytest.mark.parametrize("quorum", [2, 3])
def test_of_two_makers_at_once_both_have_the_same_log(one_by_one: None, quorum: int) -> None:
    for at in operations(three, quorum):
        stores = three()
        rivals: list[Journal] = []

        def race(stores: list[Store] = stores, rivals: list[Journal] = rivals) -> None:
            calm(stores)
            rivals.append(made(stores, quorum))
            commit(rivals[0], rivals[0].open_epoch(resume=None), 1)

        Watch(stores, at, race)
        journal = made(stores, quorum)
        assert journal.log_id == rivals[0].log_id, f"operation {at}"
        assert journal.refresh().newest() == SnapshotId(1, 1)
        assert journal.open_epoch(resume=SnapshotId(1, 1)) == 2
        assert len({state.head_digest for state in (journal.refresh(), rivals[0].refresh())}) == 1


@pytest.mark.parametrize("away", range(3))
def test_of_two_makers_who_meet_other_stores_one_log_comes_out_in_the_end(
    one_by_one: None, away: int
) -> None:
    for at in operations(three, 2):
        stores = three()
        told: list[str] = []

        def race(stores: list[Store] = stores, told: list[str] = told) -> None:
            calm(stores)
            stores[away].up = False
            with contextlib.suppress(UnavailableError, ConflictError, CommitUnknownError):
                rival = made(stores)
                commit(rival, rival.open_epoch(resume=None), 1)
                told.append(rival.log_id)
            stores[away].up = True

        Watch(stores, at, race)
        with contextlib.suppress(UnavailableError, ConflictError):
            made(stores)
        calm(stores)
        journal = made(stores)
        state = journal.refresh()
        assert not told or (journal.log_id == told[0] and state.newest() == SnapshotId(1, 1)), (
            f"operation {at}"
        )
        epoch = journal.open_epoch(resume=None)
        commit(journal, epoch, 2)


@pytest.mark.slow
def test_makers_of_overwriting_stores_on_one_machine_who_meet_are_told(one_by_one: None) -> None:
    """Nothing can keep them apart: each sees what came of it, and none goes on with half a log."""
    for at in operations(lambda: three(once=False), 2):
        stores = three(once=False)
        rivals: list[Journal] = []

        def race(stores: list[Store] = stores, rivals: list[Journal] = rivals) -> None:
            calm(stores)
            rivals.append(made(stores))

        Watch(stores, at, race)
        try:
            journal = made(stores)
        except (ConflictError, UnavailableError, UsageError, IntegrityError):
            continue
        assert journal.log_id == rivals[0].log_id, f"operation {at}"
        assert digest_hex(journal.access.record_at(0)) == digest_hex(rivals[0].access.record_at(0))
