"""Watches for trainers that hang, and has their stacks written before they are killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt.events import Event
from ckpt.ipc import messages
from ckpt.ipc.board import Board, RankBoard
from ckpt.keeper.attempts.events import Hung
from ckpt.keeper.attempts.hang import (
    Observation,
    Pulse,
    building_s,
    check_interval_s,
    first_step_s,
    hung_ranks,
    observe,
    start_limit_s,
)
from ckpt.keeper.attempts.roster import RankState, Roster, RosterEntry, RosterState
from ckpt.keeper.job_state import JobState

STACKS_WAIT_S = 2.0
"""How long hanging trainers may take to write their stacks; a stopped process never does."""
SLOW_START_S = 600.0
"""A first step that takes longer raises an alarm, at half of its limit at the latest; so does what
precedes it."""
PLACES = {
    "": "starting, before the decorated function",
    "entered": "in the function, before run.track, or in init_process_group",
    "group": "in the function, with a process group, before run.track",
    "tracked": "restoring",
    "restored": "restored, before the first step",
}
"""Where a rank stands after a milestone of its start, for people."""
STACKS_SETTLE_S = 0.2
STACKS_POLL_S = 0.05


class HangWatch:
    """Observes the trainers of one launch's running attempt. ``stacks``: the folder to which they
    write their stacks."""

    def __init__(self, state: JobState, *, stacks: Path) -> None:
        self._state = state
        self._stacks = stacks
        self._observation: Observation | None = None
        self._check_at_s = 0.0
        self._first_step_s: float | None = None
        """The longest wait for a first step of this attempt so far; None: none was seen, or all
        ranks are past it."""
        self._longest_start_s: float | None = None
        """The longest of those that were completed, of earlier attempts in this generation; None:
        there is none, or the last attempt ended in its first step."""
        self._generation = 0
        self._slow_told = False
        self._milestones: dict[int, str] = {}
        """The last milestone of its start that each rank has reached."""
        self._elsewhere: dict[int, tuple[str, int]] = {}
        """Of ranks that train on another store than the keeper's: that, and the last step."""
        self._dumping: tuple[float, Hung] | None = None
        """Until when stacks are awaited, and what is reported then."""

    def begin(self, *, generation: int) -> None:
        """An attempt begins: earlier observations do not count. ``generation``: changes when other
        nodes hold the ranks."""
        # A node that has just come compiles what the others have in their caches. And an attempt
        # that ended in its first step may only have been slow: what was learned from faster ones
        # would then end the next one too, on every node, again and again.
        if generation != self._generation or self._first_step_s is not None:
            self._longest_start_s = None
        self._generation = generation
        self._first_step_s, self._slow_told = None, False
        self._observation, self._check_at_s, self._dumping = None, 0.0, None
        self._milestones.clear()
        self._elsewhere.clear()

    def reached(self, rank: int, milestone: str) -> None:
        """A rank reached a milestone of its start: the time of what precedes its first step begins
        anew."""
        if milestone in PLACES:
            self._milestones[rank], self._slow_told = milestone, False

    def progressed(self, rank: int, store: str, completed: int) -> None:
        """A rank completed steps of a run that the board does not show: the call around it, which
        may never begin a step itself, does not hang."""
        self._elsewhere[rank], self._slow_told = (store, completed), False

    def stop(self) -> None:
        """The attempt is being killed: its stacks are of no use."""
        self._dumping = None

    def tick(self, roster: Roster | None, now_s: float) -> Hung | None:
        """The hang that was found, once the stacks are written; None: there is none, or not yet."""
        if roster is None:
            return None
        if self._dumping is not None:
            if now_s < self._dumping[0] and not self._all_dumped(roster, now_s):
                return None
            event, self._dumping = self._dumping[1], None
            self._report_stacks(roster)
            return event
        floor_s, board = self._state.launch.policy.hang_s, self._state.memory.board
        if floor_s and board is not None and now_s >= self._check_at_s:
            self._check_at_s = now_s + check_interval_s(floor_s)
            if roster.state is RosterState.RUNNING:
                self._check(roster, board, now_s)
        return None

    def wait_s(self) -> float | None:
        """Seconds until the next tick is needed; None: none is."""
        if self._dumping is not None:
            return STACKS_POLL_S
        floor_s = self._state.launch.policy.hang_s
        return check_interval_s(floor_s) if floor_s else None

    def _check(self, roster: Roster, board: Board, now_s: float) -> None:
        floor_s, alive = self._state.launch.policy.hang_s, _alive(roster)
        stopped = {entry.rank: _stopped(entry) for entry in alive}
        waits = self._waits_for_store
        marks = {
            entry.rank: (
                _mark(board.rank(entry.rank)),
                stopped[entry.rank],
                self._milestones.get(entry.rank, ""),
                self._elsewhere.get(entry.rank),
                waits,
            )
            for entry in alive
        }
        self._observation = observe(
            self._observation, marks, now_s=now_s, check_s=check_interval_s(floor_s)
        )
        idle_s = self._observation.idle_s
        pulses = [
            _pulse(board.rank(entry.rank), entry, idle_s[entry.rank], stopped=stopped[entry.rank])
            for entry in alive
        ]
        start_s = start_limit_s(
            self._longest_start_s, floor_s=floor_s, start_s=self._state.launch.policy.start_s
        )
        self._follow_start(pulses, start_s)
        build_s = 0.0 if waits or not self._judges_building else self._state.launch.policy.build_s
        self._follow_building(pulses, build_s)
        stuck = hung_ranks(pulses, floor_s=floor_s, start_s=start_s, build_s=build_s)
        # While a rank starts or is dead the others may only be waiting for it: its own event
        # decides.
        if not stuck or any(
            entry.seat not in (RankState.ALIVE, RankState.ENDED)
            for entry in roster.members.values()
        ):
            return
        first = stuck[0]
        text = (
            f"rank {first} hangs: no step for {idle_s[first]:.1f} s, {len(stuck)} of "
            f"{roster.ranks} ranks stand still"
        )
        if not board.rank(first).beat_ns:
            text = f"{text} before their first step ({self._places(stuck)})"
        for entry in alive:
            path = self._stack_file(roster, entry.rank)
            dump = messages.Dump(attempt=roster.attempt, path=str(path))
            self._state.clients.broadcast("supervisor", dump, rank=entry.rank)
        event = Hung(first, roster.attempt, text, now_s, self._state.memory.completed())
        self._dumping = (now_s + STACKS_WAIT_S, event)

    @property
    def _waits_for_store(self) -> bool:
        """Whether the ranks may be waiting for this keeper's questions to a store, which say so
        themselves."""
        uploads = self._state.uploads.current
        return uploads is not None and uploads.asks_store

    @property
    def _judges_building(self) -> bool:
        """Of several nodes only that of rank 0 judges what precedes the first step: its keeper
        alone knows whether all wait for a store. All ranks wait for one that hangs, also there."""
        placement = self._state.launch.cluster.placement
        return placement is None or placement.first_rank == 0

    def _places(self, ranks: Sequence[int]) -> str:
        """Where these ranks stand in their start."""
        there: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            there.setdefault(self._milestones.get(rank, ""), []).append(rank)
        return "; ".join(
            f"rank {', '.join(map(str, found))}: {PLACES[name]}" for name, found in there.items()
        )

    def _follow_building(self, pulses: Sequence[Pulse], limit_s: float) -> None:
        """Warn before what precedes the first step counts as a hang, and say where each rank
        stands."""
        waited_s = building_s(pulses)
        if waited_s is None or not limit_s or self._slow_told:
            return
        if waited_s <= min(SLOW_START_S, limit_s / 2):
            return
        self._slow_told = True
        text = (
            f"no rank has come further for {waited_s:.0f} s, and training has not begun. "
            f"{self._places([pulse.rank for pulse in pulses])}. After {limit_s:.0f} s it counts as "
            "a hang, and all ranks start again; if it takes that long, set RestartPolicy(build=...)"
        )
        self._warn(Event("slow-start", text, {"seconds": round(waited_s, 1)}, alarm=True))

    def _warn(self, event: Event) -> None:
        self._state.emit(event)
        line = messages.PrintLine(text=event.text, alarm=True)
        self._state.clients.broadcast("supervisor", line, rank=0)

    def _follow_start(self, pulses: Sequence[Pulse], limit_s: float) -> None:
        """Learn how long first steps take, and warn before one counts as a hang."""
        waited_s = first_step_s(pulses)
        if waited_s is not None:
            self._first_step_s = max(waited_s, self._first_step_s or 0.0)
        elif self._first_step_s is not None and all(pulse.first_step_done for pulse in pulses):
            self._longest_start_s = max(self._first_step_s, self._longest_start_s or 0.0)
            self._first_step_s = None
        if (
            waited_s is not None
            and limit_s
            and not self._slow_told
            and waited_s > min(SLOW_START_S, limit_s / 2)
        ):
            self._slow_told = True
            learned = limit_s < self._state.launch.policy.start_s
            text = (
                f"the first step has taken {waited_s:.0f} s so far; after {limit_s:.0f} s "
                f"{'(earlier attempts took far less) ' if learned else ''}it "
                "counts as a hang, and all ranks start again. If it compiles that long, set "
                f"RestartPolicy({'hang' if learned else 'start'}=...)"
            )
            self._warn(Event("slow-start", text, {"seconds": round(waited_s, 1)}, alarm=True))

    def _stack_file(self, roster: Roster, rank: int) -> Path:
        return self._stacks / f"{roster.attempt}-{rank}.txt"

    def _all_dumped(self, roster: Roster, now_s: float) -> bool:
        assert self._dumping is not None, "stacks were asked for"
        since_s = self._dumping[0] - STACKS_WAIT_S
        # A signal handler writes each file in one go: if it is not empty a moment after the
        # request, it is complete.
        files = [self._stack_file(roster, entry.rank) for entry in _alive(roster)]
        return now_s - since_s > STACKS_SETTLE_S and all(_text(file) for file in files)

    def _report_stacks(self, roster: Roster) -> None:
        for rank in (entry.rank for entry in _alive(roster)):
            stack = _text(self._stack_file(roster, rank))
            stack = stack or "no stack: the process did not answer, it may be stopped"
            text = f"rank {rank} hangs here:\n{stack}"
            self._state.emit(Event("stacks", text, {"rank": rank}, alarm=True))
            self._state.clients.broadcast(
                "supervisor", messages.PrintLine(text=text, alarm=True), rank=0
            )


def _alive(roster: Roster) -> list[RosterEntry]:
    return [entry for entry in roster.members.values() if entry.seat is RankState.ALIVE]


def _text(file: Path) -> str:
    """The file's text; "" if it has none, or the folder was removed."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _mark(board: RankBoard) -> object:
    """Anything that changes with each step, and with each sign of life of the trainer."""
    return board.completed, board.beat_ns, board.phase, board.first_step_done


def _pulse(board: RankBoard, entry: RosterEntry, idle_s: float, *, stopped: bool) -> Pulse:
    completed = board.completed
    return Pulse(
        rank=entry.rank,
        phase=board.phase,
        first_step_done=bool(board.first_step_done),
        completed=-1 if completed is None else completed,
        idle_s=idle_s,
        longest_step_s=board.longest_step_ns / 1e9,
        traced=_traced(entry.trainer_pid),
        stopped=stopped,
    )


def _traced(pid: int) -> bool:
    """Whether a debugger holds the process."""
    return _status(pid, "TracerPid:") not in ("", "0")


def _stopped(entry: RosterEntry) -> bool:
    """Whether the trainer alone is stopped. If its supervisor is too, it is Ctrl-Z, and a person
    will continue both."""
    return _status(entry.trainer_pid, "State:") == "T" and _status(entry.pid, "State:") != "T"


def _status(pid: int, name: str) -> str:
    """The first word of one line of the process's status; "" if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return next((line.split()[1] for line in status.splitlines() if line.startswith(name)), "")
