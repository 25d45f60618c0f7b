"""A supervisor's signals as things to read: a number for each in a pipe, and the user's handlers put back in a child."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None

OWN = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGTSTP})
"""What a supervisor acts on."""

_FAULTS = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS}
)
_READ_BYTES = 512


class Signals:
    """Catches signals from when it is made. ``fd`` is readable where there are some.

    Besides its own, those that the user's program handles, and SIGUSR1: schedulers send them to the process that they know, the
    supervisor, and they are meant for the trainer.
    """

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        self._before: dict[signal.Signals, Handler] = {}
        for number in _watched():
            before = signal.getsignal(number)
            if number == signal.SIGCHLD or before is not signal.SIG_IGN:
                self._before[number] = before
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, _noted)

    def read(self) -> list[int]:
        """The signals that came since the last call, in order."""
        try:
            return list(os.read(self.fd, _READ_BYTES))
        except BlockingIOError:
            return []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a fork: nothing comes to the child before it has put the user's handlers back."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before.keys())
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def restore(self) -> None:
        """The handlers as they were before, and the pipe closed: in a child, or where supervising ends with an error."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        os.close(self.fd)
        os.close(self._write)

    def stop_here(self, group: int) -> None:
        """Stop this process, and what else is in ``group``, as Ctrl-Z would. Returns when it is continued."""
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            if group:
                os.killpg(group, signal.SIGTSTP)
            else:
                os.kill(os.getpid(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, _noted)


def _watched() -> list[signal.Signals]:
    """Which signals a supervisor catches. A handler that isn't Python's own (None) is left alone unless it must not be."""
    handled = [
        number
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals) and number not in _FAULTS and callable(signal.getsignal(number))
    ]
    return sorted({*OWN, signal.SIGUSR1, *handled})


def _noted(number: int, frame: FrameType | None) -> None:
    """The number is in the pipe already."""
