"""Making a staged pair durable that nobody waits for: its trainers are gone. Repeated while the store doesn't take it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ckpt.commit.state import LogState
from ckpt.errors import CkptError, UnavailableError
from ckpt.keeper.choices import superseded
from ckpt.keeper.store_log import RETRY_LAST_S
from ckpt.keeper.turns import Turn, Turns
from ckpt.observe.events import Event
from ckpt.persist.persister import Sealed
from ckpt.persist.shares import shares_problem
from ckpt.values import SnapshotId

SealedOf = Callable[[int, SnapshotId], Sealed | None]
"""The slot of a rank that holds a pair, held for an upload; None where there is none."""


class Hands(Protocol):
    """What a settler needs of the uploads. All in the keeper's loop."""

    def read_log(self, then: Callable[[LogState], object], failed: Callable[[CkptError], object]) -> None:
        """Read the log and go on."""
        ...

    def hand_in_again(self, sealed: Mapping[int, Sealed]) -> Turn:
        """Hand in all ranks' shares of one pair, under names that no earlier try used."""
        ...

    def post(self, call: Callable[[], object], /) -> None:
        """Have a call made by the loop; from any thread."""
        ...

    def tell(self, event: Event, /) -> None:
        """Tell people."""
        ...


@dataclass(slots=True)
class _Task:
    snapshot: SnapshotId
    sealed_of: SealedOf
    pause_s: float
    timer: threading.Timer | None = None
    turn: Turn | None = None


class Settler:
    """At most one pair at a time; the last one asked for counts."""

    def __init__(self, hands: Hands, turns: Turns, *, ranks: int, retry_first_s: float) -> None:
        self._hands = hands
        self._turns = turns
        self._ranks = ranks
        self._retry_first_s = retry_first_s
        self._task: _Task | None = None

    @property
    def busy(self) -> bool:
        """Whether a pair is still to be settled."""
        return self._task is not None

    def start(self, snapshot: SnapshotId, sealed_of: SealedOf) -> None:
        """Settle ``snapshot``: nothing where it is durable or can't be any more, and no second try beside one in flight."""
        self.stop()
        self._task = task = _Task(snapshot, sealed_of, self._retry_first_s, turn=self._turns.find(snapshot))
        if task.turn is None:
            self._look(task)

    def stop(self) -> None:
        """Settle nothing any more; what is in flight goes on."""
        task, self._task = self._task, None
        if task is not None and task.timer is not None:
            task.timer.cancel()

    def turn_settled(self, turn: Turn) -> None:
        """All ranks are done with ``turn``."""
        task = self._task
        if task is None or task.turn is not turn:
            return
        if turn.error is not None and turn.error.retry:
            self._later(task)
        else:
            self._task = None

    def _look(self, task: _Task) -> None:
        """The log decides: what an unanswered commit left there is durable."""
        if task is self._task:
            self._hands.read_log(lambda state: self._try(task, state), lambda _: self._later(task))

    def _try(self, task: _Task, state: LogState) -> None:
        if task is not self._task:
            return
        if superseded(state, task.snapshot):
            self._task = None
            return
        task.turn = self._turns.find(task.snapshot)
        if task.turn is not None:
            return
        if not self._turns.level:  # trainers came back and are in the middle of handing something in
            self._later(task)
            return
        sealed = {rank: found for rank in range(self._ranks) if (found := task.sealed_of(rank, task.snapshot))}
        why = unfit(Turn(0, task.snapshot), sealed, self._ranks)
        if why is None:
            task.turn = self._hands.hand_in_again(sealed)
            return
        for one in sealed.values():
            one.let_go()
        self._task = None
        self._hands.tell(Event("settle-failed", str(why), {"step": task.snapshot.step}, alarm=True))

    def _later(self, task: _Task) -> None:
        if task is not self._task:
            return
        task.turn = None
        task.timer = threading.Timer(task.pause_s, lambda: self._hands.post(lambda: self._look(task)))
        task.timer.daemon = True
        task.timer.start()
        task.pause_s = min(2 * task.pause_s, RETRY_LAST_S)


def unfit(turn: Turn, sealed: Mapping[int, Sealed], ranks: int) -> CkptError | None:
    """Why the shares handed in and those found make no snapshot, or None. Pure."""
    indexes = {**turn.indexes, **{rank: one.index for rank, one in sealed.items()}}
    lost = [rank for rank in range(ranks) if rank not in indexes]
    if lost:
        return UnavailableError(f"ranks died before they staged it. snapshot={turn.snapshot} ranks={lost}")
    problem = shares_problem([indexes[rank] for rank in range(ranks)])
    return UnavailableError(f"{problem} snapshot={turn.snapshot}") if problem else None
