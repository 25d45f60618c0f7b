"""The records that scrubs leave in the stores: when the last one ended, and what it verified.

They outlive the process that scrubbed, so that processes that live less than a day take turns, and
retention knows which snapshot's bytes were really read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys
from ckpt.format.scrubs import SCRUB_BYTES_MAX, ScrubRecord
from ckpt.log.state import Committed

RECORDS_KEPT = 2
"""How many records a store keeps: the last one may turn out unreadable."""

CLOCKS_APART_MS = 60_000
"""A record that is further in the future is of a clock that was wrong."""


def scrubbed_s_ago(stores: Sequence[Backend], *, now_unix_ms: int) -> float | None:
    """How long ago the last scrub ended of which any store knows; None: never.

    By the clocks of the machines that scrubbed; a record of a clock that was ahead counts as very
    old, so that it puts nothing off. Raises UnavailableError if no store answers. Costs one short
    list a store.
    """
    times = [seq for _, seqs in _recorded(stores) for seq in seqs]
    if not times:
        return None
    credible = [seq for seq in times if seq <= now_unix_ms + CLOCKS_APART_MS]
    return max(0.0, (now_unix_ms - max(credible, default=0)) / 1000)


def last_record(stores: Sequence[Backend]) -> ScrubRecord | None:
    """The newest readable record that any store has, and that names a snapshot; None if there is
    none.

    One that names none may only say from when on time counts, written while the stores that knew
    of earlier scrubs did not answer: it takes nothing away from what those verified.

    Raises UnavailableError if no store answers.
    """
    found = [(seq, store) for store, seqs in _recorded(stores) for seq in seqs]
    for seq, store in sorted(found, key=lambda one: one[0], reverse=True):
        try:
            data = read_alone(store, keys.scrub_key(seq), bytes_max=SCRUB_BYTES_MAX)
            record = ScrubRecord.decode(data)
        except (IntegrityError, FormatVersionError, NotFoundError, UnavailableError):
            continue  # an older record, or another store's, says less or the same
        if record.verified:
            return record
    return None


def record_scrub(
    stores: Sequence[Backend], verified: Iterable[Committed], *, now_unix_ms: int
) -> None:
    """Record on each store that a scrub has ended, and delete older records and those of clocks
    that were ahead. A store without ``ckpt.json`` is left alone.

    Raises UnavailableError if no store took it.
    """
    entries = frozenset((entry.snapshot, entry.manifest_digest) for entry in verified)
    data = ScrubRecord(entries).encode()
    errors: list[UnavailableError] = []
    for store in stores:
        try:
            if store.stat(keys.JOB_KEY) is None:
                continue  # it may be a disk that is not mounted: nothing is written there
            store.put(keys.scrub_key(now_unix_ms), [data])
            seqs = _seqs(store)
            ahead = [seq for seq in seqs if seq > now_unix_ms + CLOCKS_APART_MS]
            for seq in [*ahead, *seqs[: len(seqs) - len(ahead)][:-RECORDS_KEPT]]:
                store.delete(keys.scrub_key(seq))
        except UnavailableError as error:
            errors.append(error)
    if len(errors) == len(stores):
        raise errors[0]


def _recorded(stores: Sequence[Backend]) -> list[tuple[Backend, list[int]]]:
    found: list[tuple[Backend, list[int]]] = []
    errors: list[UnavailableError] = []
    for store in stores:
        try:
            found.append((store, _seqs(store)))
        except UnavailableError as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    return found


def _seqs(store: Backend) -> list[int]:
    parsed = (keys.parse_scrub_key(stat.key) for stat in store.list(keys.SCRUBS))
    return sorted(seq for seq in parsed if seq is not None)
