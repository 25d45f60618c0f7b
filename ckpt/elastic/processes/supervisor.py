"""The supervisor of one rank: forks trainers, waits for them and kills them, as its keeper says.

It has one thread and never returns to the user's program. The parent of a fork stays in
``supervise`` and exits with its trainer's status; the child returns from it as a
``TrainerProcess`` and is the program from then on. The loop notes events (messages from the
keeper, signals, ended children, bytes from trainers) and then does all that is possible now. So
no step of it blocks on anything but the next event.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import msgspec

from ckpt import events
from ckpt.elastic.processes.child import (
    SUPERVISOR_SIGNALS,
    SignalPipe,
    Terminal,
    TrainerChild,
    adopt_orphans,
    anonymous_memory_bytes,
    reap_children,
)
from ckpt.elastic.processes.keeper_connection import SupervisorConnection
from ckpt.elastic.processes.launch import (
    STARTUP_FOLDER,
    InheritedProcesses,
    TrainerLaunch,
    launch_trainer,
    settle_above,
)
from ckpt.elastic.processes.start_method import Fork, Spawn
from ckpt.elastic.processes.trainer import (
    DUMPS_READY,
    FIRST_STEP,
    TERMINATED,
    TrainerOrder,
    TrainerProcess,
)
from ckpt.elastic.sigterm import SigtermHistory, SigtermMeaning
from ckpt.elastic.verdict import Verdict, give_verdict
from ckpt.errors import CkptError, ConflictError, InternalError, UnavailableError
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.board import open_anonymous
from ckpt.ipc.client import START_WAIT_S, HungUpError, KeeperSpec, ensure_keeper
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    Bye,
    Died,
    Dump,
    Failing,
    Hello,
    Kill,
    Killed,
    Leave,
    Message,
    Policy,
    Preempt,
    PrintLine,
    Start,
    Started,
    StartPrepared,
)
from ckpt.staging.memory import available_bytes

# ---- exits: as the trainer exited, so that the launcher sees what it would without supervisor

INTERRUPTED_STATUS = 128 + signal.SIGINT


def exit_status(keeper_status: int, own: int | None, *, interrupted: bool = False) -> int:
    """The status to exit with: the keeper's, unless the own trainer's says the same more exactly.

    Both are as from ``os.waitstatus_to_exitcode``; ``own`` is None if the own trainer did not end
    by itself. A keeper sends a signal as 128 plus its number, since it tells all ranks the same;
    the rank whose trainer died of that signal dies of it too. ``interrupted``: this rank's Ctrl-C
    was reported as the cause, whatever its trainer exited with.
    """
    if own is None:
        return keeper_status
    caught = interrupted and own != 0 and keeper_status == INTERRUPTED_STATUS
    return own if caught or (own < 0 and keeper_status == 128 - own) else keeper_status


def exit_with(status: int) -> NoReturn:
    """End this process with an exit code, or by minus a signal.

    Runs no exit handler: those are the trainer's.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # the reader is gone
                stream.flush()
    if status < 0:
        die_by_signal(-status)
    os._exit(status & 0xFF)


def print_line(text: str) -> None:
    """Tell a person who reads the program's output."""
    with suppress(OSError, ValueError):  # the reader is gone
        sys.stderr.write(f"ckpt: {text}\n")
        sys.stderr.flush()


def die_by_signal(number: int, *, group: bool = False) -> NoReturn:
    """Die by a signal, without a second core file.

    ``group``: send it to the whole process group, as the terminal does.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    if group:
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container ignores signals that it sends itself


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorPlan:
    """What a supervisor needs to know.

    ``hello`` is its first message on each connection; ``attempt`` is filled in. ``reconnect``
    returns a fresh connection to a keeper, and starts one if none runs; ``spec`` is what that
    keeper must have been started with. ``stacks`` is a folder for stack dumps (None: none).
    ``prepare``: keep a second trainer that has run up to ``run.ready()``.
    """

    start: Fork | Spawn
    hello: Hello
    reconnect: Callable[[], MessageSocket]
    emit: events.Emit
    spec: KeeperSpec | None = None
    stacks: Path | None = None
    prepare: bool = False


# ---- the loop

LEAVE_WAIT_S = 30.0
"""How long a supervisor that leaves waits for killed processes.

The kernel may be unable to end them at the moment.
"""

GONE_POLL_S = 0.01
CLOCK_LOOK_MS = 500
"""With several nodes: how often ``act_until`` is checked, which the keeper extends continuously."""
TERMINAL_POLL_S = 0.2
PREEMPTED_STATUS = 128 + signal.SIGTERM
STOPPED = (PREEMPTED_STATUS, 75)
"""How a trainer exits that stopped because of a preemption; 75: its last step is not durable."""
_STOPPED_FOR_TERMINAL = (signal.SIGTTIN, signal.SIGTTOU)


class Supervisor:
    """The loop of one rank's supervisor.

    The class has more than 12 attributes: each is one fact that the loop has noted and not yet
    acted upon, and every step of ``_act`` depends on several of them.
    """

    def __init__(self, keeper: SupervisorConnection, plan: SupervisorPlan) -> None:
        self._plan = plan
        self._keeper = keeper
        self._terminal = Terminal()
        self._live: TrainerChild | None = None
        self._prepared: TrainerChild | None = None
        self._attempt = plan.hello.attempt
        self._started = False
        self._ended: tuple[int, Failing | None] | None = None
        """How the trainer ended by itself, and the exception that it reported before."""
        self._unanswered: Kill | None = None
        self._starting: Start | None = None
        self._leaving: Leave | None = None
        self._leave_until_s = 0.0
        self._prepare = False
        self._is_standby = False
        self._preempted = False
        self._sigterms = SigtermHistory()
        self._interrupted = False
        self._had_terminal = False
        self._overdue = 0
        adopt_orphans()
        self._signals = SignalPipe()
        self._launch = TrainerLaunch(
            start=plan.start,
            rank=plan.hello.rank,
            stacks=plan.stacks,
            signals=self._signals,
            close_in_child=self._forget,
            # Spawned trainers run the code above the call again, and have their own.
            inherited=settle_above(plan.emit)
            if isinstance(plan.start, Fork)
            else InheritedProcesses(()),
        )

    def run(self) -> TrainerProcess:
        """Loop. Returns in trainers only."""
        while True:
            # Reports first: a keeper's request may depend on what a trainer reported before it.
            self._read_reports()
            self._read_keeper()
            self._read_signals()
            self._read_ends()
            self._check_clock()
            trainer = self._act()
            if trainer is not None:
                return trainer
            self._wait()

    def give_up(self, text: str, status: int) -> NoReturn:
        """Kill all trainers and exit with a message."""
        print_line(text)
        for child in self._children():
            child.kill()
        self._terminal.take_back()
        exit_with(status)

    # ---- events

    def _wait(self) -> None:
        """Block until an event arrives, or until something may have changed without an event."""
        if self._keeper.has_unread:  # already read from the socket, so ``poll`` would not report it
            return
        poll = select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        if not self._keeper.lost:
            poll.register(self._keeper.fileno(), select.POLLIN)
        for child in self._children():
            if child.report_fd >= 0:
                poll.register(child.report_fd, select.POLLIN)
        poll.poll(self._timeout_ms())

    def _timeout_ms(self) -> int | None:
        timeout_ms = self._timeout_for_ends_ms()
        watched = self._live is not None and self._live.attempt != self._overdue
        left_s = self._keeper.act_time_left_s() if watched else None
        if left_s is None:
            return timeout_ms
        left_ms = min(CLOCK_LOOK_MS, max(1, int(left_s * 1000)))
        return left_ms if timeout_ms is None else min(timeout_ms, left_ms)

    def _timeout_for_ends_ms(self) -> int | None:
        # ``gone`` also waits for the rest of the process group, whose end need not cause a signal
        # here.
        waits_for_end = self._unanswered or self._starting or self._leaving or self._keeper.lost
        if waits_for_end:
            return int(GONE_POLL_S * 1000)
        if self._live is not None and self._live.stopped:
            return int(TERMINAL_POLL_S * 1000)
        return None

    def _read_keeper(self) -> None:
        for message in self._keeper.receive():
            self._on_message(message)

    def _on_message(self, message: Message) -> None:
        match message:
            case Start():
                self._starting = message
            case Kill():
                self._on_kill(message)
            case Leave():
                self._leaving = message
                self._leave_until_s = time.monotonic() + LEAVE_WAIT_S
            case Dump():
                if self._live is not None and self._live.attempt == message.attempt:
                    self._live.dump(Path(message.path))
            case StartPrepared():
                self._is_standby = self._plan.prepare
            case PrintLine():
                print_line(message.text)
            case _:
                raise InternalError(
                    f"unexpected message to a supervisor. type={type(message).__name__}"
                )

    def _on_kill(self, message: Kill) -> None:
        if self._starting is not None and self._starting.attempt == message.attempt:
            self._starting = None
        if self._live is not None and self._live.attempt == message.attempt:
            self._unanswered = message
        else:
            self._keeper.send(Killed(attempt=message.attempt))

    def _read_signals(self) -> None:
        for number in self._signals.read():
            match number:
                case signal.SIGTERM:
                    self._on_terminate()
                case signal.SIGINT:
                    self._interrupted = True
                    if self._live is None or self._live.status is not None:
                        self._end_by_interrupt()
                    self._live.signal(number, group=True)
                case signal.SIGTSTP:
                    self._stop(0)
                case signal.SIGCHLD:
                    pass  # ``_read_ends`` runs in every turn of the loop
                case _ if self._live is not None:
                    self._live.signal(number)

    def _on_terminate(self) -> None:
        meaning = self._sigterms.classify()
        if meaning is SigtermMeaning.NOW or not self._started:
            for child in self._children():
                child.kill()
            self._terminal.take_back()
            exit_with(PREEMPTED_STATUS)
        self._preempt()  # only the first call has an effect
        if meaning is SigtermMeaning.FIRST and self._live is not None:
            self._live.signal(signal.SIGTERM)  # the program may have a handler of its own

    def _preempt(self) -> None:
        if not self._preempted:
            self._preempted = True
            self._keeper.send(Preempt(grace_s=(self._plan.hello.policy or Policy()).grace_s))

    def _end_by_interrupt(self) -> NoReturn:
        for child in self._children():
            if child.status is None:
                child.kill()
        die_by_signal(signal.SIGINT)

    def _read_ends(self) -> None:
        for pid, status in reap_children():
            child = next((child for child in self._children() if child.pid == pid), None)
            if child is None:  # an orphan of a trainer, or what the program started above the call
                if not os.WIFSTOPPED(status):
                    self._launch.inherited.note(pid, os.waitstatus_to_exitcode(status))
                continue
            if os.WIFSTOPPED(status):
                self._on_stopped(child, os.WSTOPSIG(status))
            else:
                child.status = os.waitstatus_to_exitcode(status)
                self._on_ended(child, child.status)

    def _on_ended(self, child: TrainerChild, status: int) -> None:
        if child is self._prepared:
            if not child.killed:
                self._lose_prepared(child, status)
            return
        self._had_terminal = self._terminal.lent
        self._terminal.take_back()
        if child.killed:
            return
        if child.report_fd >= 0:
            child.read_reports()  # what it said last
        self._ended = status, child.failing
        self._keeper.send(self._died(child.attempt, *self._ended))
        if status != 0:
            child.kill()  # its own children would hold memory and ports that the next attempt needs

    def _on_stopped(self, child: TrainerChild, number: int) -> None:
        """The trainer tried to use the terminal, or Ctrl-Z stopped the trainer that has it."""
        if child is not self._live:
            return
        if number in _STOPPED_FOR_TERMINAL:
            child.stopped = True
        elif number == signal.SIGTSTP and self._terminal.lent:
            self._terminal.take_back()
            self._stop(os.getpgrp())

    def _stop(self, group: int) -> None:
        """Stop together with the trainer, as one job; both continue together.

        It will ask for the terminal again.
        """
        if self._live is not None:
            self._live.signal(signal.SIGSTOP, group=True)
        self._signals.stop_here(group)
        if self._live is not None:
            self._live.signal(signal.SIGCONT, group=True)

    def _check_clock(self) -> None:
        """With several nodes: stop the trainer before other nodes may take over this node's
        ranks, with or without a keeper.
        """
        live = self._live
        if (
            live is None
            or self._may_act()
            or live.status is not None
            or live.attempt == self._overdue
        ):
            return
        self._overdue = live.attempt
        print_line(
            "this node has lost contact with its job's other nodes, which may continue without it: "
            "its trainer is stopped"
        )
        live.signal(signal.SIGKILL, group=True)  # reported to the keeper like any other death

    def _may_act(self) -> bool:
        left_s = self._keeper.act_time_left_s()
        return left_s is None or left_s > 0

    def _read_reports(self) -> None:
        for child in self._children():
            reports = child.read_reports() if child.report_fd >= 0 else b""
            if DUMPS_READY in reports:
                child.dumps = True
            if TERMINATED in reports:
                self._preempt()
            if FIRST_STEP in reports and child is self._live:
                self._prepare = self._plan.prepare

    # ---- actions

    def _act(self) -> TrainerProcess | None:
        """Do one thing that is possible now; the rest is checked again after the next event."""
        if self._leaving is not None:
            self._leave(self._leaving)
            return None
        live = self._live
        if self._keeper.lost:
            # Requests of a dead keeper are void, except ``Leave``.
            self._starting = self._unanswered = None
        # Before the answer to ``Kill``, a start, and the hello to another keeper, no process of the
        # old attempt may be left: it could still write to slots and use ports.
        if self._keeper.lost or self._unanswered is not None or self._starting is not None:
            if live is not None and not live.gone():
                live.kill()
                self._tell_rest(live)
                return None
            if live is not None:
                self._tell_rest(live)
                live.forget()
            self._live, self._prepare = None, False
        if self._keeper.lost:
            self._connect_again()
        elif self._unanswered is not None:
            self._keeper.send(Killed(attempt=self._unanswered.attempt))
            self._unanswered = None
        elif self._starting is not None:
            if self._may_act():  # else the trainer would be stopped at once
                message, self._starting = self._starting, None
                return self._start(message)
        elif (self._prepare or self._is_standby) and self._prepared is None:
            self._prepare = self._is_standby = False
            return self._start_prepared()
        elif live is not None and live.stopped and self._terminal.lend(live.pid):
            live.stopped = False
            live.signal(signal.SIGCONT, group=True)
        return None

    def _start(self, message: Start) -> TrainerProcess | None:
        if self._interrupted:  # another rank's trainer failed of the same Ctrl-C first
            self._end_by_interrupt()
        at_s = time.monotonic()
        self._attempt, self._started, self._ended, self._is_standby = (
            message.attempt,
            True,
            None,
            False,
        )
        self._keeper.reset_loss_count()
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.promote(
            TrainerOrder(message.attempt, message.port, message.seating)
        ):
            self._live, how = prepared, "prepared"
        else:
            if prepared is not None:
                prepared.kill()
                prepared.forget()
            child = launch_trainer(
                self._launch, attempt=message.attempt, port=message.port, seating=message.seating
            )
            if isinstance(child, TrainerProcess):
                return child
            self._live, how = child, "fork" if isinstance(self._plan.start, Fork) else "spawn"
        self._keeper.send(
            Started(attempt=message.attempt, trainer_pid=self._live.pid, how=how, at_s=at_s)
        )
        return None

    def _start_prepared(self) -> TrainerProcess | None:
        """Start a prepared trainer if there is memory for a second one."""
        needed = anonymous_memory_bytes(self._live.pid) if self._live is not None else None
        available = available_bytes()
        if needed is not None and available is not None and available < needed:
            facts = {"needed_bytes": needed, "available_bytes": available}
            self._plan.emit(events.Event("not-prepared", "no memory for a prepared trainer", facts))
            return None
        child = launch_trainer(self._launch, attempt=0, port=0)
        if isinstance(child, TrainerProcess):
            return child
        self._prepared = child
        return None

    def _leave(self, message: Leave) -> None:
        doomed = [
            child for child in self._children() if child.status is None or message.status != 0
        ]
        for child in doomed:
            child.kill()
        if not all(child.gone() for child in doomed) and time.monotonic() < self._leave_until_s:
            for child in doomed:
                self._tell_rest(child)
            return
        self._terminal.take_back()
        if message.text:
            print_line(message.text)
        if message.futile:
            give_verdict(Verdict(message.status, message.text))
        self._keeper.send(Bye())
        for child in self._children():
            child.forget()
        own = self._ended[0] if self._ended is not None else None
        status = exit_status(message.status, own, interrupted=self._interrupted)
        if status == -signal.SIGINT:
            die_by_signal(signal.SIGINT, group=self._had_terminal)
        exit_with(status)

    def _connect_again(self) -> None:
        if not self._keeper.reconnect(self._attempt):
            return
        if self._ended is not None:
            self._keeper.send(self._died(self._attempt, *self._ended))
        if self._preempted:
            self._preempted = False
            self._preempt()
        # Last: it says that no process of the attempt is left and that everything kept was handed
        # over.
        if self._attempt or self._keeper.has_descriptors:
            self._keeper.send(Killed(attempt=self._attempt))

    # ---- helpers

    def _died(self, attempt: int, status: int, failing: Failing | None) -> Died:
        """The report of a trainer's end. One that failed after Ctrl-C ended because of it.

        Whatever its status was: no restart is wanted.
        """
        reported = -signal.SIGINT if self._interrupted and status not in (0, *STOPPED) else status
        return Died(
            attempt=attempt,
            status=reported,
            at_s=time.monotonic(),
            overdue=attempt == self._overdue,
            failing=failing,
        )

    def _children(self) -> list[TrainerChild]:
        return [child for child in (self._live, self._prepared) if child is not None]

    def _lose_prepared(self, child: TrainerChild, status: int) -> None:
        self._prepared = None
        child.kill()
        child.forget()
        text = "the prepared trainer ended early, so the next restart is cold"
        self._plan.emit(events.Event("prepared-died", text, {"status": status}))

    def _tell_rest(self, child: TrainerChild) -> None:
        if child.rest is not None and (line := child.rest.line()):
            print_line(line)

    def _forget(self) -> None:
        """In a trainer: close what belongs to the supervisor."""
        self._keeper.close_after_fork()
        for child in self._children():
            child.close()


# ---- the call in which a process becomes a supervisor, and from which its trainers return


def supervise(link: MessageSocket, plan: SupervisorPlan) -> TrainerProcess:
    """Become the supervisor of this rank. Returns only in its trainers.

    ``link`` is a fresh connection to the keeper, which the supervisor takes over. Call it in the
    main thread. Raises the error with which the keeper rejects the hello, and UnavailableError if
    the keeper is gone before that; later errors end the process with a message.
    """
    lifeline = SupervisorConnection(link, plan.hello, plan.reconnect, spec=plan.spec)
    try:
        lifeline.say_hello(plan.hello.attempt)
    except BaseException:
        lifeline.disconnect()
        raise
    supervisor_pid = os.getpid()
    supervisor = Supervisor(lifeline, plan)
    try:
        return supervisor.run()
    except BaseException as error:
        # In a trainer that was interrupted before it returned from here, the error is the
        # program's.
        if os.getpid() != supervisor_pid:
            raise
        # The supervisor must not return: the program continues in its trainers only.
        if isinstance(error, CkptError):
            supervisor.give_up(str(error), error.exit_code)
        supervisor.give_up(traceback.format_exc(), InternalError.exit_code)


OTHER_LAUNCH_WAIT_S = 10.0
"""How long supervisors wait for those of an earlier launch that their launcher has just killed."""

SETTLE_WAIT_S = 600.0
"""How long supervisors wait for a keeper that is still saving the state of an earlier launch."""

RETRY_S = 0.05


def supervise_accepted(
    connect: Callable[[], MessageSocket], plan: SupervisorPlan
) -> TrainerProcess:
    """Supervise as soon as the keeper accepts this launch.

    An earlier launch whose processes are just being killed gets time to be gone, a keeper that is
    saving snapshots gets time to finish, and one that is just ending is replaced.
    """
    began_s = time.monotonic()
    announced = False
    while True:
        link = connect()
        try:
            return supervise(link, plan)
        except (ConflictError, UnavailableError) as error:
            limit = _wait_limit(error)
            if time.monotonic() - began_s > limit.seconds:
                raise
            if limit.announced and not announced:
                announced = True
                print_line(f"waiting, {limit.seconds / 60:.0f} min at most: {error}")
        time.sleep(RETRY_S)


class _WaitLimit(NamedTuple):
    seconds: float
    announced: bool


def _wait_limit(error: CkptError) -> _WaitLimit:
    if isinstance(error, ConflictError):
        return _WaitLimit(OTHER_LAUNCH_WAIT_S, announced=False)
    if isinstance(error, HungUpError):
        return _WaitLimit(START_WAIT_S, announced=False)
    return _WaitLimit(SETTLE_WAIT_S, announced=True)


# ---- a supervisor without what the program built above the call, where trainers are spawned
#
# They run the code above the call themselves, so that the supervisor has no use for what it built:
# torch, models, the memory of a GPU, threads, ports. ``execve`` drops all of it; children, the
# terminal and the process's number stay.

_THIN = (
    "import sys; sys.path[:] = filter(None, sys.path); import json, os\n"
    "with os.fdopen(int(sys.argv[1]), 'rb') as plan: path, body = plan.readline(), plan.read()\n"
    "sys.path[:] = json.loads(path)\n"
    "from ckpt.elastic.processes.supervisor import run_thin; run_thin(body)"
)
"""Modules of the folder where the program stands are not for it, and what reads the plan is closed:
neither the keeper nor a trainer inherits it."""
_GPU_FILES = ("/dev/nvidia", "/dev/kfd")


class ThinPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A ``SupervisorPlan`` on its way through ``execve``, in a file without a name: it may hold
    credentials.

    ``command`` is the program's, which runs in ``folder``; ``handled`` are the signals that it
    handles.
    """

    hello: Hello
    spec: bytes
    reason: str
    folder: str
    stacks: str
    prepare: bool
    command: list[bytes]
    handled: list[int]


def become_thin(plan: SupervisorPlan, spec: KeeperSpec) -> OSError:
    """Replace this process by an interpreter that only supervises, as ``plan`` says. Returns why
    not, if the system refuses; this process has not changed then.
    """
    assert isinstance(plan.start, Spawn), "forked trainers need what is here"
    handled = [
        int(number)
        for number in signal.valid_signals()
        if number not in SUPERVISOR_SIGNALS and callable(signal.getsignal(number))
    ]
    thin = ThinPlan(
        hello=plan.hello,
        spec=spec.encode(),
        reason=plan.start.reason,
        folder=plan.start.folder or STARTUP_FOLDER,
        stacks=str(plan.stacks) if plan.stacks is not None else "",
        prepare=plan.prepare,
        command=[os.fsencode(word) for word in sys.orig_argv],
        handled=handled,
    )
    fd = open_anonymous("ckpt-supervisor")
    # Imports pass over what is no text, such as a Path.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(path).encode() + b"\n" + msgspec.msgpack.encode(thin))
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    # The program's own command stays visible, so that ``pkill -f train.py`` finds all of it.
    words = [sys.executable, "-c", _THIN, str(fd), *sys.orig_argv]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # the reader is gone
                stream.flush()
    _close_gpus_on_exec()
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)  # until the next interpreter handles them
    try:
        os.execve(sys.executable, words, os.environ)
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        os.close(fd)
        return error


def _close_gpus_on_exec() -> None:
    """Drivers open their files so by themselves; this is for those that do not."""
    try:
        entries = list(Path("/proc/self/fd").iterdir())
    except OSError:  # no /proc
        return
    for entry in entries:
        with suppress(OSError):  # the descriptor of this very listing
            if str(entry.readlink()).startswith(_GPU_FILES):
                os.set_inheritable(int(entry.name), False)


def run_thin(body: bytes) -> NoReturn:
    """The rest of ``become_thin``, in the new interpreter."""
    plan = msgspec.msgpack.decode(body, type=ThinPlan)
    for number in plan.handled:
        signal.signal(number, ignore_until_supervised)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, plan.handled)
    sys.orig_argv[:] = [os.fsdecode(word) for word in plan.command]
    spec = KeeperSpec.decode(plan.spec)
    try:
        supervise_accepted(
            lambda: ensure_keeper(spec),
            SupervisorPlan(
                start=Spawn(plan.reason, plan.folder),
                hello=plan.hello,
                reconnect=lambda: ensure_keeper(spec),
                emit=events.emit_to_logging(plan.hello.rank),
                spec=spec,
                stacks=Path(plan.stacks) if plan.stacks else None,
                prepare=plan.prepare,
            ),
        )
    except CkptError as error:  # there is no program any more that could catch it
        print_line(str(error))
        exit_with(error.exit_code)
    except KeyboardInterrupt:
        die_by_signal(signal.SIGINT)
    raise InternalError("a spawned trainer is a program of its own")


def ignore_until_supervised(number: int, frame: FrameType | None) -> None:
    """The program handles this signal; the supervisor passes it on once there is a trainer."""


prepare_decoders(ThinPlan)
