"""Reading one store's copy of an object, and all of it that is known compared with its digest.
Nothing is written here."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import read_alone
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError
from ckpt.format.canonical import digest, digest_hex
from ckpt.format.codec import decode_chunk
from ckpt.maintenance.copies import (
    OK,
    ChunkRef,
    CopyCheck,
    CopyRepair,
    CopyStatus,
    Pack,
    WholeObject,
)
from ckpt.restore.plan import ChunkRead, PackRead, join_reads
from ckpt.save.chunks import PACK_BYTES_MAX
from ckpt.values import CHUNK_BYTES, Codec

# How fast upkeep may read and write, and that it can be told to stop: a token bucket that
# everything passes through.

BURST_S = 0.25
"""What was not used may be made up for this long; more would be felt by whoever shares the link."""


class Stopped(Exception):  # noqa: N818  a word to the caller, not a fault
    """Upkeep was told to stop. Never leaves the room."""


class MaintenancePace:
    """Lets ``bytes_per_s`` through in the long run (None: all), and raises Stopped once ``stop`` is
    set. Thread-safe.

    ``wait`` is given seconds and returns early, True, where ``stop`` is set meanwhile.
    """

    def __init__(
        self,
        bytes_per_s: float | None = None,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._stop = stop or threading.Event()
        self._clock = clock
        self._wait = wait or self._stop.wait
        self._lock = threading.Lock()
        self._free_s = clock()
        """When all that was let through so far has been paid for."""
        self.moved_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` may move. Raises Stopped."""
        self.check()
        with self._lock:
            self.moved_bytes += size_bytes
            if self._bytes_per_s is None:
                return
            now = self._clock()
            start = max(self._free_s, now - BURST_S)
            self._free_s = start + size_bytes / self._bytes_per_s
        if start > now and self._wait(start - now):
            raise Stopped

    def check(self) -> None:
        """Raises Stopped where ``stop`` is set."""
        if self._stop.is_set():
            raise Stopped


PIECE_BYTES = 8 << 20
"""Largest request: what a slow link can be asked for at once, and the scratch memory of one
reader."""


def check_whole(
    store: Backend, want: WholeObject, *, bytes_max: int, pace: MaintenancePace
) -> tuple[CopyCheck, bytes]:
    """What ``store`` has of an object that one digest is for, and its bytes where they are right.
    Raises Stopped only."""
    try:
        pace.take(want.size_bytes or 0)
        data = read_alone(store, want.key, bytes_max=bytes_max)
    except NotFoundError:
        return CopyCheck(CopyStatus.MISSING, "it is not there"), b""
    except IntegrityError as error:
        return CopyCheck(CopyStatus.DAMAGED, str(error)), b""
    except UnavailableError as error:
        return CopyCheck(CopyStatus.UNREADABLE, str(error)), b""
    if want.size_bytes is not None and len(data) != want.size_bytes:
        return CopyCheck(
            CopyStatus.DAMAGED, f"another length. size_bytes={len(data)} expected={want.size_bytes}"
        ), b""
    if digest_hex(data) != want.digest:
        return CopyCheck(CopyStatus.DAMAGED, "its bytes differ from their digest"), b""
    return OK, data


def check_pack(store: Backend, pack: Pack, *, pace: MaintenancePace) -> CopyCheck:
    """Read every chunk of ``pack`` that is referred to, and compare. Memory: one piece and one
    chunk. Raises Stopped only."""
    reads = list(
        join_reads((ChunkRead(*place, "", None, ()) for place in pack.chunks), PIECE_BYTES)
    )
    memory = memoryview(bytearray(max((read.size_bytes for read in reads), default=0)))
    bad: set[ChunkRef] = set()
    why = ""
    for read in reads:
        try:
            told = _look(store, read, memory[: read.size_bytes], bad, pace)
        except NotFoundError:
            return CopyCheck(CopyStatus.MISSING, "it is not there", all_bad=True)
        except UnavailableError as error:
            return CopyCheck(CopyStatus.UNREADABLE, str(error), all_bad=True)
        why = why or told
    if bad:
        return CopyCheck(
            CopyStatus.DAMAGED, f"{why} chunks={len(bad)} of={len(pack.chunks)}", frozenset(bad)
        )
    return OK


def assemble_pack(
    stores: Sequence[Backend], pack: Pack, mend: CopyRepair, *, pace: MaintenancePace
) -> memoryview | None:
    """The whole pack as ``mend`` says, every chunk of it verified in the memory that is returned;
    None where it isn't right.

    What lies between chunks is the source's. Takes memory of the pack's size. Raises what the
    stores raise, and Stopped.
    """
    stat = stores[mend.source].stat(pack.key)
    if stat is None:
        return None
    # Garbage behind a pack's end isn't copied, nor may it ask for any amount of memory.
    size_bytes = max(pack.end_bytes, stat.size_bytes if stat.size_bytes <= PACK_BYTES_MAX else 0)
    memory = memoryview(mmap.mmap(-1, max(size_bytes, 1)))[:size_bytes]
    there = min(stat.size_bytes, size_bytes)
    for start in range(0, there, PIECE_BYTES):
        piece = memory[start : min(start + PIECE_BYTES, there)]
        pace.take(len(piece))
        stores[mend.source].read_into(pack.key, piece, offset_bytes=start)
    for (_, at), store in mend.patches:
        piece = memory[at.offset_bytes : at.offset_bytes + at.stored_bytes]
        pace.take(len(piece))
        stores[store].read_into(pack.key, piece, offset_bytes=at.offset_bytes)
    return memory if first_wrong_chunk(memory, pack) is None else None


def first_wrong_chunk(memory: memoryview, pack: Pack) -> ChunkRef | None:
    """The first chunk of ``pack`` that ``memory``, which holds the pack from its start, does not
    hold rightly."""
    for place in pack.chunks:
        at = place[1]
        if (
            chunk_problem(memory[at.offset_bytes : at.offset_bytes + at.stored_bytes], place)
            is not None
        ):
            return place
    return None


def chunk_problem(stored: memoryview, place: ChunkRef) -> str | None:
    """What is wrong with the stored bytes of a chunk, or None."""
    wanted, at = place
    raw = stored
    if at.codec is not Codec.RAW:
        raw = memoryview(bytearray(min(at.raw_bytes, CHUNK_BYTES)))
        try:
            decode_chunk(stored, at, raw)
        except IntegrityError as error:
            return f"a chunk does not decode: {error}"
    if len(raw) != at.raw_bytes or digest(raw) != wanted:
        return "a chunk's bytes differ from their digest."
    return None


def _look(
    store: Backend, read: PackRead, memory: memoryview, bad: set[ChunkRef], pace: MaintenancePace
) -> str:
    """Adds what is wrong in one request's range to ``bad``; returns a word about the first of it,
    or nothing."""
    pace.take(read.size_bytes)
    try:
        store.read_into(read.pack, memory, offset_bytes=read.offset_bytes)
    except IntegrityError:
        if len(read.chunks) > 1:
            # It ends too early somewhere: the chunks before that may be right.
            alone = [
                PackRead(read.pack, c.location.offset_bytes, c.location.stored_bytes, (c,))
                for c in read.chunks
            ]
            words = [_look(store, one, memory[: one.size_bytes], bad, pace) for one in alone]
            return next((word for word in words if word), "")
        bad.add((read.chunks[0].digest, read.chunks[0].location))
        return "it ends too early."
    why = ""
    for chunk in read.chunks:
        place = (chunk.digest, chunk.location)
        start = chunk.location.offset_bytes - read.offset_bytes
        told = chunk_problem(memory[start : start + chunk.location.stored_bytes], place)
        if told is not None:
            bad.add(place)
            why = why or told
    return why


# A store's listing met with what ought to be there, both in key order: what is there too, and
# what is only there.


class ListingWalk:
    """The objects below ``prefix`` from after ``after`` on. Ask in ascending order; those passed
    over are counted as strays."""

    def __init__(self, store: Backend, prefix: str, *, after: str = "") -> None:
        self._entries: Iterator[Stat] = iter(store.list(prefix, after=after))
        self._next: Stat | None = None
        self._ended = False
        self.orphans = 0
        self.orphan_bytes = 0

    def take(self, key: str) -> Stat | None:
        """The entry of ``key``, or None where the listing has none."""
        self.skip(key)
        if self._next is None or self._next.key != key:
            return None
        found, self._next = self._next, None
        return found

    def skip(self, key: str | None, *, count: bool = True) -> None:
        """Pass over everything before ``key`` (None: all that is left), and ``count`` it as
        strays."""
        while (entry := self._peek()) is not None and (key is None or entry.key < key):
            self.orphans += count
            self.orphan_bytes += entry.size_bytes if count else 0
            self._next = None

    def _peek(self) -> Stat | None:
        if self._next is None and not self._ended:
            self._next = next(self._entries, None)
            self._ended = self._next is None
        return self._next


# Work on many objects at once, answers in order, never more in flight than was asked for.

K = TypeVar("K")
V = TypeVar("V")

THREADS_MAX = 32


def map_in_order(
    items: Iterable[K], work: Callable[[K], V], *, threads: int
) -> Generator[tuple[K, V], None, None]:
    """Each item and ``work`` of it, in order, up to ``threads`` at once; no thread is started for
    one at a time.

    The first error in order is raised when its turn comes. Whoever stops early waits for what is in
    flight.
    """
    if threads <= 1:
        for item in items:
            yield item, work(item)
        return
    threads = min(threads, THREADS_MAX)
    running: deque[tuple[K, Future[V]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-upkeep") as pool:
        try:
            for item in items:
                if len(running) >= threads:
                    done, future = running.popleft()
                    yield done, future.result()
                running.append((item, pool.submit(work, item)))
            while running:
                done, future = running.popleft()
                yield done, future.result()
        finally:
            for _, future in running:
                future.cancel()
            wait([future for _, future in running])
