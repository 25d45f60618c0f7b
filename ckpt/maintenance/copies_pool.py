"""Work on many objects at once, answers in order, never more in flight than was asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

THREADS_MAX = 32


def in_order(items: Iterable[K], work: Callable[[K], V], *, threads: int) -> Generator[tuple[K, V], None, None]:
    """Each item and ``work`` of it, in order, up to ``threads`` at once; no thread is started for one at a time.

    The first error in order is raised when its turn comes. Whoever stops early waits for what is in flight.
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
