"""Repeats what obstore does not: it takes a deletion for something that may not be done twice, and gives up where a page of
a listing, or an object without a tag, breaks off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ckpt.backends.base import Stat
from ckpt.errors import UnavailableError

_PAUSE_S = 0.1
"""Before the first repetition, then twice as long each time, at most 5 s."""

_PAUSE_MAX_S = 5.0


def repeat(call: Callable[[], None], *, times: int, progress: Callable[[], int] = int) -> None:
    """Do ``call``, again where the connection broke, ``times`` in a row at most without ``progress`` having grown.

    Raises what the last one raised.
    """
    broken, before = 0, progress()
    while True:
        try:
            return call()
        except UnavailableError as error:
            broken, before = (0, progress()) if progress() > before else (broken, before)
            if broken >= times or not _broke(error):
                raise
        _pause(broken)
        broken += 1


def resume(listing: Callable[[str], Iterator[Stat]], after: str, *, times: int) -> Iterator[Stat]:
    """``listing(after)``, begun again behind the last key where it broke off; ``times`` in a row at most."""
    broken = 0
    while True:
        try:
            for found in listing(after):
                yield found
                after, broken = found.key, 0
        except UnavailableError as error:
            if broken >= times or not _broke(error):
                raise
        else:
            return
        _pause(broken)
        broken += 1


def _broke(error: UnavailableError) -> bool:
    """Whether there was no answer: answers that promise better luck were repeated already."""
    return type(error) is UnavailableError and "status=-" in str(error)


def _pause(done: int) -> None:
    time.sleep(min(_PAUSE_S * 2**done, _PAUSE_MAX_S))
