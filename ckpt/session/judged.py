"""A trainer as the keeper that judges it hears of it: how far it is, what it dies of, that it is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ckpt.errors import UnavailableError
from ckpt.session.keeper.connection import KeeperLink


class Judged:
    """Tells ``judge()``; nobody where that is None."""

    def __init__(self, judge: Callable[[], KeeperLink | None]) -> None:
        self._judge = judge

    def report(self, point: str, at_s: float) -> None:
        """This trainer reached a point of its start at ``at_s``, CLOCK_MONOTONIC."""
        if (judge := self._judge()) is not None:
            judge.phase(point, at_s)

    def failing(self, kind: str, text: str, *, fingerprint: str, step: int, final: bool) -> None:
        """This trainer is about to die of an exception."""
        if (judge := self._judge()) is not None:
            with suppress(UnavailableError):  # without a keeper nobody judges it
                judge.failing(kind, text, fingerprint=fingerprint, step=step, final=final)

    def finished(self) -> None:
        """This trainer's run is over and durable; what follows is the rest of the program."""
        if (judge := self._judge()) is not None:
            with suppress(UnavailableError):  # nothing is lost any more
                judge.finished()
