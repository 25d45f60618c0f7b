"""Finding or making a log on several stores: their ``ckpt.json``, and the record that says which
they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend
from ckpt.errors import ConflictError, FencedError, NotFoundError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.records import BY_STORES, Stores, make_record
from ckpt.format.store import JobRecord
from ckpt.log.access import LogAccess, SingleStoreLog, open_store
from ckpt.log.quorum import NoAnswer, placeholder_id
from ckpt.log.replicas import LogReplicas
from ckpt.log.replicated import ReplicatedLog, silent_stores
from ckpt.log.sequencers import Appended, KeyTaken, WriteUnknown, external_sequencer
from ckpt.log.state import LogState


@dataclass(frozen=True, slots=True)
class LogLocation:
    """Where a log lies: its job and id. ``fresh``: none of the stores that answered belonged to
    any.

    ``ids`` of its stores, in the user's order; empty for one that did not answer or belongs to no
    log.
    """

    job: str
    log_id: str
    fresh: bool = False
    ids: tuple[str, ...] = ()


def locate_log(
    copies: LogReplicas, *, write_quorum: int, job: str | None, create: bool
) -> LogLocation:
    """The log on these stores; made for ``job`` where they are empty and ``create`` is set.

    Raises NotFoundError where there is none, UnavailableError where too few answer to know,
    UsageError where the stores belong to several logs or to another job.
    """
    found = copies.job_records()
    place = _common(copies, found, write_quorum)
    if place is None:
        _require_answers(copies, found, write_quorum)
        if not create:
            raise NotFoundError(
                f"no ckpt store here yet. stores={list(copies.urls)} save a snapshot first, or "
                "check the addresses"
            )
        if job is None:
            raise UsageError(
                f"new stores need their job's name. stores={list(copies.urls)} pass job="
            )
        place = LogLocation(job, secrets.token_hex(16), fresh=True)
    if job is not None and place.job != job:
        raise UsageError(
            f"the stores belong to another job. stores={list(copies.urls)} their_job={place.job!r} "
            f"asked={job!r} "
            f"use other prefixes, or that job's name"
        )
    return _make(copies, found, place, write_quorum) if create else place


def _common(
    copies: LogReplicas, found: Sequence[JobRecord | NoAnswer | None], write_quorum: int
) -> LogLocation | None:
    """The log that the stores belong to.

    Of several whose making was cut short it is the one that has any record; else the one on most
    stores, since none has a record before it is on W.
    """
    places: dict[LogLocation, list[int]] = {}
    ids: dict[str, str] = {}
    for number, record in enumerate(found):
        if isinstance(record, JobRecord):
            places.setdefault(LogLocation(record.job, record.log_id), []).append(number)
            url = copies.urls[number]
            if record.store_id in ids:
                raise UsageError(
                    f"two addresses are one store. stores={[ids[record.store_id], url]} leave one "
                    "out"
                )
            ids[record.store_id] = url
    return (
        _choose(copies, places, len(found), write_quorum)
        if len(places) > 1
        else next(iter(places), None)
    )


def _choose(
    copies: LogReplicas, places: Mapping[LogLocation, Sequence[int]], stores: int, write_quorum: int
) -> LogLocation:
    told = "; ".join(
        f"{place.job!r} on {[copies.urls[n] for n in numbers]}" for place, numbers in places.items()
    )
    begun = {n: copies.has_records(n) for numbers in places.values() for n in numbers}
    if why := {n: one for n, one in begun.items() if isinstance(one, NoAnswer)}:
        raise UnavailableError(
            f"the stores say that they hold different logs. {told} {silent_stores(copies, why)} "
            "repeat later"
        )
    logs = [place for place, numbers in places.items() if any(begun[n] for n in numbers)]
    best = min(logs or places, key=lambda place: (-len(places[place]), place.log_id))
    others = sum(len(numbers) for place, numbers in places.items() if place != best)
    if (
        len({place.job for place in places}) > 1
        or len(logs) > 1
        or (not logs and stores - others < write_quorum)
    ):
        raise UsageError(
            f"the stores hold different logs. {told} name stores of one, or add one with `ckpt "
            "stores add`; of logs that were "
            f"never finished being made, delete the {keys.JOB_KEY}"
        )
    return best


def _require_answers(
    copies: LogReplicas, found: Sequence[JobRecord | NoAnswer | None], write_quorum: int
) -> None:
    """A log was made on W stores at least, so these many that have none are enough to know that
    there is none."""
    empty = sum(one is None for one in found)
    if empty < len(found) - write_quorum + 1:
        why = silent_stores(
            copies, {n: one for n, one in enumerate(found) if isinstance(one, NoAnswer)}
        )
        raise UnavailableError(
            f"too few stores answer to know whether there is a log. {why} repeat later"
        )


def _make(
    copies: LogReplicas,
    found: Sequence[JobRecord | NoAnswer | None],
    place: LogLocation,
    write_quorum: int,
) -> LogLocation:
    """Write ``ckpt.json`` where a log that has not begun needs one. The first store that is made
    decides whose it is."""
    ids = [
        one.store_id if isinstance(one, JobRecord) and one.log_id == place.log_id else ""
        for one in found
    ]
    known = [number for number, store_id in enumerate(ids) if store_id]
    if known and (
        None not in found or any(copies.has_records(number) is not False for number in known)
    ):
        # A store without a name beside a log came back empty: it is filled before it gets one.
        return replace(place, ids=tuple(ids))
    why = {number: one for number, one in enumerate(found) if isinstance(one, NoAnswer)}
    if len(found) - len(why) < write_quorum:
        # Nothing is made then: what is left behind could keep the log of a silent store from being
        # found.
        raise UnavailableError(
            f"too few stores answer. needed={write_quorum} {silent_stores(copies, why)} repeat "
            "later"
        )
    for number in [number for number, one in enumerate(found) if one is None]:
        there = copies.make_store(
            number, JobRecord(job=place.job, store_id=secrets.token_hex(16), log_id=place.log_id)
        )
        if isinstance(there, NoAnswer):
            why[number] = there
            continue
        if (there.job, there.log_id) != (place.job, place.log_id):
            if any(ids) or there.job != place.job:
                raise ConflictError(
                    "another process makes a log on these stores at the same time. "
                    f"store={copies.urls[number]} "
                    f"its_job={there.job!r} repeat"
                )
            place = replace(place, log_id=there.log_id)
        ids[number] = there.store_id
    if sum(map(bool, ids)) < write_quorum:
        raise UnavailableError(
            f"too few stores could be made. made={sum(map(bool, ids))} needed={write_quorum} "
            f"{silent_stores(copies, why)}"
        )
    return replace(place, ids=tuple(ids))


# Opening a log: which stores are meant, whether it is there, and its first record where it lies
# on several.

FIRST_TRIES_MAX = 8
"""How often the first record is claimed anew after another process came first."""


def open_log(backend: Backend, *, job: str | None, create: bool) -> LogAccess:
    """See ``Journal.open``."""
    if not isinstance(backend, MultiStoreBackend):
        return SingleStoreLog(backend, open_store(backend, job=job, create=create))
    copies = LogReplicas(backend.stores)
    place = locate_log(copies, write_quorum=backend.write_quorum, job=job, create=create)
    several = ReplicatedLog(backend, copies, job=place.job, log_id=place.log_id)
    if create:
        _begin(several, backend, place)
    return several


def _begin(log: ReplicatedLog, backend: MultiStoreBackend, place: LogLocation) -> None:
    """Write the first record, which says where the log lies. Nothing where it is written already.

    Stores that were not empty a moment ago may belong to a log of which those that answer have
    nothing: one that missed everything, and one that came back empty and is being filled.
    """
    for _ in range(FIRST_TRIES_MAX):
        state = log.read_new(log.read_start()[0])
        if state.next_seq > 0:
            require_store_set(state, backend)
        if state.next_seq == 1 and state.hole is None:
            match log.confirm_last(
                state
            ):  # nothing can follow before that, and it may come to nothing
                case WriteUnknown(why):
                    raise UnavailableError(
                        f"the log's first record is on too few stores yet. why={why} repeat later"
                    )
                case KeyTaken():
                    continue
        if state.next_seq > 0:
            return
        if state.hole is not None:
            raise UnavailableError(
                f"the log's first record can't be read. stores={list(log.replicas.urls)} "
                f"why={state.hole.reason} repeat later"
            )
        if log.silent and not place.fresh:
            silent = [log.replicas.urls[number] for number in sorted(log.silent)]
            raise UnavailableError(
                "the log may have begun on stores that do not answer. "
                f"stores={list(log.replicas.urls)} silent={silent} "
                "repeat when all answer"
            )
        known = [now or then for now, then in zip(log.ids, place.ids, strict=True)]
        ids = tuple(store_id or placeholder_id(number) for number, store_id in enumerate(known))
        if sum(bool(store_id) for store_id in known) < backend.write_quorum:
            raise UnavailableError(
                f"too few stores answer to begin the log. stores={list(log.replicas.urls)} repeat "
                "later"
            )
        body = Stores(ids, backend.write_quorum, _giver(log, backend.write_quorum))
        record = make_record(
            body, job=log.job, seq=0, epoch=0, write_id=secrets.token_hex(16), prev=""
        )
        try:
            made = log.append(state, record)
        except FencedError:
            continue  # another maker found that a file has to give out places, or that none has
        if isinstance(made, Appended):
            return
        if isinstance(made, WriteUnknown):
            raise UnavailableError(
                f"the log could not be begun. stores={list(log.replicas.urls)} why={made.reason} "
                "repeat later"
            )
    raise UnavailableError(
        f"other writers came first every time. stores={list(log.replicas.urls)} repeat later"
    )


def require_store_set(state: LogState, backend: MultiStoreBackend) -> None:
    """Raises UsageError where the log does not say what the user says: on how many stores it lies,
    and on how many it must."""
    urls = [store.url for store in backend.stores]
    if state.stores is None:
        if state.next_seq > 0:
            raise UsageError(
                f"the log is in one store. stores={urls} add the others with `ckpt stores add` "
                "first"
            )
        return
    known = (len(state.stores.ids), state.stores.write_quorum)
    if known != (len(urls), backend.write_quorum):
        raise UsageError(
            f"the log lies on {known[0]} stores with a write quorum of {known[1]}. "
            f"given={len(urls)} "
            f"write_quorum={backend.write_quorum} stores={urls} name those, or change it with "
            "`ckpt stores`"
        )


def _giver(log: ReplicatedLog, write_quorum: int) -> str:
    """Who gives out the places: the stores together where all create a key only once, or else etcd
    or a file of this machine.

    One that doesn't would have a vote that nobody can know, so that a split could never be settled.
    """
    answering = [number for number, store_id in enumerate(log.ids) if store_id]
    able = log.replicas.create_only_stores(answering)
    if log.replicas.not_create_only([number for number in answering if number not in able]):
        return external_sequencer(log.log_id, start=0)
    if len(able) >= write_quorum:
        return BY_STORES
    # A log is bound to this machine for good only where that must be: not because a store can't be
    # asked now.
    raise UnavailableError(
        "it can't be learned whether the stores create a key only once. "
        f"stores={list(log.replicas.urls)} repeat later, or grant "
        "permission to write"
    )
