"""The keeper as a process: its folder, lock and socket; ending it if its loop hangs; noticing that
the loop stood still."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ckpt.errors import UnavailableError
from ckpt.events import Emit, Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import Settings
from ckpt.ipc.runtime_dir import JobFolder

if TYPE_CHECKING:  # a keeper listens before it has loaded what slots need
    from ckpt.keeper.slots import Estate

SUCCESSOR_WAIT_S = 25.0
"""How long a successor may take until it listens: less than its client waits for an answer."""

# ---- listener: folder, lock and socket, made anew if they were removed


class KeeperListener:
    """One keeper's job folder, the lock on it, and the socket in it. Owns lock and listener until
    ``close``."""

    def __init__(self, spec: KeeperSpec, folder: JobFolder, lock: int) -> None:
        self._spec = spec
        self._lock = lock
        self.folder = folder
        self.strangers = 0
        """How many connections of other users were refused."""
        self.listener = self._listen()

    @classmethod
    def acquire(cls, spec: KeeperSpec, folder: JobFolder) -> KeeperListener | None:
        """Lock the folder and listen in it; None if another keeper holds the lock."""
        lock = folder.try_lock()
        return cls(spec, folder, lock) if lock is not None else None

    def describe(self) -> None:
        """Write whose folder it is, with this process as the keeper."""
        self.folder.write_info(self._spec.store, self._spec.job)

    def is_reachable(self) -> bool:
        """Whether clients that look for this keeper find it. Restores small files that are
        missing."""
        if not self._owns() or _file_of(self.folder.socket_path) != self._socket_file:
            return False
        try:
            self.folder.stacks.mkdir(mode=0o700, exist_ok=True)
            if self.folder.read_info() is None:
                self.describe()
        except OSError:  # the folder is being removed at this very moment
            return False
        return True

    def renew(self) -> socket.socket | None:
        """Make folder, lock and socket anew. Returns the old listener; None if another keeper has
        taken the folder.

        The old listener may still have connections that were not accepted.
        """
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

    def start_successor(self, settings: Settings, estate: Estate) -> None:
        """Start a keeper with other settings that takes over ``estate``, and wait until it
        listens. Raises UnavailableError if it does not; then this one still listens.
        """
        program = [*settings.program, os.fspath(self.folder.path)]
        try:
            ended = subprocess.run(
                [*program, msgspec.json.encode(estate).decode()],
                input=settings.spec,
                cwd=self.folder.path,
                env=dict(settings.environment),
                pass_fds=estate.fds,
                start_new_session=True,
                timeout=SUCCESSOR_WAIT_S,
                check=False,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(
                "the keeper of an earlier launch has other settings, and no other keeper can be "
                f"started. why={error}; end it: pid={os.getpid()}"
            ) from error
        if ended.returncode != 0:
            raise UnavailableError(
                "the keeper of an earlier launch has other settings, and the one with new settings "
                f"exited with status {ended.returncode}. log={self.folder.log_path} "
                f"pid={os.getpid()}"
            )

    @property
    def lock(self) -> int:
        """The descriptor that holds the folder's lock."""
        return self._lock

    def hide(self) -> None:
        """Remove the socket's name: no client finds this keeper any more; those that found it wait
        at the listener."""
        if _file_of(self.folder.socket_path) == self._socket_file:
            self.folder.socket_path.unlink(missing_ok=True)

    def has_pending(self) -> bool:
        """Whether a connection waits to be accepted."""
        return bool(select.select([self.listener], [], [], 0)[0])

    def close(self, *, remove: bool = True) -> None:
        """Close listener and lock, and remove the folder unless another keeper has taken it."""
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
        """Whether the lock that is held is on the file that other keepers would lock."""
        held = os.fstat(self._lock)
        return _file_of(self.folder.lock_path) == (held.st_dev, held.st_ino)


def _file_of(path: os.PathLike[str]) -> tuple[int, int] | None:
    """The file at a path, as device and inode; None if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# ---- watchdog: a keeper whose loop hangs ends; its supervisors start another and pass on its slots
#
# A thread of its own keeps the lease alive, so a node whose loop hangs would seem well to all
# others, and do nothing.

CHECK_S = 1.0
CHECKS_MAX = 300
"""Longer than anything blocks a loop that recovers: leaving a membership that does not answer takes
up to three minutes.

Checks count, not seconds, so that a machine that slept is not taken for hung.
"""

WRITE_S = 5.0
"""How long writing its last log lines may take."""


class Watchdog:
    """Calls ``on_hung`` if no ``beat`` arrives for ``checks_max`` checks. Call ``stop`` when the
    loop has ended."""

    def __init__(
        self,
        on_hung: Callable[[], object],
        *,
        check_s: float = CHECK_S,
        checks_max: int = CHECKS_MAX,
    ) -> None:
        self._on_hung = on_hung
        self._check_s = check_s
        self._checks_max = checks_max
        self._beaten = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """The loop is alive; to be called in each turn."""
        self._beaten.set()

    def stop(self) -> None:
        """There is no loop any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        checks = 0
        while not self._stopped.wait(self._check_s):
            checks = 0 if self._beaten.is_set() else checks + 1
            self._beaten.clear()
            if checks >= self._checks_max:
                self._on_hung()
                return


def end_hung_process() -> None:
    """Log the stack of each thread and end as if killed: no orderly end can be trusted here.

    The loop may hang in writing that very log, so a timer that needs nothing of Python ends the
    process as well. A loop that hangs while it holds the interpreter's lock is not found.
    """
    faulthandler.dump_traceback_later(WRITE_S, exit=True)
    try:
        text = (
            f"the keeper's loop has hung for some {CHECKS_MAX * CHECK_S:.0f} s; it ends. Its "
            "threads were here:\n"
        )
        os.write(sys.stderr.fileno(), text.encode())
        faulthandler.dump_traceback(sys.stderr)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)  # not abort: a core would hold all slots


# ---- stalls: while the loop stands still no client is served and nothing is sent to other nodes

STALL_S = 0.5
"""A turn of the loop takes a few milliseconds; leases last for seconds."""


class StallDetector:
    """Reports turns of the loop that took too long. Call ``before_wait`` once in each turn, in the
    loop's thread.

    ``clock`` and ``computed`` return seconds: elapsed, and of processor time that this thread has
    used.
    """

    def __init__(
        self,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        computed: Callable[[], float] = time.thread_time,
    ) -> None:
        self._emit = emit
        self._clock = clock
        self._computed = computed
        self._before: tuple[float, float] | None = None

    def before_wait(self, wait_s: float) -> None:
        """The loop is about to wait, for at most ``wait_s``, which is not counted."""
        now_s, computed_s = self._clock(), self._computed()
        if self._before is not None and now_s - self._before[0] > STALL_S:
            stood_s, busy_s = now_s - self._before[0], computed_s - self._before[1]
            text = (
                f"the keeper stood still for {stood_s:.1f} s: it computed for {busy_s:.1f} s, and "
                "for the rest waited for a processor of this machine or for a disk"
            )
            self._emit(
                Event(
                    "stalled", text, {"seconds": round(stood_s, 3), "computed_s": round(busy_s, 3)}
                )
            )
        self._before = (now_s + max(0.0, wait_s), computed_s)
