"""A supervisor's connection to its keeper, and what it needs to give the next keeper where this one dies."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ckpt.elastic.processes.holdings import Holdings
from ckpt.errors import InternalError, UnavailableError
from ckpt.ipc.board import now_ns
from ckpt.ipc.client import greet, welcomed
from ckpt.ipc.frames import Wire, close_fds
from ckpt.ipc.message import Message
from ckpt.ipc.messages import Drop, Hello, Keep, KeepBoard

RECONNECTS_MAX = 5
"""Keepers lost in a row, with no attempt started in between, before the job is given up."""


class Lifeline:
    """One connection at a time; between two of them it is ``lost``, and words go nowhere. Owns the link and the holdings."""

    def __init__(self, link: Wire, hello: Hello, reconnect: Callable[[], Wire]) -> None:
        self._link: Wire | None = link
        self._hello = hello
        self._reconnect = reconnect
        self._lost_in_row = 0
        self._holdings = Holdings()
        self.unheard = False
        """Whether words may have come that ``select`` doesn't show."""

    @property
    def lost(self) -> bool:
        """Whether there is no keeper now."""
        return self._link is None

    def fileno(self) -> int:
        """For ``select``; -1 where it is lost."""
        return -1 if self._link is None else self._link.fileno()

    @property
    def holds(self) -> bool:
        """Whether something is held for the next keeper."""
        return bool(self._holdings)

    def time_left_s(self) -> float | None:
        """For how long trainers of this node may still act; None: for ever. After that others may have their ranks.

        The keeper of one node among several tells it through memory, on and on; one that stands still tells nothing any more.
        """
        until_ns = self._holdings.act_until_ns
        return (until_ns - now_ns()) / 1e9 if until_ns else None

    def greet(self, attempt: int) -> None:
        """Say the first hello, as of ``attempt``.

        Raises the error that the keeper answers with, ``HungUpError`` where it is gone before that.
        """
        if self._link is None:
            raise InternalError("nobody to greet")
        greet(self._link, self._hello_now(attempt))
        self.unheard = True

    def hear(self) -> list[Message]:
        """The words that have come, without waiting, but for those about what is to be held: they are obeyed here."""
        if self._link is None:
            return []
        self.unheard = False
        received, ended = self._link.arrived()
        words = []
        for word, fds in received:
            if isinstance(word, Keep | KeepBoard):
                self._holdings.keep(word, fds)
                continue
            close_fds(fds)
            if isinstance(word, Drop):
                self._holdings.drop(word)
            else:
                words.append(word)
        if ended:
            self.lose()
        return words

    def send(self, message: Message) -> None:
        """Say a word. Where the keeper is gone it is lost: what matters is said again to the next one."""
        if self._link is None:
            return
        try:
            self._link.send(message)
        except UnavailableError:
            self.lose()

    def lose(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def well(self) -> None:
        """A keeper did something: the next loss is the first one again."""
        self._lost_in_row = 0

    def connect_again(self, attempt: int) -> bool:
        """Find or start another keeper, which gets what is held where it is new; False where it is gone again already.

        Raises UnavailableError where none can be had, and the error of one that doesn't want this process.
        """
        self._lost_in_row += 1
        if self._lost_in_row > RECONNECTS_MAX:
            raise UnavailableError(
                f"keepers die one after the other. count={RECONNECTS_MAX}; see keeper.log in the job's runtime folder"
            )
        self._link, welcome = welcomed(self._reconnect, self._hello_now(attempt))
        self.unheard = True
        try:
            if welcome.new:
                self._holdings.hand_over(self._link)
        except UnavailableError:
            self.lose()
        return self._link is not None

    def forget(self) -> None:
        """In a trainer: close the copies, and say nothing."""
        if self._link is not None:
            self._link.forget_after_fork()
            self._link = None
        self._holdings.close()

    def _hello_now(self, attempt: int) -> Hello:
        return msgspec.structs.replace(self._hello, id=1, attempt=attempt, holds=self.holds)
