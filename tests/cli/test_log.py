"""``ckpt log`` over several stores: it tells what counts, and leaves every store as it is."""

from __future__ import annotations

from contextlib import closing

import pytest
from kit.logs.small import Store, commit, made, several, three

from ckpt.backends.checked import read_alone, read_checked
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.cli.commands.log import history
from ckpt.events import Event
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, Tag, make_record
from ckpt.format.store import JOB_BYTES_MAX
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId


def _ignore(_: Event) -> None:
    pass


@pytest.fixture
def stores() -> list[Store]:
    stores = three()
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    return stores


def _preferring(stores: list[Store], number: int) -> ReplicatedBackend:
    return ReplicatedBackend(stores, write_quorum=2, prefer=[number], emit=_ignore)


def _dead_record(stores: list[Store], name: str) -> bytes:
    """The next record, of a writer that does not live to finish it."""
    state = Journal.open(several(stores)).refresh()
    body = Tag(name, SnapshotId(1, 1))
    return make_record(
        body,
        job=state.job,
        seq=state.next_seq,
        epoch=1,
        write_id=f"{name:w<32}",
        prev=state.head_digest,
    ).encode()


def _log(store: Store) -> dict[str, bytes]:
    return {
        stat.key: read_alone(store.inner, stat.key, bytes_max=RECORD_BYTES_MAX)
        for stat in store.inner.list(keys.LOG)
    }


def test_a_dead_writers_record_gets_no_vote_by_being_looked_at(stores: list[Store]) -> None:
    data = _dead_record(stores, "dead")
    stores[0].inner.put(keys.log_key(3), [data])
    stores[2].up = False
    before = [_log(store) for store in stores]
    with closing(ReplicatedBackend(stores, write_quorum=2, emit=_ignore)) as backend:
        state = Journal.open(backend).refresh()
        assert state.next_seq == 4, "it may count: the silent store may hold it"
        assert [entry.record.seq for entry in history(backend, state)] == [0, 1, 2, 3]
        stores[2].up = True
        backend.await_caught_up(5.0)
    assert [_log(store) for store in stores] == before


def test_a_record_that_lost_its_place_is_not_shown_as_one_that_counts(stores: list[Store]) -> None:
    stores[0].inner.put(keys.log_key(3), [_dead_record(stores, "two")])
    made(stores).tag("one", SnapshotId(1, 1))
    before = [_log(store) for store in stores]
    for prefer in range(3):
        with closing(_preferring(stores, prefer)) as backend:
            state = Journal.open(backend).refresh()
            shown = [entry.record.body for entry in history(backend, state)]
            backend.await_caught_up(5.0)
        assert shown[3] == Tag("one", SnapshotId(1, 1))
    assert [_log(store) for store in stores] == before


@pytest.mark.parametrize("key", [keys.log_key(1), keys.settled_key(1), keys.JOB_KEY])
def test_what_each_store_has_for_itself_is_never_repaired_from_another(
    stores: list[Store], key: str
) -> None:
    """Whoever reads it through all stores, with whatever check."""
    if key == keys.settled_key(1):
        stores[0].inner.put(key, [b"xy" * 20])
    right = read_alone(stores[0].inner, key, bytes_max=JOB_BYTES_MAX)
    stores[1].inner.put(key, [right[::-1]])
    stores[2].inner.delete(key)
    with closing(_preferring(stores, 1)) as backend:
        out = memoryview(bytearray(len(right)))
        read_checked(backend, key, out, lambda data: None if data == right else "other bytes")
        assert backend.await_caught_up(5.0)
    assert read_alone(stores[1].inner, key, bytes_max=JOB_BYTES_MAX) == right[::-1]
    assert stores[2].inner.stat(key) is None
