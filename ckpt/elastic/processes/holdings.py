"""What a supervisor holds for its keeper: descriptors of slots and of the board, so that they outlive the keeper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ckpt.errors import IntegrityError
from ckpt.ipc.frames import Wire, close_fds
from ckpt.ipc.link_board import Board
from ckpt.ipc.messages import BoardKept, Drop, Keep, KeepBoard, SlotKept


@dataclass(frozen=True, slots=True)
class _Slot:
    fd: int
    size_bytes: int


class Holdings:
    """Owns the descriptors."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._board = -1
        self._mapped: Board | None = None

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._slots) or self._board >= 0

    def keep(self, word: Keep | KeepBoard, fds: Sequence[int]) -> None:
        """Hold what came beside ``word``, in place of what was held under the same name. Takes ``fds`` over."""
        if len(fds) != 1:
            close_fds(fds)
            raise IntegrityError(f"one descriptor was to come with this word. word={word} count={len(fds)}")
        if isinstance(word, KeepBoard):
            self._drop_board()
            self._board = fds[0]
            with suppress(
                IntegrityError
            ):  # a board that this release can't read is held for the next keeper all the same
                self._mapped = Board.attach(os.dup(self._board))
            return
        self.drop(Drop(rank=word.rank, index=word.index))
        self._slots[word.rank, word.index] = _Slot(fds[0], word.size_bytes)

    @property
    def act_until_ns(self) -> int:
        """Until when trainers of this node may go on, on the board's clock; 0: for ever."""
        return self._mapped.act_until_ns if self._mapped is not None else 0

    def drop(self, word: Drop) -> None:
        """Let go of a slot; one that isn't held is no error."""
        slot = self._slots.pop((word.rank, word.index), None)
        if slot is not None:
            close_fds([slot.fd])

    def hand_over(self, link: Wire) -> None:
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
