"""Which of the given stores take part in a scrub, by what their ``ckpt.json`` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.commit_quorum import is_stand_in
from ckpt.log.reader import read_all

READY = "ready"
HEADLESS = "headless"
EMPTY = "empty"
AWAY = "away"


@dataclass(frozen=True, slots=True)
class Seat:
    """One store's part in a scrub: its role (see ``StoreTally``), its record where there is one, and what is wrong."""

    role: str
    record: JobRecord | None = None
    problem: str = ""
    damaged: bool = False
    """Its ``ckpt.json`` is there and can't be read, rather than gone."""
    newer: FormatVersionError | None = None
    """It says that a newer release wrote it: believed only where no other store's can be read."""


def seat_all(stores: Sequence[Backend]) -> list[Seat]:
    """Ask each store what it is. Raises FormatVersionError where they are of a newer release."""
    seats = read_all(list(stores), _seat)
    newer = next((seat.newer for seat in seats if seat.newer is not None), None)
    if newer is not None and not any(seat.role == READY for seat in seats):
        raise newer
    return seats


def common_record(stores: Sequence[Backend], seats: Sequence[Seat]) -> JobRecord | None:
    """The job record that the stores agree in but for their own ids; None where none can be read.

    Raises UsageError where they are of different jobs or hold different logs, and where one store is named twice.
    """
    found: dict[str, int] = {}
    first: tuple[int, JobRecord] | None = None
    for number, seat in enumerate(seats):
        if seat.record is None:
            continue
        if seat.record.store_id in found:
            other = stores[found[seat.record.store_id]].url
            raise UsageError(
                f"two of the stores are one and the same, or one is a plain copy of the other. "
                f"one={other} other={stores[number].url} store_id={seat.record.store_id} name each store once; "
                "make replicas with ckpt sync, not by copying files"
            )
        found[seat.record.store_id] = number
        if first is None:
            first = (number, seat.record)
        elif (first[1].job, first[1].log_id) != (seat.record.job, seat.record.log_id):
            raise UsageError(
                f"the stores do not hold one log. one={stores[first[0]].url} its_job={first[1].job!r} "
                f"other={stores[number].url} its_job={seat.record.job!r} "
                f"same_job_other_log={first[1].job == seat.record.job} leave one out"
            )
    return None if first is None else first[1]


def lost_id(members: Sequence[str] | None, seats: Sequence[Seat], number: int) -> str | None:
    """The id that the headless store ``number`` must have had: the only one of ``members`` that no other store has.

    Empty where it had none that counts: ``members`` is None (a log in one store names no ids), or all of them are others. None
    where that can't be known. Pure.
    """
    if members is None:
        return ""
    others = [seat for at, seat in enumerate(seats) if at != number]
    if any(seat.record is None for seat in others):
        return None
    left = {member for member in members if not is_stand_in(member)} - {
        seat.record.store_id for seat in others if seat.record is not None
    }
    return None if len(left) > 1 else left.pop() if left else ""


def _seat(store: Backend) -> Seat:
    try:
        return Seat(READY, JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX)))
    except UnavailableError as error:
        return Seat(AWAY, problem=str(error))
    except IntegrityError as error:
        return Seat(HEADLESS, problem=str(error), damaged=True)
    except FormatVersionError as error:
        return Seat(HEADLESS, problem=str(error), damaged=True, newer=error)
    except NotFoundError:
        pass
    try:
        first = next(islice(store.list(keys.LOG), 1), None)
    except UnavailableError as error:
        return Seat(AWAY, problem=str(error))
    if first is None:
        return Seat(EMPTY, problem=f"nothing is there. store={store.url} mount it, or fill it with ckpt sync")
    return Seat(HEADLESS, problem=f"it holds a log but no {keys.JOB_KEY}")
