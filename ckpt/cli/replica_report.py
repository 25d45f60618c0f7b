"""A scrub report as text and JSON, for ``ckpt scrub`` and ``ckpt verify --all-replicas``."""

from __future__ import annotations

import click

from ckpt.cli.echo import JsonValue
from ckpt.cli.output import human_bytes, table
from ckpt.cli.store_options import id_json
from ckpt.errors import IntegrityError, UnavailableError
from ckpt.maintenance.copies import CopyStatus
from ckpt.maintenance.scrub.report import ScrubProblem, ScrubReport

PROBLEMS_SHOWN = 50
"""Problems that are printed; JSON has more."""
OFFSETS_SHOWN = 5


def exit_code_of(report: ScrubReport) -> int:
    """0 if all is right now, 20 if damage is left, 11 if a store was away, empty or refused."""
    if report.ok:
        return 0
    left = [problem for problem in report.problems if not problem.repaired]
    if (
        report.hole is not None
        or report.lost
        or any(problem.status is CopyStatus.DAMAGED for problem in left)
    ):
        return IntegrityError.exit_code
    if any(
        problem.status is CopyStatus.MISSING and report.stores[problem.store].role == "ready"
        for problem in left
    ):
        return IntegrityError.exit_code
    return UnavailableError.exit_code


def print_report(report: ScrubReport) -> None:
    """Print a table of the stores, then the problems, worst first."""
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
    worst_first = sorted(report.problems, key=lambda problem: (not problem.lost, problem.repaired))
    for problem in worst_first[:PROBLEMS_SHOWN]:
        click.echo(_line(report, problem))
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
                "key": problem.key,
                "store": problem.store,
                "what": problem.status.value,
                "message": problem.message,
                "offsets": list(problem.offsets),
                "lost": problem.lost,
                "mended": problem.repaired,
            }
            for problem in report.problems
        ],
        "troubles_total": report.problems_total,
    }


def _line(report: ScrubReport, problem: ScrubProblem) -> str:
    word = (
        "LOST   "
        if problem.lost
        else "mended "
        if problem.repaired
        else problem.status.value.upper()
    )
    where = f" at {', '.join(map(str, problem.offsets[:OFFSETS_SHOWN]))}" if problem.offsets else ""
    more = (
        f" and {len(problem.offsets) - OFFSETS_SHOWN} more"
        if len(problem.offsets) > OFFSETS_SHOWN
        else ""
    )
    status = (
        f"{problem.status.value}: {problem.message}" if problem.message else problem.status.value
    )
    url = report.stores[problem.store].url
    return f"{word:8} {problem.key}{where}{more}\n    {status} store={url}"
