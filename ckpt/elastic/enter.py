"""The moment of a decorated call: become a supervisor, go on as its trainer, or run in place with a word why."""

from __future__ import annotations

import importlib
import os
import secrets
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ckpt.elastic.facts import gather
from ckpt.elastic.starts import InPlace, Spawn, choose
from ckpt.elastic.supervisor import Supervision, supervise
from ckpt.elastic.trainer import TrainerSeat, seat_of_process
from ckpt.errors import ConflictError
from ckpt.link.client import KeeperSpec, ensure_keeper
from ckpt.link.frames import Wire
from ckpt.link.messages import WIRE_VERSION, Hello
from ckpt.link.policy import Policy
from ckpt.link.runtime import JobFolder
from ckpt.observe.events import Event, to_logging
from ckpt.session import keeping

OTHER_LAUNCH_WAIT_S = 10.0
"""How long supervisors wait for those of a launch that their launcher has just killed."""


def enter(spec: KeeperSpec | None, policy: Policy, *, prepare: bool) -> TrainerSeat | None:
    """Where a decorated function is called for the first time. Returns in trainers, with their seat, and in place, with None.

    In the process that the launcher started it does not return where trainers can be restarted: that process becomes their
    supervisor. Raises ConflictError where another launch of the job lives on this node.
    """
    seat = seat_of_process()
    if seat is not None:
        if spec is not None and keeping.seat_of_process() is None:
            sit_down(seat, spec)
        return seat
    _import_ahead()
    start = choose(gather())
    if spec is None and not isinstance(start, InPlace):
        start = InPlace(
            "the store lives in this process's memory, or its options can't be handed on",
            "pass a path or URL, with options that are plain values",
        )
    if spec is None or isinstance(start, InPlace):
        assert isinstance(start, InPlace), "without a store for it there is no keeper"
        _warn(start)
        return None
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    launch = _launch()
    os.environ[keeping.LAUNCH_VARIABLE] = launch
    hello = Hello(
        version=WIRE_VERSION, role="supervisor", pid=os.getpid(), launch=launch, rank=rank, ranks=keeping.ranks_here(),
        policy=policy,
    )  # fmt: skip
    tell = to_logging(rank)
    if isinstance(start, Spawn):
        text = (
            f"the training function runs in a fresh interpreter, which runs the code above the call again: {start.why}"
        )
        tell(Event("spawn", text, alarm=True))
    plan = Supervision(
        start=start,
        hello=hello,
        reconnect=lambda: ensure_keeper(spec),
        tell=tell,
        stacks=_stacks(spec),
        prepare=prepare,
    )
    seat = _supervised(lambda: ensure_keeper(spec), plan)
    sit_down(seat, spec)
    return seat


def sit_down(seat: TrainerSeat, spec: KeeperSpec) -> None:
    """Let sessions know whose trainer this process is. A prepared trainer has no attempt before it is promoted."""
    if seat.attempt:
        keeping.take_launch_seat(spec, seat.attempt)


def _supervised(connect: Callable[[], Wire], plan: Supervision) -> TrainerSeat:
    """Supervise; a launch whose processes are just being killed is given the time to be gone."""
    until_s = time.monotonic() + OTHER_LAUNCH_WAIT_S
    while True:
        try:
            return supervise(connect(), plan)
        except ConflictError:
            if time.monotonic() > until_s:
                raise
        time.sleep(0.05)  # between two looks, not in the hope of anything


def _import_ahead() -> None:
    """What making an optimizer imports: 1.5 s that every trainer would spend anew. The first one needs it anyway."""
    for name in ("torch._dynamo",):
        with suppress(ImportError):
            importlib.import_module(name)


def _launch() -> str:
    """One name for this start of the program on all its ranks: the launcher's process and what it says of itself."""
    facts = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return f"{os.getpid()}-{secrets.token_hex(4)}"
    parent = os.getppid()
    return "-".join([str(parent), _started(parent), *facts])


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot: with its number, the name of a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _stacks(spec: KeeperSpec) -> Path:
    return JobFolder(spec.store, spec.job).stacks


def _warn(start: InPlace) -> None:
    if start.remedy:
        warnings.warn(
            f"ckpt runs the training function in this process, so only the launcher can start it again: {start.why}; "
            f"{start.remedy}",
            RuntimeWarning,
            stacklevel=5,
        )
