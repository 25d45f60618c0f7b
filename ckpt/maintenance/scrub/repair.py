"""What is written last: log records in their order, folds, and a store's own ``ckpt.json``.

A store that gets a record has by then every object that the record may lead to, and every record
before it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys
from ckpt.format.store import JobRecord
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold
from ckpt.maintenance.scrub.log import (
    CountedRecord,
    FoldFaults,
    LogFindings,
    RecordFaults,
    is_record,
    right_record,
)
from ckpt.maintenance.scrub.report import HEADLESS, ScrubContext, StoreRole, lost_id


def repair_log(bench: ScrubContext, log: LogFindings, truth: CountedRecord | None) -> None:
    """Write the records that stores lack, each store's in ascending order; what can't be written
    stays in ``log.faults``.

    A store at which one can't be written gets none behind it, and neither does one that lacks
    objects (``bench.tainted``). Raises Stopped; calling it again goes on, for what is written is
    taken off the list.
    """
    for number, faults in enumerate(log.faults):
        if number in bench.writable and number not in bench.tainted:
            _repair_store(bench, log, number, faults, truth)


def repair_folds(bench: ScrubContext, log: LogFindings) -> None:
    """Write folds that stores lack, from a store that has them; what can't be written stays listed.
    Raises Stopped."""
    for place, fault in enumerate(log.folds):
        data = fault.data if fault.data is not None else _right_fold(bench, log, fault)
        if data is None:
            continue
        wrong = tuple(
            number
            for number in fault.wrong
            if number not in bench.writable
            or number in bench.tainted
            or _behind(log, number, fault.seq)
            or not bench.put(number, keys.fold_key(fault.seq), data)
        )
        log.folds[place] = replace(fault, wrong=wrong)


def repair_job(
    bench: ScrubContext,
    log: LogFindings,
    seats: Sequence[StoreRole],
    number: int,
    common: JobRecord | None,
) -> str | None:
    """Give a store that lost its ``ckpt.json`` the same one again; None where that was done, else
    why not.

    Its log must be whole, for a store that counts has everything. One that didn't count gets a new
    id. See ``lost_id``.
    """
    seat = seats[number]
    assert seat.role == HEADLESS
    members = log.state.stores
    lost = lost_id(None if members is None else members.ids, seats, number)
    if common is None or lost is None:
        return f"{seat.problem}; its id can't be known. bring {keys.JOB_KEY} back from a backup, or make the store anew"
    if number not in bench.writable:
        return f"{seat.problem}; it was only looked at"
    faults = log.faults[number]
    if number in bench.tainted or faults.first or faults.second or log.hole is not None:
        return f"{seat.problem}; it lacks objects or records, so it isn't given its id back"
    if not bench.put(
        number, keys.JOB_KEY, replace(common, store_id=lost or secrets.token_hex(16)).encode()
    ):
        return bench.findings.stores[number].problem
    return None


def _repair_store(
    bench: ScrubContext,
    log: LogFindings,
    number: int,
    faults: RecordFaults,
    truth: CountedRecord | None,
) -> None:
    todo = [(seq, keys.log_key(seq), False) for seq in faults.first]
    todo += [(seq, keys.settled_key(seq), True) for seq in faults.second]
    done = {False: 0, True: 0}
    try:
        for seq, key, second in sorted(todo):
            data = _right_data(bench, seq, log.digest(seq), truth)
            if data is None or not bench.put(number, key, data):
                break
            done[second] += 1
    finally:
        # Both are ascending, so what was done is what stands first.
        del faults.first[: done[False]]
        del faults.second[: done[True]]


def _right_data(
    bench: ScrubContext, seq: int, digest: str, truth: CountedRecord | None
) -> bytes | None:
    for number in bench.active:
        try:
            data = right_record(bench.stores[number], seq, digest)
        except UnavailableError:
            continue
        if data is not None:
            return data
    told = None if truth is None else truth(seq)
    return told if told is not None and is_record(told, digest) else None


def _right_fold(bench: ScrubContext, log: LogFindings, fault: FoldFaults) -> bytes | None:
    for number in fault.right:
        try:
            data = read_alone(
                bench.stores[number], keys.fold_key(fault.seq), bytes_max=FOLD_BYTES_MAX
            )
            state = decode_fold(data)
        except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
            continue
        if (state.next_seq - 1, state.head_digest) == (fault.seq, log.digest(fault.seq)):
            return data
    return None


def _behind(log: LogFindings, number: int, seq: int) -> bool:
    """Whether the store lacks a record that the fold up to ``seq`` is of."""
    faults = log.faults[number]
    return any(place <= seq for place in (*faults.first, *faults.second))
