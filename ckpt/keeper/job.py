"""One job in its keeper: who is connected, what they hold, what happens next. No sockets, no
waiting.

The loop (``daemon``) hands in what peers say; ``Supervisors`` follows supervisors and attempts,
``Desk`` answers trainers. A job ends when nobody is connected, nothing is in flight, and either all
left as planned or nobody came back in time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ckpt.errors import CkptError, ConflictError, UnavailableError, UsageError
from ckpt.events import Emit
from ckpt.ipc.board import RANKS_MAX, Board
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import (
    DropSlot,
    Fenced,
    Hello,
    Message,
    Outcome,
    Policy,
    RemoteError,
    Welcome,
)
from ckpt.keeper.connection import ClientConnection, error_reply
from ckpt.keeper.slots import PostToLoop, SlotTable
from ckpt.values import SnapshotId, SnapshotInfo

if TYPE_CHECKING:
    from ckpt.keeper.nodes.nodes import Nodes
    from ckpt.keeper.uploads.uploads import Uploads

SETTLE_WAIT_S = 600.0
"""How long a keeper that nobody needs any more goes on trying to bring to a store what it
promised."""

TIDY_WAIT_S = 120.0
"""How long, after that, it drops and deletes old snapshots; what is left is for the next run."""


@dataclass(slots=True)
class JobTimes:
    """When things happened, CLOCK_MONOTONIC seconds; None: not."""

    began_s: float
    abandoned_s: float | None = None
    idle_s: float | None = None
    tidy_s: float | None = None


class Job:
    """The state that crew and desk share. ``post`` brings a call of another thread to the loop."""

    def __init__(self, spec: KeeperSpec, *, incarnation: str, post: PostToLoop, emit: Emit) -> None:
        self.spec = spec
        self.incarnation = incarnation
        self.post = post
        self.emit = emit
        self.peers: dict[int, ClientConnection] = {}
        self.launch = ""
        self.ranks = 0
        self.policy = Policy()
        self.times = JobTimes(time.monotonic())
        self.board: Board | None = None
        self.slots: SlotTable | None = None
        self.uploads: Uploads | None = None
        """Made by ``need_uploads``; None while nobody needed any."""
        self._settling: SnapshotId | None = None
        """The pair that was last asked to be settled since anybody trained."""
        self.fenced: str = ""
        self.cut_off = False
        """Whether a trainer without supervisor of this launch went without a word."""
        self.nodes: Nodes | None = None
        """The job's other nodes, where it may have some; set by the crew."""
        self.drain: Callable[[], None] = lambda: None
        """Takes what trainers said before they died and nobody has read yet."""

    @property
    def members(self) -> list[ClientConnection]:
        """Everybody but tools."""
        return [peer for peer in self.peers.values() if peer.role not in ("", "tool")]

    def admit(self, hello: Hello) -> bool:
        """Take the peer's launch as the current one; True where this keeper is new to it.

        Raises ConflictError where another launch of the job still lives here, UnavailableError
        where what an earlier one with another number of ranks left is still on its way to a store:
        it would be thrown away. Ask again then.
        """
        if not 1 <= hello.ranks <= RANKS_MAX or not 0 <= hello.rank < hello.ranks:
            raise UsageError(f"a rank out of range. rank={hello.rank} ranks={hello.ranks}")
        if hello.launch == self.launch and hello.ranks == self.ranks:
            self.times.abandoned_s = self.times.idle_s = None
            return False
        others = sorted({peer.hello.pid for peer in self.members if peer.hello is not None})
        if others:
            raise ConflictError(
                f"this job is running already on this node. job={self.spec.job!r} "
                f"store={self.spec.store} pids={others}; "
                "stop it first, or give this run another job name"
            )
        if hello.ranks != self.ranks:
            self._check_settled()
        self.launch = hello.launch
        self.policy = hello.policy or self.policy
        self.fenced = ""
        self.cut_off = False
        self._settling = None
        if hello.ranks != self.ranks:
            self._make_room(hello.ranks)
        elif self.uploads is not None:
            self.uploads.new_launch()
        self.times.abandoned_s = self.times.idle_s = None
        return True

    def adopt_board(self, fd: int) -> None:
        """Take over the board that a supervisor kept, where this keeper has only a fresh one of its
        own."""
        kept = Board.attach(fd)
        if self.board is None or self.slots is None or kept.ranks != self.ranks or list(self.slots):
            kept.close()
            return
        kept.attempt = max(kept.attempt, self.board.attempt)
        self.board.close()
        self.board = kept
        self.slots = SlotTable(kept, self.post, dropped=self._dropped)

    def _make_room(self, ranks: int) -> None:
        """Board, slots and queues for another number of ranks: what the old ranks staged can't be
        theirs."""
        if self.slots is not None:
            self.slots.close()
        if self.board is not None:
            self.board.close()
        if self.uploads is not None:
            self.uploads.close(0.0)
        self.ranks = ranks
        self.board = Board.create(ranks)
        self.slots = SlotTable(self.board, self.post, dropped=self._dropped)
        self.uploads = None

    def need_uploads(self) -> Uploads:
        """The uploads of these ranks, made when they are first needed: importing them takes longer
        than a hello may."""
        if self.uploads is None:
            made: type[Uploads] = import_module("ckpt.keeper.uploads.uploads").Uploads
            self.uploads = made(
                self.spec,
                ranks=self.ranks,
                post=self.post,
                on_outcome=self._outcome,
                on_fenced_text=self._fenced,
                emit=self.emit,
            )
            self.uploads.use_channels(
                self.nodes.uploads.channel_of if self.nodes is not None else None
            )
        return self.uploads

    def keep_newest(self) -> None:
        """Nobody trains on for now: bring the newest complete pair, which only memory holds, to a
        store."""
        if self.slots is None:
            return
        pairs = self.slots.complete_snapshots(self.ranks)
        if pairs:
            self._settling = pairs[0]
            self.need_uploads().flush_newest(pairs, self.slots.hold_snapshot)

    def _check_settled(self) -> None:
        """Raise UnavailableError while something may still become durable. What can't any more is
        no reason to wait."""
        if self.slots is None:
            return
        newest = next(iter(self.slots.complete_snapshots(self.ranks)), None)
        durable = (
            self.uploads.durable.id
            if self.uploads is not None and self.uploads.durable is not None
            else None
        )
        if (
            newest is not None
            and newest != self._settling
            and (durable is None or newest > durable)
        ):
            self.keep_newest()
        if self.uploads is None or self.uploads.idle:
            return
        what = f"step {newest.step}" if newest is not None else "the last snapshot"
        raise UnavailableError(
            f"still bringing {what} to the store; wait. job={self.spec.job!r} "
            f"store={self.spec.store} ranks={self.ranks}"
        )

    def refuse(self, peer: ClientConnection, call_id: int, error: CkptError) -> None:
        """Answer a call with an error."""
        peer.send(error_reply(call_id, error))

    def welcome(self, peer: ClientConnection, hello: Hello, *, attempt: int, new: bool) -> None:
        """Answer a hello."""
        seating = self.nodes.seating if self.nodes is not None else None
        peer.send(
            Welcome(
                id=hello.id,
                boot=self.incarnation,
                pid=os.getpid(),
                attempt=attempt,
                new=new,
                seating=seating,
            )
        )

    def say(self, role: str, message: Message, *, rank: int | None = None) -> None:
        """Send a word to all peers of a role, or to one rank's."""
        for peer in list(self.peers.values()):
            if peer.role == role and rank in (None, peer.rank):
                peer.send(message)

    def completed(self) -> int:
        """The most steps that any rank has completed in this attempt; -1 for none."""
        if self.board is None:
            return -1
        done = [self.board.rank(rank).completed for rank in range(self.ranks)]
        return max((one for one in done if one is not None), default=-1)

    def abandon(self) -> None:
        """Everybody is gone without a word: bring the newest complete pair to a store, and wait for
        somebody to come back."""
        self.times.abandoned_s = time.monotonic()
        if self.uploads is not None and self.slots is not None:
            self.uploads.attempt_ended(self.slots.hold_snapshot)
        self.keep_newest()

    def lone_trainer_lost(self) -> None:
        """A trainer without supervisor is gone without a word: what it had not handed in is settled
        for the others' sake."""
        self.cut_off = True
        if self.uploads is not None and self.slots is not None:
            self.uploads.attempt_ended(self.slots.hold_snapshot)

    def over(self) -> bool:
        """Whether the keeper may end."""
        now_s = time.monotonic()
        if self.members:
            self.times.idle_s = self.times.tidy_s = None
            return False
        if self.nodes is not None and self.nodes.busy:
            return False
        if (
            self.times.abandoned_s is not None
            and now_s - self.times.abandoned_s < self.policy.linger_s
        ):
            return False
        if self.uploads is None:
            return True
        if self.times.idle_s is None:
            self.times.idle_s = now_s
        if not self.uploads.idle:
            return now_s - self.times.idle_s > SETTLE_WAIT_S
        begin = self.times.tidy_s is None
        if self.times.tidy_s is None:
            self.times.tidy_s = now_s
        return self.uploads.finish_retention(begin=begin) or now_s - self.times.tidy_s > TIDY_WAIT_S

    def close(self) -> None:
        """Give everything back."""
        if self.nodes is not None:
            self.nodes.close()
        if self.uploads is not None:
            self.uploads.close(1.0)
        if self.slots is not None:
            self.slots.close()
        if self.board is not None:
            self.board.close()

    def _dropped(self, rank: int, index: int) -> None:
        self.say("supervisor", DropSlot(rank=rank, index=index))

    def _outcome(
        self, rank: int, snapshot: SnapshotId, info: SnapshotInfo | None, error: RemoteError | None
    ) -> None:
        self.say("events", Outcome(snapshot=snapshot, info=info, error=error), rank=rank)

    def _fenced(self, text: str) -> None:
        self.fenced = text
        self.say("events", Fenced(text=text))
