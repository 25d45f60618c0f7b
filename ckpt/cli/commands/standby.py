"""``ckpt standby``: which nodes wait to take a lost one's place, and what they have of its
state."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ckpt.cli.echo import JsonValue, emit_json, warn
from ckpt.cli.jobs import (
    NOTHING,
    LiveKeeper,
    SilentKeeper,
    job_command,
    query_all,
    snapshot_json,
    snapshot_text,
)
from ckpt.cli.output import table
from ckpt.errors import UnavailableError
from ckpt.ipc.messages import KeeperReport, NodeReport

_EPILOG = """\b
Examples:
  ckpt standby
  ckpt standby --json | jq '.jobs[].nodes[] | select(.standby)'

\b
Asks the keepers of this machine. That of the node of rank 0 knows what all
standbys have; any other one knows only of its own. "has" is the newest pair,
epoch:step, of which a standby has all that it is to keep, and of a node with
ranks the newest that all such nodes have on others; "behind" counts the steps
that all ranks completed since. A standby that has nothing fetches what it
takes over from other nodes, or from a store.

\b
JSON: {"jobs": [{"job", "store", "pid", "completed": null | step, "nodes":
[{"node", "here", "standby", "first_rank", "ranks", "has": null | {"epoch",
"step"}, "behind": null | steps}, ...]}, ...]}. Jobs of one node have no nodes.

\b
Exit codes: 0 all keepers answered, also where there is none; 2 the runtime
folder cannot be trusted; 11 a keeper lives and does not answer.
"""


@click.command(name="standby", epilog=_EPILOG)
@job_command
def command(*, as_json: bool) -> int:
    """Show the nodes of this machine's jobs: who holds which ranks, who waits, and how far behind
    its copy is."""
    found = query_all()
    reports = [one.report for one in found if isinstance(one, LiveKeeper)]
    silent = [one for one in found if isinstance(one, SilentKeeper)]
    if as_json:
        emit_json({"jobs": [_json(report) for report in reports]})
    else:
        _print([report for report in reports if report.nodes])
    for one in silent:
        warn(
            f"a keeper does not answer. job={one.keeper.job!r} pid={one.keeper.pid} "
            f"why={one.problem}"
        )
    return UnavailableError.exit_code if silent else 0


def _print(reports: Sequence[KeeperReport]) -> None:
    if not reports:
        click.echo("no jobs of several nodes")
    for at, report in enumerate(reports):
        if at:
            click.echo()
        click.echo(f"{report.job} ({report.store}), attempt {report.attempt}")
        rows = [
            (
                one.node + (" (here)" if one.here else ""),
                _ranks_text(one),
                snapshot_text(one.mirrored),
                _behind_text(report, one),
            )
            for one in report.nodes
        ]
        table(("NODE", "RANKS", "HAS", "BEHIND"), rows, right=frozenset(("BEHIND",)))


def _ranks_text(one: NodeReport) -> str:
    if not one.ranks:
        return "standby"
    return (
        str(one.first_rank)
        if one.ranks == 1
        else f"{one.first_rank}-{one.first_rank + one.ranks - 1}"
    )


def _behind_text(report: KeeperReport, one: NodeReport) -> str:
    behind = _behind(report, one)
    return NOTHING if behind is None else str(behind)


def _completed(report: KeeperReport) -> int | None:
    """How many steps all ranks of that keeper's node completed; None: it has none, or they have not
    begun."""
    done = [rank.completed for rank in report.ranks if rank.completed >= 0]
    return min(done) if done else None


def _behind(report: KeeperReport, one: NodeReport) -> int | None:
    completed = _completed(report)
    if completed is None or one.mirrored is None:
        return None
    return max(0, completed - one.mirrored.step)


def _json(report: KeeperReport) -> dict[str, JsonValue]:
    return {
        "job": report.job,
        "store": report.store,
        "pid": report.pid,
        "completed": _completed(report),
        "nodes": [
            {
                "node": one.node,
                "here": one.here,
                "standby": not one.ranks,
                "first_rank": one.first_rank,
                "ranks": one.ranks,
                "has": snapshot_json(one.mirrored),
                "behind": _behind(report, one),
            }
            for one in report.nodes
        ],
    }
