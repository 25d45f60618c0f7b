"""What several stores cost over one: puts of a pack and reads of a chunk, plain and over three
folders, as ratios.

    python benchmarks/replicated.py [folder]

Each measurement is the median of interleaved rounds. Reads come from the page cache: a disk or a
network only makes the ratio smaller.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.events import Event
from ckpt.format.canonical import digest
from ckpt.testing.contract import aligned_memory

PACK_BYTES = 64 << 20
CHUNK_BYTES = 4 << 20
ROUNDS = 15
READS = 64


def main() -> None:
    folder = Path(
        tempfile.mkdtemp(prefix="ckpt-replicated-", dir=sys.argv[1] if len(sys.argv) > 1 else None)
    )
    print(
        f"{platform.platform()} · {os.cpu_count()} cores · Python {platform.python_version()} · "
        f"{folder.parent}"
    )
    try:
        run(folder)
    finally:
        shutil.rmtree(folder)


def run(folder: Path) -> None:
    plain = FileBackend(folder / "plain")
    stores = [FileBackend(folder / name) for name in "abc"]
    several = ReplicatedBackend(stores, emit=tell)
    pack = aligned_memory(PACK_BYTES)
    np.frombuffer(pack, np.uint8)[:] = np.random.default_rng(1).integers(
        0, 256, PACK_BYTES, np.uint8
    )
    expected = digest(pack[:CHUNK_BYTES])
    out = aligned_memory(CHUNK_BYTES)

    def check(data: memoryview) -> str | None:
        return None if digest(data) == expected else "wrong"

    def read(store: Backend) -> None:
        for _ in range(READS):
            store.read_into("p", out)

    def read_checked() -> None:
        for _ in range(READS):
            several.read_checked("p", out, check)

    def read_plain_checked() -> None:
        for _ in range(READS):
            plain.read_into("p", out)
            check(out)

    def three_by_hand() -> None:
        for store in stores:
            store.put("p", [pack])

    plain.put("p", [pack])
    several.put("p", [pack])
    several.await_caught_up(60)
    compare("read 4 MiB", READS, lambda: read(plain), lambda: read(several))
    compare("read 4 MiB and check", READS, read_plain_checked, read_checked)
    compare(
        "put 64 MiB, three one by one : three at once",
        1,
        three_by_hand,
        lambda: several.put("p", [pack]),
    )
    compare(
        "put 64 MiB, one : three at once",
        1,
        lambda: plain.put("p", [pack]),
        lambda: several.put("p", [pack]),
    )
    print(
        "put: bytes copied in memory per pack: "
        f"{'0' if lends(stores) else f'{PACK_BYTES >> 20} MiB'}"
    )
    several.close()


def lends(stores: list[FileBackend]) -> bool:
    return all(hasattr(store, "put_lent") for store in stores)


def compare(what: str, calls: int, one: Callable[[], None], other: Callable[[], None]) -> None:
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for act, took in zip((one, other), times, strict=True):
            start = time.perf_counter()
            act()
            took.append((time.perf_counter() - start) / calls)
    left, right = (statistics.median(took) for took in times)
    print(f"{what}: {left * 1e3:.2f} ms : {right * 1e3:.2f} ms, ratio {right / left:.2f}")


def tell(event: Event) -> None:
    print(f"  [{event.kind}] {event.text}")


if __name__ == "__main__":
    main()
