"""An exception of the user's program, as a keeper judges it."""

from __future__ import annotations

import traceback
from typing import TypedDict

from ckpt.elastic.preempted import Preempted
from ckpt.errors import FencedError, IntegrityError, NotFoundError, UsageError
from ckpt.format.digest import digest_hex

TEXT_MAX = 500

_FINAL = (UsageError, FencedError, IntegrityError, NotFoundError, KeyboardInterrupt, Preempted)
"""Starting again would meet them again, or somebody wanted the end."""


class FailingFacts(TypedDict):
    """What ``Session.failing`` takes."""

    kind: str
    text: str
    fingerprint: str
    final: bool


def facts_of(error: BaseException) -> FailingFacts:
    """Equal exceptions raised at equal places have equal fingerprints; their texts, which may hold addresses, don't count."""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    kind = type(error).__qualname__
    final = isinstance(error, _FINAL) or (isinstance(error, SystemExit) and not error.code)
    return FailingFacts(
        kind=kind, text=str(error)[:TEXT_MAX], fingerprint=digest_hex("\n".join([kind, *places]).encode()), final=final
    )
