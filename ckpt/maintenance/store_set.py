"""The set of stores that hold a log, and its write quorum: adding, replacing and removing stores.

A change is one ``stores`` record. A new store is filled before the record, so that it counts only
once it has everything. The record is written under the old set and its quorum, and completed on the
new one before another record follows. Processes that have the log open use the new set from their
next read of the log.
"""

from __future__ import annotations

import dataclasses
import heapq
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.errors import ConflictError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format import keys
from ckpt.format.records import BY_STORES, Stores
from ckpt.format.store import JobRecord
from ckpt.log.access import SingleStoreLog
from ckpt.log.journal import Journal
from ckpt.log.reader import positions
from ckpt.log.replicated import ReplicatedLog, joined_by
from ckpt.log.sequencers import external_sequencer, require_create_only
from ckpt.log.state import LogState, StoreSet
from ckpt.maintenance.replica import DEFAULT_LIMITS, SyncLimits
from ckpt.maintenance.sync.sync import fill, source_record

MAJORITY = 0
"""As a write quorum: more than half of the stores."""


@dataclass(frozen=True, slots=True)
class StoreMembership:
    """One store as the log sees it. ``store_id`` is empty if it did not answer or has none."""

    url: str
    store_id: str
    counts: bool


def store_memberships(
    journal: Journal, backend: Backend
) -> tuple[StoreSet | None, tuple[StoreMembership, ...]]:
    """The log's set of stores (None: it is in one store), and each given store's membership."""
    state = journal.refresh()
    urls = [store.url for store in stores_of(backend)]
    ids = _ids(journal)
    members = state.stores.ids if state.stores is not None else ids
    return state.stores, tuple(
        StoreMembership(url, store_id, bool(store_id) and store_id in members)
        for url, store_id in zip(urls, ids, strict=True)
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
    """Add ``new`` to the stores of the log behind ``backend``; the set now in force.

    Raises UsageError if it is a member already, belongs to another log, or does not create a key
    only once while the stores give out the log's positions; and UnavailableError if it could not be
    filled.
    """
    _require_voter(journal, new)
    journal = _joined_by(journal, new)
    # Filled first: from the ``stores`` record on it counts, and must have everything.
    new_id = _filled(journal, backend, new, limits, emit)
    before = _members(journal, backend)
    if new_id in before.ids:
        raise UsageError(f"the store counts already. store={new.url}")
    ids = (*before.ids, new_id)
    quorum = write_quorum or len(ids) // 2 + 1
    sequencer = _sequencer(journal, [*stores_of(backend), new], before)
    after = StoreSet(ids, quorum, sequencer)
    return _change(journal, backend, before, after, [new], limits, emit)


def replace(
    journal: Journal,
    backend: Backend,
    new: Backend,
    old_id: str,
    *,
    lost: bool = False,
    limits: SyncLimits = DEFAULT_LIMITS,
    emit: Emit,
) -> StoreSet:
    """Put ``new`` in the place of the store ``old_id``, which no longer counts if it returns.

    ``new`` may have the address of the old store. ``lost``: the caller's word that the old store
    never comes back; needed if fewer stores than the write quorum are left without it. Raises as
    ``add`` and ``remove``.
    """
    _require_voter(journal, new)
    journal = _joined_by(journal, new)
    with _without(journal, backend, [old_id], lost=lost) as before:
        if _lacks_job_record(new):
            # Records of a writer that were in flight when the store was emptied. They belong to
            # this log; if they do not, filling the store finds out.
            beside = _record_beside(backend, new)
            record = dataclasses.replace(beside, store_id=secrets.token_hex(16))
            create_only = new.capabilities().create_only
            new.put(keys.JOB_KEY, [record.encode()], create_only=create_only)
        new_id = _filled(journal, backend, new, limits, emit)
        if new_id in before.ids:
            raise UsageError(f"the store counts already. store={new.url}")
        ids = tuple(new_id if store_id == old_id else store_id for store_id in before.ids)
        after = StoreSet(ids, before.write_quorum, before.sequencer)
        return _change(journal, backend, before, after, [new], limits, emit)


def remove(
    journal: Journal,
    backend: Backend,
    removed_ids: Collection[str],
    *,
    lost: bool = False,
    write_quorum: int = MAJORITY,
    limits: SyncLimits = DEFAULT_LIMITS,
    emit: Emit,
) -> StoreSet:
    """Remove stores from the log's set, after the others were given everything that they have.

    ``lost``: the caller's word that they never come back; needed if fewer stores than the write
    quorum are left without them. Deletes nothing. Raises UsageError if the set has no such stores,
    or only these, or without that word; UnavailableError if of those that are left too few answer.
    """
    with _without(journal, backend, removed_ids, lost=lost) as before:
        ids = tuple(store_id for store_id in before.ids if store_id not in removed_ids)
        stores = dict(zip(_ids(journal), stores_of(backend), strict=True))
        kept = [stores[store_id] for store_id in ids if store_id in stores]
        if not kept:
            raise UnavailableError(
                f"no other store of the log answers. ids={list(ids)} repeat when one does"
            )
        if len(ids) == 1:
            require_create_only(kept[0])  # a log on one store is written by its own means
        # The removed stores may be of only W that have an object: fill the others first; but for
        # a single one that is left of lost ones, which nothing can be filled from.
        fill_from = len(kept) > 1 or any(store_id in stores for store_id in removed_ids)
        refill = kept if fill_from else []
        for store in refill:
            _filled(journal, backend, store, limits, emit)
        after = StoreSet(ids, write_quorum or len(ids) // 2 + 1, before.sequencer)
        return _change(journal, backend, before, after, refill, limits, emit)


@contextmanager
def _without(
    journal: Journal, backend: Backend, old_ids: Collection[str], *, lost: bool
) -> Iterator[StoreSet]:
    """The set as it is before ``old_ids`` leave it; within the context, those are given up if they
    are ``lost``."""
    access = journal.access
    if not isinstance(access, ReplicatedLog):
        yield _members_with(journal, backend, old_ids, lost=False)
        return
    members = journal.refresh().stores
    if members is not None:
        here = set(members.ids).intersection(access.ids)
        if lost and (found := here.intersection(old_ids)):
            raise UsageError(
                f"a store that answers is not lost. store_ids={sorted(found)} leave out --lost"
            )
        if not lost and len(here) < members.write_quorum:
            raise UnavailableError(
                "fewer stores than the write quorum answer, so nothing can be recorded. "
                f"answering={len(here)} write_quorum={members.write_quorum} "
                f"silent={sorted(set(members.ids) - here)} repeat when they answer; if the store "
                "that goes out is gone for good, repeat with --lost"
            )
    with access.declared_lost(old_ids if lost else ()):
        journal.refresh_confirmed()  # finishes what died before, if it gave up the same stores
        yield _members_with(journal, backend, old_ids, lost=lost)


def _members_with(
    journal: Journal, backend: Backend, old_ids: Collection[str], *, lost: bool
) -> StoreSet:
    """The set, which has the stores ``old_ids`` and others; of lost ones some may be out."""
    members = _members(journal, backend)
    known = set(members.ids).intersection(old_ids)
    if not known or known == set(members.ids) or (not lost and len(known) < len(set(old_ids))):
        raise UsageError(
            f"the log has no such stores beside others. store_ids={sorted(old_ids)} "
            f"ids={list(members.ids)}"
        )
    return members


def _joined_by(journal: Journal, new: Backend) -> Journal:
    """The journal, which also reaches ``new`` if that is at an address of its own."""
    access = journal.access
    if not isinstance(access, ReplicatedLog) or new.url in access.replicas.urls:
        return journal
    joined = joined_by(access, new)
    return Journal(joined, " + ".join(joined.replicas.urls), journal.mark)


def take_over(journal: Journal, backend: Backend) -> StoreSet:
    """Move the sequencer: to the stores together, or to etcd or a new file of this machine.

    The second case applies if a store does not support create-if-absent. Only the caller's word
    then keeps users of the old sequencer from writing at the same time. Raises UsageError if the
    log is in one store.
    """
    access = journal.access
    state = journal.refresh()
    if not isinstance(access, ReplicatedLog) or state.stores is None:
        raise UsageError(
            "the log is in one store, which is its own sequencer. name all of its stores"
        )
    _require_certain(state, backend)
    name = BY_STORES
    full = access.full(state.stores)
    creators = access.replicas.create_only_stores(full)
    if access.replicas.not_create_only(set(full) - creators):
        name = external_sequencer(journal.log_id, renew=True)
    elif len(creators) < state.stores.write_quorum:
        raise UnavailableError(
            "cannot learn whether the stores create a key only once. "
            f"stores={list(access.replicas.urls)} repeat later, or grant permission to write"
        )
    after = StoreSet(state.stores.ids, state.stores.write_quorum, name)
    # The record that names the new sequencer gets its own seq from the new one.
    with access.using_sequencer(name):
        journal.append(_body(after), epoch=state.epoch)
    return after


def returned_empty(journal: Journal, backend: Backend) -> tuple[tuple[Backend, str], ...]:
    """Stores that answer and do not count while members are missing, each with the id it replaces.

    Empty if the log is in one store, or its newest record is not known for certain.
    """
    access = journal.access
    state = journal.refresh()
    if not isinstance(access, ReplicatedLog) or state.stores is None or state.stale_reason:
        return ()
    members = state.stores
    missing = [store_id for store_id in members.ids if store_id not in access.ids]
    returned = []
    for number, (store, store_id) in enumerate(zip(stores_of(backend), access.ids, strict=True)):
        if (
            store_id in members.ids
            or number in access.silent
            or not missing
            or len(access.ids) != len(members.ids)
        ):
            continue
        # Ids are in the order in which the stores were named, so the store with the same number
        # most likely had this id.
        at_number = members.ids[number]
        replaced_id = at_number if at_number in missing else missing[0]
        missing.remove(replaced_id)
        returned.append((store, replaced_id))
    return tuple(returned)


def reachable_members(journal: Journal, backend: Backend) -> tuple[tuple[Backend, str], ...]:
    """The stores that answer and count, with their ids; none if the log is in one store."""
    access, state = journal.access, journal.refresh()
    if not isinstance(access, ReplicatedLog) or state.stores is None or state.stale_reason:
        return ()
    numbered = enumerate(zip(stores_of(backend), access.ids, strict=True))
    return tuple(
        (store, store_id)
        for number, (store, store_id) in numbered
        if store_id in state.stores.ids and number not in access.silent
    )


def catch_up(
    journal: Journal, backend: Backend, store: Backend, *, limits: SyncLimits, emit: Emit
) -> None:
    """Copy to a member store what it missed. Raises UnavailableError if that is impossible now."""
    _filled(journal, backend, store, limits, emit)


def missing_by_listing(stores: Sequence[Backend]) -> list[int]:
    """For each store, how many packs, parts and manifests it does not list and another one does.

    Objects that are being written or deleted meanwhile count too. Cost: one list of each store;
    memory for a page of it. Raises UnavailableError.
    """
    missing = [0] * len(stores)
    for prefix in (keys.PACKS, keys.PARTS, keys.MANIFESTS):
        listings = [_numbered(store, prefix, number) for number, store in enumerate(stores)]
        for _, entries in groupby(heapq.merge(*listings), key=lambda entry: entry[0]):
            holders = {number for _, number in entries}
            for number in range(len(stores)):
                missing[number] += number not in holders
    return missing


def _numbered(store: Backend, prefix: str, number: int) -> Iterator[tuple[str, int]]:
    return ((stat.key, number) for stat in store.list(prefix))


def _filled(
    journal: Journal,
    backend: Backend,
    store: Backend,
    limits: SyncLimits,
    emit: Emit,
    *,
    state: LogState | None = None,
) -> str:
    """Copy to ``store`` all that the log names, or that ``state`` does; its id."""
    record = _record_beside(backend, store)
    # Confirmed: a last record that does not count in the end must not be copied to its rival's key.
    log = journal.refresh_confirmed if state is None else lambda: state
    report = fill(backend, store, log, record=record, deep=False, limits=limits, emit=emit)
    if not report.complete:
        raise UnavailableError(
            f"the job writes faster than the store can be filled. store={store.url} repeat later"
        )
    if report.damaged:
        # It is as full as a store can be. Excluding it would only cost all other objects a copy.
        key, reason = report.damaged[0]
        text = (
            f"some objects are right in no store, so this store lacks them too. store={store.url} "
            f"objects={len(report.damaged)} first={key} why={reason}; see `ckpt scrub`"
        )
        emit(Event("fill-damaged", text, {"objects": len(report.damaged)}, alarm=True))
    return report.store_id


def _lacks_job_record(store: Backend) -> bool:
    """Whether the store holds log records but no ``ckpt.json``."""
    return store.stat(keys.JOB_KEY) is None and next(iter(store.list(keys.LOG)), None) is not None


def _record_beside(backend: Backend, store: Backend) -> JobRecord:
    """Another store's ``ckpt.json``. Raises UnavailableError if none is readable."""
    reason = "no other store was named"
    for other in stores_of(backend):
        if other.url == store.url:
            continue
        try:
            return source_record(other)
        except UnavailableError as error:
            reason = str(error)
    raise UnavailableError(
        f"no other store of the log can be read, so this one cannot be filled. store={store.url} "
        f"why={reason}"
    )


def _change(
    journal: Journal,
    backend: Backend,
    before: StoreSet,
    after: StoreSet,
    refill: Sequence[Backend],
    limits: SyncLimits,
    emit: Emit,
) -> StoreSet:
    """Record the new set, then give the stores ``refill`` what was written before the record."""
    state = journal.refresh()
    _require_certain(state, backend)
    changed = journal.change_stores(
        _body(after), before=before if state.stores is not None else None
    )
    # A journal on the store that held the log alone knows nothing that came after the record; and
    # those who write there can append nothing after it.
    known = changed if isinstance(journal.access, SingleStoreLog) else None
    text = f"the log is now on {len(after.ids)} stores, with a write quorum of {after.write_quorum}"
    emit(Event("stores", text))
    # A writer that had not read the record yet wrote to the old set only.
    for store in refill:
        _filled(journal, backend, store, limits, emit, state=known)
    return after


def _members(journal: Journal, backend: Backend) -> StoreSet:
    state = journal.refresh()
    if state.stores is not None:
        return state.stores
    ids = [store_id for store_id in _ids(journal) if store_id]
    if len(ids) != 1:
        raise UsageError(
            f"the log is in one store; name that one. "
            f"stores={[store.url for store in stores_of(backend)]}"
        )
    return StoreSet((ids[0],), 1)


def _ids(journal: Journal) -> tuple[str, ...]:
    access = journal.access
    if isinstance(access, ReplicatedLog):
        return access.ids
    assert isinstance(access, SingleStoreLog)
    return (access.store_id,)


def _sequencer(journal: Journal, stores: Sequence[Backend], before: StoreSet) -> str:
    """The sequencer once ``stores`` hold the log: unchanged, or as for a new log on them.

    Raises UnavailableError if it cannot be learned whether a store creates a key only once.
    """
    if len(before.ids) > 1:
        return before.sequencer
    try:
        for store in stores:
            require_create_only(store)
    except UsageError:
        return external_sequencer(journal.log_id)
    return BY_STORES


def _require_voter(journal: Journal, new: Backend) -> None:
    """Raise UsageError if ``new`` could not vote in a log whose stores give out the positions.

    Its vote would never be known: with one other store lost, no divided vote could be decided.
    """
    members = journal.refresh().stores
    if members is None or len(members.ids) == 1 or members.sequencer != BY_STORES:
        return
    try:
        require_create_only(new)
    except UsageError as error:
        raise UsageError(
            "the stores of this log give out its positions by creating keys only once, and this "
            f"one cannot. store={new.url} use one that honours create-if-absent"
        ) from error


def _body(members: StoreSet) -> Stores:
    return Stores(members.ids, members.write_quorum, members.sequencer)


def _require_certain(state: LogState, backend: Backend) -> None:
    if state.stale_reason:
        raise ConflictError(
            f"the set of stores changes only if the newest record is known for certain. "
            f"why={state.stale_reason} stores={[store.url for store in stores_of(backend)]}"
        )


class LogCoverage:
    """Up to which position each store is known to list every log record, by store id.

    A store that was away lacks the records that were written meanwhile. Not thread-safe. Positions
    that were seen are not listed again.
    """

    def __init__(self) -> None:
        self._complete: dict[str, int] = {}
        self.compared: set[str] = set()
        """The ids of the stores whose listings were compared with those of the others."""

    def first_gap(self, store: Backend, store_id: str, *, upto_seq: int) -> int | None:
        """The first position below ``upto_seq`` with no record in ``store``; None if all are there.

        Cost: one list from the first position not seen yet. Raises UnavailableError.
        """
        complete = self._complete.get(store_id, 0)
        if complete >= upto_seq:
            return None
        seqs = {seq for seq, _ in positions(store, complete)}
        while complete in seqs:
            complete += 1
        self._complete[store_id] = complete
        return complete if complete < upto_seq else None
