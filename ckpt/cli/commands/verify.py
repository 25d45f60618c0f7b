"""``ckpt verify``: read every byte, and say what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import click

from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.output import human_bytes, progress
from ckpt.cli.replica_report import exit_code_of, print_report, report_json
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
JSON: {"ok", "snapshots": [{"epoch", "step", "ok", "read_bytes", "chunks",
"packs", "objects", "damaged": [{"key", "offset_bytes", "leaves", "what",
"message"}, ...]}, ...], "hole"}. "what" is missing, short, mismatch,
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
    """Verify a snapshot of the store at URL, the newest without a selector.

    Reads the log, the manifest, all parts and every stored byte, and compares them with their
    digests. Reports all damage, not just the first. With --all, bytes that snapshots share are read
    once.

    Of several stores (--replica), one right copy is enough, and bad ones that are met are mended.
    With --all-replicas every store's copy is read, of the log too, and none is changed.
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
        hole = store.state.hole
        memo: VerifyMemo = {}
        outcomes: list[_Outcome] = []
        for snapshot in wanted:
            outcomes.append(_verify(store, snapshot, memo))
            if not choice.as_json:
                _print(outcomes[-1])
        if choice.as_json:
            ok = hole is None and not any(outcome.damaged for outcome in outcomes)
            hole_json: JsonValue = (
                None if hole is None else {"seq": hole.seq, "reason": hole.reason}
            )
            emit_json(
                {"ok": ok, "snapshots": [_json(outcome) for outcome in outcomes], "hole": hole_json}
            )
        elif hole is not None:
            click.echo(
                f"DAMAGED  the log: record {hole.seq} and all after it are lost to readers\n    "
                f"{hole.reason}"
            )
        kinds = {damaged.what for outcome in outcomes for damaged in outcome.damaged}
        if hole is not None or kinds - {"unreadable"}:
            return IntegrityError.exit_code
        return UnavailableError.exit_code if kinds else 0


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
