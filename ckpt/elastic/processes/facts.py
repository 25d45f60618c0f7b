"""What this process knows about itself where a decorated function is called; ``starts`` decides on it."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ckpt.elastic.processes.launch import forking
from ckpt.elastic.processes.start_method import Facts, Fork, choose
from ckpt.ipc.cluster_spec import NODES_VARIABLE
from ckpt.ipc.launcher import ranks_here

PROBE_WAIT_S = 1.0
"""How long a probe child may take over one parallel operation; a healthy one needs milliseconds."""

PROBE_ELEMENTS = 1 << 20
"""Enough that torch splits an operation over its threads (they take 32,768 elements each)."""

_GPUS = ("/dev/nvidia", "/dev/kfd")


def gather(*, probe: Callable[[], bool] | None = None) -> Facts:
    """The facts of this process, now.

    ``probe`` is asked only where nothing else decides, since it forks a child and runs a parallel operation there (default:
    ``probe_hangs``).
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    from_command = sys.argv[:1] == ["-c"]
    from_stdin = file is not None and file.startswith("<")
    here = ranks_here()
    facts = Facts(
        platform=sys.platform,
        asked_in_place=os.environ.get("CKPT_IN_PLACE", "0") not in ("", "0"),
        under_pytest="PYTEST_CURRENT_TEST" in os.environ and "_pytest.runner" in sys.modules,
        notebook=_interactive() or (file is None and not from_command),
        process_group=dist.is_available() and dist.is_initialized(),
        several_nodes=(
            here is not None and here != int(os.environ.get("WORLD_SIZE", here)) and NODES_VARIABLE not in os.environ
        ),
        ranks_unknown=here is None,
        unranked_child=multiprocessing.parent_process() is not None and "RANK" not in os.environ,
        main_thread=threading.current_thread() is threading.main_thread(),
        threads=tuple(one.name for one in threading.enumerate() if one is not threading.main_thread()),
        gpu_open=_gpu_open(),
        rerun=bool(sys.executable) and not from_stdin and multiprocessing.parent_process() is None,
    )
    if isinstance(choose(facts), Fork):
        facts = replace(facts, probe_hung=(probe or probe_hangs)())
    return facts


def probe_hangs(wait_s: float = PROBE_WAIT_S) -> bool:
    """Whether a forked child hangs in a parallel operation, as it does where this process has run one (libgomp's pool).

    Forks one child, waits for it and reaps it. Costs a few milliseconds where all is well, ``wait_s`` where it isn't.
    """
    if torch.get_num_threads() == 1:
        return False
    said, says = os.pipe()
    with forking():
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
