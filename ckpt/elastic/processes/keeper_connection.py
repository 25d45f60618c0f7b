"""A supervisor's connection to its keeper, and what it needs to give the next keeper where this one
dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from ckpt.errors import IntegrityError, InternalError, UnavailableError
from ckpt.ipc.board import Board, now_ns
from ckpt.ipc.client import connect_with_hello, exchange_hello
from ckpt.ipc.frames import MessageSocket, close_fds
from ckpt.ipc.messages import BoardKept, DropSlot, Hello, Keep, KeepBoard, Message, SlotKept

# What a supervisor holds for its keeper: descriptors of slots and of the board, so that they
# outlive the keeper.


@dataclass(frozen=True, slots=True)
class _KeptSlot:
    fd: int
    size_bytes: int


class KeptDescriptors:
    """Owns the descriptors."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], _KeptSlot] = {}
        self._board = -1
        self._mapped: Board | None = None

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._slots) or self._board >= 0

    def keep(self, word: Keep | KeepBoard, fds: Sequence[int]) -> None:
        """Hold what came beside ``word``, in place of what was held under the same name. Takes
        ``fds`` over."""
        if len(fds) != 1:
            close_fds(fds)
            raise IntegrityError(
                f"one descriptor was to come with this word. word={word} count={len(fds)}"
            )
        if isinstance(word, KeepBoard):
            self._drop_board()
            self._board = fds[0]
            with suppress(
                IntegrityError
            ):  # a board that this release can't read is held for the next keeper all the same
                self._mapped = Board.attach(os.dup(self._board))
            return
        self.drop(DropSlot(rank=word.rank, index=word.index))
        self._slots[word.rank, word.index] = _KeptSlot(fds[0], word.size_bytes)

    @property
    def act_until_ns(self) -> int:
        """Until when trainers of this node may go on, on the board's clock; 0: for ever."""
        return self._mapped.act_until_ns if self._mapped is not None else 0

    def drop(self, word: DropSlot) -> None:
        """Let go of a slot; one that isn't held is no error."""
        slot = self._slots.pop((word.rank, word.index), None)
        if slot is not None:
            close_fds([slot.fd])

    def hand_over(self, link: MessageSocket) -> None:
        """Give a new keeper all of it, the board first. It is held on for the one after."""
        if self._board >= 0:
            link.send(BoardKept(), [self._board])
        for (rank, index), slot in self._slots.items():
            link.send(SlotKept(rank=rank, index=index, size_bytes=slot.size_bytes), [slot.fd])

    def close(self) -> None:
        """Let go of everything: in a trainer, which gets its own from the keeper. Idempotent."""
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
"""Keepers lost in a row, with no attempt started in between, before the job is given up."""


class SupervisorConnection:
    """One connection at a time; between two of them it is ``lost``, and words go nowhere. Owns the
    link and the holdings."""

    def __init__(
        self, link: MessageSocket, hello: Hello, reconnect: Callable[[], MessageSocket]
    ) -> None:
        self._link: MessageSocket | None = link
        self._hello = hello
        self._reconnect = reconnect
        self._lost_in_row = 0
        self._holdings = KeptDescriptors()
        self.has_unread = False
        """Whether words may have come that ``select`` doesn't show."""

    @property
    def lost(self) -> bool:
        """Whether there is no keeper now."""
        return self._link is None

    def fileno(self) -> int:
        """For ``select``; -1 where it is lost."""
        return -1 if self._link is None else self._link.fileno()

    @property
    def has_descriptors(self) -> bool:
        """Whether something is held for the next keeper."""
        return bool(self._holdings)

    def act_time_left_s(self) -> float | None:
        """For how long trainers of this node may still act; None: for ever. After that others may
        have their ranks.

        The keeper of one node among several tells it through memory, on and on; one that stands
        still tells nothing any more.
        """
        until_ns = self._holdings.act_until_ns
        return (until_ns - now_ns()) / 1e9 if until_ns else None

    def say_hello(self, attempt: int) -> None:
        """Say the first hello, as of ``attempt``.

        Raises the error that the keeper answers with, ``HungUpError`` where it is gone before that.
        """
        if self._link is None:
            raise InternalError("nobody to greet")
        exchange_hello(self._link, self._hello_now(attempt))
        self.has_unread = True

    def receive(self) -> list[Message]:
        """The words that have come, without waiting, but for those about what is to be held: they
        are obeyed here."""
        if self._link is None:
            return []
        self.has_unread = False
        received, ended = self._link.receive_available()
        words = []
        for word, fds in received:
            if isinstance(word, Keep | KeepBoard):
                self._holdings.keep(word, fds)
                continue
            close_fds(fds)
            if isinstance(word, DropSlot):
                self._holdings.drop(word)
            else:
                words.append(word)
        if ended:
            self.disconnect()
        return words

    def send(self, message: Message) -> None:
        """Say a word. Where the keeper is gone it is lost: what matters is said again to the next
        one."""
        if self._link is None:
            return
        try:
            self._link.send(message)
        except UnavailableError:
            self.disconnect()

    def disconnect(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def reset_loss_count(self) -> None:
        """A keeper did something: the next loss is the first one again."""
        self._lost_in_row = 0

    def reconnect(self, attempt: int) -> bool:
        """Find or start another keeper, which gets what is held where it is new; False where it is
        gone again already.

        Raises UnavailableError where none can be had, and the error of one that doesn't want this
        process.
        """
        self._lost_in_row += 1
        if self._lost_in_row > RECONNECTS_MAX:
            raise UnavailableError(
                f"keepers die one after the other. count={RECONNECTS_MAX}; see keeper.log in the "
                "job's runtime folder"
            )
        self._link, welcome = connect_with_hello(self._reconnect, self._hello_now(attempt))
        self.has_unread = True
        try:
            if welcome.new:
                self._holdings.hand_over(self._link)
        except UnavailableError:
            self.disconnect()
        return self._link is not None

    def close_after_fork(self) -> None:
        """In a trainer: close the copies, and say nothing."""
        if self._link is not None:
            self._link.forget_after_fork()
            self._link = None
        self._holdings.close()

    def _hello_now(self, attempt: int) -> Hello:
        return msgspec.structs.replace(
            self._hello, id=1, attempt=attempt, holds=self.has_descriptors
        )
