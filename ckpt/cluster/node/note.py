"""What an epoch carries besides places: why it came, what to remember of failures, and the job's end. Pure."""

from __future__ import annotations

import msgspec

from ckpt.errors import IntegrityError
from ckpt.format.canonical import ready

NOTE_CHARS_MAX = 4000


class Note(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``why`` the epoch came, for people.

    ``fingerprint``, ``step``, ``same``, ``stuck``, ``completed``, ``overdue``: see ``keeper.verdict.Record``. ``end``: all
    nodes leave with that status. ``era``: the first epoch with the same nodes in the same places; what their keepers do
    together goes on within.
    """

    why: str = ""
    fingerprint: str = ""
    step: int = -1
    same: int = 0
    stuck: int = 0
    completed: int = -1
    overdue: int = 0
    end: int | None = None
    era: int = 0


ready(Note)


def encode_note(note: Note) -> str:
    """As text; a reason that is too long is cut."""
    text = msgspec.json.encode(note).decode()
    if len(text) <= NOTE_CHARS_MAX:
        return text
    short = msgspec.structs.replace(note, why=note.why[:500], fingerprint=note.fingerprint[:200])
    return msgspec.json.encode(short).decode()


def decode_note(text: str) -> Note:
    """The note in ``text``; an empty one of no text. Raises IntegrityError."""
    if not text:
        return Note()
    try:
        return msgspec.json.decode(text, type=Note)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise IntegrityError(f"an epoch's note is no note. why={error}") from error
