"""Finding, making and refusing a log on several stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.logs.small import JOB, Store, calm, commit, made, several, three, wipe

from ckpt.backends.checked import read_alone
from ckpt.errors import (
    CkptError,
    FormatVersionError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.records import BY_STORES, Stores
from ckpt.format.store import JobRecord
from ckpt.log import replicas as copies_room
from ckpt.log.catalog import snapshots
from ckpt.log.journal import Journal
from ckpt.log.quorum import is_placeholder
from ckpt.log.sequencers import STATE_VARIABLE
from ckpt.values import SnapshotId


def test_stores_that_hold_nothing_are_no_log_until_one_is_made() -> None:
    stores = three()
    with pytest.raises(NotFoundError, match="no ckpt store here"):
        Journal.open(several(stores))
    with pytest.raises(UsageError, match="need their job's name"):
        Journal.open(several(stores), create=True)
    journal = made(stores)
    again = Journal.open(several(stores))
    assert (again.job, again.log_id) == (JOB, journal.log_id)
    state = again.refresh()
    assert (
        state.stores is not None
        and state.stores.write_quorum == 2
        and state.stores.sequencer == BY_STORES
    )
    ids = [
        JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=1 << 16)).store_id
        for store in stores
    ]
    assert list(state.stores.ids) == ids
    assert made(stores).refresh() == state, "opening it again writes nothing"


def test_what_a_user_says_of_the_stores_must_be_what_the_log_says() -> None:
    stores = three()
    made(stores)
    with pytest.raises(UsageError, match="belong to another job"):
        Journal.open(several(stores), job="run-b", create=True)
    with pytest.raises(
        UsageError, match=r"is on 3 stores with a write quorum of 2\. given=3 write_quorum=3"
    ):
        made(stores, quorum=3)
    with pytest.raises(UsageError, match=r"is on 3 stores.*given=2"):
        made(stores[:2])
    with pytest.raises(UsageError, match="two addresses are one store"):
        made([stores[0], stores[1], Store("other name", inner=stores[1].inner)])


def test_stores_of_two_logs_are_refused_and_of_one_never_begun_the_other_is_taken() -> None:
    ours, theirs = three(), three()
    journal = made(ours)
    made(theirs)
    mixed = [ours[0], ours[1], theirs[2]]
    with pytest.raises(UsageError, match="different logs"):
        made(mixed)
    with pytest.raises(UsageError, match="different logs"):
        Journal.open(several(mixed))
    stray = Store("stray")
    stray.put(keys.JOB_KEY, [JobRecord(job=JOB, store_id="5" * 32).encode()])
    found = made([ours[0], ours[1], stray])
    assert found.log_id == journal.log_id
    assert found.open_epoch(resume=None) == 1
    stray.up = False
    assert made([ours[0], ours[1], stray]).log_id == journal.log_id


def test_with_too_few_answers_nothing_is_known_and_nothing_is_made() -> None:
    stores = three()
    stores[0].up = stores[1].up = False
    with pytest.raises(UnavailableError, match="too few stores answer to know"):
        Journal.open(several(stores))
    with pytest.raises(UnavailableError, match="too few stores answer"):
        made(stores)
    assert list(stores[2].inner.list("")) == []
    stores[2].up = False
    with pytest.raises(UnavailableError):
        made(stores)


def test_with_too_few_stores_to_begin_none_is_left_another_logs() -> None:
    lost, away = Store("lost"), Store("away")
    journal = made([lost, away])
    commit(journal, journal.open_epoch(resume=None), 1)
    wipe(lost)
    away.up = False
    with pytest.raises(UnavailableError):
        made([lost, away])
    away.up = True
    assert Journal.open(several([lost, away])).refresh().newest() == SnapshotId(1, 1)


def test_a_log_is_made_while_a_store_is_away_and_goes_on_without_it() -> None:
    stores = three()
    stores[1].up = False
    journal = made(stores)
    state = journal.refresh()
    assert state.stores is not None and [is_placeholder(one) for one in state.stores.ids] == [
        False,
        True,
        False,
    ]
    commit(journal, journal.open_epoch(resume=None), 1)
    stores[1].up = True
    late = made(stores)
    commit(late, 1, 2)
    assert list(stores[1].inner.list(keys.LOG)) == [], "it counts for nothing, and has nothing"
    state = Journal.open(several(stores)).refresh()
    assert state.newest() == SnapshotId(1, 2) and not state.stale_reason


def test_the_store_that_was_away_is_taken_in_by_a_record_once_it_is_full() -> None:
    stores = three()
    stores[1].up = False
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    stores[1].up = True
    for stat in stores[0].inner.list(""):
        if stat.key != keys.JOB_KEY:
            stores[1].inner.put(stat.key, [read_alone(stores[0], stat.key, bytes_max=1 << 20)])
    stores[1].inner.put(
        keys.JOB_KEY, [JobRecord(job=JOB, store_id="7" * 32, log_id=journal.log_id).encode()]
    )
    members = journal.refresh().stores
    assert members is not None
    ids = (members.ids[0], "7" * 32, members.ids[2])
    Journal.open(several(stores)).append(Stores(ids, 2), epoch=1)
    stores[0].up = False
    left = made(stores)
    commit(left, 1, 2)
    state = left.refresh()
    assert (
        state.newest() == SnapshotId(1, 2)
        and state.stores is not None
        and state.stores.ids == ids
        and not state.stale_reason
    )


def test_a_change_of_stores_is_known_to_who_hears_only_the_new_ones() -> None:
    stores = three()
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    new = [Store("n0"), Store("n1")]
    for number, store in enumerate(new):
        for stat in stores[0].inner.list(""):
            if stat.key != keys.JOB_KEY:
                store.inner.put(stat.key, [read_alone(stores[0], stat.key, bytes_max=1 << 20)])
        record = JobRecord(job=JOB, store_id=f"{number}" * 32, log_id=journal.log_id)
        store.inner.put(keys.JOB_KEY, [record.encode()])
    Journal.open(several([*stores, *new])).append(Stores(("0" * 32, "1" * 32), 2), epoch=1)
    for store in stores:
        store.up = False
    found = made(new)
    assert found.refresh().newest() == SnapshotId(1, 1) and not found.refresh().stale_reason
    commit(found, 1, 2)
    for store in stores:
        store.up = True
    old = Journal.open(several(stores)).refresh()
    assert old.stale_reason and old.stores is not None and old.stores.ids == ("0" * 32, "1" * 32), (
        "the old ones know of it"
    )


def test_a_store_that_came_back_empty_counts_for_nothing() -> None:
    stores = three()
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    wipe(stores[2])
    late = made(stores)
    commit(late, 1, 2)
    assert stores[2].inner.stat(keys.JOB_KEY) is None, "it gets no name before it is filled"
    assert list(stores[2].inner.list(keys.LOG)) == []
    stores[0].up = False
    state = Journal.open(several(stores)).refresh()
    assert (
        state.newest() == SnapshotId(1, 2) and "answered=1 stores=3 needed=2" in state.stale_reason
    )
    with pytest.raises(CkptError):
        commit(Journal.open(several(stores)), 1, 3)


def test_a_store_that_is_swapped_between_reading_and_writing_has_no_vote(one_by_one: None) -> None:
    stores = three()
    journal, slow = made(stores), made(stores)
    journal.open_epoch(resume=None)
    slow.refresh()

    def meanwhile(key: str) -> None:
        """As the slow one puts its record: another is committed on two stores, one of which is lost
        and comes back empty."""
        if key.startswith(keys.LOG):
            for store in stores:
                store.on_put = lambda _: None
            stores[2].up = False
            commit(journal, 1, 1)
            wipe(stores[1])
            stores[2].up = True

    for store in stores:
        store.on_put = meanwhile
    assert slow.open_epoch(resume=None) == 2, "the two that are left decide"
    state = Journal.open(several(stores)).refresh()
    commits = [(entry.snapshot, entry.seq) for entry in state.snapshots]
    assert commits == [(SnapshotId(1, 1), 2)], "what was told counts"


def test_nothing_is_begun_anew_where_those_who_answer_missed_the_beginning(
    one_by_one: None,
) -> None:
    stores = three()
    stores[0].on_put = _refuse  # it is made, and then misses everything
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    stores[0].on_put = lambda _: None
    stores[1].up = False
    wipe(stores[2])
    # As a replica that is being filled: it has a name, and nothing else yet.
    stores[2].inner.put(
        keys.JOB_KEY, [JobRecord(job=JOB, store_id="3" * 32, log_id=journal.log_id).encode()]
    )
    with pytest.raises(UnavailableError, match="may have begun on stores that do not answer"):
        made(stores)
    state = Journal.open(several(stores)).refresh()
    assert state.next_seq == 0 and state.stale_reason
    stores[1].up = True
    assert made(stores).refresh().newest() == SnapshotId(1, 1)


def _refuse(key: str) -> None:
    if key != keys.JOB_KEY:
        raise UnavailableError("no route")


def test_reading_one_of_several_stores_alone_says_that_something_newer_may_exist() -> None:
    stores = three()
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    for store in stores:
        alone = Journal.open(store)
        state = alone.refresh()
        assert (
            state.newest() == SnapshotId(1, 1)
            and "one of the log's 3 stores was asked, 2 are needed" in state.stale_reason
        )
        assert [info.maybe_stale for info in snapshots(store, state)] == [True]
        with pytest.raises(UsageError, match="one alone cannot be written to"):
            alone.open_epoch(resume=None)


def test_a_log_that_began_in_one_store_is_read_on_several_and_asks_to_be_added_first() -> None:
    first = Store("first")
    alone = Journal.open(first, job=JOB, create=True)
    commit(alone, alone.open_epoch(resume=None), 1)
    stores = [first, Store("second"), Store("third")]
    with pytest.raises(UsageError, match="the log is on one store"):
        made(stores)
    assert Journal.open(several(stores)).refresh().newest() == SnapshotId(1, 1)


def test_stores_that_can_not_be_asked_what_they_do_do_not_bind_the_log_to_a_machine(
    one_by_one: None,
) -> None:
    stores = three()
    asked = iter(range(10**6))

    def flicker() -> None:
        """Every second question goes without answer, and the store's own trial of itself too."""
        if next(asked) % 2:
            raise UnavailableError("no route")

    for store in stores[:2]:
        store.inner.put(
            keys.JOB_KEY,
            [JobRecord(job=JOB, store_id=store.url[-1] * 32, log_id="9" * 32).encode()],
        )
        store.probes = False
    copies = copies_room.LogReplicas(stores)
    assert copies.create_only_stores(range(3)) == {2}
    assert copies.not_create_only(range(2)) == {0, 1}
    for store in stores[:2]:
        store.before = flicker
    assert copies.not_create_only(range(2)) == frozenset(), "they may only be away now"
    calm(stores)
    stores[0].probes = stores[1].probes = True
    state = made(stores).refresh()
    assert state.stores is not None and state.stores.sequencer == BY_STORES


@pytest.mark.parametrize("able", range(3))
def test_where_a_store_overwrites_the_places_come_from_a_file(able: int, tmp_path: Path) -> None:
    stores = [Store(f"s{n}", once=n < able) for n in range(3)]
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    state = made(stores).refresh()
    assert state.stores is not None and state.stores.sequencer.startswith("sqlite:")
    assert len(list((tmp_path / "state").glob("*.sqlite3"))) == 1
    stores[2].up = False
    commit(made(stores), 1, 2)


def test_another_machine_reads_what_a_file_gives_out_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stores = three(once=False)
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "elsewhere"))
    before = [[stat.key for stat in store.inner.list("")] for store in stores]
    other = made(stores)
    assert other.refresh().newest() == SnapshotId(1, 1)
    with pytest.raises(UsageError, match="this machine does not give out the positions"):
        commit(other, 1, 2)
    assert before == [[stat.key for stat in store.inner.list("")] for store in stores]


def test_damage_to_what_says_the_version_is_damage_and_a_newer_release_is_told() -> None:
    stores = three()
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    key = keys.log_key(2)
    newer = read_alone(stores[0], key, bytes_max=1 << 20).replace(b'"v":1', b'"v":7')
    stores[0].inner.put(key, [newer])
    assert Journal.open(several(stores)).refresh().newest() == SnapshotId(1, 1)
    for store in stores:
        store.inner.put(key, [newer])
    with pytest.raises(FormatVersionError, match="does not read"):
        Journal.open(several(stores)).refresh()
    stores[0].inner.put(keys.JOB_KEY, [b'{"format_version":9}'])
    with pytest.raises(FormatVersionError):
        Journal.open(several(stores)).refresh()
