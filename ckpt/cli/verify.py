"""``ckpt verify``: read every byte, and say what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import click

from ckpt.cli.output import human_bytes, progress
from ckpt.cli.say import JsonValue, emit_json
from ckpt.cli.store import Selector, Store, StoreChoice, id_json, opened, snapshot_options, store_command
from ckpt.commit.catalog import load_index
from ckpt.errors import IntegrityError, UnavailableError, UsageError
from ckpt.restore.verify import Damaged, VerifyMemo, VerifyReport, verify
from ckpt.values import SnapshotId

_EPILOG = """\b
Examples:
  ckpt verify runs/a
  ckpt verify runs/a --tag best
  ckpt verify s3://bucket/run-a --all --json

\b
Exit codes: 0 all is well, 20 damage, 11 something could not be read.

\b
JSON: {"ok", "snapshots": [{"epoch", "step", "ok", "read_bytes", "chunks",
"packs", "objects", "damaged": [{"key", "offset_bytes", "leaves", "what",
"message"}, ...]}, ...], "hole"}. "what" is missing, short, mismatch,
unreadable, or record: the snapshot's manifest or a part is not what was
committed. "hole" is null, or {"seq", "reason"} of a log record that is damaged.
"""


@dataclass(frozen=True, slots=True)
class _Outcome:
    snapshot: SnapshotId
    report: VerifyReport | None
    damaged: tuple[Damaged, ...]


@click.command(name="verify", epilog=_EPILOG)
@store_command
@snapshot_options
@click.option("--all", "everything", is_flag=True, help="Verify every snapshot of the store.")
def command(choice: StoreChoice, *, selector: Selector, everything: bool) -> int:
    """Verify a snapshot of the store at URL, the newest without a selector.

    Reads the log, the manifest, all parts and every stored byte, and compares them with their digests. Reports all
    damage, not just the first. With --all, bytes that snapshots share are read once.
    """
    if everything and not selector.empty:
        raise UsageError("all snapshots or one. leave out --all, or --step, --epoch and --tag")
    with opened(choice) as store:
        wanted = (
            [entry.snapshot for entry in reversed(store.state.snapshots)] if everything else [store.select(selector)]
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
            told: JsonValue = None if hole is None else {"seq": hole.seq, "reason": hole.reason}
            emit_json({"ok": ok, "snapshots": [_json(outcome) for outcome in outcomes], "hole": told})
        elif hole is not None:
            click.echo(f"DAMAGED  the log: record {hole.seq} and all after it are lost to readers\n    {hole.reason}")
        whats = {one.what for outcome in outcomes for one in outcome.damaged}
        if hole is not None or whats - {"unreadable"}:
            return IntegrityError.exit_code
        return UnavailableError.exit_code if whats else 0


def _verify(store: Store, snapshot: SnapshotId, memo: VerifyMemo) -> _Outcome:
    try:
        index = load_index(store.backend, store.state, snapshot)
    except IntegrityError as error:
        # Without its records a snapshot's bytes cannot even be found.
        return _Outcome(snapshot, None, (Damaged("", 0, (), "record", str(error)),))
    with progress(f"verifying {snapshot}", index.manifest.size_bytes) as on_progress:
        report = verify(index, store.backend, on_progress=on_progress, memo=memo)
    return _Outcome(snapshot, report, report.damaged)


def _print(outcome: _Outcome) -> None:
    report = outcome.report
    read = (
        "" if report is None else f"{human_bytes(report.read_bytes)} in {report.chunks} chunks of {report.packs} packs"
    )
    if not outcome.damaged:
        click.echo(f"ok       {outcome.snapshot}: {read}")
        return
    click.echo(f"DAMAGED  {outcome.snapshot}: {len(outcome.damaged)} found; read {read or 'nothing'}")
    for one in outcome.damaged:
        where = f"{one.key} at {one.offset_bytes}" if one.key else ""
        needed = f" needed by {', '.join(one.leaves)}" if one.leaves else ""
        click.echo(f"  {one.what}: {where}{needed}\n    {one.message}")


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
                "key": one.key,
                "offset_bytes": one.offset_bytes,
                "leaves": list(one.leaves),
                "what": one.what,
                "message": one.message,
            }
            for one in outcome.damaged
        ],
    }
