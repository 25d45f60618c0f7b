"""The supervisor: forks trainers, waits and kills, as its keeper says; in one thread, and never
back into the user's program.

The parent of a fork stays in ``supervise`` and ends as its trainer did. The child returns from it
with its seat, and is the program from then on. The loop notes what happened (words of the keeper,
signals, ends of children, bytes that trainers say), then does whatever is possible now; so nothing
in it waits for anything but the next thing to happen.
"""

from __future__ import annotations

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
from typing import NoReturn

from ckpt import events
from ckpt.elastic.processes.child import (
    SignalPipe,
    Terminal,
    TrainerChild,
    adopt_orphans,
    anonymous_memory_bytes,
    reap_children,
)
from ckpt.elastic.processes.keeper_connection import SupervisorConnection
from ckpt.elastic.processes.launch import TrainerLaunch, launch_trainer
from ckpt.elastic.processes.start_method import Fork, Spawn
from ckpt.elastic.processes.trainer import (
    DUMPS_READY,
    FIRST_STEP,
    TERMINATED,
    TrainerOrder,
    TrainerProcess,
)
from ckpt.elastic.sigterm import SigtermHistory, SigtermMeaning
from ckpt.errors import CkptError, InternalError
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    Bye,
    Died,
    Dump,
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

# How a supervisor ends: as its trainer did, so that the launcher sees what it would have seen
# without it.

INTERRUPTED_STATUS = 128 + signal.SIGINT


def exit_status(told: int, own: int | None, *, interrupted: bool = False) -> int:
    """The status to end with: the keeper says ``told``, the own trainer ended by itself with
    ``own`` (None: it didn't).

    Both as ``os.waitstatus_to_exitcode``. A keeper tells a signal as 128 and its number, since it
    speaks to all ranks; the rank that died of it dies of it. ``interrupted``: this rank's Ctrl-C
    was told as the cause, whatever its trainer ended with.
    """
    if own is None:
        return told
    caught = interrupted and own != 0 and told == INTERRUPTED_STATUS
    return own if caught or (own < 0 and told == 128 - own) else told


def exit_with(status: int) -> NoReturn:
    """End this process with an exit code, or of minus a signal. Runs no exit handler: those are the
    trainer's."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
    if status < 0:
        die_by_signal(-status)
    os._exit(status & 0xFF)


def die_by_signal(number: int, *, group: bool = False) -> NoReturn:
    """Die of a signal, without a second core file. ``group``: the whole process group gets it, as
    from the terminal."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    if group:
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container ignores signals that it sends itself


# What a supervisor needs to know.


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorPlan:
    """See the module. ``hello`` is what it says first on each connection; its ``attempt`` is filled
    in.

    ``reconnect`` gives a connection to a keeper, starting one where there is none; nothing was said
    on it yet. ``stacks`` is a folder for stack dumps (None: none). ``prepare``: keep a second
    trainer that has run ahead to ``run.ready()``.
    """

    start: Fork | Spawn
    hello: Hello
    reconnect: Callable[[], MessageSocket]
    emit: events.Emit
    stacks: Path | None = None
    prepare: bool = False


LEAVE_WAIT_S = 30.0
"""How long a killed process may take to be gone before a supervisor leaves without it: one that the
kernel can't end now."""

GONE_POLL_S = 0.01
CLOCK_LOOK_MS = 500
"""How often the time until which a node of several may act is looked at: the keeper moves it on all
the while."""
TERMINAL_POLL_S = 0.2
PREEMPTED_STATUS = 128 + signal.SIGTERM
_STOPPED_FOR_TERMINAL = (signal.SIGTTIN, signal.SIGTTOU)


class Supervisor:
    """The loop of one rank's supervisor, and all that it knows."""

    def __init__(self, keeper: SupervisorConnection, plan: SupervisorPlan) -> None:
        self._plan = plan
        self._keeper = keeper
        self._terminal = Terminal()
        self._live: TrainerChild | None = None
        self._ahead: TrainerChild | None = None
        self._attempt = plan.hello.attempt
        self._started = False
        self._ended: int | None = None
        self._unanswered: Kill | None = None
        self._starting: Start | None = None
        self._leaving: Leave | None = None
        self._leave_until_s = 0.0
        self._prepare = False
        self._stands_by = False
        self._preempted = False
        self._terms = SigtermHistory()
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
        )

    def run(self) -> TrainerProcess:
        """Loop; returns in trainers only."""
        while True:
            self._hear_trainers()  # first: what a keeper asks for may need what a trainer said before
            self._hear_keeper()
            self._hear_signals()
            self._hear_ends()
            self._look_at_clock()
            seat = self._act()
            if seat is not None:
                return seat
            self._wait()

    def give_up(self, text: str, status: int) -> NoReturn:
        """End with a message, and no trainer left."""
        self._say(text)
        for child in self._children():
            child.kill()
        self._terminal.take_back()
        exit_with(status)

    # ---- what happened

    def _wait(self) -> None:
        """Until something can be read, or something that tells nobody may have changed."""
        if self._keeper.has_unread:
            return
        poll = select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        if not self._keeper.lost:
            poll.register(self._keeper.fileno(), select.POLLIN)
        for child in self._children():
            if child.report_fd >= 0:
                poll.register(child.report_fd, select.POLLIN)
        poll.poll(self._patience_ms())

    def _patience_ms(self) -> int | None:
        patience_ms = self._patience_for_ends_ms()
        watched = self._live is not None and self._live.attempt != self._overdue
        left_s = self._keeper.act_time_left_s() if watched else None
        if left_s is None:
            return patience_ms
        left_ms = min(CLOCK_LOOK_MS, max(1, int(left_s * 1000)))
        return left_ms if patience_ms is None else min(patience_ms, left_ms)

    def _patience_for_ends_ms(self) -> int | None:
        waits_for_end = self._unanswered or self._starting or self._leaving or self._keeper.lost
        if waits_for_end:
            return int(GONE_POLL_S * 1000)
        if self._live is not None and self._live.stopped:
            return int(TERMINAL_POLL_S * 1000)
        return None

    def _hear_keeper(self) -> None:
        for word in self._keeper.receive():
            self._on_word(word)

    def _on_word(self, word: Message) -> None:
        match word:
            case Start():
                self._starting = word
            case Kill():
                self._on_kill(word)
            case Leave():
                self._leaving = word
                self._leave_until_s = time.monotonic() + LEAVE_WAIT_S
            case Dump():
                if self._live is not None and self._live.attempt == word.attempt:
                    self._live.dump(Path(word.path))
            case StartPrepared():
                self._stands_by = self._plan.prepare
            case PrintLine():
                self._say(word.text)
            case _:
                raise InternalError(
                    f"a supervisor has no use for this word. type={type(word).__name__}"
                )

    def _on_kill(self, word: Kill) -> None:
        if self._starting is not None and self._starting.attempt == word.attempt:
            self._starting = None
        if self._live is not None and self._live.attempt == word.attempt:
            self._unanswered = word
        else:
            self._keeper.send(Killed(attempt=word.attempt))

    def _hear_signals(self) -> None:
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
                    pass  # ``_hear_ends`` asks each time
                case _ if self._live is not None:
                    self._live.signal(number)

    def _on_terminate(self) -> None:
        term = self._terms.classify()
        if term is SigtermMeaning.NOW or not self._started:
            for child in self._children():
                child.kill()
            self._terminal.take_back()
            exit_with(PREEMPTED_STATUS)
        self._preempt()  # a second time changes nothing

    def _preempt(self) -> None:
        if not self._preempted:
            self._preempted = True
            self._keeper.send(Preempt(grace_s=(self._plan.hello.policy or Policy()).grace_s))

    def _end_by_interrupt(self) -> NoReturn:
        for child in self._children():
            if child.status is None:
                child.kill()
        die_by_signal(signal.SIGINT)

    def _hear_ends(self) -> None:
        for pid, status in reap_children():
            child = next((one for one in self._children() if one.pid == pid), None)
            if child is None:
                continue  # a child that a trainer left behind
            if os.WIFSTOPPED(status):
                self._on_stopped(child, os.WSTOPSIG(status))
            else:
                child.status = os.waitstatus_to_exitcode(status)
                self._on_ended(child, child.status)

    def _on_ended(self, child: TrainerChild, status: int) -> None:
        if child is self._ahead:
            if not child.killed:
                self._lose_ahead(child, status)
            return
        self._had_terminal = self._terminal.lent
        self._terminal.take_back()
        if child.killed:
            return
        self._ended = status
        self._keeper.send(self._died(child.attempt, status))
        if status != 0:
            child.kill()  # what it left behind would hold memory and ports of the next attempt

    def _on_stopped(self, child: TrainerChild, number: int) -> None:
        """A trainer asked for the terminal, or Ctrl-Z stopped the one that has it."""
        if child is not self._live:
            return
        if number in _STOPPED_FOR_TERMINAL:
            child.stopped = True
        elif number == signal.SIGTSTP and self._terminal.lent:
            self._terminal.take_back()
            self._stop(os.getpgrp())

    def _stop(self, group: int) -> None:
        """Stop with the trainer, as one job; both go on together. It asks for the terminal again
        when it needs it."""
        if self._live is not None:
            self._live.signal(signal.SIGSTOP, group=True)
        self._signals.stop_here(group)
        if self._live is not None:
            self._live.signal(signal.SIGCONT, group=True)

    def _look_at_clock(self) -> None:
        """With several nodes: stop before others may have been given this node's ranks, keeper or
        none."""
        live = self._live
        if (
            live is None
            or self._may_act()
            or live.status is not None
            or live.attempt == self._overdue
        ):
            return
        self._overdue = live.attempt
        self._say(
            "this node has lost touch with its job's other nodes, which may go on without it: its "
            "trainer is stopped"
        )
        live.signal(
            signal.SIGKILL, group=True
        )  # it ends like any other death, and its keeper hears of it

    def _may_act(self) -> bool:
        left_s = self._keeper.act_time_left_s()
        return left_s is None or left_s > 0

    def _hear_trainers(self) -> None:
        for child in self._children():
            said = child.read_reports() if child.report_fd >= 0 else b""
            if DUMPS_READY in said:
                child.dumps = True
            if TERMINATED in said:
                self._preempt()
            if FIRST_STEP in said and child is self._live:
                self._prepare = self._plan.prepare

    # ---- what can be done now

    def _act(self) -> TrainerProcess | None:
        """Do what is possible; what isn't yet is looked at again after the next event."""
        if self._leaving is not None:
            self._leave(self._leaving)
            return None
        live = self._live
        if self._keeper.lost:
            self._starting = self._unanswered = (
                None  # what a dead keeper asked for counts no more, but for leaving
            )
        if self._keeper.lost or self._unanswered is not None or self._starting is not None:
            if live is not None and not live.gone():
                live.kill()
                return None
            if live is not None:
                live.forget()
            self._live, self._prepare = None, False
        if self._keeper.lost:
            self._connect_again()
        elif self._unanswered is not None:
            self._keeper.send(Killed(attempt=self._unanswered.attempt))
            self._unanswered = None
        elif self._starting is not None:
            if self._may_act():  # else it would be stopped at once
                word, self._starting = self._starting, None
                return self._start(word)
        elif (self._prepare or self._stands_by) and self._ahead is None:
            self._prepare = self._stands_by = False
            return self._run_ahead()
        elif live is not None and live.stopped and self._terminal.lend(live.pid):
            live.stopped = False
            live.signal(signal.SIGCONT, group=True)
        return None

    def _start(self, word: Start) -> TrainerProcess | None:
        if self._interrupted:  # another rank failed of it first
            self._end_by_interrupt()
        at_s = time.monotonic()
        self._attempt, self._started, self._ended, self._stands_by = word.attempt, True, None, False
        self._keeper.reset_loss_count()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.promote(TrainerOrder(word.attempt, word.port, word.seating)):
            self._live, how = ahead, "prepared"
        else:
            if ahead is not None:
                ahead.kill()
                ahead.forget()
            child = launch_trainer(
                self._launch, attempt=word.attempt, port=word.port, seating=word.seating
            )
            if isinstance(child, TrainerProcess):
                return child
            self._live, how = child, "fork" if isinstance(self._plan.start, Fork) else "spawn"
        self._keeper.send(
            Started(attempt=word.attempt, trainer_pid=self._live.pid, how=how, at_s=at_s)
        )
        return None

    def _run_ahead(self) -> TrainerProcess | None:
        """Start the trainer of the next attempt already, where memory allows a second one."""
        needed = anonymous_memory_bytes(self._live.pid) if self._live is not None else None
        left = available_bytes()
        if needed is not None and left is not None and left < needed:
            facts = {"needed_bytes": needed, "available_bytes": left}
            self._plan.emit(events.Event("not-prepared", "no memory for a prepared trainer", facts))
            return None
        child = launch_trainer(self._launch, attempt=0, port=0)
        if isinstance(child, TrainerProcess):
            return child
        self._ahead = child
        return None

    def _leave(self, word: Leave) -> None:
        doomed = [child for child in self._children() if child.status is None or word.status != 0]
        for child in doomed:
            child.kill()
        if not all(child.gone() for child in doomed) and time.monotonic() < self._leave_until_s:
            return
        self._terminal.take_back()
        if word.text:
            self._say(word.text)
        self._keeper.send(Bye())
        for child in self._children():
            child.forget()
        status = exit_status(word.status, self._ended, interrupted=self._interrupted)
        if status == -signal.SIGINT:
            die_by_signal(signal.SIGINT, group=self._had_terminal)
        exit_with(status)

    def _connect_again(self) -> None:
        if not self._keeper.reconnect(self._attempt):
            return
        if self._ended is not None:
            self._keeper.send(self._died(self._attempt, self._ended))
        if self._preempted:
            self._preempted = False
            self._preempt()
        if (
            self._attempt or self._keeper.has_descriptors
        ):  # nothing of it lives here any more, and all that was held and met is told
            self._keeper.send(Killed(attempt=self._attempt))

    # ---- small parts

    def _died(self, attempt: int, status: int) -> Died:
        """A trainer that failed after Ctrl-C was ended by it, whatever it made of it: nobody wants
        the next attempt."""
        told = (
            -signal.SIGINT if self._interrupted and status not in (0, PREEMPTED_STATUS) else status
        )
        return Died(
            attempt=attempt, status=told, at_s=time.monotonic(), overdue=attempt == self._overdue
        )

    def _children(self) -> list[TrainerChild]:
        return [child for child in (self._live, self._ahead) if child is not None]

    def _lose_ahead(self, child: TrainerChild, status: int) -> None:
        self._ahead = None
        child.kill()
        child.forget()
        text = "the prepared trainer ended early, so the next restart is a cold one"
        self._plan.emit(events.Event("prepared-died", text, {"status": status}))

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(f"ckpt: {text}\n")
            sys.stderr.flush()

    def _forget(self) -> None:
        """In a trainer: what is the supervisor's is closed."""
        self._keeper.close_after_fork()
        for child in self._children():
            child.close()


# The call in which a process becomes a supervisor, and out of which its trainers come.


def supervise(link: MessageSocket, plan: SupervisorPlan) -> TrainerProcess:
    """Become the supervisor of this rank; returns only in its trainers, each with its seat.

    ``link`` is a fresh connection to the keeper, owned from here on. Call it in the main thread.
    Raises what the keeper refuses the hello with, UnavailableError where it is gone before that;
    later errors end the process with a message.
    """
    lifeline = SupervisorConnection(link, plan.hello, plan.reconnect)
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
        if os.getpid() != supervisor_pid:  # a trainer that was interrupted on its way out of here
            raise
        if isinstance(
            error, CkptError
        ):  # the program must not go on here: it goes on in its trainers
            supervisor.give_up(str(error), error.exit_code)
        supervisor.give_up(traceback.format_exc(), InternalError.exit_code)
