"""What a user may choose, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import UsageError
from ckpt.manifest.records import tag_ok

SLOTS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Choices for one session. Raises UsageError naming the first that cannot work."""

    job: str | None = None
    slots: int = 3
    compression: Literal["off", "auto", "on"] = "auto"
    verify_staged: bool = True
    only: tuple[str, ...] | None = None
    missing: Literal["error", "keep"] = "error"
    threads: int | None = None
    read_budget_bytes: int = 512 << 20
    storage_options: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= SLOTS_MAX:
            raise UsageError(f"slots is a number from 1 to {SLOTS_MAX}. slots={self.slots}")
        if self.compression not in ("off", "auto", "on"):
            raise UsageError(f"compression is 'off', 'auto' or 'on'. compression={self.compression!r}")
        if self.missing not in ("error", "keep"):
            raise UsageError(f"missing is 'error' or 'keep'. missing={self.missing!r}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads counts from 1. threads={self.threads}")


def check_tag(tag: str) -> None:
    """Raises UsageError where ``tag`` can't name a snapshot."""
    if not isinstance(tag, str) or not tag_ok(tag):
        raise UsageError(f"a tag is 1 to 128 printable characters without blanks at its ends. tag={tag!r}")
