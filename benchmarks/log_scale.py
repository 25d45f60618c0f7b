"""What opening a log, committing to it and asking for the newest snapshot cost after many snapshots.

    python benchmarks/log_scale.py            two logs in folders: 100 and 100,000 snapshots ever made
    python benchmarks/log_scale.py --quick    a smoke test: 100 and 3,000, no figures to quote

Two histories of the longer log: all but the last 100 snapshots were dropped, as retention does, and
all of them exist. Prints the medians, each beside its ratio to the short log. The records are
written straight into the folder; everything that is timed goes through the code that jobs use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ckpt.backends.file.store import FileBackend
from ckpt.format import keys
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.records import Body, Commit, Drop, Open, make_record
from ckpt.log.fold import empty, fold
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.log.stored_fold import FOLDS_KEPT, encode_fold, fold_due
from ckpt.values import SnapshotId

LIVE = 100
ROUNDS = 15
JOB = "scale"
DROPS_AT_ONCE = 1_000
WRITER = keys.writer_name("node", "0123456789abcdef")


def manifest(step: int) -> Manifest:
    """A small manifest of a snapshot with one part."""
    return Manifest(
        job=JOB,
        snapshot=SnapshotId(1, step),
        world_size=1,
        base=None,
        parts=(
            PartRef(
                key=keys.part_key(SnapshotId(1, step), WRITER),
                digest="0" * 32,
                size_bytes=1,
                rank=0,
            ),
        ),
        size_bytes=0,
        new_bytes=0,
        created_unix_s=0.0,
        metadata={},
    )


def history(snapshots: int, *, live: int) -> list[Body]:
    """The bodies of all records: one open, the commits, and drops of all but the last ``live``."""
    pairs = [SnapshotId(1, step) for step in range(1, snapshots + 1)]
    bodies: list[Body] = [Open(1, None)]
    for n, pair in enumerate(pairs, start=1):
        bodies.append(Commit(pair, "0" * 32, None))
        # As retention does it: a drop of what is too old by now, many at once.
        if n % DROPS_AT_ONCE == 0 and live < n:
            bodies.append(Drop(tuple(pairs[max(0, n - live - DROPS_AT_ONCE) : n - live]), None))
    return bodies


def fill(folder: Path, snapshots: int, *, live: int) -> None:
    """A store with that history, its newest folds included."""
    Journal.open(FileBackend(str(folder)), job=JOB, create=True)
    state: LogState = empty(JOB)
    folds: list[tuple[int, bytes]] = []
    batch = []
    prev = ""
    bodies = history(snapshots, live=live)
    for seq, body in enumerate(bodies):
        record = make_record(body, job=JOB, seq=seq, epoch=1, write_id=f"{seq:032x}", prev=prev)
        prev = record.digest
        path = folder / keys.log_key(seq)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.encode())
        batch.append(record)
        if fold_due(seq) and len(bodies) - seq < 64 * (FOLDS_KEPT + 1):
            state, batch = fold(state, batch), []
            folds.append((seq, encode_fold(state)))
    for seq, data in folds[-FOLDS_KEPT:]:
        path = folder / keys.fold_key(seq)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def measure(folder: Path, snapshots: int) -> dict[str, float]:
    """Median seconds: of opening the log anew, of a commit, and of asking again."""
    store = FileBackend(str(folder))
    journal = Journal.open(store)
    journal.refresh()
    steps = iter(range(snapshots + 1, snapshots + 1 + ROUNDS))
    rounds: dict[str, list[float]] = {"open": [], "commit": [], "newest": []}
    for _ in range(ROUNDS):
        rounds["open"].append(timed(lambda: Journal.open(FileBackend(str(folder))).refresh()))
        rounds["commit"].append(timed(lambda: journal.commit(manifest(next(steps)), epoch=1)))
        rounds["newest"].append(timed(lambda: journal.refresh().newest()))
    return {name: statistics.median(taken) for name, taken in rounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 and 3,000 snapshots")
    many = 3_000 if parser.parse_args().quick else 100_000
    cases = [
        ("100 snapshots", LIVE, LIVE),
        (f"{many:,} made, {LIVE} exist", many, LIVE),
        (f"{many:,} made, all exist", many, many),
    ]
    print(f"{'':34}{'open':>18}{'commit':>18}{'newest':>18}")
    first: dict[str, float] = {}
    for name, snapshots, live in cases:
        with tempfile.TemporaryDirectory(prefix="ckpt-log-scale-") as folder:
            fill(Path(folder), snapshots, live=live)
            taken = measure(Path(folder), snapshots)
        first = first or taken
        cells = [f"{taken[key] * 1e3:8.1f} ms {taken[key] / first[key]:4.1f}x" for key in taken]
        print(f"{name:34}" + "".join(f"{cell:>18}" for cell in cells))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
