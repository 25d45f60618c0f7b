"""``ckpt verify``: read all small objects and the state of one snapshot or all; say what is
wrong."""

from __future__ import annotations

from dataclasses import dataclass

import click

from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.output import human_bytes, progress
from ckpt.cli.replica_report import (
    PROBLEMS_SHOWN,
    exit_code_of,
    print_report,
    report_json,
)
from ckpt.cli.store_options import (
    OpenStore,
    Selector,
    StoreChoice,
    id_json,
    open_store,
    snapshot_options,
    store_command,
)
from ckpt.errors import IntegrityError, InternalError, UnavailableError, UsageError
from ckpt.log.catalog import load_index
from ckpt.log.state import Hole
from ckpt.maintenance.copies import CopyStatus
from ckpt.maintenance.scrub.report import ScrubReport
from ckpt.maintenance.scrub.scrub import Scrub
from ckpt.restore.verify import DamagedObject, VerifyMemo, VerifyReport, verify
from ckpt.values import SnapshotId

READ_THREADS = 4
"""How many objects are read at once with --all-replicas, each on all stores."""

_EPILOG = """\b
Examples:
  ckpt verify runs/a
  ckpt verify runs/a --tag best
  ckpt verify s3://bucket/run-a --all --json
  ckpt verify /mnt/a/run --replica s3://bucket/run --all-replicas

\b
Exit codes: 0 all is well, 20 damage, 11 something could not be read.

\b
JSON: {"ok", "of_snapshots", "snapshots": [{"epoch", "step", "ok", "read_bytes", "chunks",
"packs", "objects", "damaged": [{"key", "offset_bytes", "leaves", "what",
"message"}, ...]}, ...], "log", "hole"}. "of_snapshots": how many there are, of
which "snapshots" were read whole. "log" is what ckpt scrub prints, for all but
packs: ckpt.json, records, folds, manifests and parts. "what" is missing, short, mismatch,
unreadable, or record: the snapshot's manifest or a part is not what was
committed. "hole" is null, or {"seq", "reason"} of a log record that is damaged.
With --all-replicas it is what ckpt scrub prints.
"""


@dataclass(frozen=True, slots=True)
class _Outcome:
    snapshot: SnapshotId
    report: VerifyReport | None
    damaged: tuple[DamagedObject, ...]


@click.command(name="verify", epilog=_EPILOG)
@store_command
@snapshot_options
@click.option("--all", "everything", is_flag=True, help="Verify every snapshot of the store.")
@click.option(
    "--all-replicas",
    "each_store",
    is_flag=True,
    help="Verify each store by itself, and tell what each has. Mends nothing.",
)
def command(choice: StoreChoice, *, selector: Selector, everything: bool, each_store: bool) -> int:
    """Verify the store at URL, and the data of its newest snapshot, or of the selected one.

    Reads ckpt.json, every log record and fold, and the manifest and parts of all snapshots, every
    copy of them on each store; then every stored byte of one snapshot, or with --all of each, bytes
    that snapshots share once. Compares all with their digests, reports all damage, not just the
    first, and says how much was read.

    Of the data on several stores (--replica) one right copy is enough, and bad ones that are met
    are mended. With --all-replicas every store's copy is read, and none is changed.
    """
    if everything and not selector.empty:
        raise UsageError("all snapshots or one. leave out --all, or --step, --epoch and --tag")
    with open_store(choice) as store:
        if each_store:
            only = None if everything else frozenset((store.select(selector),))
            return _each_store(choice, store, only)
        wanted = (
            [entry.snapshot for entry in reversed(store.state.snapshots)]
            if everything
            else [store.select(selector)]
        )
        log = _verify_log(store)
        hole = log.hole or store.state.hole
        memo: VerifyMemo = {}
        outcomes: list[_Outcome] = []
        for snapshot in wanted:
            outcomes.append(_verify(store, snapshot, memo))
            if not choice.as_json:
                _print(outcomes[-1])
        kinds = {damaged.what for outcome in outcomes for damaged in outcome.damaged}
        code = 0
        if hole is not None or kinds - {"unreadable"} or _is_damaged(log):
            code = IntegrityError.exit_code
        elif kinds or _has_unread(log):
            code = UnavailableError.exit_code
        if choice.as_json:
            emit_json(
                {
                    "ok": code == 0,
                    "of_snapshots": len(store.state.snapshots),
                    "snapshots": [_json(outcome) for outcome in outcomes],
                    "log": report_json(log),
                    "hole": None if hole is None else {"seq": hole.seq, "reason": hole.reason},
                }
            )
        else:
            _print_log(log, hole)
            _print_amount(len(outcomes), len(store.state.snapshots))
        return code


def _verify_log(store: OpenStore) -> ScrubReport:
    """Compare all copies of everything but packs, of all snapshots."""
    stores = stores_of(store.backend)
    comparison = Scrub(stores, write_quorum_of(store.backend), repair=False, packs=False)
    report = comparison.run(threads=READ_THREADS)
    if report is None:
        raise InternalError("a comparison without a stop event was stopped")
    return report


def _is_damaged(log: ScrubReport) -> bool:
    """Whether a copy is damaged, or nothing is left of an object. That a store was away, or lacks
    what others have, is no damage."""
    return bool(log.lost) or any(problem.status is CopyStatus.DAMAGED for problem in log.problems)


def _has_unread(log: ScrubReport) -> bool:
    """Whether a copy could not be read, so that it is not known whether it is right."""
    return any(problem.status is CopyStatus.UNREADABLE for problem in log.problems)


def _print_log(log: ScrubReport, hole: Hole | None) -> None:
    if hole is not None:
        click.echo(
            f"DAMAGED  the log: record {hole.seq} and all after it are lost to readers\n    "
            f"{hole.reason}"
        )
    damaged = [
        problem
        for problem in log.problems
        if problem.status is CopyStatus.DAMAGED
        or (problem.lost and problem.status is CopyStatus.MISSING)
    ]
    for problem in damaged[:PROBLEMS_SHOWN]:
        url = log.stores[problem.store].url
        click.echo(f"DAMAGED  {problem.key} on {url}\n    {problem.message}; run ckpt scrub")
    if len(damaged) > PROBLEMS_SHOWN:
        click.echo(f"... and {len(damaged) - PROBLEMS_SHOWN} more")
    unread = [problem for problem in log.problems if problem.status is CopyStatus.UNREADABLE]
    for problem in unread[:PROBLEMS_SHOWN]:
        url = log.stores[problem.store].url
        click.echo(f"UNREAD   {problem.key} on {url}\n    {problem.message}; repeat")
    if hole is None and not _is_damaged(log) and not _has_unread(log):
        click.echo(f"ok       the log: {log.records} records, indexes of {log.snapshots} snapshots")


def _print_amount(read: int, snapshots: int) -> None:
    rest = "" if read == snapshots else "; --all for the rest"
    click.echo(f"data of {read} of {snapshots} snapshots read{rest}")


def _each_store(choice: StoreChoice, store: OpenStore, only: frozenset[SnapshotId] | None) -> int:
    """Compare the whole log on all stores, and the objects of snapshots ``only`` (None: all)."""
    stores = stores_of(store.backend)
    comparison = Scrub(stores, write_quorum_of(store.backend), repair=False, only=only)
    report = comparison.run(threads=READ_THREADS)
    if report is None:
        raise InternalError("a comparison without a stop event was stopped")
    if choice.as_json:
        emit_json(report_json(report))
    else:
        print_report(report)
    return exit_code_of(report)


def _verify(store: OpenStore, snapshot: SnapshotId, memo: VerifyMemo) -> _Outcome:
    try:
        index = load_index(store.backend, store.state, snapshot)
    except IntegrityError as error:
        # Without its manifest and parts it is unknown which bytes the snapshot has.
        return _Outcome(snapshot, None, (DamagedObject("", 0, (), "record", str(error)),))
    with progress(f"verifying {snapshot}", index.manifest.size_bytes) as on_progress:
        report = verify(index, store.backend, on_progress=on_progress, memo=memo)
    return _Outcome(snapshot, report, report.damaged)


def _print(outcome: _Outcome) -> None:
    report = outcome.report
    read = (
        ""
        if report is None
        else f"{human_bytes(report.read_bytes)} in {report.chunks} chunks of {report.packs} packs"
    )
    if not outcome.damaged:
        click.echo(f"ok       {outcome.snapshot}: {read}")
        return
    click.echo(
        f"DAMAGED  {outcome.snapshot}: {len(outcome.damaged)} found; read {read or 'nothing'}"
    )
    for damaged in outcome.damaged:
        where = f"{damaged.key} at {damaged.offset_bytes}" if damaged.key else ""
        needed = f" needed by {', '.join(damaged.leaves)}" if damaged.leaves else ""
        click.echo(f"  {damaged.what}: {where}{needed}\n    {damaged.message}")


def _json(outcome: _Outcome) -> JsonValue:
    report = outcome.report
    return {
        **id_json(outcome.snapshot),
        "ok": not outcome.damaged,
        "read_bytes": 0 if report is None else report.read_bytes,
        "chunks": 0 if report is None else report.chunks,
        "packs": 0 if report is None else report.packs,
        "objects": 0 if report is None else report.objects,
        "damaged": [
            {
                "key": damaged.key,
                "offset_bytes": damaged.offset_bytes,
                "leaves": list(damaged.leaves),
                "what": damaged.what,
                "message": damaged.message,
            }
            for damaged in outcome.damaged
        ],
    }
