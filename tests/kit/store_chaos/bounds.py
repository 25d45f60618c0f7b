"""Operations that end: closed whatever happened, and within a time."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import ckpt
from ckpt.backends.base import Backend
from ckpt.errors import CkptError

T = TypeVar("T", ckpt.Checkpointer, Backend)

OPERATION_S = 300.0
"""No operation takes longer, whatever the stores do: s3fs asks a store that hangs 20 times for 4 s
each. Against hangs only."""


@contextmanager
def closing(one: T) -> Iterator[T]:
    """Close it, whatever happened; what closing itself says does not matter to who only looked."""
    try:
        yield one
    finally:
        with suppress(CkptError):
            one.close()


def within(limit_s: float, call: Callable[[], str]) -> str:
    """What ``call`` gives. Fails with the stacks of all threads where it does not come back."""
    done: list[str] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(call())
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True, name="chaos-operation")
    thread.start()
    thread.join(limit_s)
    if failed:
        raise failed[0]
    if not done:
        frames = sys._current_frames().items()
        stacks = "\n".join("".join(traceback.format_stack(frame)) for _, frame in frames)
        raise AssertionError(f"it did not come back. limit_s={limit_s}\n{stacks}")
    return done[0]
