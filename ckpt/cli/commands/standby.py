"""``ckpt standby``: the nodes of a job, its standbys, and the state that each one has."""

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
    answers = query_all()
    reports = [answer.report for answer in answers if isinstance(answer, LiveKeeper)]
    silent = [answer for answer in answers if isinstance(answer, SilentKeeper)]
    if as_json:
        emit_json({"jobs": [_json(report) for report in reports]})
    else:
        _print([report for report in reports if report.nodes])
    for answer in silent:
        warn(
            f"a keeper does not answer. job={answer.keeper.job!r} pid={answer.keeper.pid} "
            f"why={answer.problem}"
        )
    return UnavailableError.exit_code if silent else 0


def _print(reports: Sequence[KeeperReport]) -> None:
    if not reports:
        click.echo("no jobs of several nodes")
    for number, report in enumerate(reports):
        if number:
            click.echo()
        click.echo(f"{report.job} ({report.store}), attempt {report.attempt}")
        rows = [
            (
                node.node + (" (here)" if node.here else ""),
                _ranks_text(node),
                snapshot_text(node.mirrored),
                _behind_text(report, node),
            )
            for node in report.nodes
        ]
        table(("NODE", "RANKS", "HAS", "BEHIND"), rows, right=frozenset(("BEHIND",)))


def _ranks_text(node: NodeReport) -> str:
    if not node.ranks:
        return "standby"
    return (
        str(node.first_rank)
        if node.ranks == 1
        else f"{node.first_rank}-{node.first_rank + node.ranks - 1}"
    )


def _behind_text(report: KeeperReport, node: NodeReport) -> str:
    behind = _behind(report, node)
    return NOTHING if behind is None else str(behind)


def _completed(report: KeeperReport) -> int | None:
    """Steps completed by all ranks of the keeper's node; None if it has no ranks or no step."""
    done = [rank.completed for rank in report.ranks if rank.completed >= 0]
    return min(done) if done else None


def _behind(report: KeeperReport, node: NodeReport) -> int | None:
    completed = _completed(report)
    if completed is None or node.mirrored is None:
        return None
    return max(0, completed - node.mirrored.step)


def _json(report: KeeperReport) -> dict[str, JsonValue]:
    return {
        "job": report.job,
        "store": report.store,
        "pid": report.pid,
        "completed": _completed(report),
        "nodes": [
            {
                "node": node.node,
                "here": node.here,
                "standby": not node.ranks,
                "first_rank": node.first_rank,
                "ranks": node.ranks,
                "has": snapshot_json(node.mirrored),
                "behind": _behind(report, node),
            }
            for node in report.nodes
        ],
    }
