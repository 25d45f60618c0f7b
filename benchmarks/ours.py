"""ckpt, through its public face and with its defaults: live model and optimizer in, a local folder
as the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contestant import Saving, State

from ckpt import Checkpointer


class Ours:
    """``Checkpointer.save_async`` and ``restore``."""

    def __init__(self, state: State, folder: Path) -> None:
        self.items: dict[str, object] = {"model": state.model, "optimizer": state.optimizer}
        self.checkpointer = Checkpointer(str(folder))
        self.checkpointer.prepare(self.items)
        self.waiter = ThreadPoolExecutor(1)

    def save(self, step: int) -> Saving:
        pending = self.checkpointer.save_async(self.items, step=step)

        def wait() -> None:
            pending.durable()

        return Saving(self.waiter.submit(wait))

    def load(self, step: int) -> None:
        self.checkpointer.restore(self.items, step=step)

    def forget(self, step: int) -> None:
        """Old snapshots stay: dropping is not what is measured, and the disk has room."""

    def close(self) -> None:
        self.waiter.shutdown()
        self.checkpointer.close()
