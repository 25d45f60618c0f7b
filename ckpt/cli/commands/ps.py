"""``ckpt ps``: the jobs of this machine, as their keepers see them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.jobs import (
    NUMERIC_COLUMNS,
    RANK_COLUMNS,
    DeadKeeper,
    KeeperIdentity,
    LiveKeeper,
    SilentKeeper,
    job_command,
    query_all,
    rank_rows,
    report_json,
    summary,
)
from ckpt.cli.output import table
from ckpt.errors import UnavailableError

_EPILOG = """\b
Examples:
  ckpt ps
  ckpt ps --json | jq '.jobs[] | {job, complete}'

\b
A slot is shown by the pair that it holds, epoch:step; '*' marks one that an
upload holds, '-' one that holds nothing. "complete" is the newest pair that
slots of all ranks hold. Jobs in place have no supervisors.

\b
JSON: {"jobs": [{"job", "store", "pid", "launch", "state", "since_s",
"attempt", "epoch", "complete": null | pair, "durable": null | {"epoch",
"step", "size_bytes", "new_bytes", "created_unix_s", "tags"}, "uploads",
"slot_bytes", "rss_bytes", "ranks": [{"rank", "supervisor_pid",
"trainer_pid", "completed", "phase", "idle_s", "staged", "skipped",
"slots": [{"index", "size_bytes", "snapshot": null | pair, "held"}, ...]},
...], "recoveries": [{...}, ...], "mirror_bytes", "refused": {kind: count},
"behind": [{"store", "objects", "more"}, ...]}, ...],
"silent": [{"job", "store", "pid", "folder", "problem"}, ...],
"dead": [{"job", "store", "pid", "folder"}, ...]}. A pair is
{"epoch", "step"}. "pid" is the keeper's. "silent" keepers live and do not
answer; "dead" are folders that no keeper lives in any more.

\b
Exit codes: 0 all keepers answered, also where there is none; 2 the runtime
folder cannot be trusted; 11 a keeper lives and does not answer.
"""


@click.command(name="ps", epilog=_EPILOG)
@job_command
def command(*, as_json: bool) -> int:
    """List the jobs of this user on this machine: keepers, ranks, processes, slots, what is staged
    and durable.

    Starts no keeper and removes nothing.
    """
    answers = query_all()
    alive = [answer for answer in answers if isinstance(answer, LiveKeeper)]
    silent = [answer for answer in answers if isinstance(answer, SilentKeeper)]
    dead = [answer for answer in answers if isinstance(answer, DeadKeeper)]
    if as_json:
        emit_json(
            {
                "jobs": [report_json(answer.report) for answer in alive],
                "silent": [
                    {**_home_json(answer.keeper), "problem": answer.problem} for answer in silent
                ],
                "dead": [_home_json(answer.keeper) for answer in dead],
            }
        )
    else:
        _print(alive, silent, dead)
    return UnavailableError.exit_code if silent else 0


def _print(
    alive: Sequence[LiveKeeper], silent: Sequence[SilentKeeper], dead: Sequence[DeadKeeper]
) -> None:
    if not (alive or silent or dead):
        click.echo("no jobs")
        return
    for number, answer in enumerate(alive):
        if number:
            click.echo()
        for label, text in summary(answer.report):
            click.echo(f"{label:<10}{text}")
        if answer.report.ranks:
            click.echo()
            table(RANK_COLUMNS, rank_rows(answer.report), right=NUMERIC_COLUMNS)
    _print_homes(
        "keepers that do not answer",
        [(answer.keeper, answer.problem) for answer in silent],
        first=not alive,
    )
    _print_homes(
        "folders of dead keepers",
        [(answer.keeper, "") for answer in dead],
        first=not (alive or silent),
    )


def _print_homes(title: str, keepers: Sequence[tuple[KeeperIdentity, str]], *, first: bool) -> None:
    if not keepers:
        return
    if not first:
        click.echo()
    click.echo(f"{title}:")
    rows = [
        (keeper.job, keeper.store, str(keeper.pid or "-"), str(keeper.folder), problem)
        for keeper, problem in keepers
    ]
    table(("JOB", "STORE", "PID", "FOLDER", "PROBLEM"), rows, right=NUMERIC_COLUMNS)


def _home_json(keeper: KeeperIdentity) -> dict[str, JsonValue]:
    return {
        "job": keeper.job,
        "store": keeper.store,
        "pid": keeper.pid or None,
        "folder": str(keeper.folder),
    }
