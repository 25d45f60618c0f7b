"""What a command prints, in bounded time and memory. Its output is a secret: no message repeats it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import IO

from ckpt.errors import UnavailableError, UsageError


def output_of(words: Sequence[str], *, wait_s: float, bytes_max: int) -> bytes:
    """Run ``words`` without a shell and return what it printed; its complaints go where ours go.

    The command and what it started are killed after ``wait_s`` seconds and where it prints more than ``bytes_max``. Raises
    UsageError where it can't be started or prints too much, UnavailableError where it fails or does not end.
    """
    program = words[0]
    try:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the key's command can't be started. program={program} cause={error}; give the program's full path"
        ) from None
    assert process.stdout is not None
    deadline_s = time.monotonic() + wait_s
    with process:
        try:
            output = _read(process.stdout, deadline_s, bytes_max)
            if output is None:
                raise UsageError(f"the key's command prints more than a key. program={program} limit_bytes={bytes_max}")
            status = process.wait(max(0.0, deadline_s - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise UnavailableError(
                f"the key's command did not end. program={program} waited_s={wait_s}; run it by hand, then repeat"
            ) from None
        finally:
            if process.returncode is None:  # not reaped, so that the group is still its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if status:
        raise UnavailableError(
            f"the key's command failed. program={program} status={status}; run it by hand to see why, then repeat"
        )
    return output


def _read(pipe: IO[bytes], deadline_s: float, bytes_max: int) -> bytes | None:
    """All of a pipe; None where it is longer than ``bytes_max``. Raises TimeoutError."""
    output = b""
    while len(output) <= bytes_max:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            raise TimeoutError
        piece = os.read(pipe.fileno(), bytes_max + 1 - len(output))
        if not piece:
            return output
        output += piece
    return None
