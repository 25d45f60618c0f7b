"""``ckpt top``: one job, live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ckpt.cli.echo import emit_json
from ckpt.cli.jobs import (
    LIVE_COLUMNS,
    NUMERIC_COLUMNS,
    RECOVERY_COLUMNS,
    KeeperQuery,
    ReportSample,
    choose_keeper,
    job_command,
    keeper_identity,
    live_json,
    live_rows,
    recovery_rows,
    steps_per_s,
    summary,
)
from ckpt.cli.output import grid, stdout_console
from ckpt.errors import NotFoundError, UnavailableError
from ckpt.ipc.runtime_dir import JobFolder, list_jobs

SAMPLES_MAX = 20
"""Samples that a rank's rate is averaged over: few enough to show a change."""

LOST_S_MAX = 15.0
"""Wait for a keeper that is gone: supervisors start another one well within this."""

RETRY_S = 0.1
"""Poll interval for a keeper that is gone."""

RECOVERIES_SHOWN = 5

_EPILOG = """\b
Examples:
  ckpt top
  ckpt top my-job --interval 5
  ckpt top my-job --once --json | jq '.ranks[].steps_per_s'

\b
JOB is the job's name, or the folder's name that 'ckpt ps' shows; it may be
left out where one job runs. Ctrl-C ends the view. In a pipe one view is
printed for each interval. HELD counts slots that uploads hold, '*' marks them.

\b
JSON: one document for each interval, as in ps's "jobs", and each rank has
"steps_per_s" besides: null until two samples of its trainer are there.
--once prints one, after one interval.

\b
Exit codes: 0 the job's keeper ended as planned, or --once is done; 2 several
jobs fit; 10 no such job runs; 11 the keeper died or does not answer;
130 Ctrl-C.
"""


@click.command(name="top", epilog=_EPILOG)
@click.argument("job", required=False)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two samples.",
)
@click.option("--once", is_flag=True, help="Print one view, after one interval, and exit.")
@job_command
def command(*, job: str | None, interval_s: float, once: bool, as_json: bool) -> None:
    """Watch one job of this machine: each rank's step, pace, phase and slots, and the last
    recoveries."""
    folders = [folder for folder in list_jobs() if folder.has_keeper()]
    folder = folders[choose_keeper([keeper_identity(folder) for folder in folders], job)]
    watch = JobWatch(folder)
    try:
        samples = [watch.sample()]
        with _shown(as_json=as_json) as show:
            if not once:
                show(samples)
            while True:
                time.sleep(interval_s)
                sample = watch.next_sample()
                if sample is None:
                    return
                samples = [*samples, sample][-SAMPLES_MAX:]
                show(samples)
                if once:
                    return
    finally:
        watch.close()


class JobWatch:
    """Samples of one job; continues with the next keeper if one is replaced."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._asker: KeeperQuery | None = None

    def sample(self) -> ReportSample:
        """The keeper's report. Raises UnavailableError, or NotFoundError if it has no ranks yet."""
        try:
            self._asker = self._asker or KeeperQuery(self._folder)
            report = self._asker.report()
        except UnavailableError:
            self.close()
            raise
        if report is None:
            raise NotFoundError(f"the keeper has no ranks yet. folder={self._folder.path}")
        return ReportSample(time.monotonic(), report)

    def next_sample(self) -> ReportSample | None:
        """The next sample, waiting LOST_S_MAX for another keeper; None if the job has ended."""
        until_s = time.monotonic() + LOST_S_MAX
        while True:
            try:
                return self.sample()
            except (UnavailableError, NotFoundError):
                if not self._folder.path.is_dir():
                    return None
                if time.monotonic() > until_s:
                    raise
            time.sleep(RETRY_S)

    def close(self) -> None:
        """Close the connection."""
        if self._asker is not None:
            self._asker.close()
            self._asker = None


ShowSamples = Callable[[Sequence[ReportSample]], None]


@contextmanager
def _shown(*, as_json: bool) -> Iterator[ShowSamples]:
    """The way to show samples: as JSON, as text in a pipe, or in place on a terminal."""
    if as_json:
        yield lambda samples: emit_json(live_json(samples))
        return
    console = stdout_console()
    if not console.is_terminal:
        yield lambda samples: console.print(render(samples), end="\n\n")
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda samples: live.update(render(samples), refresh=True)


def render(samples: Sequence[ReportSample]) -> RenderableType:
    """The last sample as text and tables."""
    report = samples[-1].report
    parts: list[RenderableType] = [Text(f"{label:<10}{text}") for label, text in summary(report)]
    parts += [
        Text(""),
        grid(LIVE_COLUMNS, live_rows(report, steps_per_s(samples)), right=NUMERIC_COLUMNS),
    ]
    if report.recoveries:
        recoveries = recovery_rows(report.recoveries, last=RECOVERIES_SHOWN)
        parts += [Text(""), grid(RECOVERY_COLUMNS, recoveries)]
    return Group(*parts)
