"""Finding a keeper and saying hello to it: one that ends just then is no answer, one that is busy says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from msgspec.structs import replace

from ckpt.errors import UnavailableError
from ckpt.ipc import client
from ckpt.ipc.answers import Welcome
from ckpt.ipc.client import START_WAIT_S, KeeperSpec, ensure_keeper
from ckpt.ipc.frames import Wire
from ckpt.ipc.messages import Hello

_T = TypeVar("_T")

HELLO_ID = 1
"""The first call on a connection, and the only one on that for events."""

AGAIN_FIRST_S = 0.01
AGAIN_LAST_S = 1.0
"""Pauses between tries to find a keeper that doesn't end just then."""


class KeeperBusyError(UnavailableError):
    """The keeper lives and takes nobody yet: it still settles what an earlier launch left."""


class _KeeperEndedError(UnavailableError):
    """It ended before it said hello."""


def connections(spec: KeeperSpec, *, start: bool) -> tuple[Wire, Wire]:
    """A trainer's two connections to its keeper, which is started where none runs, unless ``start`` is false."""
    calls = ensure_keeper(spec, start=start)
    try:
        return calls, ensure_keeper(spec, start=False)
    except UnavailableError as error:
        calls.close()
        raise _KeeperEndedError(str(error)) from error
    except BaseException:
        calls.close()
        raise


def greet(wire: Wire, hello: Hello) -> Welcome:
    """Say hello and return the answer. Raises what the keeper has against this peer."""
    try:
        return client.greet(wire, replace(hello, id=HELLO_ID))
    except client.HungUpError as error:
        raise _KeeperEndedError(str(error)) from error
    except UnavailableError as error:
        raise KeeperBusyError(str(error)) from error


def in_spite_of_ends(connect: Callable[[], _T], *, again: bool) -> _T:
    """``connect``, and ``again`` for START_WAIT_S seconds where the keeper that was found ended just then."""
    until_s = time.monotonic() + START_WAIT_S
    pause_s = AGAIN_FIRST_S
    while True:
        try:
            return connect()
        except _KeeperEndedError:
            if not again or time.monotonic() > until_s:
                raise
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, AGAIN_LAST_S)
