"""An error of one rank, told to all: its code and words travel, and become the same kind of error again."""

from __future__ import annotations

import re

from ckpt import errors
from ckpt.errors import CkptError, InternalError
from ckpt.ipc.message import RemoteError

_CAME_FROM = re.compile(r"rank (-?[0-9]{1,9}): ")
_BY_CODE = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CkptError)}


def from_error(error: CkptError, *, rank: int) -> RemoteError:
    """The message for ``error``, met on ``rank``. One that came from another rank keeps that rank."""
    text = str(error)
    came = _CAME_FROM.match(text)
    if came is not None:
        return RemoteError(error.code, text[came.end() :], int(came[1]))
    return RemoteError(error.code, text, rank)


def to_error(message: RemoteError) -> CkptError:
    """The error that a message stands for."""
    return _BY_CODE.get(message.code, InternalError)(
        f"rank {message.rank}: {message.text}" if message.rank >= 0 else message.text
    )
