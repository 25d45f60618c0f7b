"""Opening a log: which stores it is on, whether it exists, and its first record on several
stores."""

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
from ckpt.log.high_water import HighWaterMark
from ckpt.log.quorum import NoAnswer, placeholder_id
from ckpt.log.replicas import LogReplicas
from ckpt.log.replicated import ReplicatedLog, silent_stores
from ckpt.log.sequencers import Appended, KeyTaken, WriteUnknown, external_sequencer
from ckpt.log.state import LogState


@dataclass(frozen=True, slots=True)
class LogLocation:
    """The log of some stores: its job and id. ``fresh``: no store that answered belonged to any
    log.

    ``ids``: each store's id, in the user's order; empty if it did not answer or belongs to no log.
    """

    job: str
    log_id: str
    fresh: bool = False
    ids: tuple[str, ...] = ()


def locate_log(
    replicas: LogReplicas, *, write_quorum: int, job: str | None, create: bool
) -> LogLocation:
    """The log on these stores; created for ``job`` if they are empty and ``create`` is set.

    Raises NotFoundError if there is none, UnavailableError if too few stores answer to know,
    UsageError if the stores belong to several logs or to another job.
    """
    records = replicas.job_records()
    location = _common(replicas, records, write_quorum)
    if location is None:
        # A log that is made over another one would be a second history.
        _require_answers(replicas, records, write_quorum)
        if not create:
            raise NotFoundError(
                f"no ckpt store here yet. stores={list(replicas.urls)} save a snapshot first, or "
                "check the addresses"
            )
        if job is None:
            raise UsageError(
                f"new stores need their job's name. stores={list(replicas.urls)} pass job="
            )
        location = LogLocation(job, secrets.token_hex(16), fresh=True)
    if job is not None and location.job != job:
        raise UsageError(
            f"the stores belong to another job. stores={list(replicas.urls)} "
            f"their_job={location.job!r} "
            f"asked={job!r} use other prefixes, or that job's name"
        )
    return _make(replicas, records, location, write_quorum) if create else location


def _common(
    replicas: LogReplicas, records: Sequence[JobRecord | NoAnswer | None], write_quorum: int
) -> LogLocation | None:
    """The log that the stores belong to; None if no store that answered has one.

    If several logs were left half made, it is the one that has a record; else the one on most
    stores, because no log has a record before W stores are made.
    """
    locations: dict[LogLocation, list[int]] = {}
    ids: dict[str, str] = {}
    for number, record in enumerate(records):
        if isinstance(record, JobRecord):
            locations.setdefault(LogLocation(record.job, record.log_id), []).append(number)
            url = replicas.urls[number]
            if record.store_id in ids:
                raise UsageError(
                    f"two addresses are one store. stores={[ids[record.store_id], url]} leave one "
                    "out"
                )
            ids[record.store_id] = url
    return (
        _choose(replicas, locations, len(records), write_quorum)
        if len(locations) > 1
        else next(iter(locations), None)
    )


def _choose(
    replicas: LogReplicas,
    locations: Mapping[LogLocation, Sequence[int]],
    stores: int,
    write_quorum: int,
) -> LogLocation:
    listing = "; ".join(
        f"{location.job!r} on {[replicas.urls[n] for n in numbers]}"
        for location, numbers in locations.items()
    )
    has_records = {n: replicas.has_records(n) for numbers in locations.values() for n in numbers}
    if unanswered := {
        n: answer for n, answer in has_records.items() if isinstance(answer, NoAnswer)
    }:
        raise UnavailableError(
            f"the stores say that they hold different logs. {listing} "
            f"{silent_stores(replicas, unanswered)} "
            "repeat later"
        )
    logs = [
        location for location, numbers in locations.items() if any(has_records[n] for n in numbers)
    ]
    best = min(logs or locations, key=lambda location: (-len(locations[location]), location.log_id))
    others = sum(len(numbers) for location, numbers in locations.items() if location != best)
    if (
        len({location.job for location in locations}) > 1
        or len(logs) > 1
        or (not logs and stores - others < write_quorum)
    ):
        raise UsageError(
            f"the stores hold different logs. {listing} name stores of one, or add one with `ckpt "
            f"stores add`; if the creation of a log was interrupted, delete its {keys.JOB_KEY}"
        )
    return best


def _require_answers(
    replicas: LogReplicas, records: Sequence[JobRecord | NoAnswer | None], write_quorum: int
) -> None:
    """Raise UnavailableError unless enough stores are known to be empty.

    A log is made on at least W stores, so R - W + 1 empty ones show that there is none.
    """
    empty = sum(record is None for record in records)
    if empty < len(records) - write_quorum + 1:
        silent = silent_stores(
            replicas,
            {n: record for n, record in enumerate(records) if isinstance(record, NoAnswer)},
        )
        raise UnavailableError(
            f"too few stores answer to know whether there is a log. {silent} repeat later"
        )


def _make(
    replicas: LogReplicas,
    records: Sequence[JobRecord | NoAnswer | None],
    location: LogLocation,
    write_quorum: int,
) -> LogLocation:
    """Write ``ckpt.json`` on stores of a log that has not begun. The first store made decides the
    id."""
    ids = [
        record.store_id
        if isinstance(record, JobRecord) and record.log_id == location.log_id
        else ""
        for record in records
    ]
    made_numbers = [number for number, store_id in enumerate(ids) if store_id]
    if made_numbers and (
        None not in records
        or any(replicas.has_records(number) is not False for number in made_numbers)
    ):
        # A store without ``ckpt.json`` beside a log that has begun came back empty. It must be
        # filled before it gets one, or it would count while it lacks records.
        return replace(location, ids=tuple(ids))
    unanswered = {
        number: record for number, record in enumerate(records) if isinstance(record, NoAnswer)
    }
    if len(records) - len(unanswered) < write_quorum:
        # Then nothing is made: a half-made log could later hide the log of a silent store.
        raise UnavailableError(
            f"too few stores answer. needed={write_quorum} {silent_stores(replicas, unanswered)} "
            "repeat "
            "later"
        )
    for number in [number for number, record in enumerate(records) if record is None]:
        made = replicas.make_store(
            number,
            JobRecord(job=location.job, store_id=secrets.token_hex(16), log_id=location.log_id),
        )
        if isinstance(made, NoAnswer):
            unanswered[number] = made
            continue
        if (made.job, made.log_id) != (location.job, location.log_id):
            if any(ids) or made.job != location.job:
                raise ConflictError(
                    "another process makes a log on these stores at the same time. "
                    f"store={replicas.urls[number]} its_job={made.job!r} repeat"
                )
            # Another process made the first store; both continue with its log.
            location = replace(location, log_id=made.log_id)
        ids[number] = made.store_id
    if sum(map(bool, ids)) < write_quorum:
        raise UnavailableError(
            f"too few stores could be made. made={sum(map(bool, ids))} needed={write_quorum} "
            f"{silent_stores(replicas, unanswered)}"
        )
    return replace(location, ids=tuple(ids))


# ---- open: the log behind a backend, and its first record

FIRST_TRIES_MAX = 8
"""How often the first record is appended again after another process was faster."""


def open_log(backend: Backend, *, job: str | None, create: bool, mark: HighWaterMark) -> LogAccess:
    """The log behind ``backend``; ``mark`` learns its id. Raises as ``Journal.open`` does."""
    if not isinstance(backend, MultiStoreBackend):
        record = open_store(backend, job=job, create=create)
        mark.log_id = record.store_id
        return SingleStoreLog(backend, record)
    replicas = LogReplicas(backend.stores)
    location = locate_log(replicas, write_quorum=backend.write_quorum, job=job, create=create)
    mark.log_id = location.log_id
    mark.look()
    several = ReplicatedLog(backend, replicas, job=location.job, log_id=location.log_id, mark=mark)
    if create:
        _begin(several, backend, location)
    return several


def _begin(log: ReplicatedLog, backend: MultiStoreBackend, location: LogLocation) -> None:
    """Write the first record, which names the log's stores, unless it is there.

    Stores that had a ``ckpt.json`` before may belong to a log of which the answering ones hold
    nothing: one missed everything, another came back empty and is being filled. So then all stores
    must answer.
    """
    for _ in range(FIRST_TRIES_MAX):
        state = log.read_new(log.read_start()[0])
        if state.next_seq > 0:
            require_store_set(state, backend)
        if state.next_seq == 1 and state.hole is None:
            # Nothing can follow the first record before it is confirmed, and it may come to
            # nothing.
            match log.confirm_last(state):
                case WriteUnknown(reason):
                    raise UnavailableError(
                        "the log's first record is on too few stores yet. "
                        f"why={reason} repeat later"
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
        if log.silent and not location.fresh:
            silent = [log.replicas.urls[number] for number in sorted(log.silent)]
            raise UnavailableError(
                "the log may have begun on stores that do not answer. "
                f"stores={list(log.replicas.urls)} silent={silent} repeat when all answer"
            )
        ids_now = [now or then for now, then in zip(log.ids, location.ids, strict=True)]
        ids = tuple(store_id or placeholder_id(number) for number, store_id in enumerate(ids_now))
        if sum(bool(store_id) for store_id in ids_now) < backend.write_quorum:
            raise UnavailableError(
                f"too few stores answer to begin the log. stores={list(log.replicas.urls)} repeat "
                "later"
            )
        body = Stores(ids, backend.write_quorum, _choose_sequencer(log, backend.write_quorum))
        record = make_record(
            body, job=log.job, seq=0, epoch=0, write_id=secrets.token_hex(16), prev=""
        )
        try:
            result = log.append(state, record)
        except FencedError:
            continue  # another process began the log with another sequencer
        if isinstance(result, Appended):
            return
        if isinstance(result, WriteUnknown):
            raise UnavailableError(
                f"the log could not be begun. stores={list(log.replicas.urls)} why={result.reason} "
                "repeat later"
            )
    raise UnavailableError(
        f"other writers came first every time. stores={list(log.replicas.urls)} repeat later"
    )


def require_store_set(state: LogState, backend: MultiStoreBackend) -> None:
    """Raise UsageError if the log is on another number of stores, or has another quorum, than
    given."""
    urls = [store.url for store in backend.stores]
    if state.stores is None:
        if state.next_seq > 0:
            raise UsageError(
                f"the log is on one store. stores={urls} add the others with `ckpt stores add` "
                "first"
            )
        return
    known = (len(state.stores.ids), state.stores.write_quorum)
    if known != (len(urls), backend.write_quorum):
        raise UsageError(
            f"the log is on {known[0]} stores with a write quorum of {known[1]}. "
            f"given={len(urls)} write_quorum={backend.write_quorum} stores={urls} name those, or "
            "change it with `ckpt stores`"
        )


def _choose_sequencer(log: ReplicatedLog, write_quorum: int) -> str:
    """The sequencer of a new log: its stores if all create a key only once, else etcd or a file.

    A store that does not create only once would have a vote that is never known, so a split could
    never be settled.
    """
    answering = [number for number, store_id in enumerate(log.ids) if store_id]
    able = log.replicas.create_only_stores(answering)
    if log.replicas.not_create_only([number for number in answering if number not in able]):
        return external_sequencer(log.log_id, start=0)
    if len(able) >= write_quorum:
        return BY_STORES
    # A file sequencer binds the log to this machine for good, so it is chosen only for stores that
    # answer and cannot create only once, never because a store cannot be asked now.
    raise UnavailableError(
        "cannot learn whether the stores create a key only once. "
        f"stores={list(log.replicas.urls)} repeat later, or grant permission to write"
    )
