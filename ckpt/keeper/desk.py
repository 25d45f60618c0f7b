"""What trainers ask of their keeper, answered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ckpt.errors import CkptError, FencedError, InternalError, UsageError
from ckpt.keeper.job import Job
from ckpt.keeper.peers import Peer
from ckpt.link.messages import (
    Choices,
    Count,
    Done,
    Forget,
    GetBoard,
    GetChoices,
    GetSlots,
    Keep,
    Known,
    Message,
    Number,
    OpenEpoch,
    Outcome,
    Peek,
    Persist,
    Post,
    Refuse,
    Reply,
    SetTag,
    SlotGone,
    SlotMade,
    Slots,
    Value,
)
from ckpt.link.remote import from_error, to_error
from ckpt.values import SnapshotId

T = TypeVar("T")

WAIT_S_MAX = 3600.0
"""No question waits longer for a message."""


class Desk:
    """Answers the calls of trainers. ``room`` is the attempt's messages, cleared for each attempt."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._room: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Peer, int, float]]] = {}
        self.resume: SnapshotId | None = None
        """Where the last epoch that was opened goes on from."""

    def clear(self) -> None:
        """Forget all messages: a new attempt, or launch, starts with an empty room."""
        self._room.clear()
        self._counts.clear()
        self._waiting.clear()

    def tick(self, now_s: float) -> float:
        """Answer those that have waited long enough; returns seconds until the next has."""
        left_s = WAIT_S_MAX
        for key, waiting in list(self._waiting.items()):
            for other, call_id, until_s in list(waiting):
                if until_s <= now_s:
                    waiting.remove((other, call_id, until_s))
                    other.send(Value(id=call_id, value=None))
                else:
                    left_s = min(left_s, until_s - now_s)
            if not waiting:
                del self._waiting[key]
        return left_s

    def gone(self, peer: Peer) -> None:
        """Nobody waits there any more."""
        for waiting in self._waiting.values():
            waiting[:] = [one for one in waiting if one[0] is not peer]

    def _peek(self, peer: Peer, message: Peek) -> None:
        value = self._room.get(message.key)
        if value is not None or message.wait_s <= 0:
            peer.send(Value(id=message.id, value=value))
            return
        until_s = time.monotonic() + min(message.wait_s, WAIT_S_MAX)
        self._waiting.setdefault(message.key, []).append((peer, message.id, until_s))

    def take(self, peer: Peer, message: Message, fds: Sequence[int]) -> bool:
        """Answer one message; False where it is none of a trainer's. Owns ``fds``."""
        match message:
            case Peek():
                self._peek(peer, message)
            case Post():
                self._room[message.key] = message.value
                for other, call_id, _ in self._waiting.pop(message.key, ()):
                    other.send(Value(id=call_id, value=message.value))
            case Count():
                self._counts[message.key] = self._counts.get(message.key, 0) + message.amount
                peer.send(Number(id=message.id, number=self._counts[message.key]))
            case Forget():
                self._room.pop(message.key, None)
            case GetBoard():
                assert self._job.board is not None, "admitted"
                peer.send(Done(id=message.id), [self._job.board.fd])
            case GetSlots() | SlotMade() | SlotGone():
                self._slots(peer, message, fds)
            case GetChoices() | OpenEpoch() | SetTag():
                self._log(peer, message)
            case Known() | Persist() | Refuse():
                self._upload(peer, message)
            case _:
                return False
        return True

    def _slots(self, peer: Peer, message: GetSlots | SlotMade | SlotGone, fds: Sequence[int]) -> None:
        table = self._job.slots
        assert table is not None, "admitted"
        match message:
            case GetSlots():
                slots = table.of(message.rank)
                peer.send(Slots(id=message.id, slots=table.entries(message.rank)), [slot.fd for slot in slots])
            case SlotMade() if len(fds) == 1:
                try:
                    slot = table.add(peer.rank, message.index, fds[0], message.size_bytes)
                except CkptError as error:
                    self._job.refuse(peer, message.id, error)
                    return
                peer.send(Done(id=message.id))
                for other in self._job.members:
                    if other.role == "supervisor":
                        other.send(Keep(rank=slot.rank, index=slot.index, size_bytes=slot.size_bytes), [slot.fd])
            case SlotMade():
                for fd in fds:
                    os.close(fd)
                self._job.refuse(peer, message.id, UsageError("a slot comes with exactly one descriptor."))
            case SlotGone():
                table.drop(peer.rank, message.index)

    def _log(self, peer: Peer, message: GetChoices | OpenEpoch | SetTag) -> None:
        job = self._job
        assert job.slots is not None, "admitted"
        if job.fenced:
            job.refuse(peer, message.id, FencedError(job.fenced))
            return
        match message:
            case GetChoices():
                origins = job.slots.origins(job.ranks)
                answer = job.need_uploads().choices(tuple(origins), origins)
                self._answer(peer, message.id, answer, lambda found: Choices(id=message.id, choices=tuple(found)))
            case OpenEpoch():
                opened = job.need_uploads().open_epoch(message.resume, message.retention)
                self._answer(peer, message.id, opened, lambda number: self._opened(message, number))
            case SetTag():
                tagged = job.need_uploads().tag(message.name, message.snapshot)
                self._answer(peer, message.id, tagged, lambda _: Done(id=message.id))

    def _opened(self, message: OpenEpoch, number: int) -> Reply:
        """What lies beyond the pair that the epoch goes on from is on no line now. Not before: it may have failed to open."""
        assert self._job.slots is not None, "admitted"
        self._job.slots.forget_beyond(message.resume)
        self.resume = message.resume
        return Number(id=message.id, number=number, origin=self._job.need_uploads().origin_of(number))

    def _upload(self, peer: Peer, message: Known | Persist | Refuse) -> None:
        job = self._job
        assert job.slots is not None, "admitted"
        uploads = job.need_uploads()
        match message:
            case Known():
                known = dict(zip(message.digests, message.locations, strict=True))
                uploads.known(peer.rank, message.base, known)
            case Refuse():
                uploads.refuse(peer.rank, message.snapshot, to_error(message.error))
                job.say("events", Outcome(snapshot=message.snapshot, error=message.error), rank=peer.rank)
            case Persist():
                sealed = job.slots.sealed(peer.rank, message.index, message.generation)
                if sealed is None:
                    text = f"a slot was handed in that is not sealed. snapshot={message.snapshot} rank={peer.rank}"
                    lost = InternalError(text)
                    uploads.refuse(peer.rank, message.snapshot, lost)
                    told = Outcome(snapshot=message.snapshot, error=from_error(lost, rank=peer.rank))
                    job.say("events", told, rank=peer.rank)
                else:
                    uploads.persist(peer.rank, replace(sealed, shared=dict(message.shared)), message.tags)

    def _answer(self, peer: Peer, call_id: int, future: Future[T], reply: Callable[[T], Reply]) -> None:
        """Answer a call when ``future`` is done, from the loop."""

        def send() -> None:
            error = future.exception()
            if error is None:
                peer.send(reply(future.result()))
            else:
                known = error if isinstance(error, CkptError) else InternalError(f"a keeper failed. cause={error!r}")
                peer.send(Done(id=call_id, error=from_error(known, rank=-1)))

        future.add_done_callback(lambda _: self._job.post(send))
