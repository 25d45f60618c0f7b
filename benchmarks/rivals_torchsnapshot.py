"""torchsnapshot, which never calls fsync: the benchmark does, in the caller or behind it as the
save itself runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torchsnapshot
from contestant import Saving, State, finished, remove_tree, sync_tree


class Take:
    """``Snapshot.take``."""

    def __init__(self, state: State, folder: Path) -> None:
        self.folder = folder
        self.items = {"state": torchsnapshot.StateDict(**state.tensors)}

    def save(self, step: int) -> Saving:
        path = self.folder / str(step)
        torchsnapshot.Snapshot.take(str(path), self.items)
        return Saving(finished(), fsync_s=sync_tree(path))

    def load(self, step: int) -> None:
        torchsnapshot.Snapshot(str(self.folder / str(step))).restore(self.items)

    def forget(self, step: int) -> None:
        remove_tree(self.folder / str(step))

    def close(self) -> None:
        pass


class AsyncTake(Take):
    """``Snapshot.async_take``."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.waiter = ThreadPoolExecutor(1)

    def save(self, step: int) -> Saving:
        path = self.folder / str(step)
        pending = torchsnapshot.Snapshot.async_take(str(path), self.items)

        def wait() -> None:
            pending.wait()
            sync_tree(path)

        return Saving(self.waiter.submit(wait))

    def close(self) -> None:
        self.waiter.shutdown()
