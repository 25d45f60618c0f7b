"""Supervisors and their attempts: carries out what the roster decides, watches for hangs, tells
recoveries."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from ckpt.events import Event as Told
from ckpt.events import Fact
from ckpt.ipc import messages as words
from ckpt.ipc.frames import close_fds
from ckpt.ipc.messages import Hello, Message
from ckpt.keeper.attempts import roster as rules
from ckpt.keeper.attempts.events import (
    AttemptOver,
    GatheringTimedOut,
    GraceExpired,
    KillAll,
    LeaveAll,
    LeaveOne,
    PreemptRequested,
    ReportEnded,
    RequestEpoch,
    RequestStop,
    RosterAction,
    RosterEvent,
    StartAll,
    SupervisorJoined,
    SupervisorLeft,
    TrainerDied,
    TrainerEntered,
    TrainerFailing,
    TrainerFinished,
    TrainerKilled,
    TrainerStarted,
)
from ckpt.keeper.attempts.hang_watch import HangWatch
from ckpt.keeper.attempts.recovery import Recovery
from ckpt.keeper.attempts.roster import RankState, Roster, RosterState
from ckpt.keeper.connection import ClientConnection
from ckpt.keeper.job import Job
from ckpt.keeper.trainer_calls import TrainerCalls

if TYPE_CHECKING:
    from ckpt.keeper.nodes.nodes import Nodes

GATHER_TELL_S = 30.0
"""Ranks that come later than this are asked for by name."""
GATHER_MAX_S = 600.0
"""How long those that have come wait for the others."""

RECOVERIES_KEPT = 20


class Supervisors:
    """The supervisors of one launch."""

    def __init__(self, job: Job, trainer_calls: TrainerCalls, *, stacks: Path) -> None:
        self._job = job
        self._desk = trainer_calls
        self._watch = HangWatch(job, stacks=stacks)
        self.roster: Roster | None = None
        self.recoveries: deque[Mapping[str, Fact]] = deque(maxlen=RECOVERIES_KEPT)
        self._recovery: Recovery | None = None
        self._attempt = 0
        self._grace_until_s: float | None = None
        self._leaving: tuple[float, words.Leave] | None = None
        """What supervisors are told once all is durable, or at that time at the latest."""
        self._gathering_s = 0.0
        self._missing_told = False
        self._waiting: dict[int, int | None] = {}
        """Supervisors that met an earlier keeper and hand over what they hold; how their trainers
        had ended by themselves."""
        self._cut_off = False

    @property
    def attempt(self) -> int:
        """The attempt that runs, or the last one."""
        return self._attempt

    def join(self, peer: ClientConnection, hello: Hello, *, new: bool) -> None:
        """A supervisor said hello. One that met an earlier keeper first hands over what it holds
        and ends with ``Killed``."""
        job = self._job
        if (
            self.roster is None
            or self.roster.launch != job.launch
            or (new and self.roster.state is RosterState.OVER)
        ):
            self.roster = Roster(
                job.launch,
                job.ranks,
                job.policy,
                attempt=self._attempt,
                shared=self._meet_nodes(hello.agent),
            )
            self._cut_off = False
            self._grace_until_s = self._leaving = None
            self._gathering_s, self._missing_told = time.monotonic(), False
        met_another = hello.holds or hello.attempt > 0
        self._attempt = max(self._attempt, hello.attempt)
        if (
            self.roster.state is RosterState.GATHERING
        ):  # numbers of attempts only grow, over keepers too
            self.roster = replace(self.roster, attempt=self._attempt)
        job.welcome(peer, hello, attempt=self._attempt, new=met_another)
        if met_another:
            self._waiting[peer.number] = None
        else:
            self._joined(peer, None)

    def handle(self, peer: ClientConnection, message: Message, fds: list[int]) -> bool:
        """One message of a supervisor, or of a trainer about its fate; False where it is neither.
        Owns ``fds``."""
        job = self._job
        match message:
            case words.Started():
                self._on(
                    TrainerStarted(peer.rank, message.attempt, message.trainer_pid, message.how)
                )
                if self._recovery is not None and message.attempt == self._attempt:
                    self._recovery.how = message.how
            case words.Died() if peer.number in self._waiting:
                self._waiting[peer.number] = message.status
            case words.Died():
                job.drain()
                self._on(
                    TrainerDied(
                        peer.rank,
                        message.attempt,
                        message.status,
                        message.at_s,
                        job.completed(),
                        message.overdue,
                    )
                )
            case words.Killed():
                if peer.number in self._waiting:
                    self._joined(peer, self._waiting.pop(peer.number))
                else:
                    self._on(TrainerKilled(peer.rank, message.attempt))
            case words.Preempt():
                self._preempt(message.grace_s)
            case words.SlotKept() if fds and job.slots is not None:
                if (message.rank, message.index) not in {
                    (slot.rank, slot.index) for slot in job.slots
                }:
                    job.slots.add(message.rank, message.index, fds[0], message.size_bytes)
                    return True
                close_fds(fds)
            case words.BoardKept() if fds:
                job.adopt_board(fds[0])
            case _:
                return self._take_of_trainer(peer, message)
        return True

    def _take_of_trainer(self, peer: ClientConnection, message: Message) -> bool:
        match message:
            case words.Failing():
                self._on(TrainerFailing(peer.rank, peer.attempt, message))
            case words.Finished():
                self._on(TrainerFinished(peer.rank, peer.attempt))
            case words.Phase():
                if message.name == "entered":
                    self._on(TrainerEntered(peer.rank, peer.attempt))
                self._phase(peer.rank, message)
            case _:
                return False
        return True

    @property
    def supervised(self) -> bool:
        """Whether a launch with supervisors is here."""
        return self.roster is not None and self.roster.launch == self._job.launch

    @property
    def cut_off(self) -> bool:
        """Whether a supervisor of the launch went without a word: the launcher starts the program
        anew."""
        return self.supervised and self._cut_off

    @property
    def ended_well(self) -> bool:
        """Whether the launch ran to an end of its own: nobody will come back for it."""
        return (
            self.roster is not None
            and self.supervised
            and self.roster.state is RosterState.OVER
            and not self._cut_off
        )

    def repeat_stop(self, peer: ClientConnection) -> None:
        """A trainer came after the job was asked to stop: tell it too."""
        if self._grace_until_s is not None and self.roster is not None and self.roster.preempted:
            peer.send(words.Stop(grace_s=max(0.1, self._grace_left_s())))

    def disconnected(self, peer: ClientConnection) -> None:
        """A supervisor's connection ended."""
        self._waiting.pop(peer.number, None)
        now_s = time.monotonic()
        seat = (
            self.roster.members[peer.rank].seat
            if self.roster and peer.rank in self.roster.members
            else None
        )
        self._cut_off |= (
            not peer.planned
            and seat is not RankState.ENDED
            and self.roster is not None
            and self.roster.state is not RosterState.OVER
        )
        self._on(SupervisorLeft(peer.rank, peer.number, peer.planned, now_s, self._job.completed()))

    def tick(self) -> float:
        """Look at the clock; returns seconds until the next look."""
        now_s = time.monotonic()
        if self._grace_until_s is not None and now_s >= self._grace_until_s:
            self._grace_until_s = None
            self._on(GraceExpired(now_s))
        if self._leaving is not None and (now_s >= self._leaving[0] or self._all_durable()):
            leave, self._leaving = self._leaving[1], None
            self._job.say("supervisor", leave)
        hung = self._watch.tick(self.roster, now_s)
        if hung is not None:
            self._on(hung)
        if self.roster is not None and self.roster.state is RosterState.GATHERING:
            self._ask_for_missing(self.roster, now_s)
        untils_s = [self._grace_until_s, self._leaving[0] if self._leaving is not None else None]
        waits = [until_s - now_s for until_s in untils_s if until_s is not None]
        watch_s = self._watch.wait_s()
        waits += [watch_s] if watch_s is not None else []
        waits += [self._job.nodes.tick(now_s)] if self._job.nodes is not None else []
        return min(waits, default=5.0)

    def _joined(self, peer: ClientConnection, status: int | None) -> None:
        if self._job.slots is not None:
            self._job.slots.sync_board()
        assert peer.hello is not None, "it said hello"
        if self._job.board is not None and self._job.slots is not None:
            peer.send(words.KeepBoard(), [self._job.board.fd])
            for slot in self._job.slots:
                peer.send(
                    words.Keep(rank=slot.rank, index=slot.index, size_bytes=slot.size_bytes),
                    [slot.fd],
                )
        self._on(SupervisorJoined(peer.rank, peer.number, peer.hello.pid, status))

    def _on(self, event: RosterEvent) -> None:
        if self.roster is None:
            return
        before = self.roster.state
        self.roster, actions = rules.step(self.roster, event)
        for action in actions:
            self._do(action)
        over = self.roster.state is RosterState.OVER and before is not RosterState.OVER
        if over and not any(
            isinstance(action, LeaveAll) for action in actions
        ):  # which keeps the newest by itself
            self._job.keep_newest()  # no more than a look, where all ended as they should: what they left last is durable

    def _do(self, action: RosterAction) -> None:
        job = self._job
        match action:
            case StartAll(attempt):
                self._begin(attempt)
                self._explain()
                job.say("supervisor", self._start_word(attempt))
            case KillAll(attempt, failure):
                self._watch.stop()
                self._recovery = Recovery(attempt + 1, failure, job.completed(), time.monotonic())
                job.say("supervisor", words.Kill(attempt=attempt))
            case AttemptOver():
                job.drain()
                if self._recovery is not None:
                    self._recovery.failure = action.failure
                    self._recovery.killed_s = time.monotonic()
                if job.slots is not None and job.uploads is not None:
                    job.slots.sync_board()
                    job.uploads.attempt_ended(job.slots.hold_snapshot)
            case LeaveAll():
                self._recovery = None  # who starts it again later does not recover from this
                self._leave(action)
            case LeaveOne(rank, status):
                job.say("supervisor", words.Leave(status=status), rank=rank)
            case RequestEpoch(failure, completed):
                assert job.nodes is not None and self.roster is not None, "a shared roster"
                job.nodes.ask(failure, completed, self.roster.attempt)
            case ReportEnded():
                assert job.nodes is not None, "a shared roster"
                job.nodes.ended(self._attempt)
            case RequestStop():
                job.say("events", words.Stop(grace_s=max(0.1, self._grace_left_s())))

    def _meet_nodes(self, agent: str) -> bool:
        """Whether the job may have other nodes: then a launch begins with none known. ``agent``:
        who launched it here."""
        job = self._job
        if job.spec.nodes is None:
            return False
        if job.nodes is not None:
            job.nodes.close()
        # Only where there are nodes: what they need takes long to import.
        made: type[Nodes] = import_module("ckpt.keeper.nodes.nodes").Nodes
        job.nodes = made(job, structs.replace(job.spec.nodes, agent=agent), on=self._on)
        return True

    def _explain(self) -> None:
        """Of several nodes the epoch says why the last one ended: what was seen here may only be
        what came of it."""
        nodes = self._job.nodes
        if (
            self._recovery is not None
            and nodes is not None
            and nodes.epoch is not None
            and nodes.epoch.note.why
        ):
            self._recovery.failure = replace(self._recovery.failure, text=nodes.epoch.note.why)

    def _start_word(self, attempt: int) -> words.Start:
        nodes = self._job.nodes
        if nodes is None:
            return words.Start(attempt=attempt, port=_free_port())
        return words.Start(attempt=attempt, port=nodes.port, seating=nodes.seating)

    def _begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._desk.begin(attempt)
        if self._job.board is not None:
            self._job.board.begin_attempt(attempt)
        self._watch.begin()

    def _leave(self, action: LeaveAll) -> None:
        """All leave: at once, or once all is durable. Where the last process of a container ends,
        the keeper ends with it."""
        job = self._job
        job.emit(Told("ended", action.text, {"status": action.status}, alarm=True))
        job.keep_newest()
        if job.nodes is not None:  # the others go on without this node, or leave too
            job.nodes.leave()
        leave = words.Leave(status=action.status, text=action.text)
        wait_s = min(job.policy.linger_s, job.policy.grace_s)
        if not action.held or wait_s <= 0 or self._all_durable():
            job.say("supervisor", leave)
            return
        self._leaving = (time.monotonic() + wait_s, leave)
        text = f"{action.text}; leaving when what is staged is in the store, in {wait_s:.0f} s at the latest"
        job.say("supervisor", words.PrintLine(text=text), rank=0)

    def _all_durable(self) -> bool:
        return self._job.uploads is None or self._job.uploads.idle

    def _ask_for_missing(self, roster: Roster, now_s: float) -> None:
        """Ranks that don't come are named: a launcher that starts fewer than it says would have the
        others wait in silence."""
        waited_s = now_s - self._gathering_s
        if waited_s < GATHER_TELL_S or (self._missing_told and waited_s < GATHER_MAX_S):
            return
        missing = ", ".join(str(rank) for rank in range(roster.ranks) if rank not in roster.members)
        text = (
            f"ranks are missing on this node: {missing} of {roster.ranks} did not come for "
            f"{waited_s:.0f} s; start them, or "
            "set LOCAL_WORLD_SIZE to how many there are on this node"
        )
        if waited_s >= GATHER_MAX_S:
            self._on(GatheringTimedOut(text, now_s))
            return
        self._missing_told = True
        self._job.emit(Told("missing", text, alarm=True))
        self._job.say("supervisor", words.PrintLine(text=text, alarm=True))

    def _preempt(self, grace_s: float) -> None:
        if self._grace_until_s is None:
            self._grace_until_s = time.monotonic() + min(grace_s, self._job.policy.grace_s)
        self._on(PreemptRequested())

    def _grace_left_s(self) -> float:
        return (self._grace_until_s or time.monotonic()) - time.monotonic()

    def _phase(self, rank: int, phase: words.Phase) -> None:
        recovery = self._recovery
        if recovery is None or recovery.attempt != self._attempt:
            return
        if phase.name == "restored":
            nodes = self._job.nodes
            recovery.resume = self._desk.resume if nodes is None else nodes.uploads.resume
        recovery.reach(rank, phase.name, phase.at_s)
        if recovery.done(self._job.ranks):
            self._recovery = None
            self.recoveries.append(recovery.facts())
            self._job.emit(Told("recovered", recovery.line(), recovery.facts(), alarm=True))
            self._job.say("supervisor", words.PrintLine(text=recovery.line()), rank=0)


def _free_port() -> int:
    """A port on loopback that nobody listens on now. Whoever takes it in between makes an attempt
    fail, which is repeated."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
