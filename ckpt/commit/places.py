"""Finding or making a log on several stores: their ``ckpt.json``, and the record that says which they are."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.commit.claims import silent
from ckpt.commit.copies import Copies
from ckpt.commit.gather import Silent
from ckpt.errors import ConflictError, NotFoundError, UnavailableError, UsageError
from ckpt.manifest.job import JobRecord


@dataclass(frozen=True, slots=True)
class Place:
    """Where a log lies: its job and id."""

    job: str
    log_id: str


def open_places(copies: Copies, *, write_quorum: int, job: str | None, create: bool) -> Place:
    """The log on these stores; made for ``job`` where they are empty and ``create`` is set.

    Raises NotFoundError where there is none, UnavailableError where too few answer to know, UsageError where the stores belong
    to several logs or to another job.
    """
    found = copies.jobs()
    place = _common(copies, found)
    if place is None:
        _require_answers(copies, found, write_quorum)
        if not create:
            raise NotFoundError(
                f"no ckpt store here yet. stores={list(copies.urls)} save a snapshot first, or check the addresses"
            )
        if job is None:
            raise UsageError(f"new stores need their job's name. stores={list(copies.urls)} pass job=")
        place = Place(job, secrets.token_hex(16))
    if job is not None and place.job != job:
        raise UsageError(
            f"the stores belong to another job. stores={list(copies.urls)} their_job={place.job!r} asked={job!r} "
            f"use other prefixes, or that job's name"
        )
    return _make(copies, found, place, write_quorum) if create else place


def _common(copies: Copies, found: Sequence[JobRecord | Silent | None]) -> Place | None:
    places: dict[Place, list[str]] = {}
    ids: dict[str, str] = {}
    for url, record in zip(copies.urls, found, strict=True):
        if isinstance(record, JobRecord):
            places.setdefault(Place(record.job, record.log_id), []).append(url)
            if record.store_id in ids:
                raise UsageError(f"two addresses are one store. stores={[ids[record.store_id], url]} leave one out")
            ids[record.store_id] = url
    if len(places) > 1:
        told = "; ".join(f"{place.job!r} on {urls}" for place, urls in places.items())
        raise UsageError(
            f"the stores hold different logs. {told} name stores of one, or add one with `ckpt stores add`"
        )
    return next(iter(places), None)


def _require_answers(copies: Copies, found: Sequence[JobRecord | Silent | None], write_quorum: int) -> None:
    """A log was made on W stores at least, so these many that have none are enough to know that there is none."""
    empty = sum(one is None for one in found)
    if empty < len(found) - write_quorum + 1:
        why = silent(copies, {n: one for n, one in enumerate(found) if isinstance(one, Silent)})
        raise UnavailableError(f"too few stores answer to know whether there is a log. {why} repeat later")


def _make(copies: Copies, found: Sequence[JobRecord | Silent | None], place: Place, write_quorum: int) -> Place:
    """Write ``ckpt.json`` where a log that has not begun needs one. The first store that is made decides whose it is."""
    begun = any(isinstance(one, JobRecord) for one in found)
    made = 0
    why: dict[int, Silent] = {}
    for number, record in enumerate(found):
        if isinstance(record, Silent):
            why[number] = record
        elif record is not None:
            made += 1
        elif begun and made + sum(isinstance(one, JobRecord) for one in found[number:]) >= write_quorum:
            continue  # it came back empty: it is filled before it counts again
        else:
            there = copies.make(number, JobRecord(job=place.job, store_id=secrets.token_hex(16), log_id=place.log_id))
            if isinstance(there, Silent):
                why[number] = there
                continue
            if (there.job, there.log_id) != (place.job, place.log_id):
                if made or there.job != place.job:
                    raise ConflictError(
                        f"another process makes a log on these stores at the same time. store={copies.urls[number]} "
                        f"its_job={there.job!r} repeat"
                    )
                place = Place(there.job, there.log_id)
            made += 1
    if made < write_quorum:
        raise UnavailableError(f"too few stores could be made. made={made} needed={write_quorum} {silent(copies, why)}")
    return place
