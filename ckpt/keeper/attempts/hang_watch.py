"""Looks for trainers that hang, and has their stacks written before anything is done about it."""

from __future__ import annotations

from pathlib import Path

from ckpt.events import Event as Told
from ckpt.ipc import messages as words
from ckpt.ipc.board import Board, RankBoard
from ckpt.keeper.attempts.events import Hung
from ckpt.keeper.attempts.hang import Observation, Pulse, check_interval_s, hung_ranks, observe
from ckpt.keeper.attempts.roster import RankState, Roster, RosterEntry, RosterState
from ckpt.keeper.job import Job

STACKS_WAIT_S = 2.0
"""How long trainers that hang may take to write their stacks; one that is stopped never does."""
STACKS_SETTLE_S = 0.2
STACKS_POLL_S = 0.05


class HangWatch:
    """One at a time looks, dumps, and says who hangs. ``stacks``: the folder for their stacks."""

    def __init__(self, job: Job, *, stacks: Path) -> None:
        self._job = job
        self._stacks = stacks
        self._sight: Observation | None = None
        self._check_at_s = 0.0
        self._dumping: tuple[float, Hung] | None = None

    def begin(self) -> None:
        """An attempt begins: nothing that was seen before counts."""
        self._sight, self._check_at_s, self._dumping = None, 0.0, None

    def stop(self) -> None:
        """The attempt is being killed: its stacks are of no use."""
        self._dumping = None

    def tick(self, roster: Roster | None, now_s: float) -> Hung | None:
        """Who hangs, once their stacks are written; None: nobody, or not yet."""
        if roster is None:
            return None
        if self._dumping is not None:
            if now_s < self._dumping[0] and not self._all_dumped(roster, now_s):
                return None
            event, self._dumping = self._dumping[1], None
            self._tell_stacks(roster)
            return event
        floor_s, board = self._job.policy.hang_s, self._job.board
        if floor_s and board is not None and now_s >= self._check_at_s:
            self._check_at_s = now_s + check_interval_s(floor_s)
            if roster.state is RosterState.RUNNING:
                self._look(roster, board, now_s)
        return None

    def wait_s(self) -> float | None:
        """Seconds until the next tick is due; None: none is."""
        if self._dumping is not None:
            return STACKS_POLL_S
        return check_interval_s(self._job.policy.hang_s) if self._job.policy.hang_s else None

    def _look(self, roster: Roster, board: Board, now_s: float) -> None:
        floor_s, alive = self._job.policy.hang_s, _alive(roster)
        stopped = {one.rank: _stopped(one) for one in alive}
        marks = {one.rank: (_mark(board.rank(one.rank)), stopped[one.rank]) for one in alive}
        self._sight = observe(self._sight, marks, now_s=now_s, check_s=check_interval_s(floor_s))
        idle_s = self._sight.idle_s
        pulses = [
            _pulse(board.rank(one.rank), one, idle_s[one.rank], stopped=stopped[one.rank])
            for one in alive
        ]
        stuck = hung_ranks(pulses, floor_s=floor_s)
        if not stuck or any(
            one.seat not in (RankState.ALIVE, RankState.ENDED) for one in roster.members.values()
        ):
            return
        first = stuck[0]
        text = f"rank {first} hangs: no step for {idle_s[first]:.1f} s, {len(stuck)} of {roster.ranks} ranks stand still"
        for one in alive:
            path = self._stack_file(roster, one.rank)
            self._job.say(
                "supervisor", words.Dump(attempt=roster.attempt, path=str(path)), rank=one.rank
            )
        event = Hung(first, roster.attempt, text, now_s, self._job.completed())
        self._dumping = (now_s + STACKS_WAIT_S, event)

    def _stack_file(self, roster: Roster, rank: int) -> Path:
        return self._stacks / f"{roster.attempt}-{rank}.txt"

    def _all_dumped(self, roster: Roster, now_s: float) -> bool:
        assert self._dumping is not None, "stacks were asked for"
        since_s = self._dumping[0] - STACKS_WAIT_S
        # Written in one go by a signal handler: what is there a moment after the request and not
        # empty is whole.
        files = [self._stack_file(roster, one.rank) for one in _alive(roster)]
        return now_s - since_s > STACKS_SETTLE_S and all(_text(file) for file in files)

    def _tell_stacks(self, roster: Roster) -> None:
        for rank in (one.rank for one in _alive(roster)):
            text = _text(self._stack_file(roster, rank))
            shown = text or "no stack: the process did not answer, it may be stopped"
            self._job.emit(
                Told("stacks", f"rank {rank} hangs here:\n{shown}", {"rank": rank}, alarm=True)
            )
            self._job.say(
                "supervisor",
                words.PrintLine(text=f"rank {rank} hangs here:\n{shown}", alarm=True),
                rank=0,
            )


def _alive(roster: Roster) -> list[RosterEntry]:
    return [one for one in roster.members.values() if one.seat is RankState.ALIVE]


def _text(file: Path) -> str:
    """What is written there; "" where nothing is, or the folder was taken away."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _mark(board: RankBoard) -> object:
    return board.completed, board.beat_ns, board.phase, board.first_step_done


def _pulse(board: RankBoard, member: RosterEntry, idle_s: float, *, stopped: bool) -> Pulse:
    completed = board.completed
    return Pulse(
        rank=member.rank,
        phase=board.phase,
        first_step_done=bool(board.first_step_done),
        completed=-1 if completed is None else completed,
        idle_s=idle_s,
        longest_step_s=board.longest_step_ns / 1e9,
        traced=_traced(member.trainer_pid),
        stopped=stopped,
    )


def _traced(pid: int) -> bool:
    """Whether a debugger holds the process."""
    return _status(pid, "TracerPid:") not in ("", "0")


def _stopped(member: RosterEntry) -> bool:
    """Whether the trainer alone is stopped. With its supervisor it is Ctrl-Z: a person will go
    on."""
    return _status(member.trainer_pid, "State:") == "T" and _status(member.pid, "State:") != "T"


def _status(pid: int, name: str) -> str:
    """The first word of a line of the process's status; "" where there is no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return next((line.split()[1] for line in status.splitlines() if line.startswith(name)), "")
