"""The records that scrubs leave in the stores: when the last one ended, and what it verified.

They outlive the process that scrubbed, so that processes that live less than a day take turns, and
retention knows which snapshot's bytes were really read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys
from ckpt.format.scrubs import SCRUB_BYTES_MAX, ScrubCursor, ScrubRecord
from ckpt.log.state import Committed

RECORDS_KEPT = 2
"""How many records a store keeps: the last one may turn out unreadable."""

CLOCKS_APART_MS = 60_000
"""A record that is further in the future is of a clock that was wrong."""

CURSOR_EVERY_S = 60.0
"""How often a scrub notes where it is: what is read since is read again if its process dies."""

CURSOR_KEPT_MS = 7 * 24 * 3600 * 1000
"""A scrub that nobody went on with for so long begins anew: what it read says little now."""


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

    def record(store: Backend) -> None:
        store.put(keys.scrub_key(now_unix_ms), [data])
        seqs = _seqs(store)
        ahead = [seq for seq in seqs if seq > now_unix_ms + CLOCKS_APART_MS]
        for seq in [*ahead, *seqs[: len(seqs) - len(ahead)][:-RECORDS_KEPT]]:
            store.delete(keys.scrub_key(seq))
        store.delete(keys.SCRUB_CURSOR_KEY)

    _on_each(stores, record)


class ScrubCursors:
    """Where in the stores a scrub that is longer than its process's life is gone on with.

    ``every_s``: how often it is noted at most. ``now_unix_ms``: this machine's clock.
    """

    def __init__(
        self,
        stores: Sequence[Backend],
        *,
        every_s: float = CURSOR_EVERY_S,
        now_unix_ms: Callable[[], int] = lambda: int(time.time() * 1000),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores = tuple(stores)
        self._every_s = every_s
        self.now_unix_ms = now_unix_ms
        self._clock = clock
        self._kept_s = clock()

    def read(self) -> ScrubCursor | None:
        """Where the newest scrub is that was not ended since; None: begin anew.

        Raises UnavailableError if no store answers. Cost: a short list and a small read a store.
        """
        now_unix_ms = self.now_unix_ms()
        newest = now_unix_ms + CLOCKS_APART_MS
        seqs = [seq for _, seqs in _recorded(self._stores) for seq in seqs]
        ended = max((seq for seq in seqs if seq <= newest), default=0)
        found: list[ScrubCursor] = []
        for store in self._stores:
            try:
                data = read_alone(store, keys.SCRUB_CURSOR_KEY, bytes_max=SCRUB_BYTES_MAX)
                found.append(ScrubCursor.decode(data))
            except (IntegrityError, FormatVersionError, NotFoundError, UnavailableError):
                continue  # another store's says the same, and without any all is read again
        oldest = max(ended, now_unix_ms - CURSOR_KEPT_MS)
        credible = [cursor for cursor in found if oldest <= cursor.at_unix_ms <= newest]
        return max(credible, key=lambda cursor: (cursor.at_unix_ms, cursor.last_pack), default=None)

    def is_due(self) -> bool:
        """Whether it is time to note where the scrub is."""
        return self._clock() - self._kept_s >= self._every_s

    def keep(self, cursor: ScrubCursor, *, among: Sequence[Backend] | None = None) -> None:
        """Note on each store where the scrub is; ``among``: only on these, which still answer.

        Raises UnavailableError if no store took it.
        """
        self._kept_s = self._clock()
        data = cursor.encode()
        stores = self._stores if among is None else among
        _on_each(stores, lambda store: store.put(keys.SCRUB_CURSOR_KEY, [data]))


def _on_each(stores: Sequence[Backend], act: Callable[[Backend], object]) -> None:
    """``act`` on each store that has its ``ckpt.json``. Raises UnavailableError if none could."""
    errors: list[UnavailableError] = []
    for store in stores:
        try:
            if store.stat(keys.JOB_KEY) is None:
                continue  # it may be a disk that is not mounted: nothing is written there
            act(store)
        except UnavailableError as error:
            errors.append(error)
    if errors and len(errors) == len(stores):
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
