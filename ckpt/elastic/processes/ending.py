"""How a supervisor ends: as its trainer did, so that the launcher sees what it would have seen without it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

INTERRUPTED_STATUS = 128 + signal.SIGINT


def leave_status(told: int, own: int | None, *, interrupted: bool = False) -> int:
    """The status to end with: the keeper says ``told``, the own trainer ended by itself with ``own`` (None: it didn't).

    Both as ``os.waitstatus_to_exitcode``. A keeper tells a signal as 128 and its number, since it speaks to all ranks; the rank
    that died of it dies of it. ``interrupted``: this rank's Ctrl-C was told as the cause, whatever its trainer ended with.
    """
    if own is None:
        return told
    caught = interrupted and own != 0 and told == INTERRUPTED_STATUS
    return own if caught or (own < 0 and told == 128 - own) else told


def end_as(status: int) -> NoReturn:
    """End this process with an exit code, or of minus a signal. Runs no exit handler: those are the trainer's."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
    if status < 0:
        end_with_signal(-status)
    os._exit(status & 0xFF)


def end_with_signal(number: int, *, group: bool = False) -> NoReturn:
    """Die of a signal, without a second core file. ``group``: the whole process group gets it, as from the terminal."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    if group:
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container ignores signals that it sends itself
