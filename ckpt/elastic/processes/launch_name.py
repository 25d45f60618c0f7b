"""The name of one start of the whole program, which all its ranks find out alike and no other start has."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_MARKS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""What launchers set for each rank, the innermost launcher first."""

_FACTS = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


def launch_name() -> str:
    """The launcher's process, and what it says of this start. A program without ranks is its own launcher.

    The launcher is the nearest process above this one that is of no rank: scripts between the two belong to the rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return f"{os.getpid()}-{secrets.token_hex(4)}"
    mark = next((name for name in _MARKS if name in os.environ), "RANK")
    launcher = _nearest_without(mark)
    return "-".join([str(launcher), _stat(launcher)[1], *(os.environ.get(name, "") for name in _FACTS)])


def _nearest_without(mark: str) -> int:
    """The nearest ancestor that was started without this variable, or that doesn't show its own; else the outermost."""
    pid = os.getppid()
    while True:
        try:
            started_with = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # another user's: no part of this program
            return pid
        parent = _stat(pid)[0]
        if parent <= 0 or not any(one.startswith(f"{mark}=".encode()) for one in started_with):
            return pid
        pid = parent


def _stat(pid: int) -> tuple[int, str]:
    """A process's parent, and when it began in clock ticks since boot: with its number, that is its name."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    except (OSError, IndexError):
        return 0, ""
