"""How a scrub begins: who is there, whose log it is, and what every store holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.events import Tell
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, decode_record
from ckpt.format.store import JobRecord
from ckpt.maintenance.copies_pace import Pace
from ckpt.maintenance.replica import claim_replica
from ckpt.maintenance.scrub.log import LogFindings, Truth, compare_logs
from ckpt.maintenance.scrub.report import Bench
from ckpt.maintenance.scrub.scrub_facts import Findings, StoreTally
from ckpt.maintenance.scrub.scrub_noted import Noted
from ckpt.maintenance.scrub.scrub_roles import AWAY, EMPTY, HEADLESS, READY, Seat, common_record, lost_id, seat_all

RECORDS_TRIED_MAX = 100
"""How many records of a store without ``ckpt.json`` are tried for the job's name."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What a scrub knows once all logs are read. ``common``: what the stores' records agree in; None where none can be read."""

    bench: Bench
    seats: Sequence[Seat]
    common: JobRecord | None
    log: LogFindings
    noted: Noted


def begin(
    stores: Sequence[Backend],
    write_quorum: int,
    *,
    mend: bool,
    fill_empty: bool,
    truth: Truth | None,
    tell: Tell,
    pace: Pace,
) -> Begun:
    """Read everything but objects. Writes at most the ``ckpt.json`` of empty stores that are to be filled.

    Raises UsageError where the stores do not belong together, NotFoundError where none is a store, FormatVersionError,
    UnavailableError where none answers, and Stopped.
    """
    seats = seat_all(stores)
    common = common_record(stores, seats)
    job = common.job if common is not None else _job_without_head(stores, seats)
    fresh: list[int] = []
    for number, seat in enumerate(seats):
        if seat.role == EMPTY and mend and fill_empty and common is not None:
            seats[number] = Seat(READY, claim_replica(stores[number], common), "it was empty, and is a replica now")
            fresh.append(number)
    writable = {number for number, seat in enumerate(seats) if mend and seat.role in (READY, HEADLESS)}
    findings = Findings([_tally(store, seat) for store, seat in zip(stores, seats, strict=True)], write_quorum)
    bench = Bench(tuple(stores), findings, writable, tell, pace)
    # A replica that was made just now holds nothing, so it has no say in what counts.
    ids = {n: seat.record.store_id if seat.record else f"headless-{n}" for n, seat in enumerate(seats)}
    ids |= dict.fromkeys(fresh, "")
    log, noted = _compare(bench, ids, job, truth)
    known = _known_heads(seats, log)
    if known:
        # Now it is known which of the log's stores a headless one is, so it counts like any other.
        log, noted = _compare(bench, ids | known, job, truth)
    for number, why in log.silent.items():
        bench.lose(number, why)
    if not bench.active:
        raise UnavailableError(f"no store answers. stores={[store.url for store in stores]} repeat later")
    return Begun(bench, seats, common, log, noted)


def _compare(bench: Bench, ids: dict[int, str], job: str, truth: Truth | None) -> tuple[LogFindings, Noted]:
    noted = Noted()
    stores = {number: bench.stores[number] for number in bench.active}
    return compare_logs(stores, ids, job, note=noted, pace=bench.pace, truth=truth), noted


def _known_heads(seats: Sequence[Seat], log: LogFindings) -> dict[int, str]:
    members = log.state.stores
    if members is None:
        return {}
    found = {n: lost_id(members.ids, seats, n) for n, seat in enumerate(seats) if seat.role == HEADLESS}
    return {number: known for number, known in found.items() if known}


def _tally(store: Backend, seat: Seat) -> StoreTally:
    return StoreTally(
        url=store.url, role=seat.role, store_id=seat.record.store_id if seat.record else "", problem=seat.problem
    )


def _job_without_head(stores: Sequence[Backend], seats: Sequence[Seat]) -> str:
    """The job that the log itself names, where no store has a ``ckpt.json`` that can be read."""
    for store, seat in zip(stores, seats, strict=True):
        if seat.role != HEADLESS:
            continue
        for stat in islice(store.list(keys.LOG), RECORDS_TRIED_MAX):
            try:
                return decode_record(read_alone(store, stat.key, bytes_max=RECORD_BYTES_MAX)).job
            except (IntegrityError, FormatVersionError, NotFoundError):
                continue
    if all(seat.role == AWAY for seat in seats):
        raise UnavailableError(f"no store answers. why={[seat.problem for seat in seats]} repeat later")
    raise NotFoundError(f"no ckpt store here. why={[seat.problem for seat in seats]} check the addresses")
