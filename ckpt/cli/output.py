"""Output for people: tables, sizes and times, and a progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

_PIPE_COLUMNS = 100_000
"""Width of a pipe: a line must not be cut on its way into another program."""


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[str] = frozenset()
) -> None:
    """Print aligned columns, those named in ``right`` to the right; folded in a terminal, whole
    lines in a pipe."""
    stdout_console().print(grid(columns, rows, right=right))


def grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[str] = frozenset()
) -> Table:
    """The table that ``table`` prints."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        shown.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def stdout_console() -> Console:
    """A console on stdout that cuts no line in a pipe."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)


def human_bytes(size_bytes: int) -> str:
    """``1536`` as ``1.5 KiB``."""
    size = float(size_bytes)
    place = 0
    while size >= 1024 and place < len(_UNITS) - 1:
        size /= 1024
        place += 1
    return f"{size:.1f} {_UNITS[place]}" if place else f"{size_bytes} B"


def human_time(unix_s: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr where that is a terminal, else None."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)
