"""The last writes of a scrub: log records in order, then folds, then a store's ``ckpt.json``.

By then a store has every object that a record may lead to, and every record before it. So at no
moment does a store's log name something that the store lacks.
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


def repair_log(
    context: ScrubContext,
    log: LogFindings,
    counted_record: CountedRecord | None,
    *,
    end: int | None = None,
) -> None:
    """Write the records that stores lack; what cannot be written stays in ``log.faults``.

    Each store gets them in ascending order, and none behind one that could not be written, nor at
    ``end`` or later. A store that lacks objects (``context.tainted``) gets none. Raises Stopped; a
    repeated call continues.
    """
    for number, faults in enumerate(log.faults):
        # A tainted store lacks an object that another store has; a record could name it.
        if number in context.writable and number not in context.tainted:
            _repair_store(context, log, number, faults, counted_record, end=end)


def repair_folds(context: ScrubContext, log: LogFindings) -> None:
    """Write the folds that stores lack; what cannot be written stays in ``log.folds``.

    Raises Stopped.
    """
    for index, fold in enumerate(log.folds):
        data = fold.data if fold.data is not None else _right_fold(context, log, fold)
        if data is None:
            continue
        wrong = tuple(
            number
            for number in fold.wrong
            if number not in context.writable
            or number in context.tainted
            or _lacks_records(log, number, fold.seq)
            or not context.put(number, keys.fold_key(fold.seq), data)
        )
        log.folds[index] = replace(fold, wrong=wrong)


def repair_job(
    context: ScrubContext,
    log: LogFindings,
    roles: Sequence[StoreRole],
    number: int,
    common: JobRecord | None,
) -> str | None:
    """Write the lost ``ckpt.json`` of the headless store ``number``; None, or why it was not done.

    A store that counts must hold everything, so its objects and log have to be complete before. A
    store that did not count gets a new id; see ``lost_id``.
    """
    role = roles[number]
    assert role.role == HEADLESS
    members = log.state.stores
    store_id = lost_id(None if members is None else members.ids, roles, number)
    if common is None and members is None and len(roles) == 1:
        # Both copies are lost, and nothing but the records tells whose log it is.
        common = JobRecord(job=log.state.job, store_id=secrets.token_hex(16))
        store_id = common.store_id
    elif common is not None and len(roles) == 1:
        store_id = common.store_id  # its own, from the second copy
    if common is None or store_id is None:
        return (
            f"{role.problem}; its id is unknown. restore {keys.JOB_KEY} from a backup, or replace "
            "the store"
        )
    if number not in context.writable:
        return f"{role.problem}; it was only compared"
    faults = log.faults[number]
    if number in context.tainted or faults.first or faults.second or log.hole is not None:
        return f"{role.problem}; it lacks objects or records, so its id is not restored"
    record = replace(common, store_id=store_id or secrets.token_hex(16))
    if not context.put(number, keys.JOB_KEY, record.encode()):
        return context.findings.stores[number].problem
    return None


def _repair_store(
    context: ScrubContext,
    log: LogFindings,
    number: int,
    faults: RecordFaults,
    counted_record: CountedRecord | None,
    *,
    end: int | None,
) -> None:
    todo = [(seq, keys.log_key(seq), False) for seq in faults.first]
    todo += [(seq, keys.settled_key(seq), True) for seq in faults.second]
    written = {False: 0, True: 0}
    try:
        for seq, key, second in sorted(todo):
            if end is not None and seq >= end:
                break
            data = _right_data(context, seq, log.digest(seq), counted_record)
            if data is None or not context.put(number, key, data):
                break  # a record behind a missing one would be a gap in the store's log
            written[second] += 1
    finally:
        # Also after Stopped. Both lists ascend, so what was written is at their beginning.
        del faults.first[: written[False]]
        del faults.second[: written[True]]


def _right_data(
    context: ScrubContext, seq: int, digest: str, counted_record: CountedRecord | None
) -> bytes | None:
    for number in context.active:
        try:
            data = right_record(context.stores[number], seq, digest)
        except UnavailableError:
            continue
        if data is not None:
            return data
    data = None if counted_record is None else counted_record(seq)
    return data if data is not None and is_record(data, digest) else None


def _right_fold(context: ScrubContext, log: LogFindings, fold: FoldFaults) -> bytes | None:
    key = keys.fold_key(fold.seq)
    for number in fold.right:
        try:
            data = read_alone(context.stores[number], key, bytes_max=FOLD_BYTES_MAX)
            state = decode_fold(data)
        except (NotFoundError, IntegrityError, FormatVersionError, UnavailableError):
            continue
        if (state.next_seq - 1, state.head_digest) == (fold.seq, log.digest(fold.seq)):
            return data
    return None


def _lacks_records(log: LogFindings, number: int, seq: int) -> bool:
    """Whether the store still lacks a record that the fold up to ``seq`` covers."""
    faults = log.faults[number]
    return any(missing <= seq for missing in (*faults.first, *faults.second))
