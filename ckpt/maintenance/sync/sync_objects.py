"""Copying manifests, parts and packs to a replica: what isn't there, verified on the way, never damage."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from itertools import groupby

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import read_checked, read_object
from ckpt.errors import IntegrityError, NotFoundError
from ckpt.format.digest import digest_hex
from ckpt.format.manifest import PART_STORED_BYTES_MAX
from ckpt.maintenance.copies import Pack, Place, What, Whole
from ckpt.maintenance.copies_pace import Pace
from ckpt.maintenance.copies_walk import Walk
from ckpt.maintenance.copy_io import chunk_problem, look_pack, look_whole, wrong_chunk
from ckpt.maintenance.sync_budget import Budget
from ckpt.save.chunks import PACK_BYTES_MAX

Want = Whole | Pack


def missing_objects(
    store: Backend, wanted: Sequence[Want], *, deep: bool = False, pace: Pace | None = None
) -> list[Want]:
    """What of ``wanted`` (in order of its keys) ``store`` does not list with the right length, or, ``deep``, not hold rightly.

    Quick: one list for each prefix, and nothing is read. A pack of unknown length counts as there where it is long enough.
    Deep reads everything that is there. Raises UnavailableError.
    """
    pace = pace or Pace()
    missing: list[Want] = []
    for prefix, group in groupby(wanted, key=lambda want: want.key.partition("/")[0] + "/"):
        some = list(group)
        # The first key without its last sign is just before it, whatever else there is.
        walk = Walk(store, prefix, after=some[0].key[:-1] if len(some[0].key) > len(prefix) + 1 else "")
        for want in some:
            stat = walk.take(want.key)
            if stat is None or not fits(want, stat) or (deep and not _right(store, want, pace)):
                missing.append(want)
    return missing


def fits(want: Want, stat: Stat) -> bool:
    """Whether an object of that length can be what is wanted. Pure."""
    if want.size_bytes is not None:
        return stat.size_bytes == want.size_bytes
    return stat.size_bytes >= want.end_bytes if isinstance(want, Pack) else stat.size_bytes > 0


def copy_object(source: Backend, store: Backend, want: Want, *, budget: Budget, pace: Pace) -> int:
    """Copy one object, all of it that has a digest verified in memory first; its length.

    Raises IntegrityError where ``source`` has it nowhere rightly, what either store raises, and Stopped.
    """
    if isinstance(want, Whole):
        data = read_object(
            source,
            want.key,
            lambda found: None if digest_hex(found) == want.digest else "its bytes differ from their digest",
            bytes_max=want.size_bytes or PART_STORED_BYTES_MAX,
        )
        pace.take(2 * len(data))
        store.put(want.key, [data])
        return len(data)
    stat = source.stat(want.key)
    if stat is None:
        raise NotFoundError(f"no such object. key={want.key} store={source.url}")
    size_bytes = max(want.end_bytes, stat.size_bytes if stat.size_bytes <= PACK_BYTES_MAX else 0)
    with budget.holding(size_bytes):
        memory = memoryview(mmap.mmap(-1, max(size_bytes, 1)))[:size_bytes]
        pace.take(2 * size_bytes)
        _read_pack(source, want, memory, min(stat.size_bytes, size_bytes))
        store.put(want.key, [memory])
    return size_bytes


def _read_pack(source: Backend, pack: Pack, memory: memoryview, there: int) -> None:
    """Fill ``memory`` with a copy of the pack that is right as a whole, or else with each chunk from wherever it is right."""

    def check(found: memoryview) -> str | None:
        if len(found) < pack.end_bytes:
            return "it ends too early"
        bad = wrong_chunk(found, pack)
        return None if bad is None else f"a chunk is not right. offset_bytes={bad[1].offset_bytes}"

    try:
        read_checked(source, pack.key, memory[:there], check)
    except IntegrityError:
        for place in pack.places:
            at = place[1]
            piece = memory[at.offset_bytes : at.offset_bytes + at.stored_bytes]
            read_checked(source, pack.key, piece, _chunk_check(place), offset_bytes=at.offset_bytes)


def _chunk_check(place: Place) -> Callable[[memoryview], str | None]:
    return lambda stored: chunk_problem(stored, place)


def _right(store: Backend, want: Want, pace: Pace) -> bool:
    if isinstance(want, Pack):
        return look_pack(store, want, pace=pace).what is What.OK
    return look_whole(store, want, bytes_max=want.size_bytes or PART_STORED_BYTES_MAX, pace=pace)[0].what is What.OK
