"""The terminal, which only one process group may read: lent to the trainer that asks for it.

Trainers have groups of their own, so that all of one can be killed at once. The kernel stops a process that reads from the
terminal (``breakpoint()``) without being in its foreground group. That is the question; the answer is to make the trainer's
group the foreground one. Until somebody asks, Ctrl-C reaches the launcher and every supervisor, as without supervisors.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Terminal:
    """The terminal that controls this process, if there is one."""

    def __init__(self) -> None:
        self._lent_to = 0

    @property
    def lent(self) -> bool:
        """Whether a trainer has it: then the terminal's signals reach that trainer only."""
        return bool(self._lent_to)

    def lend(self, group: int) -> bool:
        """Make ``group`` the foreground one, if the terminal is now this process's own group's; says whether it is.

        False where this process is in the background, another trainer has the terminal, or there is none.
        """
        with _opened() as fd:
            if fd < 0 or os.tcgetpgrp(fd) not in (os.getpgrp(), group):
                return False
            _give(fd, group)
        self._lent_to = group
        return True

    def take_back(self) -> None:
        """Make this process's group the foreground one again, where what it lent the terminal to still has it."""
        group, self._lent_to = self._lent_to, 0
        if not group:
            return
        with _opened() as fd:
            if fd >= 0 and os.tcgetpgrp(fd) in (group, 0):
                _give(fd, os.getpgrp())


@contextmanager
def _opened() -> Iterator[int]:
    """The controlling terminal, open; -1 where there is none."""
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # ENXIO: no terminal controls this process
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _give(fd: int, group: int) -> None:
    """Who isn't in the foreground itself may do this only with SIGTTOU blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the group is gone, or in another session
            os.tcsetpgrp(fd, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
