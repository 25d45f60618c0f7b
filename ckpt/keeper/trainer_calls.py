"""The calls of trainers, answered: mailbox, slots, log and uploads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from ckpt.errors import CkptError, FencedError, InternalError, UsageError
from ckpt.ipc.frames import close_fds
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
from ckpt.keeper.connection import ClientConnection, error_reply
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox
from ckpt.values import SnapshotId

if TYPE_CHECKING:  # three modules that the keeper needs for nothing else when it starts
    from concurrent.futures import Future

T = TypeVar("T")


class TrainerCalls:
    """Answers the calls of trainers. The mailbox has the messages of one attempt and is empty when
    it begins."""

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._own_mailbox = LocalMailbox()
        self._mailbox: KeeperMailbox = self._own_mailbox
        """This keeper's, or the one at the node of rank 0."""

    def begin(self, attempt: int) -> None:
        """An attempt begins, with an empty mailbox."""
        self.clear()
        self._mailbox = self._state.launch.cluster.begin(attempt, self._own_mailbox)

    def clear(self) -> None:
        """Drop all messages: no message of an earlier attempt or launch may reach a later one."""
        self._own_mailbox.clear()

    def tick(self, now_s: float) -> float:
        """Answer the questions whose time is up; returns the seconds until the next is."""
        return self._own_mailbox.tick(now_s)

    def disconnected(self, client: ClientConnection) -> None:
        """Drop the client's questions."""
        self._own_mailbox.cancel(client)

    def handle(self, client: ClientConnection, message: Message, fds: Sequence[int]) -> bool:
        """Answer one message; False if trainers do not send it. Owns ``fds``."""
        memory, cluster = self._state.memory, self._state.launch.cluster
        match message:
            case Peek() | Count() | Post() | Forget():
                self._message(client, message)
            case Decided():
                cluster.decided(message.boundary, message.flags)
            case GetSources():
                sources, epoch = cluster.sources(message.snapshot)
                client.send(Sources(id=message.id, ranks=sources, epoch=epoch))
            case GetBoard():
                assert memory.board is not None, "admitted"
                client.send(Done(id=message.id), [memory.board.fd])
            case GetSlots() | SlotCreated() | SlotReleased():
                self._slots(client, message, fds)
            case GetChoices() | OpenEpoch() | SetTag():
                self._log(client, message)
            case VerifiedChunks() | Persist() | Refuse():
                self._upload(client, message)
            case _:
                return False
        return True

    def _message(self, client: ClientConnection, message: Peek | Count | Post | Forget) -> None:
        match message:
            case Peek(id=call_id):

                def value_is(value: bytes | None) -> None:
                    client.send(Value(id=call_id, value=value))

                self._mailbox.peek(
                    message.key, wait_s=message.wait_s, owner=client, answer=value_is
                )
            case Count(id=call_id):

                def number_is(number: int) -> None:
                    client.send(Number(id=call_id, number=number))

                self._mailbox.count(message.key, message.amount, answer=number_is)
            case Post():
                self._mailbox.post(message.key, message.value)
            case Forget():
                self._mailbox.forget(message.key)

    def _slots(
        self,
        client: ClientConnection,
        message: GetSlots | SlotCreated | SlotReleased,
        fds: Sequence[int],
    ) -> None:
        table = self._state.memory.slots
        assert table is not None, "admitted"
        match message:
            case GetSlots():
                slots = table.of_rank(message.rank)
                client.send(
                    Slots(id=message.id, slots=table.entries(message.rank)),
                    [slot.fd for slot in slots],
                )
            case SlotCreated() if len(fds) == 1:
                try:
                    slot = table.add(
                        client.rank,
                        message.index,
                        fds[0],
                        message.size_bytes,
                        free_share=message.free_share,
                    )
                except CkptError as error:
                    client.send_error(message.id, error)
                    return
                client.send(Done(id=message.id))
                if slot.handed_in() is not None:
                    self._state.uploads.slots_came()
                keep = Keep(rank=slot.rank, index=slot.index, size_bytes=slot.size_bytes)
                # Every supervisor holds every slot: the memory outlives the keeper and any one
                # supervisor.
                for other in self._state.clients.members:
                    if other.role == "supervisor":
                        other.send(keep, [slot.fd])
            case SlotCreated():
                close_fds(fds)
                client.send_error(
                    message.id, UsageError("a slot comes with exactly one descriptor.")
                )
            case SlotReleased():
                table.drop(client.rank, message.index)

    def _log(self, client: ClientConnection, message: GetChoices | OpenEpoch | SetTag) -> None:
        uploads = self._state.uploads
        if uploads.fenced:
            client.send_error(message.id, FencedError(uploads.fenced))
            return
        match message:
            case GetChoices():

                def choose(origins: Mapping[SnapshotId, str]) -> None:
                    choices = uploads.need().choices(tuple(origins), origins)
                    self._answer(
                        client,
                        message.id,
                        choices,
                        lambda best: Choices(id=message.id, choices=tuple(best)),
                    )

                self._state.launch.cluster.gather(choose)
            case OpenEpoch():
                opened = uploads.need().open_epoch(
                    message.resume, message.retention, newest=message.newest
                )
                self._answer(
                    client, message.id, opened, lambda number: self._epoch_opened(message, number)
                )
            case SetTag():
                tagged = uploads.need().tag(message.name, message.snapshot)
                self._answer(client, message.id, tagged, lambda _: Done(id=message.id))

    def _epoch_opened(self, message: OpenEpoch, number: int) -> Reply:
        """Only now, when the epoch is open, are captures beyond its ``resume`` void: opening it
        might have failed."""
        self._state.launch.cluster.log_epoch_opened(message.resume)
        return Number(
            id=message.id, number=number, origin=self._state.uploads.need().origin_of(number)
        )

    def _upload(self, client: ClientConnection, message: VerifiedChunks | Persist | Refuse) -> None:
        slots, rank = self._state.memory.slots, client.rank
        assert slots is not None, "admitted"
        uploads = self._state.uploads.need()
        match message:
            case VerifiedChunks():
                if len(message.digests) != len(message.locations):
                    raise UsageError("each known chunk needs exactly one location.")
                locations = dict(zip(message.digests, message.locations, strict=True))
                uploads.refer_next(rank, message.base, locations)
            case Refuse():
                uploads.refuse(rank, message.snapshot, to_error(message.error))
                outcome = Outcome(snapshot=message.snapshot, error=message.error)
                self._state.clients.broadcast("events", outcome, rank=rank)
            case Persist():
                sealed = slots.hold(rank, message.index, message.generation)
                if sealed is not None:
                    shared, samples = dict(message.shared), dict(message.samples)
                    uploads.persist(
                        rank, replace(sealed, shared=shared, samples=samples), message.tags
                    )
                    return
                error = InternalError(
                    f"a slot was submitted that is not sealed. snapshot={message.snapshot} "
                    f"rank={rank}"
                )
                uploads.refuse(rank, message.snapshot, error)
                outcome = Outcome(snapshot=message.snapshot, error=from_error(error, rank=rank))
                self._state.clients.broadcast("events", outcome, rank=rank)

    def _answer(
        self, client: ClientConnection, call_id: int, future: Future[T], reply: Callable[[T], Reply]
    ) -> None:
        """Answer a call from the loop when ``future`` is done."""

        def send() -> None:
            error = future.exception()
            if error is None:
                client.send(reply(future.result()))
            elif isinstance(error, CkptError):
                client.send(error_reply(call_id, error))
            else:
                client.send(
                    error_reply(call_id, InternalError(f"a keeper failed. cause={error!r}"))
                )

        future.add_done_callback(lambda _: self._state.post(send))
