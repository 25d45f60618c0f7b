"""Changing the set of stores that hold a log, and on how many of them a record must be: filled
first, then logged.

The record is written under the set that is in force, and brought to the new one before another
follows. Whoever has the log open goes by it from its next read on.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.errors import ConflictError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format import keys
from ckpt.format.records import BY_STORES, Stores
from ckpt.format.store import JobRecord
from ckpt.log.access import SingleStoreLog
from ckpt.log.journal import Journal
from ckpt.log.replicated import ReplicatedLog
from ckpt.log.sequencers import external_sequencer
from ckpt.log.state import LogState, StoreSet
from ckpt.maintenance.replica import DEFAULT_LIMITS, SyncLimits
from ckpt.maintenance.sync.sync import fill, source_record

MAJORITY = 0
"""As a write quorum: more than half of the stores."""


@dataclass(frozen=True, slots=True)
class StoreMembership:
    """One store as the log sees it: its id (empty where it did not answer or has none), and whether
    it counts."""

    url: str
    store_id: str
    counts: bool


def store_memberships(
    journal: Journal, backend: Backend
) -> tuple[StoreSet | None, tuple[StoreMembership, ...]]:
    """The set that the log fixes (None: it is in one store), and how each of these stores stands to
    it."""
    state = journal.refresh()
    urls = [store.url for store in stores_of(backend)]
    ids = _ids(journal, backend)
    members = state.stores.ids if state.stores is not None else ids
    return state.stores, tuple(
        StoreMembership(url, one, bool(one) and one in members)
        for url, one in zip(urls, ids, strict=True)
    )


def add(
    journal: Journal,
    backend: Backend,
    new: Backend,
    *,
    write_quorum: int = MAJORITY,
    limits: SyncLimits = DEFAULT_LIMITS,
    emit: Emit,
) -> StoreSet:
    """Make ``new`` one more store of the log behind ``backend``, and return the set that is in
    force then.

    Raises UsageError where it is one already or belongs to another log, UnavailableError where it
    could not be filled.
    """
    new_id = _filled(journal, backend, new, limits, emit)
    before = _members(journal, backend)
    if new_id in before.ids:
        raise UsageError(f"the store counts already. store={new.url}")
    ids = (*before.ids, new_id)
    quorum = write_quorum or len(ids) // 2 + 1
    after = StoreSet(ids, quorum, _giver(journal, [*stores_of(backend), new], before, quorum))
    return _change(journal, backend, before, after, [new], limits, emit)


def replace(
    journal: Journal,
    backend: Backend,
    new: Backend,
    lost_id: str,
    *,
    limits: SyncLimits = DEFAULT_LIMITS,
    emit: Emit,
) -> StoreSet:
    """Put ``new`` in the place of the store with ``lost_id``, which is declared lost: should it
    come back it counts no more.

    ``new`` may be where the lost one was. Raises as ``add``, and UsageError where the log knows no
    such store.
    """
    if _headless(new):
        # A writer's records that were on their way when it was emptied: they are this log's, or
        # filling it finds out.
        record = dataclasses.replace(_record_beside(backend, new), store_id=secrets.token_hex(16))
        new.put(keys.JOB_KEY, [record.encode()], create_only=new.capabilities().create_only)
    new_id = _filled(journal, backend, new, limits, emit)
    before = _members(journal, backend)
    if lost_id not in before.ids:
        raise UsageError(f"the log has no such store. store_id={lost_id} ids={list(before.ids)}")
    if new_id in before.ids:
        raise UsageError(f"the store counts already. store={new.url}")
    ids = tuple(new_id if one == lost_id else one for one in before.ids)
    after = StoreSet(ids, before.write_quorum, before.sequencer)
    return _change(journal, backend, before, after, [new], limits, emit)


def remove(
    journal: Journal,
    backend: Backend,
    removed_id: str,
    *,
    write_quorum: int = MAJORITY,
    limits: SyncLimits = DEFAULT_LIMITS,
    emit: Emit,
) -> StoreSet:
    """Take a store out of the log's set, after the others have all that it may be one of few to
    have.

    Nothing is deleted. Raises UsageError where the log knows no such store or it is the last one.
    """
    before = _members(journal, backend)
    if removed_id not in before.ids or len(before.ids) == 1:
        raise UsageError(
            f"the log has no such store beside others. store_id={removed_id} ids={list(before.ids)}"
        )
    seats = zip(stores_of(backend), _ids(journal, backend), strict=True)
    kept = [store for store, one in seats if one in before.ids and one != removed_id]
    for store in kept:
        _filled(journal, backend, store, limits, emit)
    ids = tuple(one for one in before.ids if one != removed_id)
    after = StoreSet(ids, write_quorum or len(ids) // 2 + 1, before.sequencer)
    return _change(journal, backend, before, after, kept, limits, emit)


def take_over(journal: Journal, backend: Backend) -> StoreSet:
    """Let the stores together give out the log's places, or where too few create only once etcd or
    a new file of this machine.

    In the second case nothing but the caller's word keeps who did so before from writing in the
    meantime. Raises UsageError where the log is in one store.
    """
    access = journal.access
    state = journal.refresh()
    if not isinstance(access, ReplicatedLog) or state.stores is None:
        raise UsageError(
            "the log is in one store, which gives out its places itself. name all of its stores"
        )
    _require_sure(state, backend)
    name = BY_STORES
    if (
        len(access.replicas.create_only_stores(access.full(state.stores)))
        < state.stores.write_quorum
    ):
        name = external_sequencer(journal.log_id, renew=True)
    after = StoreSet(state.stores.ids, state.stores.write_quorum, name)
    with access.using_sequencer(name):
        journal.append(_body(after), epoch=state.epoch)
    return after


def returned_empty(journal: Journal, backend: Backend) -> tuple[tuple[Backend, str], ...]:
    """Stores that answer and don't count while ids of the set are missing: each with the id that it
    stands in for."""
    access = journal.access
    state = journal.refresh()
    if not isinstance(access, ReplicatedLog) or state.stores is None or state.stale_reason:
        return ()
    members = state.stores
    missing = [one for one in members.ids if one not in access.ids]
    found = []
    for number, (store, store_id) in enumerate(zip(stores_of(backend), access.ids, strict=True)):
        if (
            store_id in members.ids
            or number in access.silent
            or not missing
            or len(access.ids) != len(members.ids)
        ):
            continue
        # Ids stand in the order in which the stores were named: most likely it is the one that had
        # this place.
        mine = members.ids[number] if members.ids[number] in missing else missing[0]
        missing.remove(mine)
        found.append((store, mine))
    return tuple(found)


def reachable_members(journal: Journal, backend: Backend) -> tuple[tuple[Backend, str], ...]:
    """The stores that answer and count, with their ids, as the log was last read; none where it is
    in one store."""
    access, state = journal.access, journal.refresh()
    if not isinstance(access, ReplicatedLog) or state.stores is None or state.stale_reason:
        return ()
    ids = enumerate(zip(stores_of(backend), access.ids, strict=True))
    return tuple(
        (store, one)
        for n, (store, one) in ids
        if one in state.stores.ids and n not in access.silent
    )


def catch_up(
    journal: Journal, backend: Backend, store: Backend, *, limits: SyncLimits, emit: Emit
) -> None:
    """Bring a store that counts what it missed while it was away. Raises UnavailableError where
    that can't be done now."""
    _filled(journal, backend, store, limits, emit)


def _filled(
    journal: Journal, backend: Backend, store: Backend, effort: SyncLimits, tell: Emit
) -> str:
    """Bring ``store`` all that the log names; its id."""
    record = _record_beside(backend, store)
    done = fill(
        backend, store, journal.refresh, record=record, deep=False, limits=effort, emit=tell
    )
    if not done.complete:
        raise UnavailableError(
            f"the store could not be filled as quickly as the job writes. store={store.url} repeat "
            "later"
        )
    if done.damaged:
        # It is as full as a store can be; keeping it out would only cost the redundancy of
        # everything else.
        key, why = done.damaged[0]
        text = (
            f"objects are right in no store, so this one lacks them too. store={store.url} "
            f"objects={len(done.damaged)} "
            f"first={key} why={why}; see `ckpt scrub`"
        )
        tell(Event("fill-damaged", text, {"objects": len(done.damaged)}, alarm=True))
    return done.store_id


def _headless(store: Backend) -> bool:
    """Whether it holds records and nothing that says whose they are."""
    return store.stat(keys.JOB_KEY) is None and next(iter(store.list(keys.LOG)), None) is not None


def _record_beside(backend: Backend, store: Backend) -> JobRecord:
    """The ``ckpt.json`` of another of the log's stores. Raises UnavailableError where none can be
    read."""
    why = "no other store was named"
    for other in stores_of(backend):
        if other.url == store.url:
            continue
        try:
            return source_record(other)
        except UnavailableError as error:
            why = str(error)
    raise UnavailableError(
        f"no other store of the log can be read, so this one can't be filled. store={store.url} "
        f"why={why}"
    )


def _change(
    journal: Journal,
    backend: Backend,
    before: StoreSet,
    after: StoreSet,
    fresh: Sequence[Backend],
    effort: SyncLimits,
    tell: Emit,
) -> StoreSet:
    state = journal.refresh()
    _require_sure(state, backend)
    journal.change_stores(_body(after), before=before if state.stores is not None else None)
    tell(
        Event(
            "stores",
            f"the log lies on {len(after.ids)} stores now, with a write quorum of "
            f"{after.write_quorum}",
        )
    )
    for store in fresh:  # what was written between its filling and the record
        _filled(journal, backend, store, effort, tell)
    return after


def _members(journal: Journal, backend: Backend) -> StoreSet:
    state = journal.refresh()
    if state.stores is not None:
        return state.stores
    ids = [one for one in _ids(journal, backend) if one]
    if len(ids) != 1:
        raise UsageError(
            "the log is in one store; name that one. "
            f"stores={[store.url for store in stores_of(backend)]}"
        )
    return StoreSet((ids[0],), 1)


def _ids(journal: Journal, backend: Backend) -> tuple[str, ...]:
    access = journal.access
    if isinstance(access, ReplicatedLog):
        return access.ids
    assert isinstance(access, SingleStoreLog)
    return (access.store_id,)


def _giver(journal: Journal, stores: Sequence[Backend], before: StoreSet, quorum: int) -> str:
    """Who gives out places once ``stores`` hold the log: as before, or what serves best where it
    was in one store."""
    if len(before.ids) > 1:
        return before.sequencer
    if sum(store.capabilities().create_only for store in stores) >= quorum:
        return BY_STORES
    return external_sequencer(journal.log_id)


def _body(members: StoreSet) -> Stores:
    return Stores(members.ids, members.write_quorum, members.sequencer)


def _require_sure(state: LogState, backend: Backend) -> None:
    if state.stale_reason:
        raise ConflictError(
            "the set of stores is changed only where the log is known for sure. "
            f"why={state.stale_reason} "
            f"stores={[store.url for store in stores_of(backend)]}"
        )


# How far each store of a log is known to list every place: a store that was away lacks what was
# written meanwhile.


class LogCoverage:
    """What each store was seen to list, by its id. For one thread; what is known once isn't listed
    again."""

    def __init__(self) -> None:
        self._whole: dict[str, int] = {}

    def first_gap(self, store: Backend, store_id: str, *, upto_seq: int) -> int | None:
        """The first place below ``upto_seq`` at which ``store`` lists no record; None where it
        lists all.

        Cost: a list of the places from the first that was not seen yet. Raises UnavailableError.
        """
        whole = self._whole.get(store_id, 0)
        if whole >= upto_seq:
            return None
        seqs: set[int] = set()
        for stat in store.list(keys.LOG, after=keys.log_key(whole - 1) if whole else ""):
            seq = keys.parse_log_key(stat.key)
            seq = keys.parse_settled_key(stat.key) if seq is None else seq
            if seq is not None:
                seqs.add(seq)
        while whole in seqs:
            whole += 1
        self._whole[store_id] = whole
        return whole if whole < upto_seq else None
