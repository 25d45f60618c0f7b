"""Carrying out a read plan: read, verify every chunk against its digest, deliver. Decides nothing.
No torch.

A chunk whose stored copy is damaged is read from the other places that hold the same digest, if the
caller knows them.

A raw chunk whose bytes are one run of one output is read straight into it: one request, then the
digest while the bytes are in cache. Everything else goes through scratch memory that each worker
keeps. Reading and digesting release the GIL, so that workers scale over cores.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend, read_again
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format.canonical import digest
from ckpt.format.codec import decode_chunk
from ckpt.restore.plan import ChunkCopy, ChunkRead, PackRead, ReadPlan
from ckpt.values import ChunkLocation, Codec, Digest

THREADS_MAX = 64
"""Upper limit of workers: beyond it a Python process gains nothing."""

BUDGET_BYTES = 256 << 20
"""Scratch memory that a fetch may use if its caller gives no limit."""

OnProgress = Callable[[int], None]
"""Called with the raw bytes that were just verified, by one worker at a time."""

ChunkPlacesOf = Callable[[Digest], Iterable[ChunkLocation]]
"""Every known place of the chunk with that digest, best first. Asked only after damage, by several
workers at once; its errors pass through.
"""


class CachedRange(Protocol):
    """A range of a pack in memory that processes of this machine share."""

    def read_into(self, out: memoryview) -> bool:
        """Fill ``out`` if the range is there; its bytes may be wrong."""
        ...

    def keep(self, data: memoryview) -> None:
        """Keep the range for others, if there is room."""
        ...


class RangeCache(Protocol):
    """Where ranges may be that another process of this machine has read."""

    def range(
        self, pack: str, offset_bytes: int, size_bytes: int
    ) -> AbstractContextManager[CachedRange | None]:
        """The range, held for as long as the context lasts; None if it can't be had."""
        ...


Bytes = NDArray[np.uint8]

_WORDS: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("V16"),
}


@dataclass(frozen=True, slots=True)
class DamagedChunk:
    """One stored range that is not intact. ``what``: ``missing``, ``short``, ``mismatch`` or
    ``unreadable``.
    """

    chunk: ChunkRead
    what: str
    message: str


def threads_best(backend: Backend) -> int:
    """Number of workers that fill the link to ``backend`` from this machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(backend.capabilities().concurrency_best, THREADS_MAX, 16 * cores))


def fetch(
    backend: Backend,
    plan: ReadPlan,
    outputs: Sequence[memoryview | NDArray[np.generic]],
    *,
    threads: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
    on_progress: OnProgress | None = None,
) -> None:
    """Read what ``plan`` says into ``outputs``, one writable contiguous buffer for each want.

    Returns only when every byte was verified. ``budget_bytes`` bounds scratch memory, down to one
    request. Raises IntegrityError if stored bytes are missing, short or differ from their digest
    (``outputs`` then hold anything), and UnavailableError if the store does not answer. No worker
    touches ``outputs`` after this returned or raised.
    """
    with Fetcher(backend, threads=threads, budget_bytes=budget_bytes) as fetcher:
        fetcher.fetch(plan, outputs, on_progress=on_progress)


class Fetcher:
    """Workers and scratch memory that serve many fetches from one store; close it when done.

    ``places_of``: where else a chunk may be read if its own place is damaged. Each place is tried
    before ``fetch`` raises IntegrityError; ``scan`` reports the damage all the same. ``cache``:
    where other processes of this machine leave what they read.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        threads: int | None = None,
        budget_bytes: int = BUDGET_BYTES,
        places_of: ChunkPlacesOf | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        self._backend = backend
        self._places_of = places_of
        self._cache = cache
        self.read_elsewhere: dict[Digest, str] = {}
        """The chunks whose own place was damaged and that were read from another one; why."""
        self._threads = threads_best(backend) if threads is None else max(1, threads)
        self._budget_bytes = budget_bytes
        self._scratch: list[_ScratchMemory] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and free the scratch memory; idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._scratch.clear()

    def fetch(
        self,
        plan: ReadPlan,
        outputs: Sequence[memoryview | NDArray[np.generic]],
        *,
        on_progress: OnProgress | None = None,
    ) -> None:
        """As the function ``fetch``."""
        targets = _targets(plan, outputs)

        def work(read: PackRead, scratch: _ScratchMemory) -> int:
            try:
                return self._deliver_once(plan.snapshot, read, targets, scratch)
            except (IntegrityError, UnavailableError) as error:
                if self._places_of is None or not _is_damage(error):
                    raise
            for chunk in read.chunks:
                self._deliver_from_any(plan.snapshot, chunk, targets, scratch)
            return sum(chunk.location.raw_bytes for chunk in read.chunks)

        self._run(plan, work, on_progress)

    def _deliver_once(
        self, snapshot: str, read: PackRead, targets: list[Bytes], scratch: _ScratchMemory
    ) -> int:
        """Deliver a request's chunks from the cache if they are there, else from the store."""
        if self._cache is None:
            return _deliver_read(self._backend, snapshot, read, targets, scratch)
        with self._cache.range(read.pack, read.offset_bytes, read.size_bytes) as cached:
            return _deliver_read(self._backend, snapshot, read, targets, scratch, cached=cached)

    def _deliver_from_any(
        self, snapshot: str, chunk: ChunkRead, targets: list[Bytes], scratch: _ScratchMemory
    ) -> None:
        """Deliver one chunk from its own place, else from another one of equal bytes. Raises the
        first place's error if all are damaged.
        """
        own = chunk.location
        first: IntegrityError | UnavailableError | None = None
        for at in itertools.chain([own], self._places_of(chunk.digest) if self._places_of else ()):
            if first is not None and (at == own or at.raw_bytes != own.raw_bytes):
                continue
            scratch.grow(at.stored_bytes, at.raw_bytes)
            read = PackRead(
                at.pack, at.offset_bytes, at.stored_bytes, (replace(chunk, location=at),)
            )
            try:
                _deliver_read(self._backend, snapshot, read, targets, scratch)
            except (IntegrityError, UnavailableError) as error:
                if not _is_damage(error):
                    raise
                first = first or error
                continue
            if first is not None:
                self.read_elsewhere[chunk.digest] = str(first)
            return
        assert first is not None, "its own place was tried"
        raise first

    def scan(self, plan: ReadPlan, *, on_progress: OnProgress | None = None) -> list[DamagedChunk]:
        """Read and verify everything in ``plan``, deliver nothing, and return all damage instead of
        raising.
        """
        damaged: list[DamagedChunk] = []

        def work(read: PackRead, scratch: _ScratchMemory) -> int:
            damaged.extend(_scan_read(self._backend, plan.snapshot, read, scratch))
            return sum(chunk.location.raw_bytes for chunk in read.chunks)

        self._run(plan, work, on_progress)
        damaged.sort(
            key=lambda damage: (damage.chunk.location.pack, damage.chunk.location.offset_bytes)
        )
        return damaged

    def _run(
        self,
        plan: ReadPlan,
        work: Callable[[PackRead, _ScratchMemory], int],
        on_progress: OnProgress | None,
    ) -> None:
        stored_bytes, raw_bytes = _scratch_bytes(plan)
        scratch_bytes = max(1, stored_bytes + raw_bytes)
        workers = max(1, min(self._threads, len(plan.reads), self._budget_bytes // scratch_bytes))
        while len(self._scratch) < workers:
            self._scratch.append(_ScratchMemory())
        for scratch in self._scratch[:workers]:
            scratch.grow(stored_bytes, raw_bytes)
        queue = _ReadQueue(plan.reads, on_progress)
        if workers == 1:
            queue.drain(work, self._scratch[0])
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ckpt-fetch")
            futures = [
                self._pool.submit(queue.drain, work, scratch) for scratch in self._scratch[:workers]
            ]
            try:
                for future in futures:
                    future.result()
            finally:
                queue.stop()
                for future in futures:
                    future.exception()
        if queue.error is not None:
            raise queue.error


class _ReadQueue:
    """Reads waiting for a worker; the first error empties it."""

    def __init__(self, reads: Sequence[PackRead], on_progress: OnProgress | None) -> None:
        self._lock = threading.Lock()
        self._reads: Iterator[PackRead] = iter(reads)
        self._on_progress = on_progress
        self._stopped = False
        self.error: CkptError | None = None

    def stop(self) -> None:
        self._stopped = True

    def drain(
        self, work: Callable[[PackRead, _ScratchMemory], int], scratch: _ScratchMemory
    ) -> None:
        try:
            while True:
                with self._lock:
                    read = None if self._stopped else next(self._reads, None)
                if read is None:
                    return
                done_bytes = work(read, scratch)
                if self._on_progress is not None:
                    with self._lock:
                        self._on_progress(done_bytes)
        except CkptError as error:
            self.stop()
            with self._lock:
                self.error = self.error or error
        except BaseException:
            self.stop()
            raise


class _ScratchMemory:
    """One worker's reused memory: stored bytes of one request, raw bytes of one chunk.
    Page-aligned, for direct I/O.
    """

    def __init__(self) -> None:
        self.stored: Bytes = np.empty(0, np.uint8)
        self.raw: Bytes = np.empty(0, np.uint8)

    def grow(self, stored_bytes: int, raw_bytes: int) -> None:
        if self.stored.size < stored_bytes:
            self.stored = np.frombuffer(mmap.mmap(-1, stored_bytes), np.uint8)
        if self.raw.size < raw_bytes:
            self.raw = np.frombuffer(mmap.mmap(-1, raw_bytes), np.uint8)


def _scratch_bytes(plan: ReadPlan) -> tuple[int, int]:
    stored_bytes = raw_bytes = 0
    for read in plan.reads:
        if _direct(read) is None:
            stored_bytes = max(stored_bytes, read.size_bytes)
            for chunk in read.chunks:
                if chunk.location.codec is not Codec.RAW:
                    raw_bytes = max(raw_bytes, chunk.location.raw_bytes)
    return stored_bytes, raw_bytes


def _direct(read: PackRead) -> ChunkCopy | None:
    """The copy whose place in its output can take the read's bytes as they arrive, or None."""
    chunk = read.chunks[0]
    if len(read.chunks) > 1 or chunk.location.codec is not Codec.RAW:
        return None
    for copy in chunk.copies:
        if copy.contiguous and copy.size_bytes == chunk.location.raw_bytes == read.size_bytes:
            return copy
    return None


def _targets(plan: ReadPlan, outputs: Sequence[memoryview | NDArray[np.generic]]) -> list[Bytes]:
    if len(outputs) != len(plan.output_bytes):
        raise UsageError(
            f"one output is needed for each want. wants={len(plan.output_bytes)} "
            f"outputs={len(outputs)}"
        )
    targets: list[Bytes] = []
    for number, (output, size_bytes) in enumerate(zip(outputs, plan.output_bytes, strict=True)):
        if not size_bytes:
            targets.append(np.empty(0, np.uint8))
            continue
        array = output if isinstance(output, np.ndarray) else np.frombuffer(output, np.uint8)
        if array.nbytes != size_bytes:
            raise UsageError(
                f"an output has the wrong length. output={number} bytes={array.nbytes} "
                f"wanted={size_bytes}"
            )
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise UsageError(f"an output must be contiguous and writable. output={number}")
        targets.append(array.reshape(-1).view(np.uint8))
    return targets


def _is_damage(error: CkptError) -> bool:
    """Whether the bytes of one place are damaged: wrong, missing, or on a bad sector of a disk.

    A disk that is gone answers in the same way as a bad sector; then no other place answers either.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, IntegrityError):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.EIO:
            return True
        cause = cause.__cause__
    return False


def _deliver_read(
    backend: Backend,
    snapshot: str,
    read: PackRead,
    targets: list[Bytes],
    scratch: _ScratchMemory,
    *,
    cached: CachedRange | None = None,
) -> int:
    direct = _direct(read)
    if direct is not None:
        chunk = read.chunks[0]
        start = direct.target_offset_bytes
        raw = targets[direct.output][start : start + direct.size_bytes]
        _read_verified(
            backend, snapshot, read, raw, lambda: _check(chunk, raw, snapshot), cached=cached
        )
        _deliver(raw, (copy for copy in chunk.copies if copy is not direct), targets)
        return raw.size
    stored = scratch.stored[: read.size_bytes]

    def deliver() -> None:
        # If a later chunk of this copy is damaged, the next copy is delivered over it.
        for chunk in read.chunks:
            raw = _raw(chunk, stored, read.offset_bytes, scratch, snapshot)
            _check(chunk, raw, snapshot)
            _deliver(raw, chunk.copies, targets)

    _read_verified(backend, snapshot, read, stored, deliver, cached=cached)
    return sum(chunk.location.raw_bytes for chunk in read.chunks)


def _scan_read(
    backend: Backend, snapshot: str, read: PackRead, scratch: _ScratchMemory
) -> list[DamagedChunk]:
    stored = scratch.stored[: read.size_bytes]
    damaged: list[DamagedChunk] = []

    def look(chunk: ChunkRead) -> None:
        _check(chunk, _raw(chunk, stored, read.offset_bytes, scratch, snapshot), snapshot)

    def look_at_all() -> None:
        for chunk in read.chunks:
            look(chunk)

    try:
        if isinstance(backend, MultiStoreBackend) or len(read.chunks) == 1:
            _read_verified(backend, snapshot, read, stored, look_at_all)
            return []
        _read(backend, snapshot, read, stored)
    except (IntegrityError, UnavailableError) as error:
        if len(read.chunks) == 1:
            return [_damage(read.chunks[0], error)]
        return [
            damage
            for chunk in read.chunks
            for damage in _scan_read(backend, snapshot, _alone(read, chunk), scratch)
        ]
    for chunk in read.chunks:
        try:
            look(chunk)
        except IntegrityError as error:
            if len(read.chunks) == 1:
                damaged.append(_damage(chunk, error))
                continue
            # Read again, by itself: the bytes may be stored right.
            damaged += _scan_read(backend, snapshot, _alone(read, chunk), scratch)
    return damaged


def _alone(read: PackRead, chunk: ChunkRead) -> PackRead:
    at = chunk.location
    return PackRead(read.pack, at.offset_bytes, at.stored_bytes, (chunk,))


def _damage(chunk: ChunkRead, error: CkptError) -> DamagedChunk:
    match error, error.__cause__:
        case UnavailableError(), _:
            kind = "unreadable"
        case _, NotFoundError():
            kind = "missing"
        case _, IntegrityError():
            kind = "short"
        case _:
            kind = "mismatch"
    return DamagedChunk(chunk, kind, str(error))


def _read_verified(
    backend: Backend,
    snapshot: str,
    read: PackRead,
    out: Bytes,
    check: Callable[[], None],
    *,
    cached: CachedRange | None = None,
) -> None:
    """Fill ``out`` from whichever copy does not make ``check`` raise, at the second try if need
    be. What was read from a store goes to ``cached``.
    """
    if cached is not None:
        if _is_right(cached, out, check):
            return
        _read_verified(backend, snapshot, read, out, check)
        cached.keep(out.data)
        return
    if isinstance(backend, MultiStoreBackend):
        read_again(lambda: _read_copies(backend, snapshot, read, out, check))
        return

    def once() -> None:
        _read(backend, snapshot, read, out)
        check()

    read_again(once)


def _is_right(cached: CachedRange, out: Bytes, check: Callable[[], None]) -> bool:
    if not cached.read_into(out.data):
        return False
    try:
        check()
    except IntegrityError:
        return False  # damaged in that memory: the store decides
    return True


def _read_copies(
    backend: MultiStoreBackend,
    snapshot: str,
    read: PackRead,
    out: Bytes,
    check: Callable[[], None],
) -> None:
    def problem(_: memoryview) -> str | None:
        try:
            check()
        except IntegrityError as error:
            return str(error)
        return None

    try:
        backend.read_checked(read.pack, out.data, problem, offset_bytes=read.offset_bytes)
    except (NotFoundError, IntegrityError) as error:
        fact = (
            "a pack is missing"
            if isinstance(error, NotFoundError)
            else "no copy of a pack is intact"
        )
        cause = error if isinstance(error, NotFoundError) else None
        raise IntegrityError(f"{_where(fact, read.chunks[0], snapshot)}: {error}") from cause


def _read(backend: Backend, snapshot: str, read: PackRead, out: Bytes) -> None:
    try:
        backend.read_into(read.pack, out.data, offset_bytes=read.offset_bytes)
    except (NotFoundError, IntegrityError) as error:
        chunk = read.chunks[0]
        fact = "a pack is missing" if isinstance(error, NotFoundError) else "a pack ends too early"
        raise IntegrityError(_where(fact, chunk, snapshot)) from error


def _raw(
    chunk: ChunkRead, stored: Bytes, start_bytes: int, scratch: _ScratchMemory, snapshot: str
) -> Bytes:
    at = chunk.location
    low = at.offset_bytes - start_bytes
    chunk_bytes = stored[low : low + at.stored_bytes]
    if at.codec is Codec.RAW:
        return chunk_bytes
    raw = scratch.raw[: at.raw_bytes]
    try:
        decode_chunk(chunk_bytes.data, at, raw.data)
    except IntegrityError as error:
        raise IntegrityError(
            f"{_where('a stored chunk does not decompress', chunk, snapshot)}: {error}"
        ) from None
    return raw


def _check(chunk: ChunkRead, raw: Bytes, snapshot: str) -> None:
    if raw.size != chunk.location.raw_bytes or digest(raw.data) != chunk.digest:
        raise IntegrityError(_where("stored bytes differ from their digest", chunk, snapshot))


def _where(fact: str, chunk: ChunkRead, snapshot: str) -> str:
    at = chunk.location
    owner = "" if chunk.rank is None else f" rank={chunk.rank}"
    return (
        f"{fact}. pack={at.pack} offset_bytes={at.offset_bytes} stored_bytes={at.stored_bytes} "
        f"leaf={chunk.leaf}{owner} snapshot={snapshot}"
    )


def _deliver(
    raw: Bytes, copies: Iterator[ChunkCopy] | Sequence[ChunkCopy], targets: list[Bytes]
) -> None:
    for copy in copies:
        target = targets[copy.output]
        if copy.contiguous:
            low, start, size = copy.source_offset_bytes, copy.target_offset_bytes, copy.size_bytes
            np.copyto(target[start : start + size], raw[low : low + size])
            continue
        dtype = _WORDS[copy.itemsize_bytes]
        source = np.ndarray(
            copy.shape, dtype, raw.data, copy.source_offset_bytes, copy.source_strides_bytes
        )
        destination = np.ndarray(
            copy.shape, dtype, target.data, copy.target_offset_bytes, copy.target_strides_bytes
        )
        np.copyto(destination, source)
