"""What trainers ask of their keeper, answered."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ckpt.errors import CkptError, FencedError, InternalError, UsageError
from ckpt.ipc.messages import (
    Choices,
    Count,
    Decided,
    Done,
    Forget,
    GetBoard,
    GetChoices,
    GetSlots,
    GetSources,
    Keep,
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
    SlotCreated,
    SlotReleased,
    Slots,
    Sources,
    Value,
    VerifiedChunks,
    from_error,
    to_error,
)
from ckpt.keeper.connection import ClientConnection
from ckpt.keeper.job import Job
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox
from ckpt.values import SnapshotId

T = TypeVar("T")


class TrainerCalls:
    """Answers the calls of trainers. ``room`` has the attempt's messages, and is empty when the
    attempt begins."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.own_mailbox = LocalMailbox()
        """The room, where it is this keeper's."""
        self.mailbox: KeeperMailbox = self.own_mailbox
        self.resume: SnapshotId | None = None
        """Where the last epoch that was opened goes on from."""

    def begin(self, attempt: int) -> None:
        """An attempt begins in an empty room: this keeper's, or the one at the node of rank 0."""
        self.clear()
        nodes = self._job.nodes
        self.mailbox = self.own_mailbox if nodes is None else nodes.begin(attempt, self.own_mailbox)

    def clear(self) -> None:
        """Forget all messages: a new attempt, or launch, starts with an empty room."""
        self.own_mailbox.clear()

    def tick(self, now_s: float) -> float:
        """Answer those that have waited long enough; returns seconds until the next has."""
        return self.own_mailbox.tick(now_s)

    def disconnected(self, peer: ClientConnection) -> None:
        """Nobody waits there any more."""
        self.own_mailbox.cancel(peer)

    def _peek(self, peer: ClientConnection, message: Peek) -> None:
        def answer(value: bytes | None) -> None:
            peer.send(Value(id=message.id, value=value))

        self.mailbox.peek(message.key, wait_s=message.wait_s, owner=peer, answer=answer)

    def _count(self, peer: ClientConnection, message: Count) -> None:
        def answer(number: int) -> None:
            peer.send(Number(id=message.id, number=number))

        self.mailbox.count(message.key, message.amount, answer=answer)

    def handle(self, peer: ClientConnection, message: Message, fds: Sequence[int]) -> bool:
        """Answer one message; False where it is none of a trainer's. Owns ``fds``."""
        match message:
            case Peek():
                self._peek(peer, message)
            case Post():
                self.mailbox.post(message.key, message.value)
            case Count():
                self._count(peer, message)
            case Forget():
                self.mailbox.forget(message.key)
            case Decided():
                if self._job.nodes is not None:
                    self._job.nodes.decided(message.boundary, message.flags)
            case GetSources():
                nodes = self._job.nodes
                found = nodes.memory.sources(message.snapshot) if nodes is not None else ()
                epoch = nodes.epoch.number if nodes is not None and nodes.epoch is not None else 0
                peer.send(Sources(id=message.id, ranks=found, epoch=epoch))
            case GetBoard():
                assert self._job.board is not None, "admitted"
                peer.send(Done(id=message.id), [self._job.board.fd])
            case GetSlots() | SlotCreated() | SlotReleased():
                self._slots(peer, message, fds)
            case GetChoices() | OpenEpoch() | SetTag():
                self._log(peer, message)
            case VerifiedChunks() | Persist() | Refuse():
                self._upload(peer, message)
            case _:
                return False
        return True

    def _slots(
        self,
        peer: ClientConnection,
        message: GetSlots | SlotCreated | SlotReleased,
        fds: Sequence[int],
    ) -> None:
        table = self._job.slots
        assert table is not None, "admitted"
        match message:
            case GetSlots():
                slots = table.of_rank(message.rank)
                peer.send(
                    Slots(id=message.id, slots=table.entries(message.rank)),
                    [slot.fd for slot in slots],
                )
            case SlotCreated() if len(fds) == 1:
                try:
                    slot = table.add(peer.rank, message.index, fds[0], message.size_bytes)
                except CkptError as error:
                    self._job.refuse(peer, message.id, error)
                    return
                peer.send(Done(id=message.id))
                for other in self._job.members:
                    if other.role == "supervisor":
                        other.send(
                            Keep(rank=slot.rank, index=slot.index, size_bytes=slot.size_bytes),
                            [slot.fd],
                        )
            case SlotCreated():
                for fd in fds:
                    os.close(fd)
                self._job.refuse(
                    peer, message.id, UsageError("a slot comes with exactly one descriptor.")
                )
            case SlotReleased():
                table.drop(peer.rank, message.index)

    def _log(self, peer: ClientConnection, message: GetChoices | OpenEpoch | SetTag) -> None:
        job = self._job
        assert job.slots is not None, "admitted"
        if job.fenced:
            job.refuse(peer, message.id, FencedError(job.fenced))
            return
        match message:
            case GetChoices():

                def choose(origins: Mapping[SnapshotId, str]) -> None:
                    answer = job.need_uploads().choices(tuple(origins), origins)
                    self._answer(
                        peer,
                        message.id,
                        answer,
                        lambda found: Choices(id=message.id, choices=tuple(found)),
                    )

                if job.nodes is None:
                    choose(job.slots.snapshot_origins(job.ranks))
                else:
                    job.nodes.memory.gather(choose)
            case OpenEpoch():
                opened = job.need_uploads().open_epoch(
                    message.resume, message.retention, newest=message.newest
                )
                self._answer(peer, message.id, opened, lambda number: self._opened(message, number))
            case SetTag():
                tagged = job.need_uploads().tag(message.name, message.snapshot)
                self._answer(peer, message.id, tagged, lambda _: Done(id=message.id))

    def _opened(self, message: OpenEpoch, number: int) -> Reply:
        """What lies beyond the pair that the epoch goes on from is on no line now. Not before: it
        may have failed to open."""
        assert self._job.slots is not None, "admitted"
        if self._job.nodes is not None:
            self._job.nodes.uploads.open(message.resume)
        else:
            self._job.slots.discard_after(message.resume)
        self.resume = message.resume
        return Number(
            id=message.id, number=number, origin=self._job.need_uploads().origin_of(number)
        )

    def _upload(self, peer: ClientConnection, message: VerifiedChunks | Persist | Refuse) -> None:
        job = self._job
        assert job.slots is not None, "admitted"
        uploads = job.need_uploads()
        match message:
            case VerifiedChunks():
                if len(message.digests) != len(message.locations):
                    raise UsageError("chunks that are known come with one place each.")
                known = dict(zip(message.digests, message.locations, strict=True))
                uploads.refer_next(peer.rank, message.base, known)
            case Refuse():
                uploads.refuse(peer.rank, message.snapshot, to_error(message.error))
                job.say(
                    "events",
                    Outcome(snapshot=message.snapshot, error=message.error),
                    rank=peer.rank,
                )
            case Persist():
                sealed = job.slots.hold(peer.rank, message.index, message.generation)
                if sealed is None:
                    text = f"a slot was handed in that is not sealed. snapshot={message.snapshot} rank={peer.rank}"
                    lost = InternalError(text)
                    uploads.refuse(peer.rank, message.snapshot, lost)
                    told = Outcome(
                        snapshot=message.snapshot, error=from_error(lost, rank=peer.rank)
                    )
                    job.say("events", told, rank=peer.rank)
                else:
                    uploads.persist(
                        peer.rank, replace(sealed, shared=dict(message.shared)), message.tags
                    )

    def _answer(
        self, peer: ClientConnection, call_id: int, future: Future[T], reply: Callable[[T], Reply]
    ) -> None:
        """Answer a call when ``future`` is done, from the loop."""

        def send() -> None:
            error = future.exception()
            if error is None:
                peer.send(reply(future.result()))
            else:
                known = (
                    error
                    if isinstance(error, CkptError)
                    else InternalError(f"a keeper failed. cause={error!r}")
                )
                peer.send(Done(id=call_id, error=from_error(known, rank=-1)))

        future.add_done_callback(lambda _: self._job.post(send))
