"""``ckpt logs``: what keepers wrote, also after they have ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.jobs import job_command
from ckpt.cli.output import table
from ckpt.errors import NotFoundError
from ckpt.ipc.runtime_dir import LOG_BYTES_MAX, JobFolderInfo, kept_logs, list_jobs

_EPILOG = """\b
Examples:
  ckpt logs
  ckpt logs gpt

\b
JOB is the job's name or its store. The newest log is printed: of the keeper
that runs, else of the one that ended last.

\b
JSON: {"logs": [{"job", "store", "pid", "path", "ended_unix_s": null |
number, "size_bytes"}, ...]}; with JOB one entry, which also has "text".

\b
Exit codes: 0 done; 2 the runtime folder cannot be trusted; 10 no log of that
job.
"""


@dataclass(frozen=True, slots=True)
class LogFound:
    """One log. ``ended_unix_s`` is None while its keeper may still write to it."""

    info: JobFolderInfo
    path: Path
    ended_unix_s: float | None
    text: str


@click.command(name="logs", epilog=_EPILOG)
@click.argument("job", required=False)
@job_command
def command(*, job: str | None, as_json: bool) -> None:
    """List the logs of this user's keepers on this machine, or print the newest one of JOB."""
    logs = find_logs()
    if job is None:
        if as_json:
            emit_json({"logs": [_json(log) for log in logs]})
        else:
            _print(logs)
        return
    log = newest_of(logs, job)
    if as_json:
        emit_json({"logs": [{**_json(log), "text": log.text}]})
    else:
        click.echo(log.text.rstrip("\n"))


def find_logs() -> list[LogFound]:
    """Logs of running keepers, then kept ones, newest first."""
    running = [
        LogFound(info, folder.log_path, None, folder.log_tail(limit_bytes=LOG_BYTES_MAX))
        for folder in list_jobs()
        if (info := folder.read_info()) is not None
    ]
    kept = [LogFound(log.info, log.path, log.ended_unix_s, log.text) for log in kept_logs()]
    return [*running, *kept]


def newest_of(logs: Sequence[LogFound], job: str) -> LogFound:
    """The first log of a job, named by its name or its store. Raises NotFoundError."""
    stores = {job, str(Path(job).absolute())}
    for log in logs:
        if log.info.job == job or log.info.store in stores:
            return log
    known = sorted({log.info.job for log in logs})
    raise NotFoundError(f"no log of this job. job={job!r} known={known}; see `ckpt logs`")


def _json(log: LogFound) -> dict[str, JsonValue]:
    return {
        "job": log.info.job,
        "store": log.info.store,
        "pid": log.info.pid,
        "path": str(log.path),
        "ended_unix_s": log.ended_unix_s,
        "size_bytes": len(log.text.encode()),
    }


def _print(logs: Sequence[LogFound]) -> None:
    if not logs:
        click.echo("no logs")
        return
    rows = [(log.info.job, log.info.store, _ended(log), str(log.path)) for log in logs]
    table(("JOB", "STORE", "ENDED", "LOG"), rows)


def _ended(log: LogFound) -> str:
    if log.ended_unix_s is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(log.ended_unix_s))
