"""The start of a decorated call: become a supervisor, continue as its trainer, or run in place."""

from __future__ import annotations

import asyncio
import builtins
import importlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

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
from ckpt.elastic.processes.supervisor import SupervisorPlan, become_thin, supervise_accepted
from ckpt.elastic.processes.trainer import TrainerProcess, trainer_of_process
from ckpt.events import Event, emit_to_logging
from ckpt.ipc.client import KeeperSpec, ensure_keeper
from ckpt.ipc.cluster_spec import NODES_VARIABLE, launch_name, local_rank_count
from ckpt.ipc.messages import WIRE_VERSION, Hello, Policy
from ckpt.session.keeper import attachment as keeping

# ---- the facts from which ``choose_start_method`` decides

PROBE_WAIT_S = 1.0
"""How long a probe child may take for one parallel operation; a healthy one needs milliseconds."""

PROBE_ELEMENTS = 1 << 20
"""Enough that torch splits an operation over its threads (32,768 elements each)."""

_GPUS = ("/dev/nvidia", "/dev/kfd")


def gather_process_facts(*, probe: Callable[[], bool] | None = None) -> ProcessFacts:
    """The facts about this process, now.

    ``probe`` is called only if all else allows a fork, since it forks a child and runs a parallel
    operation there (default: ``probe_hangs``).
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    from_command = sys.argv[:1] == ["-c"]
    from_stdin = file is not None and file.startswith("<")
    local_ranks = local_rank_count()
    facts = ProcessFacts(
        platform=sys.platform,
        asked_in_place=os.environ.get("CKPT_IN_PLACE", "0") not in ("", "0"),
        under_pytest="PYTEST_CURRENT_TEST" in os.environ and "_pytest.runner" in sys.modules,
        notebook=_interactive() or (file is None and not from_command),
        process_group=dist.is_available() and dist.is_initialized(),
        several_nodes=(
            local_ranks is not None
            and local_ranks != int(os.environ.get("WORLD_SIZE", local_ranks))
            and NODES_VARIABLE not in os.environ
        ),
        ranks_unknown=local_ranks is None,
        unranked_child=multiprocessing.parent_process() is not None and "RANK" not in os.environ,
        main_thread=threading.current_thread() is threading.main_thread(),
        threads=tuple(
            thread.name for thread in threading.enumerate() if thread is not threading.main_thread()
        ),
        event_loop=asyncio._get_running_loop() is not None,
        gpu_open=_gpu_open(),
        rerun=bool(sys.executable) and not from_stdin and multiprocessing.parent_process() is None,
    )
    if isinstance(choose_start_method(facts), Fork):
        facts = replace(facts, probe_hung=(probe or probe_hangs)())
    return facts


def probe_hangs(wait_s: float = PROBE_WAIT_S) -> bool:
    """Whether a forked child hangs in a parallel operation.

    It does if this process has run one (libgomp's pool). Forks one child, waits for it and reaps
    it. Takes a few milliseconds, or ``wait_s`` if the child hangs.
    """
    if torch.get_num_threads() == 1:
        return False
    read_fd, write_fd = os.pipe()
    with around_fork():
        pid = os.fork()
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            torch.ones(PROBE_ELEMENTS).add_(1.0)
            os.write(write_fd, b"!")
        finally:
            os._exit(0)
    os.close(write_fd)
    try:
        ready, _, _ = select.select([read_fd], [], [], wait_s)
        returned = bool(ready) and os.read(read_fd, 1) == b"!"
    finally:
        os.close(read_fd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return not returned


def _interactive() -> bool:
    return hasattr(builtins, "__IPYTHON__") or hasattr(sys, "ps1")


def _gpu_open() -> bool:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    return any(target.startswith(_GPUS) for target in _open_files())


def _open_files() -> list[str]:
    targets = []
    try:
        entries = list(Path("/proc/self/fd").iterdir())
    except OSError:  # no /proc
        return []
    for entry in entries:
        try:
            targets.append(str(entry.readlink()))
        except OSError:  # the descriptor of this very listing
            continue
    return targets


# ---- the decorated call


def enter(
    spec: KeeperSpec | None, policy: Policy, *, capture_rule: str, prepare: bool
) -> TrainerProcess | None:
    """The start of a decorated call. ``capture_rule``: see ``Hello.capture_rule``.

    Returns in trainers, as ``TrainerProcess``, and in place, with None.

    If trainers can be restarted, it does not return in the process that the launcher started:
    that process becomes their supervisor. Raises ConflictError if another launch of the job lives
    on this node.
    """
    trainer = trainer_of_process()
    if trainer is not None:
        if spec is not None and keeping.supervised_trainer() is None:
            register_trainer(trainer, spec)
        return trainer
    start = _choose_start_method(spec)
    if spec is None or isinstance(start, InPlace):
        assert isinstance(start, InPlace), "without a keeper's specification the start is in place"
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
        ends_after=spec.nodes.ends_after if spec.nodes is not None else -1,
        capture_rule=capture_rule,
    )
    emit = emit_to_logging(rank)
    if isinstance(start, Spawn):
        text = (
            "the training function runs in a fresh interpreter, which runs the code above the call "
            f"again: {start.reason}"
        )
        emit(Event("spawn", text, alarm=True))
    plan = SupervisorPlan(
        start=start,
        hello=hello,
        reconnect=lambda: ensure_keeper(spec),
        emit=emit,
        spec=spec,
        stacks=_stacks(spec),
        prepare=prepare,
    )
    if isinstance(start, Spawn):
        why = become_thin(plan, spec)
        emit(Event("not-thin", f"the supervisor keeps what the program built: {why}", alarm=True))
    trainer = supervise_accepted(lambda: ensure_keeper(spec), plan)
    remove_stale_error_file()
    register_trainer(trainer, spec)
    return trainer


def _choose_start_method(spec: KeeperSpec | None) -> Fork | Spawn | InPlace:
    start = choose_start_method(gather_process_facts(probe=lambda: False))
    if isinstance(start, InPlace):
        return start
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        # Inherited from the parent: the exit status of a child would be lost.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if spec is None:
        return InPlace(
            "the store is in this process's memory, or its options can't be passed to the keeper",
            "pass a path or URL, with options that are plain values",
        )
    if isinstance(start, Spawn):
        return start
    # Only forks inherit imports, so nothing is imported ahead for the other two. The facts are
    # gathered again afterwards: what was imported may have started threads.
    _import_ahead()
    return choose_start_method(gather_process_facts())


def register_trainer(trainer: TrainerProcess, spec: KeeperSpec) -> None:
    """Tell sessions which attempt this process belongs to.

    A prepared trainer has none before it is promoted.
    """
    if trainer.attempt:
        keeping.set_supervised_from_environment(spec, trainer.attempt)


def _import_ahead() -> None:
    """Import what the first trainer is going to import, once, so that forked trainers have it.

    Making an optimizer imports ``torch._dynamo``: 1.5 s in every trainer, and so in every
    recovery. It must happen before the first fork: later it would block the supervisor's loop.
    With other nodes, also what a trainer imports to read their memory.
    """
    for name in (
        "torch._dynamo",
        *(("ckpt.cluster.peermem.gmac",) if os.environ.get(NODES_VARIABLE) else ()),
    ):
        with suppress(ImportError):
            importlib.import_module(name)


def _stacks(spec: KeeperSpec) -> Path:
    return spec.folder.stacks


def _warn(start: InPlace) -> None:
    if start.remedy:
        warnings.warn(
            "ckpt runs the training function in this process, so only the launcher can restart it: "
            f"{start.reason}; {start.remedy}",
            RuntimeWarning,
            stacklevel=5,
        )
