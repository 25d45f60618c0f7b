"""The two copies of each small object on a store that holds a log alone: right bytes from either.

Several stores mend each other; a lone one has only its own second copies, and the digests that
records, commits and manifests name.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.records import RECORD_BYTES_MAX, decode_record
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.reader import log_objects, read_at, second_job_record, second_record
from ckpt.maintenance.copies import CopyCheck, CopyStatus, WholeObject, flip_back
from ckpt.maintenance.copy_io import check_whole
from ckpt.maintenance.scrub.report import ScrubContext


def counted_alone(store: Backend, seq: int) -> bytes | None:
    """The record at ``seq`` of a log that ``store`` holds alone, if its first copy is damaged.

    From the second copy, else from the first by undoing the damage of one byte. None if neither
    is possible. Raises UnavailableError.
    """
    if (second := second_record(store, seq)) is not None:
        return second.encode()
    try:
        data = read_at(store, seq, settled=False)
    except (NotFoundError, IntegrityError):
        return None
    return flip_back(data, lambda trial: _is_record_at(trial, seq))


def job_record_alone(store: Backend) -> JobRecord | None:
    """The record in a damaged or missing ``ckpt.json``, as ``counted_alone``."""
    if (second := second_job_record(store)) is not None:
        return second
    try:
        data = read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX)
    except (NotFoundError, IntegrityError):
        return None
    mended = flip_back(data, _is_job_record)
    return None if mended is None else JobRecord.decode(mended)


def whole_alone(context: ScrubContext, want: WholeObject, *, bytes_max: int) -> bytes | None:
    """The bytes of a damaged or missing manifest or part of the context's one store, as
    ``counted_alone``."""
    store = context.stores[0]
    second = _second_of(want)
    copy, data = check_whole(store, second, bytes_max=bytes_max, pace=context.pace)
    if copy.status is CopyStatus.OK:
        return data
    try:
        data = read_alone(store, want.key, bytes_max=bytes_max)
    except (NotFoundError, IntegrityError, UnavailableError):
        return None
    return flip_back(data, lambda trial: digest_hex(trial) == want.digest)


def check_second_of(context: ScrubContext, want: WholeObject, data: bytes) -> None:
    """Check the second copy of a manifest or part whose right bytes are ``data``; write it if it is
    not right."""
    second = _second_of(want)
    copy, _ = check_whole(context.stores[0], second, bytes_max=len(data), pace=context.pace)
    _count(context, second.key, copy, data)


def check_second_records(context: ScrubContext) -> None:
    """Check the second copies of ``ckpt.json`` and of all records; write those that are not right.

    Where the first copy is still damaged nothing is done: it was counted. Raises Stopped. Cost: two
    small reads a record.
    """
    store = context.stores[0]
    try:
        for key, copy, data in _seconds(context, store):
            _count(context, key, copy, data)
    except UnavailableError as error:
        context.mark_away(0, str(error))


def _seconds(context: ScrubContext, store: Backend) -> Iterator[tuple[str, CopyCheck, bytes]]:
    """The second copies, each with its status and the right bytes."""
    try:
        data = read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX)
        if _is_job_record(data):
            yield keys.copy_key(keys.JOB_KEY), _compared(store, keys.JOB_KEY, data), data
    except (NotFoundError, IntegrityError):
        pass  # counted as the store's own fault
    for found in log_objects(store, 0):
        context.pace.take(found.stat.size_bytes)
        if found.round is not None:
            continue  # settled on several stores
        try:
            data = read_alone(store, found.stat.key, bytes_max=RECORD_BYTES_MAX)
        except (NotFoundError, IntegrityError):
            continue
        if _is_record_at(data, found.seq):
            # A record outside of folders has its copy where all copies of its position are.
            key = keys.log_key(found.seq)
            yield keys.copy_key(key), _compared(store, key, data), data


def _compared(store: Backend, key: str, data: bytes) -> CopyCheck:
    try:
        held = read_alone(store, keys.copy_key(key), bytes_max=RECORD_BYTES_MAX)
    except NotFoundError:
        return CopyCheck(CopyStatus.MISSING, "it is not there")
    except IntegrityError as error:
        return CopyCheck(CopyStatus.DAMAGED, str(error))
    if held == data:
        return CopyCheck(CopyStatus.OK)
    return CopyCheck(CopyStatus.DAMAGED, "it differs from the first copy")


def _count(context: ScrubContext, key: str, copy: CopyCheck, data: bytes) -> None:
    """A copy that is missing is no damage: stores had none before this release, and its writer may
    have died."""
    if copy.status is CopyStatus.OK:
        context.findings.stores[0].count(copy.status)
        return
    written = (
        copy.status is not CopyStatus.UNREADABLE
        and 0 in context.writable
        and context.put(0, key, data)
    )
    if copy.status is not CopyStatus.MISSING:
        context.count_object(key, {0: copy}, repaired=(0,) if written else ())


def _second_of(want: WholeObject) -> WholeObject:
    return WholeObject(keys.copy_key(want.key), want.digest, want.size_bytes)


def _is_record_at(data: bytes, seq: int) -> bool:
    try:
        return decode_record(data).seq == seq
    except (IntegrityError, FormatVersionError):
        return False


def _is_job_record(data: bytes) -> bool:
    try:
        JobRecord.decode(data)
    except (IntegrityError, FormatVersionError):
        return False
    return True
