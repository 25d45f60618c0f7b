"""The keeper that judges how this process ends, where the run at hand uses another one: a second store in one program."""

from __future__ import annotations

import os
from contextlib import suppress

from ckpt.elastic.failing import FailingFacts
from ckpt.elastic.points import Points
from ckpt.errors import UnavailableError
from ckpt.ipc.messages import WIRE_VERSION, Hello
from ckpt.session.keeper.attachment import Seat, seat_of_process
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.session import Session


class Judge:
    """Hears what a decorated call does: through the run's session where that one's keeper is the judge, else on its own.

    ``outermost``: the call stands in no other one, of which it would be a part.
    """

    def __init__(self, session: Session, *, outermost: bool = True) -> None:
        self._session = session
        self._outermost = outermost
        self._link: KeeperLink | None = None

    def entered(self, points: Points) -> None:
        """The call began; ``points`` has when."""
        seat = seat_of_process()
        if seat is None or not self._outermost:
            return
        if self._session.seated:
            self._session.join()
            points.hand_on(self._session.judged.report)
            return
        self._link = KeeperLink.connect(seat.spec, _hello(seat), start=False)
        points.hand_on(self._link.phase)

    def failing(self, facts: FailingFacts, step: int) -> None:
        """The process is about to die of an exception."""
        if self._link is None:
            self._session.judged.failing(**facts, step=step)
            return
        with suppress(UnavailableError):  # without a keeper nobody judges it
            self._link.failing(**facts, step=step)
        self._link.close()

    def finished(self) -> None:
        """The function returned and all is durable. A session tells it itself, before it parts with the keeper."""
        if self._link is not None:
            with suppress(UnavailableError):  # nothing is lost any more
                self._link.finished()
            self._link.close()


def _hello(seat: Seat) -> Hello:
    return Hello(
        version=WIRE_VERSION, role="trainer", pid=os.getpid(), launch=seat.launch, rank=seat.rank, ranks=seat.ranks,
        attempt=seat.attempt,
    )  # fmt: skip
