"""An error of one rank, told to all: its code and words travel, and become the same kind of error again."""

from __future__ import annotations

import msgspec

from ckpt import errors
from ckpt.errors import CkptError, InternalError
from ckpt.manifest.canonical import ready


class RemoteError(msgspec.Struct, frozen=True):
    """An error as a message: ``code`` finds its class again, ``text`` are its words, ``rank`` says whose it was."""

    code: str
    text: str
    rank: int


_BY_CODE = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CkptError)}


def from_error(error: CkptError, *, rank: int) -> RemoteError:
    """The message for ``error``, met on ``rank``."""
    return RemoteError(error.code, str(error), rank)


def to_error(message: RemoteError) -> CkptError:
    """The error that a message stands for."""
    return _BY_CODE.get(message.code, InternalError)(f"rank {message.rank}: {message.text}")


ready(RemoteError)
