"""The moment of a decorated call: become a supervisor, go on as its trainer, or run in place with a
word why."""

from __future__ import annotations

import builtins
import importlib
import multiprocessing
import os
import secrets
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ckpt.elastic.failure import remove_stale_error_file
from ckpt.elastic.processes.launch import around_fork
from ckpt.elastic.processes.start_method import (
    Fork,
    InPlace,
    ProcessFacts,
    Spawn,
    choose_start_method,
)
from ckpt.elastic.processes.supervisor import SupervisorPlan, supervise
from ckpt.elastic.processes.trainer import TrainerProcess, trainer_of_process
from ckpt.errors import CkptError, ConflictError, UnavailableError
from ckpt.events import Event, emit_to_logging
from ckpt.ipc.client import START_WAIT_S, HungUpError, KeeperSpec, ensure_keeper
from ckpt.ipc.cluster_spec import NODES_VARIABLE, local_rank_count
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import WIRE_VERSION, Hello, Policy
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.session.keeper import attachment as keeping

# What this process knows about itself where a decorated function is called; ``starts`` decides on
# it.

PROBE_WAIT_S = 1.0
"""How long a probe child may take over one parallel operation; a healthy one needs milliseconds."""

PROBE_ELEMENTS = 1 << 20
"""Enough that torch splits an operation over its threads (they take 32,768 elements each)."""

_GPUS = ("/dev/nvidia", "/dev/kfd")


def gather_process_facts(*, probe: Callable[[], bool] | None = None) -> ProcessFacts:
    """The facts of this process, now.

    ``probe`` is asked only where nothing else decides, since it forks a child and runs a parallel
    operation there (default: ``probe_hangs``).
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    from_command = sys.argv[:1] == ["-c"]
    from_stdin = file is not None and file.startswith("<")
    here = local_rank_count()
    facts = ProcessFacts(
        platform=sys.platform,
        asked_in_place=os.environ.get("CKPT_IN_PLACE", "0") not in ("", "0"),
        under_pytest="PYTEST_CURRENT_TEST" in os.environ and "_pytest.runner" in sys.modules,
        notebook=_interactive() or (file is None and not from_command),
        process_group=dist.is_available() and dist.is_initialized(),
        several_nodes=(
            here is not None
            and here != int(os.environ.get("WORLD_SIZE", here))
            and NODES_VARIABLE not in os.environ
        ),
        ranks_unknown=here is None,
        unranked_child=multiprocessing.parent_process() is not None and "RANK" not in os.environ,
        main_thread=threading.current_thread() is threading.main_thread(),
        threads=tuple(
            one.name for one in threading.enumerate() if one is not threading.main_thread()
        ),
        gpu_open=_gpu_open(),
        rerun=bool(sys.executable) and not from_stdin and multiprocessing.parent_process() is None,
    )
    if isinstance(choose_start_method(facts), Fork):
        facts = replace(facts, probe_hung=(probe or probe_hangs)())
    return facts


def probe_hangs(wait_s: float = PROBE_WAIT_S) -> bool:
    """Whether a forked child hangs in a parallel operation, as it does where this process has run
    one (libgomp's pool).

    Forks one child, waits for it and reaps it. Costs a few milliseconds where all is well,
    ``wait_s`` where it isn't.
    """
    if torch.get_num_threads() == 1:
        return False
    said, says = os.pipe()
    with around_fork():
        pid = os.fork()
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            torch.ones(PROBE_ELEMENTS).add_(1.0)
            os.write(says, b"!")
        finally:
            os._exit(0)
    os.close(says)
    try:
        ready, _, _ = select.select([said], [], [], wait_s)
        back = bool(ready) and os.read(said, 1) == b"!"
    finally:
        os.close(said)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return not back


def _interactive() -> bool:
    return hasattr(builtins, "__IPYTHON__") or hasattr(sys, "ps1")


def _gpu_open() -> bool:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    return any(target.startswith(_GPUS) for target in _open_files())


def _open_files() -> list[str]:
    found = []
    try:
        entries = list(Path("/proc/self/fd").iterdir())
    except OSError:  # no /proc: then there are no names to look at
        return []
    for entry in entries:
        try:
            found.append(str(entry.readlink()))
        except OSError:  # the descriptor of this very listing
            continue
    return found


# The name of one start of the whole program, which all its ranks find out alike and no other
# start has.

_MARKS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""What launchers set for each rank, the innermost launcher first."""

_FACTS = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


def launch_name() -> str:
    """The launcher's process, and what it says of this start. A program without ranks is its own
    launcher.

    The launcher is the nearest process above this one that is of no rank: scripts between the two
    belong to the rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return f"{os.getpid()}-{secrets.token_hex(4)}"
    mark = next((name for name in _MARKS if name in os.environ), "RANK")
    launcher = _nearest_without(mark)
    return "-".join(
        [str(launcher), _stat(launcher)[1], *(os.environ.get(name, "") for name in _FACTS)]
    )


def _nearest_without(mark: str) -> int:
    """The nearest ancestor that was started without this variable, or that doesn't show its own;
    else the outermost."""
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
    """A process's parent, and when it began in clock ticks since boot: with its number, that is its
    name."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="ascii", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return int(fields[1]), fields[19]
    except (OSError, IndexError):
        return 0, ""


OTHER_LAUNCH_WAIT_S = 10.0
"""How long supervisors wait for those of a launch that their launcher has just killed."""

SETTLE_WAIT_S = 600.0
"""How long they wait for a keeper that is busy with what an earlier launch left."""

LOOK_AGAIN_S = 0.05


def enter(spec: KeeperSpec | None, policy: Policy, *, prepare: bool) -> TrainerProcess | None:
    """Where a decorated function is called for the first time. Returns in trainers, with their
    seat, and in place, with None.

    In the process that the launcher started it does not return where trainers can be restarted:
    that process becomes their supervisor. Raises ConflictError where another launch of the job
    lives on this node.
    """
    seat = trainer_of_process()
    if seat is not None:
        if spec is not None and keeping.supervised_trainer() is None:
            register_trainer(seat, spec)
        return seat
    _import_ahead()
    start = choose_start_method(gather_process_facts())
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
        version=WIRE_VERSION,
        role="supervisor",
        pid=os.getpid(),
        launch=launch,
        rank=rank,
        ranks=local_rank_count() or 1,
        policy=policy,
        agent=spec.nodes.agent if spec.nodes is not None else "",
    )
    tell = emit_to_logging(rank)
    if isinstance(start, Spawn):
        text = f"the training function runs in a fresh interpreter, which runs the code above the call again: {start.reason}"
        tell(Event("spawn", text, alarm=True))
    plan = SupervisorPlan(
        start=start,
        hello=hello,
        reconnect=lambda: ensure_keeper(spec),
        emit=tell,
        stacks=_stacks(spec),
        prepare=prepare,
    )
    seat = _supervised(lambda: ensure_keeper(spec), plan)
    remove_stale_error_file()
    register_trainer(seat, spec)
    return seat


def register_trainer(seat: TrainerProcess, spec: KeeperSpec) -> None:
    """Let sessions know whose trainer this process is. A prepared trainer has no attempt before it
    is promoted."""
    if seat.attempt:
        keeping.set_supervised_from_environment(spec, seat.attempt)


def _supervised(connect: Callable[[], MessageSocket], plan: SupervisorPlan) -> TrainerProcess:
    """Supervise, as soon as the keeper takes this launch.

    A launch whose processes are just being killed is given the time to be gone, a keeper the time
    to bring its snapshots to the store; one that is just ending is followed by another.
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
    """What making an optimizer imports: 1.5 s that every trainer would spend anew. The first one
    needs it anyway.

    With other nodes also what reading their memory imports, which the first trainer does not.
    """
    for name in (
        "torch._dynamo",
        *(("ckpt.cluster.peermem.gmac",) if os.environ.get(NODES_VARIABLE) else ()),
    ):
        with suppress(ImportError):
            importlib.import_module(name)


def _stacks(spec: KeeperSpec) -> Path:
    return JobFolder(spec.store, spec.job).stacks


def _warn(start: InPlace) -> None:
    if start.remedy:
        warnings.warn(
            "ckpt runs the training function in this process, so only the launcher can start it "
            f"again: {start.reason}; "
            f"{start.remedy}",
            RuntimeWarning,
            stacklevel=5,
        )
