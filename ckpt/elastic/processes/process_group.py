"""The user's ``init_process_group`` in a trainer: not too early, and noted.

Trainers of one attempt start within milliseconds. A rank that dials before rank 0 listens backs off inside torch, which costs a
quarter to three quarters of a second; so it looks first whether somebody listens. Whoever took the function from
``torch.distributed`` before the decorated call gets torch's own.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

LISTEN_WAIT_S = 300.0
"""How long rank 0 is waited for; then torch waits, and says what is wrong."""

LOOK_S = 0.001
_LISTENS = "0A"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def watch_process_group(made: Callable[[], None]) -> None:
    """Have ``made`` called after the user's process group is made, and make it without torch's first back-off."""
    if not dist.is_available():
        return
    make = dist.init_process_group

    @functools.wraps(make)
    def init_process_group(*args: object, **kwargs: object) -> None:
        init_method = args[1] if len(args) > 1 else kwargs.get("init_method")
        if init_method in (None, "env://") and kwargs.get("store") is None and looks_here(os.environ):
            wait_for_listener(int(os.environ.get("MASTER_PORT", "0")))
        make(*args, **kwargs)  # type: ignore[arg-type]
        made()

    dist.init_process_group = init_process_group


def looks_here(said: Mapping[str, str]) -> bool:
    """Whether this rank dials rank 0 and that one listens on this machine, as the environment says: only here one can look."""
    here = said.get("MASTER_ADDR", "").startswith(("127.", "localhost", "::1")) or said.get("GROUP_RANK") == "0"
    return said.get("RANK", "0") != "0" and here


def wait_for_listener(port: int, *, timeout_s: float = LISTEN_WAIT_S) -> bool:
    """Wait until somebody on this machine listens on ``port``; False where nobody did in time, or the system doesn't tell."""
    until_s = time.monotonic() + timeout_s
    while port:
        found = listens(port)
        if found is not False:
            return bool(found)
        if time.monotonic() > until_s:
            return False
        time.sleep(LOOK_S)
    return False


def listens(port: int) -> bool | None:
    """Whether somebody listens on ``port``; None where the system doesn't tell. Connects to nobody."""
    told = False
    for table in _TABLES:
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        told = True
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False if told else None
