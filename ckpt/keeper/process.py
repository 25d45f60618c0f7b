"""Where a keeper can be found: its folder, the lock on it, and the socket in it; made anew where somebody took them away."""

from __future__ import annotations

import os
import select
import socket

from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.runtime_dir import JobFolder


class Home:
    """One keeper's place. Owns lock and listener until ``close``."""

    def __init__(self, spec: KeeperSpec, folder: JobFolder, lock: int) -> None:
        self._spec = spec
        self._lock = lock
        self.folder = folder
        self.listener = self._listen()

    @classmethod
    def take(cls, spec: KeeperSpec, folder: JobFolder) -> Home | None:
        """Move in and listen; None where another keeper lives there."""
        lock = folder.try_lock()
        return cls(spec, folder, lock) if lock is not None else None

    def describe(self) -> None:
        """Say whose folder it is, with this process as the keeper."""
        self.folder.describe(self._spec.store, self._spec.job)

    def found(self) -> bool:
        """Whether who looks for this keeper still finds it. Makes the small things that are missing."""
        if not self._owns() or _file_of(self.folder.socket_path) != self._socket_file:
            return False
        try:
            self.folder.stacks.mkdir(mode=0o700, exist_ok=True)
            if self.folder.note() is None:
                self.describe()
        except OSError:  # the folder goes at this very moment
            return False
        return True

    def renew(self) -> socket.socket | None:
        """Folder, lock and socket anew. The old listener, where there may be calls in wait; None where another keeper came."""
        if not self._owns():
            self.folder.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.folder.try_lock()
            if lock is None:
                return None
            os.close(self._lock)
            self._lock = lock
        old, self.listener = self.listener, self._listen()
        self.describe()
        return old

    def hide(self) -> None:
        """Nobody finds this keeper from now on; who has found it waits at the listener."""
        if _file_of(self.folder.socket_path) == self._socket_file:
            self.folder.socket_path.unlink(missing_ok=True)

    def somebody_knocks(self) -> bool:
        """Whether there is a connection that was not accepted yet."""
        return bool(select.select([self.listener], [], [], 0)[0])

    def close(self, *, remove: bool = True) -> None:
        """Move out, and take the folder along unless somebody else has moved in."""
        self.listener.close()
        if remove and self._owns():
            self.folder.remove()
        os.close(self._lock)

    def _listen(self) -> socket.socket:
        listener = self.folder.listen()
        listener.setblocking(False)
        self._socket_file = _file_of(self.folder.socket_path)
        return listener

    def _owns(self) -> bool:
        """Whether the lock that is held is still the one that others look at."""
        held = os.fstat(self._lock)
        return _file_of(self.folder.lock_path) == (held.st_dev, held.st_ino)


def _file_of(path: os.PathLike[str]) -> tuple[int, int] | None:
    """Which file a path leads to; None: to none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
