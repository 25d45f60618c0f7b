"""A supervisor's connection to its keeper, and the descriptors kept for the next keeper."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from ckpt.errors import IntegrityError, InternalError, UnavailableError
from ckpt.ipc.board import Board, now_ns
from ckpt.ipc.client import KeeperSpec, connect_with_hello, exchange_hello
from ckpt.ipc.frames import MessageSocket, close_fds
from ckpt.ipc.messages import BoardKept, DropSlot, Hello, Keep, KeepBoard, Message, SlotKept


@dataclass(frozen=True, slots=True)
class _KeptSlot:
    fd: int
    size_bytes: int


class KeptDescriptors:
    """The memfds of slots and of the board, kept so that the memory outlives the keeper.

    Owns them.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], _KeptSlot] = {}
        self._board = -1
        self._mapped: Board | None = None

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return bool(self._slots) or self._board >= 0

    def keep(self, message: Keep | KeepBoard, fds: Sequence[int]) -> None:
        """Keep the descriptor beside ``message``, in place of an earlier one for the same slot.

        Takes ``fds`` over.
        """
        if len(fds) != 1:
            close_fds(fds)
            raise IntegrityError(
                f"exactly one descriptor belongs to it. message={message} count={len(fds)}"
            )
        if isinstance(message, KeepBoard):
            self._drop_board()
            self._board = fds[0]
            with suppress(IntegrityError):  # another version's board is kept all the same
                self._mapped = Board.attach(os.dup(self._board))
            return
        self.drop(DropSlot(rank=message.rank, index=message.index))
        self._slots[message.rank, message.index] = _KeptSlot(fds[0], message.size_bytes)

    @property
    def act_until_ns(self) -> int:
        """Until when this node's trainers may run, on the board's clock; 0: without limit."""
        return self._mapped.act_until_ns if self._mapped is not None else 0

    def drop(self, message: DropSlot) -> None:
        """Close the descriptor of a slot; a slot that is not kept is no error."""
        slot = self._slots.pop((message.rank, message.index), None)
        if slot is not None:
            close_fds([slot.fd])

    def hand_over(self, link: MessageSocket) -> None:
        """Send everything to a new keeper, the board first.

        It stays kept here for the keeper after that.
        """
        if self._board >= 0:
            link.send(BoardKept(), [self._board])
        for (rank, index), slot in self._slots.items():
            link.send(SlotKept(rank=rank, index=index, size_bytes=slot.size_bytes), [slot.fd])

    def close(self) -> None:
        """Close everything, in a trainer, which gets its own descriptors from the keeper.

        Idempotent.
        """
        close_fds(slot.fd for slot in self._slots.values())
        self._slots.clear()
        self._drop_board()

    def _drop_board(self) -> None:
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        if self._board >= 0:
            close_fds([self._board])
        self._board = -1


RECONNECTS_MAX = 5
"""Give up the job after that many lost keepers in a row without an attempt started in between."""


class SupervisorConnection:
    """One connection to a keeper at a time.

    Between two of them it is ``lost`` and messages are dropped.

    Owns the socket and the kept descriptors.
    """

    def __init__(
        self,
        link: MessageSocket,
        hello: Hello,
        reconnect: Callable[[], MessageSocket],
        *,
        spec: KeeperSpec | None = None,
    ) -> None:
        self._link: MessageSocket | None = link
        self._hello = hello
        self._reconnect = reconnect
        self._spec = spec
        self._lost_in_row = 0
        self._kept = KeptDescriptors()
        self.has_unread = False
        """Whether messages may have arrived that ``select`` does not show."""

    @property
    def lost(self) -> bool:
        """Whether there is no keeper now."""
        return self._link is None

    def fileno(self) -> int:
        """For ``select``; -1 if the connection is lost."""
        return -1 if self._link is None else self._link.fileno()

    @property
    def has_descriptors(self) -> bool:
        """Whether anything is kept for the next keeper."""
        return bool(self._kept)

    def act_time_left_s(self) -> float | None:
        """How long this node's trainers may still run; None: without limit.

        After that other nodes may have their ranks.

        With several nodes the keeper extends the time continuously, through shared memory, so a
        keeper that hangs stops extending it.
        """
        until_ns = self._kept.act_until_ns
        return (until_ns - now_ns()) / 1e9 if until_ns else None

    def say_hello(self, attempt: int) -> None:
        """Send the first hello, for ``attempt``.

        Raises the error in the keeper's reply, and ``HungUpError`` if the keeper is gone before
        that.
        """
        if self._link is None:
            raise InternalError("a hello without a connection")
        exchange_hello(self._link, self._hello_now(attempt), spec=self._spec)
        self.has_unread = True

    def receive(self) -> list[Message]:
        """The messages that have arrived, without blocking.

        Those about kept descriptors are carried out here.
        """
        if self._link is None:
            return []
        self.has_unread = False
        received, ended = self._link.receive_available()
        messages = []
        for message, fds in received:
            if isinstance(message, Keep | KeepBoard):
                self._kept.keep(message, fds)
                continue
            close_fds(fds)
            if isinstance(message, DropSlot):
                self._kept.drop(message)
            else:
                messages.append(message)
        if ended:
            self.disconnect()
        return messages

    def send(self, message: Message) -> None:
        """Send a message.

        It is dropped if the keeper is gone: what matters is sent again to the next one.
        """
        if self._link is None:
            return
        try:
            self._link.send(message)
        except UnavailableError:
            self.disconnect()

    def disconnect(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def reset_loss_count(self) -> None:
        """A keeper did something useful: the next loss counts as the first one."""
        self._lost_in_row = 0

    def reconnect(self, attempt: int) -> bool:
        """Find or start another keeper; false if it is gone again already.

        Sends it the kept descriptors if it is new. Raises UnavailableError if there is no keeper
        to be had, and the error of one that rejects this process.
        """
        self._lost_in_row += 1
        if self._lost_in_row > RECONNECTS_MAX:
            raise UnavailableError(
                f"keepers die one after another. count={RECONNECTS_MAX}; see `ckpt logs`"
            )
        self._link, welcome = connect_with_hello(
            self._reconnect, self._hello_now(attempt), spec=self._spec
        )
        self.has_unread = True
        try:
            if welcome.new:
                self._kept.hand_over(self._link)
        except UnavailableError:
            self.disconnect()
        return self._link is not None

    def close_after_fork(self) -> None:
        """In a trainer: close the copies, without a message."""
        if self._link is not None:
            self._link.forget_after_fork()
            self._link = None
        self._kept.close()

    def _hello_now(self, attempt: int) -> Hello:
        return msgspec.structs.replace(
            self._hello, id=1, attempt=attempt, holds=self.has_descriptors
        )
