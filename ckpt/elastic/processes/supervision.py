"""What a supervisor needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt import events
from ckpt.elastic.processes.start_method import Fork, Spawn
from ckpt.ipc.frames import Wire
from ckpt.ipc.messages import Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """See the module. ``hello`` is what it says first on each connection; its ``attempt`` is filled in.

    ``reconnect`` gives a connection to a keeper, starting one where there is none; nothing was said on it yet. ``stacks`` is a
    folder for stack dumps (None: none). ``prepare``: keep a second trainer that has run ahead to ``run.ready()``.
    """

    start: Fork | Spawn
    hello: Hello
    reconnect: Callable[[], Wire]
    tell: events.Tell
    stacks: Path | None = None
    prepare: bool = False
