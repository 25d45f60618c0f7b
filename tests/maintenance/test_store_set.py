"""Who is taken into the set of a log's stores, and who gives out its positions then."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from kit.logs.small import JOB, Store, commit, made, three

from ckpt.backends.base import Backend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import StoreDeniedError, UsageError
from ckpt.events import Event
from ckpt.format import keys
from ckpt.format.records import BY_SQLITE, BY_STORES
from ckpt.log.journal import Journal
from ckpt.log.sequencers import STATE_VARIABLE
from ckpt.maintenance import store_set


@pytest.fixture(autouse=True)
def _state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))


def _ignore(_: Event) -> None:
    pass


def _begun(stores: list[Store]) -> ReplicatedBackend:
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    return ReplicatedBackend(stores, write_quorum=2, emit=_ignore)


class Denied(Store):
    """A store that may not be written to."""

    def __init__(self) -> None:
        super().__init__("denied")
        self.probes = False

    def put(self, key: str, data: object, *, create_only: bool = False) -> None:
        raise StoreDeniedError(f"403. key={key}")


@pytest.mark.parametrize("change", ["add", "replace"])
def test_a_store_that_cannot_vote_is_not_taken_into_a_log_whose_stores_vote(change: str) -> None:
    """Else, with another store lost, a divided vote would stay open for ever."""
    with closing(_begun(three())) as backend:
        journal = Journal.open(backend)
        before = journal.refresh().stores
        assert before is not None and before.sequencer == BY_STORES
        for new, error in ((Store("plain", once=False), UsageError), (Denied(), StoreDeniedError)):
            with pytest.raises(error):
                if change == "add":
                    store_set.add(journal, backend, new, emit=_ignore)
                else:
                    store_set.replace(journal, backend, new, before.ids[2], emit=_ignore)
            assert not list(new.inner.list("")), "it was not filled before it was refused"
        assert Journal.open(backend).refresh().stores == before
        after = store_set.add(journal, backend, Store("able"), emit=_ignore)
        assert len(after.ids) == 4


def test_a_refused_replacement_has_written_nothing_to_the_new_store() -> None:
    """Not to one that holds records alone either, which gets a ``ckpt.json`` to be filled."""
    with closing(_begun(three())) as backend:
        journal = Journal.open(backend)
        before = journal.refresh().stores
        assert before is not None
        new = Store("emptied")
        new.put(keys.log_key(0), [b"of a writer that was in flight"])
        held = [stat.key for stat in new.inner.list("")]
        for ids, lost in ((["0" * 32], False), (["0" * 32], True), (before.ids[:1], True)):
            with pytest.raises(UsageError):
                store_set.replace(journal, backend, new, ids[0], lost=lost, emit=_ignore)
            assert [stat.key for stat in new.inner.list("")] == held
        assert journal.refresh().stores == before


def test_any_store_is_taken_into_a_log_whose_positions_come_from_elsewhere() -> None:
    with closing(_begun(three(once=False))) as backend:
        journal = Journal.open(backend)
        after = store_set.add(journal, backend, Store("plain", once=False), emit=_ignore)
        assert len(after.ids) == 4 and after.sequencer.startswith(BY_SQLITE)


@pytest.mark.parametrize(("once", "by"), [(True, BY_STORES), (False, BY_SQLITE)])
def test_a_lone_store_is_joined_by_the_rule_of_opening(once: bool, by: str) -> None:
    """One that overwrites has no vote, also if W others have."""
    lone: Backend = Store("lone")
    journal = Journal.open(lone, job=JOB, create=True)
    journal.open_epoch(resume=None)
    first = store_set.add(journal, lone, Store("new", once=once), emit=_ignore)
    assert first.sequencer.startswith(by)


def test_a_takeover_goes_by_the_rule_of_opening() -> None:
    stores = [*three()[:2], Store("plain", once=False)]
    with closing(_begun(stores)) as backend:
        journal = Journal.open(backend)
        before = journal.refresh().stores
        assert before is not None and before.sequencer.startswith(BY_SQLITE)
        assert store_set.take_over(journal, backend).sequencer.startswith(BY_SQLITE)
        stores[2].once = True
    with closing(ReplicatedBackend(stores, write_quorum=2, emit=_ignore)) as backend:
        assert store_set.take_over(Journal.open(backend), backend).sequencer == BY_STORES
