"""The supervisors of one launch: carries out what the roster decides, reports hangs and
recoveries."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from ckpt.events import Event, Fact
from ckpt.ipc import messages
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.frames import close_fds
from ckpt.ipc.messages import Hello, Message
from ckpt.keeper.attempts import roster as rules
from ckpt.keeper.attempts.events import (
    AttemptOver,
    Failure,
    GatheringTimedOut,
    GraceExpired,
    KillAll,
    LeaveAll,
    LeaveNodes,
    LeaveOne,
    Pause,
    PauseOver,
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
    TrainerProgressed,
    TrainerStarted,
)
from ckpt.keeper.attempts.failures import ASKED_TO_GO, with_global_rank
from ckpt.keeper.attempts.hang_watch import HangWatch
from ckpt.keeper.attempts.recovery import Recovery
from ckpt.keeper.attempts.roster import PREEMPTED_STATUS, RankState, Roster, RosterState
from ckpt.keeper.connection import ClientConnection
from ckpt.keeper.job_state import JobState
from ckpt.keeper.trainer_calls import TrainerCalls
from ckpt.values import TrainerPhase

if TYPE_CHECKING:  # imported for a job with several nodes only
    from ckpt.keeper.nodes.nodes import Nodes

GATHER_REPORT_S = 30.0
"""Ranks that have not joined by then are named to the user."""
GATHER_MAX_S = 600.0
"""How long the ranks that have joined wait for the others."""

RECOVERIES_KEPT = 20

FLUSH_SHARE = 0.2
"""The part of the grace time in which what is staged becomes durable after trainers are killed."""
MIN_FLUSH_S = 0.05


class Supervisors:
    """The supervisors of one launch. ``drain`` reads what trainers sent before they died.

    The roster decides (it is pure); this class turns messages and time into its events and carries
    out its actions. It has more attributes than usual because each is one deadline or memory of the
    launch that only it uses.
    """

    def __init__(
        self, state: JobState, calls: TrainerCalls, *, stacks: Path, drain: Callable[[], object]
    ) -> None:
        self._state = state
        self._calls = calls
        self._drain = drain
        self._stacks = stacks
        self._watch = HangWatch(state, stacks=stacks)
        self.roster: Roster | None = None
        self.recoveries: deque[Mapping[str, Fact]] = deque(maxlen=RECOVERIES_KEPT)
        self._recovery: Recovery | None = None
        # A keeper that took a board over goes on counting where the one before it stopped.
        self._attempt = state.memory.board.attempt if state.memory.board is not None else 0
        self._grace_until_s: float | None = None
        """Until when trainers of a preempted job may take to stop by themselves."""
        self._ends_s: float | None = None
        """When a preempted job ends, whatever is left to do."""
        self._leaving: tuple[float, messages.Leave] | None = None
        """What supervisors are sent once all is durable, or at that time at the latest."""
        self._pause_until: tuple[float, int] | None = None
        """When the pause after an attempt is over, and that attempt's number."""
        self._gathering_s = 0.0
        self._missing_reported = False
        self._handing_over: dict[int, messages.Died | None] = {}
        """Supervisors (by connection) that served an earlier keeper and still hand over what they
        hold.

        The value is how their trainer ended, if it did by itself.
        """
        self._cut_off = False

    @property
    def attempt(self) -> int:
        """The attempt that runs, or the last one."""
        return self._attempt

    @property
    def supervised(self) -> bool:
        """Whether the current launch has supervisors."""
        return self.roster is not None and self.roster.launch == self._state.launch.id

    @property
    def cut_off(self) -> bool:
        """Whether a supervisor of the launch was lost: then the launcher starts the program
        again."""
        return self.supervised and self._cut_off

    @property
    def ended_well(self) -> bool:
        """Whether the launch ended as it should: no process returns for it."""
        over = self.roster is not None and self.roster.state is RosterState.OVER
        return over and self.supervised and not self._cut_off

    # ---- messages

    def join(self, client: ClientConnection, hello: Hello, *, new: bool) -> None:
        """A supervisor said hello. If it served an earlier keeper it first hands over its slots,
        then sends ``Killed``."""
        state = self._state
        if (
            self.roster is None
            or self.roster.launch != state.launch.id
            or (new and self.roster.state is RosterState.OVER)
        ):
            self.roster = Roster(
                state.launch.id,
                state.memory.ranks,
                state.launch.policy,
                attempt=self._attempt,
                shared=self._enter_cluster(hello),
            )
            # Another program may compile longer: what was learned of the last one does not count.
            self._watch = HangWatch(state, stacks=self._stacks)
            self._cut_off = False
            self._grace_until_s = self._leaving = self._pause_until = self._ends_s = None
            self._gathering_s, self._missing_reported = time.monotonic(), False
        served_another = hello.holds or hello.attempt > 0
        self._attempt = max(self._attempt, hello.attempt)
        if (
            self.roster.state is RosterState.GATHERING
        ):  # attempt numbers only grow, also from keeper to keeper
            self.roster = replace(self.roster, attempt=self._attempt)
        state.welcome(client, hello, attempt=self._attempt, new=served_another)
        if served_another:
            self._handing_over[client.number] = None
        else:
            self._joined(client, None)

    def handle(self, client: ClientConnection, message: Message, fds: list[int]) -> bool:
        """Take one message of a supervisor, or of a trainer about its fate; False for any other.
        Owns ``fds``."""
        memory = self._state.memory
        match message:
            case messages.Started():
                self._on(
                    TrainerStarted(client.rank, message.attempt, message.trainer_pid, message.how)
                )
                if self._recovery is not None and message.attempt == self._attempt:
                    self._recovery.how = message.how
            case messages.Died() if client.number in self._handing_over:
                self._handing_over[client.number] = message
            case messages.Died():
                # The trainer may have sent its exception before it died: read that first, it
                # explains the death.
                self._drain()
                if message.failing is not None and self._unheard(client.rank):
                    self._on(TrainerFailing(client.rank, message.attempt, message.failing))
                self._on(
                    TrainerDied(
                        client.rank,
                        message.attempt,
                        message.status,
                        message.at_s,
                        memory.completed(),
                        message.overdue,
                        stepping=memory.board is not None
                        and memory.board.rank(client.rank).phase is not TrainerPhase.FINISHED,
                    )
                )
            case messages.Killed():
                if client.number in self._handing_over:
                    self._joined(client, self._handing_over.pop(client.number))
                else:
                    self._on(TrainerKilled(client.rank, message.attempt))
            case messages.Preempt():
                self._preempt(message.grace_s)
            case messages.SlotKept() if fds and memory.slots is not None:
                # Several supervisors hold the same slots: the first that hands one over counts.
                if (message.rank, message.index) not in {
                    (slot.rank, slot.index) for slot in memory.slots
                }:
                    memory.slots.add(message.rank, message.index, fds[0], message.size_bytes)
                    return True
                close_fds(fds)
            case messages.BoardKept() if fds:
                memory.adopt_board(fds[0])
            case _:
                return self._handle_of_trainer(client, message)
        return True

    def _handle_of_trainer(self, client: ClientConnection, message: Message) -> bool:
        match message:
            case messages.Failing():
                self._on(TrainerFailing(client.rank, client.attempt, message))
            case messages.Progress(store=store, completed=completed):
                if client.attempt == self._attempt:
                    self._watch.progressed(client.rank, store, completed)
                self._on(TrainerProgressed(client.rank, client.attempt, store, completed))
            case messages.Finished():
                self._on(TrainerFinished(client.rank, client.attempt))
            case messages.Phase():
                if message.name == "entered":
                    self._on(TrainerEntered(client.rank, client.attempt))
                self._milestone(client.rank, message)
            case _:
                return False
        return True

    def _unheard(self, rank: int) -> bool:
        """Whether no exception of the rank's trainer was heard of from itself."""
        entry = self.roster.members.get(rank) if self.roster is not None else None
        return entry is not None and entry.failing is None

    def repeat_stop(self, client: ClientConnection) -> None:
        """A trainer connected after the job was asked to stop: ask it too."""
        if self._grace_until_s is not None and self.roster is not None and self.roster.preempted:
            client.send(messages.Stop(grace_s=max(0.1, self._grace_left_s())))

    def disconnected(self, client: ClientConnection) -> None:
        """A supervisor's connection ended."""
        self._handing_over.pop(client.number, None)
        now_s, roster = time.monotonic(), self.roster
        entry = roster.members.get(client.rank) if roster is not None else None
        self._cut_off |= (
            not client.planned
            and (entry is None or entry.seat is not RankState.ENDED)
            and roster is not None
            and roster.state is not RosterState.OVER
        )
        completed = self._state.memory.completed()
        self._on(SupervisorLeft(client.rank, client.number, client.planned, now_s, completed))

    # ---- time

    def tick(self) -> float:
        """Do what is due; returns the seconds until the next call is needed."""
        now_s = time.monotonic()
        if self._grace_until_s is not None and now_s >= self._grace_until_s:
            self._grace_until_s = None
            self._on(GraceExpired(now_s))
        if self._leaving is not None and (now_s >= self._leaving[0] or self._state.uploads.idle):
            leave, self._leaving = self._leaving[1], None
            self._state.clients.broadcast("supervisor", self._last_word(leave))
        if self._pause_until is not None and now_s >= self._pause_until[0]:
            attempt, self._pause_until = self._pause_until[1], None
            self._on(PauseOver(attempt))
        hung = self._watch.tick(self.roster, now_s)
        if hung is not None:
            self._on(hung)
        if self.roster is not None and self.roster.state is RosterState.GATHERING:
            self._check_gathering(self.roster, now_s)
        deadlines_s = [
            self._grace_until_s,
            self._leaving[0] if self._leaving is not None else None,
            self._pause_until[0] if self._pause_until is not None else None,
        ]
        waits_s = [until_s - now_s for until_s in deadlines_s if until_s is not None]
        watch_s = self._watch.wait_s()
        if watch_s is not None:
            waits_s.append(watch_s)
        waits_s.append(self._state.launch.cluster.tick(now_s))
        return min(waits_s)

    def _check_gathering(self, roster: Roster, now_s: float) -> None:
        """Name the ranks that do not join. A launcher that starts too few of them would have the
        others wait in silence."""
        waited_s = now_s - self._gathering_s
        if waited_s < GATHER_REPORT_S or (self._missing_reported and waited_s < GATHER_MAX_S):
            return
        missing = ", ".join(str(rank) for rank in range(roster.ranks) if rank not in roster.members)
        text = (
            f"ranks are missing on this node: {missing} of {roster.ranks} have not joined for "
            f"{waited_s:.0f} s; start them, or set LOCAL_WORLD_SIZE to the number of ranks on this "
            "node"
        )
        if waited_s >= GATHER_MAX_S:
            self._on(GatheringTimedOut(text, now_s))
            return
        self._missing_reported = True
        self._state.emit(Event("missing", text, alarm=True))
        self._state.clients.broadcast("supervisor", messages.PrintLine(text=text, alarm=True))

    # ---- events and actions of the roster

    def _joined(self, client: ClientConnection, died: messages.Died | None) -> None:
        """A supervisor has handed over what it holds: give it all that this keeper holds, and count
        its rank in."""
        memory = self._state.memory
        assert client.hello is not None, "it said hello"
        if memory.slots is not None:
            memory.slots.sync_board()
        if memory.board is not None and memory.slots is not None:
            client.send(messages.KeepBoard(), [memory.board.fd])
            for slot in memory.slots:
                keep = messages.Keep(rank=slot.rank, index=slot.index, size_bytes=slot.size_bytes)
                client.send(keep, [slot.fd])
        joined = SupervisorJoined(client.rank, client.number, client.hello.pid)
        if died is not None:
            joined = replace(joined, status=died.status, failing=died.failing, at_s=died.at_s)
        self._on(joined)

    def _on(self, event: RosterEvent) -> None:
        if self.roster is None:
            return
        before = self.roster.state
        # The new roster is stored before the actions: an action may cause another event at once.
        self.roster, actions = rules.step(self.roster, event)
        self._tell_restart(actions)
        for action in actions:
            self._do(action)
        over = self.roster.state is RosterState.OVER and before is not RosterState.OVER
        # ``LeaveAll`` flushes by itself. If all ranks ended as they should this finds nothing:
        # their last is durable.
        if over and not any(isinstance(action, LeaveAll) for action in actions):
            self._state.uploads.flush_newest()

    def _tell_restart(self, actions: Sequence[RosterAction]) -> None:
        """One line for each attempt that failed and may be followed by another one on this node."""
        over = next((action for action in actions if isinstance(action, AttemptOver)), None)
        if over is None:
            return
        for action in actions:
            match action:
                case StartAll():
                    when = "now"
                case Pause(_, seconds):
                    when = f"in {seconds:.0f} s"
                case RequestEpoch() if over.failure.kind not in ASKED_TO_GO:
                    when = "together with the other nodes'"
                case _:
                    continue
            placement = self._state.launch.cluster.placement
            first = placement.first_rank if placement is not None else 0
            why = with_global_rank(over.failure, first).text
            text = f"attempt {over.attempt} failed: {why}; the next one starts {when}"
            self._state.clients.broadcast("supervisor", messages.PrintLine(text=text), rank=0)

    def _do(self, action: RosterAction) -> None:
        state = self._state
        match action:
            case StartAll(attempt):
                self._begin(attempt)
                state.clients.broadcast("supervisor", state.launch.cluster.start_message(attempt))
            case KillAll(attempt, failure):
                self._watch.stop()
                self._recovery = Recovery(
                    attempt + 1, failure, state.memory.completed(), time.monotonic()
                )
                state.clients.broadcast("supervisor", messages.Kill(attempt=attempt))
            case AttemptOver():
                self._attempt_over(action)
            case Pause(attempt, seconds):
                self._pause_until = (time.monotonic() + seconds, attempt)
            case LeaveAll():
                self._recovery = None  # a later launch does not recover from this failure
                self._leave(action)
            case LeaveOne(rank, status):
                state.clients.broadcast("supervisor", messages.Leave(status=status), rank=rank)
            case RequestEpoch():
                assert self.roster is not None, "it asked"
                state.launch.cluster.request_epoch(action, self.roster.attempt)
            case ReportEnded():
                state.launch.cluster.report_ended(self._attempt)
            case LeaveNodes(completed):
                asked = Failure(-1, "preempted", "a node is asked to go", PREEMPTED_STATUS, 0.0)
                state.launch.cluster.request_epoch(RequestEpoch(asked, completed), self._attempt)
                state.launch.cluster.leave()
            case RequestStop():
                state.clients.broadcast(
                    "events", messages.Stop(grace_s=max(0.1, self._grace_left_s()))
                )

    def _begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._calls.begin(attempt)
        if self._state.memory.board is not None:
            self._state.memory.board.begin_attempt(attempt)
        self._watch.begin(generation=self._state.launch.cluster.generation)
        # With several nodes the epoch says why the last one ended: what failed here may only follow
        # from that.
        reason = self._state.launch.cluster.epoch_reason
        if self._recovery is not None and reason:
            self._recovery.failure = replace(self._recovery.failure, text=reason)

    def _attempt_over(self, action: AttemptOver) -> None:
        """No trainer is left: take what they sent and staged, before the next attempt changes slots
        and board."""
        self._drain()
        if self._recovery is not None:
            self._recovery.failure = action.failure
            self._recovery.killed_s = time.monotonic()
        state = self._state
        if state.memory.slots is not None and state.uploads.current is not None:
            state.memory.slots.sync_board()
            state.uploads.attempt_ended()

    def _enter_cluster(self, hello: Hello) -> bool:
        """Enter the cluster anew if the job may have several nodes; whether it may. ``hello`` says
        what launched it here."""
        spec = self._state.spec.nodes
        if spec is None:
            return False
        self._state.launch.enter_cluster(
            lambda: self._make_nodes(
                structs.replace(spec, agent=hello.agent, ends_after=hello.ends_after)
            )
        )
        return True

    def _make_nodes(self, spec: NodesSpec) -> Nodes:
        made: type[Nodes] = import_module("ckpt.keeper.nodes.nodes").Nodes
        return made(self._state, spec, on=self._on)

    def _leave(self, action: LeaveAll) -> None:
        """All supervisors leave: at once, or once all is durable. In a container the keeper ends
        with the last of them."""
        state = self._state
        state.emit(Event("ended", action.text, {"status": action.status}, alarm=True))
        state.uploads.flush_newest()
        state.launch.cluster.leave()
        leave = messages.Leave(status=action.status, text=action.text, futile=action.futile)
        wait_s = min(state.launch.policy.linger_s, state.launch.policy.grace_s)
        if self._ends_s is not None:
            wait_s = min(wait_s, max(MIN_FLUSH_S, self._ends_s - time.monotonic()))
        if not action.flush_first or wait_s <= 0 or state.uploads.idle:
            state.clients.broadcast("supervisor", self._last_word(leave))
            return
        self._leaving = (time.monotonic() + wait_s, leave)
        text = (
            f"{action.text}; leaving when what is staged is in the store, in {wait_s:.0f} s at the "
            "latest"
        )
        state.clients.broadcast("supervisor", messages.PrintLine(text=text), rank=0)

    def _preempt(self, grace_s: float) -> None:
        if self._ends_s is None:
            whole_s = min(grace_s, self._state.launch.policy.grace_s)
            self._ends_s = time.monotonic() + whole_s
            # The rest is for killing those that did not stop, and for what they had staged.
            self._grace_until_s = self._ends_s - whole_s * FLUSH_SHARE
        self._on(PreemptRequested())

    def _grace_left_s(self) -> float:
        return (self._grace_until_s or time.monotonic()) - time.monotonic()

    def _last_word(self, leave: messages.Leave) -> messages.Leave:
        """What supervisors are sent at the end; that of a preempted job says whether its last step
        is durable."""
        # Launchers go by the status of a futile end, which is that of the whole job.
        if self.roster is None or not self.roster.preempted or leave.futile:
            return leave
        uploads = self._state.uploads
        newest, durable = uploads.newest_staged, uploads.newest_durable
        # An earlier keeper may have made it durable: then only the log has it.
        if newest is not None and uploads.is_durable(newest):
            durable = newest if durable is None else max(durable, newest)
        if newest is None or (durable is not None and durable >= newest):
            done = (
                f"step {durable.step} is durable" if durable is not None else "nothing was staged"
            )
            return structs.replace(leave, text=f"{leave.text}; {done}")
        return structs.replace(
            leave,
            status=rules.NOT_DURABLE_STATUS,
            text=f"{leave.text}; step {newest.step} is staged and not durable: the keeper goes on "
            "with it while this machine lives",
        )

    def _milestone(self, rank: int, phase: messages.Phase) -> None:
        """A trainer reached a milestone of its start; the last one of all ranks ends the
        recovery."""
        self._watch.reached(rank, phase.name)
        recovery = self._recovery
        if recovery is None or recovery.attempt != self._attempt:
            return
        if phase.name == "restored":
            recovery.resume = self._state.launch.cluster.resumed_from
        recovery.reach(rank, phase.name, phase.at_s)
        if recovery.done(self._state.memory.ranks):
            self._recovery = None
            self.recoveries.append(recovery.facts())
            self._state.emit(Event("recovered", recovery.line(), recovery.facts(), alarm=True))
            self._state.clients.broadcast(
                "supervisor", messages.PrintLine(text=recovery.line()), rank=0
            )
