"""Read access to single copies of objects: verified reads, listings, workers and a rate limit.

Nothing here writes to a store.
"""

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

BURST_S = 0.25
"""How long unused rate may be caught up. A longer burst would disturb others on the same link."""


class Stopped(Exception):  # noqa: N818  a signal to the caller, not an error
    """The stop event was set. Callers within this package catch it; it never leaves the package."""


class MaintenancePace:
    """A token bucket of ``bytes_per_s`` (None: no limit) that raises Stopped once ``stop`` is set.

    Thread-safe. ``wait`` sleeps for the seconds given, and returns True early if ``stop`` is set.
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
        """When the rate limit has room for the next byte."""
        self.moved_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` may be moved. Raises Stopped."""
        self.check()
        with self._lock:
            self.moved_bytes += size_bytes
            if self._bytes_per_s is None:
                return
            now = self._clock()
            # Time that was not used is caught up for BURST_S at most.
            start = max(self._free_s, now - BURST_S)
            self._free_s = start + size_bytes / self._bytes_per_s
        # Outside the lock: other threads book their share meanwhile.
        if start > now and self._wait(start - now):
            raise Stopped

    def check(self) -> None:
        """Raises Stopped if ``stop`` is set."""
        if self._stop.is_set():
            raise Stopped


# ---- verified reads of one copy

PIECE_BYTES = 8 << 20
"""Largest request: a slow link still answers in time, and it bounds a reader's scratch memory."""


def check_whole(
    store: Backend, want: WholeObject, *, bytes_max: int, pace: MaintenancePace
) -> tuple[CopyCheck, bytes]:
    """Check ``store``'s copy of a whole object; its bytes, empty unless they are right.

    Errors of the store become a status; raises only Stopped.
    """
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
        message = f"another length. size_bytes={len(data)} expected={want.size_bytes}"
        return CopyCheck(CopyStatus.DAMAGED, message), b""
    if digest_hex(data) != want.digest:
        return CopyCheck(CopyStatus.DAMAGED, "its bytes differ from their digest"), b""
    return OK, data


def check_pack(store: Backend, pack: Pack, *, pace: MaintenancePace) -> CopyCheck:
    """Read every referenced chunk of ``pack`` and compare it with its digest.

    Memory: one request and one chunk. Errors of the store become a status; raises only Stopped.
    """
    chunk_reads = (ChunkRead(*chunk, "", None, ()) for chunk in pack.chunks)
    reads = list(join_reads(chunk_reads, PIECE_BYTES))
    memory = memoryview(bytearray(max((read.size_bytes for read in reads), default=0)))
    bad: set[ChunkRef] = set()
    first_problem = ""
    for read in reads:
        try:
            problem = _check_range(store, read, memory[: read.size_bytes], bad, pace)
        except NotFoundError:
            return CopyCheck(CopyStatus.MISSING, "it is not there", all_bad=True)
        except UnavailableError as error:
            return CopyCheck(CopyStatus.UNREADABLE, str(error), all_bad=True)
        first_problem = first_problem or problem
    if bad:
        message = f"{first_problem} chunks={len(bad)} of={len(pack.chunks)}"
        return CopyCheck(CopyStatus.DAMAGED, message, frozenset(bad))
    return OK


def assemble_pack(
    stores: Sequence[Backend], pack: Pack, repair: CopyRepair, *, pace: MaintenancePace
) -> memoryview | None:
    """Read the whole pack as ``repair`` says; None unless every chunk is right in the result.

    Chunks are verified in the memory that is returned, not in an earlier read: that memory is what
    will be written. Bytes between chunks are the source's. Takes memory of the pack's size. Raises
    what the stores raise, and Stopped.
    """
    stat = stores[repair.source].stat(pack.key)
    if stat is None:
        return None
    # A length above what any pack has is damage: bytes behind the last chunk are then not copied,
    # or a broken store could demand any amount of memory.
    size_bytes = max(pack.end_bytes, stat.size_bytes if stat.size_bytes <= PACK_BYTES_MAX else 0)
    memory = memoryview(mmap.mmap(-1, max(size_bytes, 1)))[:size_bytes]
    stored_bytes = min(stat.size_bytes, size_bytes)
    for start in range(0, stored_bytes, PIECE_BYTES):
        piece = memory[start : min(start + PIECE_BYTES, stored_bytes)]
        pace.take(len(piece))
        stores[repair.source].read_into(pack.key, piece, offset_bytes=start)
    for (_, at), store in repair.patches:
        piece = memory[at.offset_bytes : at.offset_bytes + at.stored_bytes]
        pace.take(len(piece))
        stores[store].read_into(pack.key, piece, offset_bytes=at.offset_bytes)
    return memory if first_wrong_chunk(memory, pack) is None else None


def first_wrong_chunk(memory: memoryview, pack: Pack) -> ChunkRef | None:
    """The first chunk of ``pack`` that is wrong in ``memory``, which holds the whole pack."""
    for chunk in pack.chunks:
        at = chunk[1]
        stored = memory[at.offset_bytes : at.offset_bytes + at.stored_bytes]
        if chunk_problem(stored, chunk) is not None:
            return chunk
    return None


def chunk_problem(stored: memoryview, chunk: ChunkRef) -> str | None:
    """What is wrong with the stored bytes of a chunk, or None."""
    expected, at = chunk
    raw = stored
    if at.codec is not Codec.RAW:
        raw = memoryview(bytearray(min(at.raw_bytes, CHUNK_BYTES)))
        try:
            decode_chunk(stored, at, raw)
        except IntegrityError as error:
            return f"a chunk does not decode: {error}"
    if len(raw) != at.raw_bytes or digest(raw) != expected:
        return "a chunk's bytes differ from their digest."
    return None


def _check_range(
    store: Backend, read: PackRead, memory: memoryview, bad: set[ChunkRef], pace: MaintenancePace
) -> str:
    """Add the wrong chunks of one request's range to ``bad``; the first problem, or ""."""
    pace.take(read.size_bytes)
    try:
        store.read_into(read.pack, memory, offset_bytes=read.offset_bytes)
    except IntegrityError:
        if len(read.chunks) > 1:
            # The copy is too short somewhere in this range; chunks before that may be right.
            singles = [
                PackRead(read.pack, c.location.offset_bytes, c.location.stored_bytes, (c,))
                for c in read.chunks
            ]
            problems = [
                _check_range(store, single, memory[: single.size_bytes], bad, pace)
                for single in singles
            ]
            return next((problem for problem in problems if problem), "")
        bad.add((read.chunks[0].digest, read.chunks[0].location))
        return "it ends too early."
    first_problem = ""
    for read_chunk in read.chunks:
        chunk = (read_chunk.digest, read_chunk.location)
        start = read_chunk.location.offset_bytes - read.offset_bytes
        problem = chunk_problem(memory[start : start + read_chunk.location.stored_bytes], chunk)
        if problem is not None:
            bad.add(chunk)
            first_problem = first_problem or problem
    return first_problem


# ---- ListingWalk: a listing merged with expected keys, both ascending


class ListingWalk:
    """The objects below ``prefix`` with keys above ``after``.

    Ask for keys in ascending order. Objects between them are counted as orphans: nothing refers to
    them.
    """

    def __init__(self, store: Backend, prefix: str, *, after: str = "") -> None:
        self._entries: Iterator[Stat] = iter(store.list(prefix, after=after))
        self._next: Stat | None = None
        self._ended = False
        self.orphans = 0
        self.orphan_bytes = 0

    def take(self, key: str) -> Stat | None:
        """The entry of ``key``, or None if the listing has none."""
        self.skip(key)
        if self._next is None or self._next.key != key:
            return None
        entry, self._next = self._next, None
        return entry

    def skip(self, key: str | None, *, count: bool = True) -> None:
        """Skip everything before ``key`` (None: the rest); ``count`` it as orphans."""
        while (entry := self._peek()) is not None and (key is None or entry.key < key):
            self.orphans += count
            self.orphan_bytes += entry.size_bytes if count else 0
            self._next = None

    def _peek(self) -> Stat | None:
        if self._next is None and not self._ended:
            self._next = next(self._entries, None)
            self._ended = self._next is None
        return self._next


# ---- map_in_order: bounded parallel work with ordered results

K = TypeVar("K")
V = TypeVar("V")

THREADS_MAX = 32


def map_in_order(
    items: Iterable[K], work: Callable[[K], V], *, threads: int
) -> Generator[tuple[K, V], None, None]:
    """Yield each item and ``work(item)`` in order, with up to ``threads`` items in flight.

    With one thread the work runs in the caller. The first error in item order is raised at its
    turn. Closing the generator early waits for the items in flight.
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
