"""What a record that counts for nothing means to who wrote it. Pure."""

from __future__ import annotations

from ckpt.errors import ConflictError, FencedError
from ckpt.log.state import LogState, Void


def refused(void: Void) -> ConflictError:
    """The error for a record that is, or would be, void: FencedError where the writer must stop, else ConflictError."""
    match void.code:
        case "fenced":
            return FencedError(f"{void.reason} stop this writer: another one goes on")
        case "base-gone":
            return ConflictError(f"{void.reason} snapshot again without that base")
        case "newest-kept" | "tag-kept":
            return ConflictError(f"{void.reason} leave it out, or move what keeps it")
        case _:
            return ConflictError(f"{void.reason} code={void.code}")


def settled(state: LogState, seq: int) -> None:
    """Raises the fitting error where the record at ``seq`` is void in ``state``."""
    void = state.void_at(seq)
    if void is not None:
        raise refused(void)
