"""The moment of a decorated call: become a supervisor, go on as its trainer, or run in place with a word why."""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ckpt.elastic.failure import forget_older_error
from ckpt.elastic.processes.facts import gather
from ckpt.elastic.processes.launch_name import launch_name
from ckpt.elastic.processes.start_method import InPlace, Spawn, choose
from ckpt.elastic.processes.supervise import supervise
from ckpt.elastic.processes.supervision import Supervision
from ckpt.elastic.processes.trainer import TrainerSeat, seat_of_process
from ckpt.errors import CkptError, ConflictError, UnavailableError
from ckpt.events import Event, to_logging
from ckpt.ipc.client import START_WAIT_S, HungUpError, KeeperSpec, ensure_keeper
from ckpt.ipc.cluster_spec import NODES_VARIABLE
from ckpt.ipc.frames import Wire
from ckpt.ipc.launcher import ranks_here
from ckpt.ipc.messages import WIRE_VERSION, Hello
from ckpt.ipc.policy import Policy
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.session.keeper import attachment as keeping

OTHER_LAUNCH_WAIT_S = 10.0
"""How long supervisors wait for those of a launch that their launcher has just killed."""

SETTLE_WAIT_S = 600.0
"""How long they wait for a keeper that is busy with what an earlier launch left."""

LOOK_AGAIN_S = 0.05


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
    launch = launch_name()
    os.environ[keeping.LAUNCH_VARIABLE] = launch
    hello = Hello(
        version=WIRE_VERSION, role="supervisor", pid=os.getpid(), launch=launch, rank=rank, ranks=ranks_here() or 1,
        policy=policy, agent=spec.nodes.agent if spec.nodes is not None else "",
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
    forget_older_error()
    sit_down(seat, spec)
    return seat


def sit_down(seat: TrainerSeat, spec: KeeperSpec) -> None:
    """Let sessions know whose trainer this process is. A prepared trainer has no attempt before it is promoted."""
    if seat.attempt:
        keeping.take_launch_seat(spec, seat.attempt)


def _supervised(connect: Callable[[], Wire], plan: Supervision) -> TrainerSeat:
    """Supervise, as soon as the keeper takes this launch.

    A launch whose processes are just being killed is given the time to be gone, a keeper the time to bring its snapshots to the
    store; one that is just ending is followed by another.
    """
    began_s = time.monotonic()
    said = False
    while True:
        link = connect()
        try:
            return supervise(link, plan)
        except (ConflictError, UnavailableError) as error:
            patience = _patience(error)
            if time.monotonic() - began_s > patience.seconds:
                raise
            if patience.worth_telling and not said:
                said = True
                _say(f"waiting, {patience.seconds / 60:.0f} min at most: {error}")
        time.sleep(LOOK_AGAIN_S)  # between two looks, not in the hope of anything


class _Patience(NamedTuple):
    seconds: float
    worth_telling: bool


def _patience(error: CkptError) -> _Patience:
    if isinstance(error, ConflictError):
        return _Patience(OTHER_LAUNCH_WAIT_S, worth_telling=False)
    if isinstance(error, HungUpError):
        return _Patience(START_WAIT_S, worth_telling=False)
    return _Patience(SETTLE_WAIT_S, worth_telling=True)


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads it
        sys.stderr.write(f"ckpt: {text}\n")
        sys.stderr.flush()


def _import_ahead() -> None:
    """What making an optimizer imports: 1.5 s that every trainer would spend anew. The first one needs it anyway.

    With other nodes also what reading their memory imports, which the first trainer does not.
    """
    for name in ("torch._dynamo", *(("ckpt.cluster.peermem.gmac",) if os.environ.get(NODES_VARIABLE) else ())):
        with suppress(ImportError):
            importlib.import_module(name)


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
