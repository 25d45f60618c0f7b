"""The trainer's side of supervision: what a forked child does before it runs the user's function.

``TrainerProcess`` says that this process is a trainer. It is passed to a spawned trainer, and to
later decorated calls of any trainer, in the environment as ``CKPT_SEAT``. It counts only in the
process whose pid it names, so processes that a trainer starts do not take it for their own. All
that a trainer reports to its supervisor are single bytes in a pipe, and one line about the
exception that ends it: that needs no thread, and a signal handler may write them.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from ckpt.errors import InternalError, UsageError
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.messages import Failing, RankPlacement

TRAINER_VARIABLE = "CKPT_SEAT"
"""The environment variable that holds a ``TrainerProcess``."""

OOM_SCORE = 500
"""Added to a trainer's score, so that the kernel kills trainers first.

Supervisor and keeper hold their staged state.
"""

DUMPS_READY = b"D"
FIRST_STEP = b"S"
READY = b"R"
TERMINATED = b"T"
FAILING = b"F"
"""An exception ends the trainer: a ``Failing`` follows as one line of JSON."""
ENTERED = b"E"
"""A decorated call began: what an earlier one failed of is over."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class TrainerOrder(msgspec.Struct, frozen=True):
    """What a prepared trainer waits for: the attempt that it becomes part of."""

    attempt: int
    port: int
    seating: RankPlacement | None = None


prepare_decoders(TrainerOrder)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerProcess:
    """This process is the trainer of ``attempt``, whose process group meets at ``port``.

    ``how`` it was started: ``fork``, ``spawn`` or ``prepared``. A prepared trainer has attempt 0
    until ``promoted``. ``report_fd`` goes to the supervisor, ``order_fd`` comes from it (-1: not
    prepared). ``stacks`` is the file for stack dumps ("": none). Without ``seating`` the group
    meets on loopback.
    """

    attempt: int
    port: int
    how: str
    pid: int
    report_fd: int
    order_fd: int = -1
    stacks: str = ""
    seating: RankPlacement | None = None

    def first_step_done(self) -> None:
        """Report that this trainer got past its start; the next one may now be prepared."""
        report_byte(self.report_fd, FIRST_STEP)

    def entered(self) -> None:
        """Report that a decorated call begins."""
        report_byte(self.report_fd, ENTERED)

    def failing(self, failing: Failing) -> None:
        """Report the exception that this trainer is about to end with: its supervisor tells the
        next keeper, if there is none now.
        """
        report_byte(self.report_fd, FAILING + msgspec.json.encode(failing) + b"\n")

    def promoted(self) -> TrainerProcess:
        """This trainer if it has an attempt; else the trainer of the attempt that is ordered.

        A prepared trainer waits here for the order while the live one is well, and exits here if
        its supervisor does not need it.
        """
        if self.attempt:
            return self
        report_byte(self.report_fd, READY)
        order = _wait_for_order(self.order_fd)
        os.close(self.order_fd)
        trainer = replace(
            self, attempt=order.attempt, port=order.port, order_fd=-1, seating=order.seating
        )
        put_into_environment(trainer)
        return trainer


prepare_decoders(TrainerProcess)


def trainer_of_process() -> TrainerProcess | None:
    """The trainer that this process is, or None.

    A spawned trainer sets up its signals here, at its first call.
    """
    text = os.environ.get(TRAINER_VARIABLE)
    if not text:
        return None
    try:
        trainer = msgspec.json.decode(text.encode(), type=TrainerProcess)
    except msgspec.DecodeError as error:
        raise UsageError(f"invalid variable. {TRAINER_VARIABLE}={text!r}; unset it") from error
    if trainer.pid != os.getpid():
        return None
    if os.get_inheritable(trainer.report_fd):  # spawned, and not set up yet
        _take(trainer)
    return trainer


def put_into_environment(trainer: TrainerProcess) -> None:
    """Set the variables that the user's ``init_process_group`` reads, and ``CKPT_SEAT``.

    Others stay as they are.
    """
    os.environ.update(environment(trainer))


def environment(trainer: TrainerProcess) -> dict[str, str]:
    """The environment variables of a trainer."""
    own = {TRAINER_VARIABLE: msgspec.json.encode(trainer).decode()}
    if not trainer.attempt:
        return own
    return {
        **own,
        **_placement(trainer.seating),
        "MASTER_PORT": str(trainer.port),
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # that store still has addresses of dead attempts
        "TORCHELASTIC_RESTART_COUNT": str(trainer.attempt - 1),
    }


def _placement(seating: RankPlacement | None) -> dict[str, str]:
    """Where rank 0 is and, with several nodes, which ranks are local; else the launcher says it."""
    if seating is None:
        return {"MASTER_ADDR": "127.0.0.1"}
    rank = str(seating.first_rank + int(os.environ.get("LOCAL_RANK", "0")))
    world = str(seating.world_size)
    return {
        "MASTER_ADDR": seating.host,
        "RANK": rank,
        "WORLD_SIZE": world,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "GROUP_RANK": str(seating.node),
        "GROUP_WORLD_SIZE": str(seating.nodes),
    }


def begin_child(supervisor_pid: int) -> None:
    """The first thing in a forked child: its own process group, and death with its supervisor."""
    os.setpgid(0, 0)
    die_with_parent(supervisor_pid)
    # Without /proc, or if it is not writable, the kernel chooses by size alone.
    with contextlib.suppress(OSError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE)))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies.

    Kills it at once if the parent is already dead.
    """
    if _LIBC is not None and _LIBC.prctl(
        _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0
    ):
        code = ctypes.get_errno()
        raise InternalError(f"cannot tie a trainer to its supervisor. why={os.strerror(code)}")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def enter_forked(trainer: TrainerProcess) -> TrainerProcess:
    """Become ``trainer``, in a forked child whose signal handlers are the user's again."""
    put_into_environment(trainer)
    _take(trainer)
    return trainer


def exec_again(trainer: TrainerProcess, folder: str) -> NoReturn:
    """Replace this forked child by a fresh interpreter that runs the program's command.

    It runs in ``folder``. Never returns.
    """
    for fd in (trainer.report_fd, trainer.order_fd):
        if fd >= 0:
            os.set_inheritable(fd, True)
    os.chdir(folder)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **environment(trainer)})


def report_byte(report_fd: int, byte: bytes) -> None:
    """Write one byte, or one line, to the supervisor.

    If it is gone, this process is about to be killed.
    """
    with contextlib.suppress(BrokenPipeError):
        os.write(report_fd, byte)


class TrainerSigterm:
    """The SIGTERM handler of a trainer.

    Training ends at a boundary that all ranks agree on, so it only reports.

    The user's own handler, if there was one before the call, is called too.
    """

    def __init__(
        self, report_fd: int, before: Callable[[int, FrameType | None], object] | None
    ) -> None:
        self._report_fd = report_fd
        self._before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM."""
        report_byte(self._report_fd, TERMINATED)
        if self._before is not None:
            self._before(number, frame)

    def restore(self) -> None:
        """In a forked child, such as a data loader's worker: restore the previous handler.

        Without that SIGTERM could not end it.
        """
        if isinstance(signal.getsignal(signal.SIGTERM), TrainerSigterm):
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def _take(trainer: TrainerProcess) -> None:
    """Set up signals and stack dumps of this process."""
    for fd in (trainer.report_fd, trainer.order_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_IGN:
        handler = TrainerSigterm(trainer.report_fd, before if callable(before) else None)
        signal.signal(signal.SIGTERM, handler)
        os.register_at_fork(after_in_child=handler.restore)
    if trainer.stacks and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
        _dump_on_signal(trainer)


def _dump_on_signal(trainer: TrainerProcess) -> None:
    """SIGUSR2 writes the stacks of all threads. Skipped if the user has a handler for it."""
    try:
        fd = os.open(
            trainer.stacks,
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC,
            0o600,
        )
        # The file is given by number, so that no file object closes it early.
        faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True, chain=False)
    except OSError:  # the folder was removed: a hang still ends the attempt, without stacks
        return
    report_byte(trainer.report_fd, DUMPS_READY)


def _wait_for_order(fd: int) -> TrainerOrder:
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(fd, 4096)
        if not piece:
            os._exit(0)
        text += piece
    return msgspec.json.decode(text, type=TrainerOrder)


def exit_after_error(error: BaseException) -> NoReturn:
    """Exit a child that failed before it became a trainer: print why, and nothing else."""
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    os._exit(1)


# ---- the user's ``init_process_group``: started when rank 0 listens, and reported as a milestone
#
# Trainers of one attempt start within milliseconds of each other. A rank that connects before rank
# 0 listens backs off inside torch, which costs 0.25 to 0.75 s; so it first waits until a process
# listens. Code that imported the function from ``torch.distributed`` before the decorated call gets
# torch's own.

LISTEN_WAIT_S = 300.0
"""The longest wait for rank 0; after that torch waits, and reports the error."""

LOOK_S, LOOK_S_MAX = 0.001, 0.25
LOOK_SHARE = 0.1
"""A look follows a tenth of the time waited so far, so it costs at most that much more; and at
least ten times what the last look took, which grows with the machine's connections."""

_LISTENS = "0A"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def watch_process_group(made: Callable[[], None]) -> None:
    """Call ``made`` once the user's process group is made; also avoids torch's first back-off.

    Imports torch here: a supervisor by itself has no use for it.
    """
    import torch.distributed as dist  # noqa: PLC0415

    if not dist.is_available():
        return
    make = dist.init_process_group

    @functools.wraps(make)
    def init_process_group(*args: object, **kwargs: object) -> None:
        init_method = args[1] if len(args) > 1 else kwargs.get("init_method")
        if (
            init_method in (None, "env://")
            and kwargs.get("store") is None
            and rank0_is_local(os.environ)
        ):
            wait_for_listener(int(os.environ.get("MASTER_PORT", "0")))
        make(*args, **kwargs)  # type: ignore[arg-type]
        made()

    dist.init_process_group = init_process_group


def rank0_is_local(variables: Mapping[str, str]) -> bool:
    """Whether this rank connects to a rank 0 on this machine: only there can it look."""
    loopback = variables.get("MASTER_ADDR", "").startswith(("127.", "localhost", "::1"))
    return variables.get("RANK", "0") != "0" and (loopback or variables.get("GROUP_RANK") == "0")


def wait_for_listener(port: int, *, timeout_s: float = LISTEN_WAIT_S) -> bool:
    """Wait until a process on this machine listens on ``port``.

    False if none did in time, or if that is unknown.
    """
    began_s = time.monotonic()
    while port:
        look_s = time.monotonic()
        listening = is_listening(port)
        if listening is not False:
            return bool(listening)
        now_s = time.monotonic()
        if now_s > began_s + timeout_s:
            return False
        pause_s = max(LOOK_SHARE * (now_s - began_s), (now_s - look_s) / LOOK_SHARE)
        time.sleep(min(LOOK_S_MAX, max(LOOK_S, pause_s)))
    return False


def is_listening(port: int) -> bool | None:
    """Whether a process listens on ``port``; None if the system does not say.

    Connects to nothing.
    """
    known = False
    for table in _TABLES:
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        known = True
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False if known else None
