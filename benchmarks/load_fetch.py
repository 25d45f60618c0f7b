"""How much slower is a verified fetch than reading the same bytes with nothing but preadv?

Both fill the same warm memory from the same warm files, in turns; the ratio is what counts. Run it
on an idle machine:

    python benchmarks/load_fetch.py --gib 1 --rounds 7
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ckpt.backends.file.store import FileBackend
from ckpt.log.catalog import load_index
from ckpt.restore.fetch import Fetcher, fetch
from ckpt.restore.plan import ReadPlan, Want, plan_reads
from ckpt.testing.sample import SampleWriter, tensor
from ckpt.values import CHUNK_BYTES, Box, SnapshotId


def shapes(total_bytes: int, tensors: int) -> list[int]:
    """Element counts of fp32 tensors as a transformer has them: a few large, most of them small."""
    large = total_bytes * 99 // 100 // 4 // max(1, tensors // 3)
    small = total_bytes // 100 // 4 // max(1, tensors - tensors // 3)
    return [large if i % 3 == 0 else small for i in range(tensors)]


def plain(root: Path, plan: ReadPlan, outputs: list[np.ndarray], threads: int) -> None:
    """Read as many bytes from the same packs, chunk by chunk, no digest, no names."""
    jobs: list[tuple[str, int, memoryview]] = []
    for read in plan.reads:
        at = 0
        view = memoryview(outputs[read.chunks[0].copies[0].output]).cast("B")
        start = min(
            read.chunks[0].copies[0].target_offset_bytes, max(0, len(view) - read.size_bytes)
        )
        while at < read.size_bytes:
            size = min(CHUNK_BYTES, read.size_bytes - at, len(view))
            jobs.append((read.pack, read.offset_bytes + at, view[start : start + size]))
            at += size
    line = iter(jobs)
    lock = threading.Lock()
    fds = {pack: os.open(root / pack, os.O_RDONLY) for pack in {read.pack for read in plan.reads}}

    def work() -> None:
        while True:
            with lock:
                job = next(line, None)
            if job is None:
                return
            os.preadv(fds[job[0]], [job[2]], job[1])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in fds.values():
        os.close(fd)


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tensors", type=int, default=304)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        random = np.random.default_rng(0)
        base = random.integers(0, 256, 64 << 20, dtype=np.uint8)
        arrays = [
            np.roll(np.resize(base, n * 4), i).view(np.float32)
            for i, n in enumerate(shapes(int(args.gib * (1 << 30)), args.tensors))
        ]
        backend = FileBackend(root)
        writer = SampleWriter(backend)
        pair = SnapshotId(writer.open_epoch(), 1)
        writer.write(pair, [[tensor(f"t{i:04d}", array) for i, array in enumerate(arrays)]])
        index = load_index(backend, writer.journal.refresh(), pair)
        outputs = [np.ones_like(array) for array in arrays]
        del arrays
        wants = [Want(f"t{i:04d}", None, Box.whole(out.shape)) for i, out in enumerate(outputs)]
        coalesce = backend.capabilities().read_bytes_best
        plan = plan_reads(index, wants, coalesce_bytes=coalesce)
        cores = len(os.sched_getaffinity(0))
        fetcher = Fetcher(backend)
        contestants: dict[str, Callable[[], None]] = {
            "preadv, 1 thread": lambda: plain(root, plan, outputs, 1),
            f"preadv, {cores} threads": lambda: plain(root, plan, outputs, cores),
            "fetch, 1 thread": lambda: fetch(backend, plan, outputs, threads=1),
            f"fetch, {cores} threads": lambda: fetch(backend, plan, outputs, threads=cores),
            "fetch": lambda: fetch(backend, plan, outputs),
            "fetch, kept workers": lambda: fetcher.fetch(plan, outputs),
            "plan + fetch": lambda: fetch(
                backend, plan_reads(index, wants, coalesce_bytes=coalesce), outputs
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(args.rounds + 1):
            for name, action in contestants.items():
                seconds = timed(action)
                if number:
                    times[name].append(seconds)
        fetcher.close()
        total = sum(out.nbytes for out in outputs)
        print(
            f"{total / (1 << 30):.2f} GiB, {len(outputs)} tensors, {len(plan.reads)} reads, "
            f"{cores} cores, all warm"
        )
        print(f"{platform.platform()}, Python {sys.version.split()[0]}, numpy {np.__version__}")
        best = statistics.median(times[f"preadv, {cores} threads"])
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            print(
                f"{name:22} median {middle:.3f} s  best {min(seconds):.3f} s  {middle / best:.2f}x "
                "of preadv on all cores"
            )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
