"""A comparison of several stores, for people and programs: the same for ``scrub`` and ``verify
--all-replicas``."""

from __future__ import annotations

import click

from ckpt.cli.echo import JsonValue
from ckpt.cli.output import human_bytes, table
from ckpt.cli.store_options import id_json
from ckpt.errors import IntegrityError, UnavailableError
from ckpt.maintenance.copies import CopyStatus
from ckpt.maintenance.scrub.report import ScrubProblem, ScrubReport

PROBLEMS_SHOWN = 50
"""How many troubles are printed; JSON has more."""
OFFSETS_SHOWN = 5


def exit_code_of(report: ScrubReport) -> int:
    """0 where all is well now, 20 where damage is left, 11 where only silence, emptiness or a
    refused write is."""
    if report.ok:
        return 0
    left = [trouble for trouble in report.problems if not trouble.repaired]
    if (
        report.hole is not None
        or report.lost
        or any(trouble.status is CopyStatus.DAMAGED for trouble in left)
    ):
        return IntegrityError.exit_code
    if any(
        trouble.status is CopyStatus.MISSING and report.stores[trouble.store].role == "ready"
        for trouble in left
    ):
        return IntegrityError.exit_code
    return UnavailableError.exit_code


def print_report(report: ScrubReport) -> None:
    """A table of stores, then what is wrong, worst first."""
    rows = [
        (
            store.url,
            store.role,
            str(store.objects),
            str(store.ok),
            str(store.missing),
            str(store.damaged),
            str(store.unreadable),
            str(store.repaired),
            f"{store.orphans} ({human_bytes(store.orphan_bytes)})" if store.orphans else "0",
        )
        for store in report.stores
    ]
    columns = (
        "STORE",
        "STATE",
        "OBJECTS",
        "OK",
        "MISSING",
        "DAMAGED",
        "UNREADABLE",
        "MENDED",
        "UNREFERENCED",
    )
    table(columns, rows, right=frozenset(columns[2:]))
    for store in report.stores:
        if store.problem:
            click.echo(f"{store.url}: {store.problem}")
    worst_first = sorted(report.problems, key=lambda one: (not one.lost, one.repaired))
    for trouble in worst_first[:PROBLEMS_SHOWN]:
        click.echo(_line(report, trouble))
    if report.problems_total > PROBLEMS_SHOWN:
        click.echo(f"... and {report.problems_total - PROBLEMS_SHOWN} more")
    if report.hole is not None:
        click.echo(
            f"LOST     the log: record {report.hole.seq} and all after it\n    {report.hole.reason}"
        )
    for snapshot in report.untraced:
        click.echo(f"LOST     {snapshot}: without its records not all that it needs can be found")
    word = "ok" if report.ok else "NOT WELL"
    click.echo(
        f"{word}: {report.snapshots} snapshots, {report.records} records; found "
        f"{report.problems_total}, "
        f"lost {report.lost}, left {report.unrepaired}, away {report.away}"
    )


def report_json(report: ScrubReport) -> dict[str, JsonValue]:
    """The report, as ``ckpt scrub --help`` describes it."""
    return {
        "ok": report.ok,
        "job": report.job,
        "snapshots": report.snapshots,
        "records": report.records,
        "moved_bytes": report.moved_bytes,
        "thin": report.under_replicated,
        "lost": report.lost,
        "unmended": report.unrepaired,
        "hole": None
        if report.hole is None
        else {"seq": report.hole.seq, "reason": report.hole.reason},
        "untraced": [id_json(snapshot) for snapshot in report.untraced],
        "stores": [
            {
                "url": store.url,
                "role": store.role,
                "store_id": store.store_id,
                "problem": store.problem,
                "objects": store.objects,
                "ok": store.ok,
                "missing": store.missing,
                "damaged": store.damaged,
                "unreadable": store.unreadable,
                "mended": store.repaired,
                "strays": store.orphans,
                "stray_bytes": store.orphan_bytes,
            }
            for store in report.stores
        ],
        "troubles": [
            {
                "key": trouble.key,
                "store": trouble.store,
                "what": trouble.status.value,
                "message": trouble.message,
                "offsets": list(trouble.offsets),
                "lost": trouble.lost,
                "mended": trouble.repaired,
            }
            for trouble in report.problems
        ],
        "troubles_total": report.problems_total,
    }


def _line(report: ScrubReport, trouble: ScrubProblem) -> str:
    word = (
        "LOST   "
        if trouble.lost
        else "mended "
        if trouble.repaired
        else trouble.status.value.upper()
    )
    where = f" at {', '.join(map(str, trouble.offsets[:OFFSETS_SHOWN]))}" if trouble.offsets else ""
    more = (
        f" and {len(trouble.offsets) - OFFSETS_SHOWN} more"
        if len(trouble.offsets) > OFFSETS_SHOWN
        else ""
    )
    what = f"{trouble.status.value}: {trouble.message}" if trouble.message else trouble.status.value
    return (
        f"{word:8} {trouble.key}{where}{more}\n    {what} store={report.stores[trouble.store].url}"
    )
