"""What every message between keepers, supervisors, trainers and tools has in common."""

from __future__ import annotations

import msgspec


class RemoteError(msgspec.Struct, frozen=True):
    """An error as a message: ``code`` finds its class again, ``text`` are its words, ``rank`` says whose it was."""

    code: str
    text: str
    rank: int


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of all messages. ``id`` above 0: a call."""

    id: int = 0
