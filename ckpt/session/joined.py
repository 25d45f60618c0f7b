"""What a session has once its ranks have met: the channel and keeper, and what saves, restores and agrees over them."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt.backends.base import Backend
from ckpt.capture.leaves import World
from ckpt.errors import UnavailableError
from ckpt.events import Event, Tell
from ckpt.ipc.mailbox import wait_for
from ckpt.log.state import LogState
from ckpt.session.decisions import Orders, RankOrders, SoloOrders
from ckpt.session.keeper.attachment import Keeping
from ckpt.session.options import Options
from ckpt.session.restoring import Restoring
from ckpt.session.saving import Saving


class Joined:
    """What exists once the ranks have met."""

    def __init__(
        self, keeping: Keeping, backend: Backend, options: Options, state: Callable[[], LogState], tell: Tell
    ) -> None:
        self.keeping = keeping
        self.channel = channel = keeping.channel
        self.tell = tell
        self._uses_slots = False
        self.saving = Saving(channel, options, self.tell)
        self._orders: Orders | None = None
        self.restoring = Restoring(
            channel, backend, world=World(channel.rank, channel.size), state=state, tell=self.tell, threads=options.threads,
            budget_bytes=options.read_budget_bytes, staged=keeping.open_staged,
        )  # fmt: skip

    def use_slots(self) -> None:
        """Stage into slots that the keeper holds too, where there is one; once."""
        if not self._uses_slots and self.keeping.regions is not None:
            self._uses_slots = True
            self.saving.use(self.keeping.regions)

    @property
    def orders(self) -> Orders:
        """What all ranks do at a boundary."""
        assert self._orders is not None, "a run is open"
        return self._orders

    def start_orders(self) -> None:
        """For a run; a checkpointer has no boundaries to agree on."""
        saving = self.saving
        self._orders = (
            SoloOrders(saving.may_take, self._skipped)
            if self.channel.size == 1
            else RankOrders(self.channel, saving.may_take, self._skipped, passed=lambda: saving.passed_step)
        )

    def leave(self, *, wait_s: float) -> None:
        """End what runs in the background and leave: rank 0 last, because it may own the message store.

        Without ``wait_s`` an exception is on its way out: nothing waits, and nothing is raised over it.
        """
        try:
            if self._orders is not None:
                self._orders.close()
            if self.channel.rank != 0:
                self._say_bye(heard=wait_s > 0)
            elif wait_s > 0 and not self.keeping.seated:
                self._see_off(wait_s)
        finally:
            self.keeping.close()

    def _say_bye(self, *, heard: bool) -> None:
        rank = self.channel.rank
        try:
            self.channel.post(f"bye/{rank}", b"1")
        except (UnavailableError, RuntimeError) as error:  # RuntimeError: torch's own stores
            if heard:
                raise
            self.tell(Event("left", f"left without a word to the other ranks: {error}", {"rank": rank}))

    def _see_off(self, wait_s: float) -> None:
        began_s = time.monotonic()
        for rank in range(1, self.channel.size):
            left_s = max(0.0, wait_s - (time.monotonic() - began_s))
            try:
                wait_for(self.channel, f"bye/{rank}", timeout_s=left_s, what=f"rank {rank} to leave")
            except UnavailableError as error:
                self.tell(Event("late-leaver", str(error), {"rank": rank}, alarm=True))

    def _skipped(self, boundary: int, why: str) -> None:
        self.tell(
            Event("skipped", f"the snapshot due at step {boundary} is skipped: {why}", {"step": boundary}, alarm=True)
        )
