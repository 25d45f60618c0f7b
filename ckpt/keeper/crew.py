"""Supervisors and their attempts: carries out what the roster decides, watches for hangs, tells recoveries."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckpt.keeper import roster as rules
from ckpt.keeper.desk import Desk
from ckpt.keeper.hang import Pulse, check_s, hung
from ckpt.keeper.job import Job
from ckpt.keeper.peers import Peer
from ckpt.keeper.recovery import Recovery
from ckpt.keeper.roster import Roster, Seat, State
from ckpt.keeper.roster_words import (
    Action,
    AskStop,
    AttemptOver,
    Event,
    GraceOver,
    Hung,
    Joined,
    KillAll,
    LeaveAll,
    LeaveOne,
    Preempted,
    StartAll,
    SupervisorLeft,
    TrainerDied,
    TrainerFailing,
    TrainerKilled,
    TrainerStarted,
)
from ckpt.link import messages as words
from ckpt.link.board import RankBoard
from ckpt.link.frames import close_fds
from ckpt.link.messages import Failing, Hello, Message
from ckpt.observe.events import Event as Told
from ckpt.observe.events import Fact

STACKS_WAIT_S = 2.0
"""How long trainers that hang may take to write their stacks; one that is stopped never does."""

RECOVERIES_KEPT = 20


class Crew:
    """The supervisors of one launch."""

    def __init__(self, job: Job, desk: Desk, *, stacks: Path) -> None:
        self._job = job
        self._desk = desk
        self._stacks = stacks
        self.roster: Roster | None = None
        self.recoveries: deque[Mapping[str, Fact]] = deque(maxlen=RECOVERIES_KEPT)
        self._recovery: Recovery | None = None
        self._attempt = 0
        self._grace_until_s: float | None = None
        self._check_at_s = 0.0
        self._dumping: tuple[float, Hung] | None = None
        self._waiting: dict[int, int | None] = {}
        """Supervisors that met an earlier keeper and hand over what they hold; how their trainers had ended by themselves."""
        self._cut_off = False

    @property
    def attempt(self) -> int:
        """The attempt that runs, or the last one."""
        return self._attempt

    def join(self, peer: Peer, hello: Hello, *, new: bool) -> None:
        """A supervisor said hello. One that met an earlier keeper first hands over what it holds and ends with ``Killed``."""
        job = self._job
        if self.roster is None or self.roster.launch != job.launch or (new and self.roster.state is State.OVER):
            self.roster = Roster(job.launch, job.ranks, job.policy, attempt=self._attempt)
            self._cut_off = False
            self._grace_until_s = None
        met_another = hello.attempt > 0
        self._attempt = max(self._attempt, hello.attempt)
        if self.roster.state is State.GATHERING:  # numbers of attempts only grow, over keepers too
            self.roster = replace(self.roster, attempt=self._attempt)
        job.welcome(peer, hello, attempt=self._attempt, new=met_another)
        if met_another:
            self._waiting[peer.number] = None
        else:
            self._joined(peer, None)

    def take(self, peer: Peer, message: Message, fds: list[int]) -> bool:
        """One message of a supervisor, or of a trainer about its fate; False where it is neither. Owns ``fds``."""
        job = self._job
        match message:
            case words.Started():
                self._on(TrainerStarted(peer.rank, message.attempt, message.trainer_pid, message.how))
                if self._recovery is not None and message.attempt == self._attempt:
                    self._recovery.how = message.how
            case words.Died() if peer.number in self._waiting:
                self._waiting[peer.number] = message.status
            case words.Died():
                job.drain()
                self._on(TrainerDied(peer.rank, message.attempt, message.status, message.at_s, job.completed()))
            case words.Killed():
                if peer.number in self._waiting:
                    self._joined(peer, self._waiting.pop(peer.number))
                else:
                    self._on(TrainerKilled(peer.rank, message.attempt))
            case words.Preempt():
                self._preempt(message.grace_s)
            case words.SlotKept() if fds and job.slots is not None:
                if (message.rank, message.index) not in {(slot.rank, slot.index) for slot in job.slots}:
                    job.slots.add(message.rank, message.index, fds[0], message.size_bytes)
                    return True
                close_fds(fds)
            case words.BoardKept() if fds:
                job.adopt_board(fds[0])
            case Failing():
                self._on(TrainerFailing(peer.rank, peer.hello.attempt if peer.hello else 0, message))
            case words.Phase():
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
        """Whether a supervisor of the launch went without a word: the launcher starts the program anew."""
        return self.supervised and self._cut_off

    @property
    def ended_well(self) -> bool:
        """Whether the launch ran to an end of its own: nobody will come back for it."""
        return self.roster is not None and self.supervised and self.roster.state is State.OVER and not self._cut_off

    def repeat_stop(self, peer: Peer) -> None:
        """A trainer came after the job was asked to stop: tell it too."""
        if self._grace_until_s is not None and self.roster is not None and self.roster.preempted:
            peer.send(words.Stop(grace_s=max(0.1, self._grace_left_s())))

    def gone(self, peer: Peer) -> None:
        """A supervisor's connection ended."""
        self._waiting.pop(peer.number, None)
        now_s = time.monotonic()
        seat = self.roster.members[peer.rank].seat if self.roster and peer.rank in self.roster.members else None
        self._cut_off |= (
            not peer.planned
            and seat is not Seat.ENDED
            and self.roster is not None
            and self.roster.state is not State.OVER
        )
        self._on(SupervisorLeft(peer.rank, peer.number, peer.planned, now_s, self._job.completed()))

    def tick(self) -> float:
        """Look at the clock; returns seconds until the next look."""
        now_s = time.monotonic()
        if self._grace_until_s is not None and now_s >= self._grace_until_s:
            self._grace_until_s = None
            self._on(GraceOver(now_s))
        if self._dumping is not None and (now_s >= self._dumping[0] or self._all_dumped()):
            event, self._dumping = self._dumping[1], None
            self._tell_stacks()
            self._on(event)
        floor_s = self._job.policy.hang_s
        if floor_s and now_s >= self._check_at_s:
            self._check_at_s = now_s + check_s(floor_s)
            self._look(now_s)
        waits = [check_s(floor_s)] if floor_s else []
        waits += [self._grace_until_s - now_s] if self._grace_until_s is not None else []
        waits += [0.05] if self._dumping is not None else []
        return min(waits, default=5.0)

    def _joined(self, peer: Peer, status: int | None) -> None:
        if self._job.slots is not None:
            self._job.slots.settle()
        assert peer.hello is not None, "it said hello"
        if self._job.board is not None and self._job.slots is not None:
            peer.send(words.KeepBoard(), [self._job.board.fd])
            for slot in self._job.slots:
                peer.send(words.Keep(rank=slot.rank, index=slot.index, size_bytes=slot.size_bytes), [slot.fd])
        self._on(Joined(peer.rank, peer.number, peer.hello.pid, status))

    def _on(self, event: Event) -> None:
        if self.roster is None:
            return
        self.roster, actions = rules.step(self.roster, event)
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        job = self._job
        match action:
            case StartAll(attempt):
                self._begin(attempt)
                job.say("supervisor", words.Start(attempt=attempt, port=_free_port()))
            case KillAll(attempt, failure):
                self._dumping = None
                self._recovery = Recovery(attempt + 1, failure, job.completed(), time.monotonic())
                job.say("supervisor", words.Kill(attempt=attempt))
            case AttemptOver():
                job.drain()
                if self._recovery is not None:
                    self._recovery.failure = action.failure
                    self._recovery.killed_s = time.monotonic()
                if job.slots is not None and job.uploads is not None:
                    job.slots.settle()
                    job.uploads.attempt_ended(job.slots.sealed_of)
            case LeaveAll(status, text):
                job.tell(Told("ended", text, {"status": status}, alarm=True))
                self._keep_newest()
                job.say("supervisor", words.Leave(status=status, text=text))
            case LeaveOne(rank, status):
                job.say("supervisor", words.Leave(status=status), rank=rank)
            case AskStop():
                job.say("events", words.Stop(grace_s=max(0.1, self._grace_left_s())))

    def _begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._desk.clear()
        if self._job.board is not None:
            self._job.board.begin_attempt(attempt)
        self._check_at_s = 0.0

    def _keep_newest(self) -> None:
        """Nothing will train on: what only memory holds goes to a store."""
        job = self._job
        if job.slots is None or job.uploads is None:
            return
        newest = next(iter(job.slots.complete(job.ranks)), None)
        if newest is not None:
            job.uploads.settle(newest, job.slots.sealed_of)

    def _preempt(self, grace_s: float) -> None:
        if self._grace_until_s is None:
            self._grace_until_s = time.monotonic() + min(grace_s, self._job.policy.grace_s)
        self._on(Preempted())

    def _grace_left_s(self) -> float:
        return (self._grace_until_s or time.monotonic()) - time.monotonic()

    def _phase(self, rank: int, phase: words.Phase) -> None:
        recovery = self._recovery
        if recovery is None or recovery.attempt != self._attempt:
            return
        if phase.name == "restored":
            recovery.resume = self._desk.resume
        recovery.reach(rank, phase.name, phase.at_s)
        if recovery.done(self._job.ranks):
            self._recovery = None
            self.recoveries.append(recovery.facts())
            self._job.tell(Told("recovered", recovery.line(), recovery.facts(), alarm=True))
            self._job.say("supervisor", words.Tell(text=recovery.line()), rank=0)

    def _look(self, now_s: float) -> None:
        roster, board = self.roster, self._job.board
        if roster is None or board is None or roster.state is not State.RUNNING or self._dumping is not None:
            return
        alive = self._alive()
        pulses = [_pulse(board.rank(one.rank), one) for one in alive]
        stuck = hung(pulses, floor_s=self._job.policy.hang_s)
        if any(one.seat not in (Seat.ALIVE, Seat.ENDED) for one in roster.members.values()) or not stuck:
            return
        idle_s = {pulse.rank: pulse.idle_s for pulse in pulses}[stuck[0]]
        text = f"rank {stuck[0]} hangs: no step for {idle_s:.1f} s, {len(stuck)} of {roster.ranks} ranks stand still"
        for one in alive:
            path = self._stack_file(one.rank)
            self._job.say("supervisor", words.Dump(attempt=roster.attempt, path=str(path)), rank=one.rank)
        event = Hung(stuck[0], roster.attempt, text, now_s, self._job.completed())
        self._dumping = (now_s + STACKS_WAIT_S, event)

    def _alive(self) -> list[rules.Member]:
        members = self.roster.members.values() if self.roster is not None else ()
        return [one for one in members if one.seat is Seat.ALIVE]

    def _stack_file(self, rank: int) -> Path:
        return self._stacks / f"{self._attempt}-{rank}.txt"

    def _all_dumped(self) -> bool:
        assert self._dumping is not None, "stacks were asked for"
        since_s = self._dumping[0] - STACKS_WAIT_S
        # Written in one go by a signal handler: what is there 0.2 s after the request and not empty is whole.
        files = [self._stack_file(one.rank) for one in self._alive()]
        return time.monotonic() - since_s > 0.2 and all(file.exists() and file.stat().st_size for file in files)

    def _tell_stacks(self) -> None:
        for rank in (one.rank for one in self._alive()):
            file = self._stack_file(rank)
            text = file.read_text(errors="replace") if file.exists() else ""
            shown = text or "no stack: the process did not answer, it may be stopped"
            self._job.tell(Told("stacks", f"rank {rank} hangs here:\n{shown}", {"rank": rank}, alarm=True))
            self._job.say("supervisor", words.Tell(text=f"rank {rank} hangs here:\n{shown}", alarm=True), rank=0)


def _pulse(board: RankBoard, member: rules.Member) -> Pulse:
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    completed = board.completed
    return Pulse(
        rank=member.rank, phase=board.phase, first_step_done=bool(board.first_step_done),
        completed=-1 if completed is None else completed, idle_s=max(0, now_ns - board.beat_ns) / 1e9,
        longest_step_s=board.longest_step_ns / 1e9, traced=_traced(member.trainer_pid),
    )  # fmt: skip


def _traced(pid: int) -> bool:
    """Whether a debugger holds the process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status.splitlines())


def _free_port() -> int:
    """A port on loopback that nobody listens on now. Whoever takes it in between makes an attempt fail, which is repeated."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
