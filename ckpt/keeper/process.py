"""Where a keeper can be found: its folder, the lock on it, and the socket in it; made anew where
somebody took them away."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from ckpt.events import Emit, Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.runtime_dir import JobFolder


class KeeperListener:
    """One keeper's place. Owns lock and listener until ``close``."""

    def __init__(self, spec: KeeperSpec, folder: JobFolder, lock: int) -> None:
        self._spec = spec
        self._lock = lock
        self.folder = folder
        self.listener = self._listen()

    @classmethod
    def acquire(cls, spec: KeeperSpec, folder: JobFolder) -> KeeperListener | None:
        """Move in and listen; None where another keeper lives there."""
        lock = folder.try_lock()
        return cls(spec, folder, lock) if lock is not None else None

    def describe(self) -> None:
        """Say whose folder it is, with this process as the keeper."""
        self.folder.write_info(self._spec.store, self._spec.job)

    def is_reachable(self) -> bool:
        """Whether who looks for this keeper still finds it. Makes the small things that are
        missing."""
        if not self._owns() or _file_of(self.folder.socket_path) != self._socket_file:
            return False
        try:
            self.folder.stacks.mkdir(mode=0o700, exist_ok=True)
            if self.folder.read_info() is None:
                self.describe()
        except OSError:  # the folder goes at this very moment
            return False
        return True

    def renew(self) -> socket.socket | None:
        """Folder, lock and socket anew. The old listener, where there may be calls in wait; None
        where another keeper came."""
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

    def has_pending(self) -> bool:
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


# Ends a keeper whose loop hangs: its supervisors start another, which gets all that they hold for
# it.
#
# Its lease is kept alive by a thread of its own, so a node whose loop hangs would look well to
# all others, and do nothing.

LOOK_S = 1.0
LOOKS_MAX = 300
"""Longer than anything keeps a loop that will go on: to leave a membership that doesn't answer
takes up to three minutes.

Looks count, not seconds: a machine that slept wakes well.
"""

WRITE_S = 5.0
"""How long its last words may take."""


class Watchdog:
    """Call ``turn`` in each turn of the loop, and ``stop`` after the last. ``hung``: what follows
    where none came."""

    def __init__(
        self, hung: Callable[[], object], *, look_s: float = LOOK_S, looks_max: int = LOOKS_MAX
    ) -> None:
        self._hung = hung
        self._look_s = look_s
        self._looks_max = looks_max
        self._turned = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """The loop goes on."""
        self._turned.set()

    def stop(self) -> None:
        """There is no loop any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        looks = 0
        while not self._stopped.wait(self._look_s):
            looks = 0 if self._turned.is_set() else looks + 1
            self._turned.clear()
            if looks >= self._looks_max:
                self._hung()
                return


def end_hung_process() -> None:
    """Say where each thread stands, in the log, and be gone as if killed: nothing here can be
    trusted to end well.

    The loop may hang in writing that very log, so another one's clock runs that needs nothing of
    Python. A loop that hangs and keeps the interpreter's lock is not found.
    """
    faulthandler.dump_traceback_later(WRITE_S, exit=True)
    try:
        text = f"the keeper's loop has hung for some {LOOKS_MAX * LOOK_S:.0f} s; it ends, and its threads stood here:\n"
        os.write(sys.stderr.fileno(), text.encode())
        faulthandler.dump_traceback(sys.stderr)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)  # not abort: a core would hold all slots


# Notices that the keeper's loop stood still: nothing is told to other nodes meanwhile, and nobody
# here is served.

STALL_S = 0.5
"""A turn of the loop takes a few milliseconds; leases last for seconds."""


class StallDetector:
    """Call ``turn`` once in each turn of the loop, in its thread.

    ``clock`` and ``computed`` are seconds: of the world, and of the processor's that this thread
    took.
    """

    def __init__(
        self,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        computed: Callable[[], float] = time.thread_time,
    ) -> None:
        self._tell = emit
        self._clock = clock
        self._computed = computed
        self._before: tuple[float, float] | None = None

    def before_wait(self, waits_s: float) -> None:
        """The loop is about to wait, for ``waits_s`` at most."""
        now_s, computed_s = self._clock(), self._computed()
        if self._before is not None and now_s - self._before[0] > STALL_S:
            stood_s, busy_s = now_s - self._before[0], computed_s - self._before[1]
            text = (
                f"the keeper stood still for {stood_s:.1f} s, of which it computed for "
                f"{busy_s:.1f} s; the rest it waited, "
                "for a processor of this machine or for a disk"
            )
            self._tell(
                Event(
                    "stalled", text, {"seconds": round(stood_s, 3), "computed_s": round(busy_s, 3)}
                )
            )
        self._before = (now_s + max(0.0, waits_s), computed_s)
