"""What a user may choose, checked once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.backends.base import Backend
from ckpt.errors import UsageError
from ckpt.manifest.manifest import job_ok, metadata_problem
from ckpt.manifest.records import tag_ok
from ckpt.observe.events import Fact

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
        if self.job is not None and not (isinstance(self.job, str) and job_ok(self.job)):
            raise UsageError(f"a job's name is 1 to 200 printable characters. job={self.job!r}")
        if not is_count(self.slots) or not 1 <= self.slots <= SLOTS_MAX:
            raise UsageError(f"slots is a number from 1 to {SLOTS_MAX}. slots={self.slots!r}")
        if self.compression not in ("off", "auto", "on"):
            raise UsageError(f"compression is 'off', 'auto' or 'on'. compression={self.compression!r}")
        if self.missing not in ("error", "keep"):
            raise UsageError(f"missing is 'error' or 'keep'. missing={self.missing!r}")
        if self.threads is not None and (not is_count(self.threads) or self.threads < 1):
            raise UsageError(f"threads counts from 1. threads={self.threads!r}")


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number from 0 on (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_store(store: str | os.PathLike[str] | Backend) -> str | Backend:
    """The address or the store that is meant. Raises UsageError where ``store`` is neither."""
    if isinstance(store, os.PathLike):
        store = os.fspath(store)
    if not isinstance(store, str) and not all(callable(getattr(store, name, None)) for name in ("put", "read_into")):
        raise UsageError(f"a store is a path, an fsspec URL or a Backend. store={store!r}")
    return store


def check_items(items: Mapping[str, object]) -> None:
    """Raises UsageError where ``items`` is not a dict of names to objects."""
    if not isinstance(items, Mapping):
        raise UsageError(
            f"a state is a dict of names to objects. type={type(items).__name__}; write {{'model': model}}"
        )
    for name in items:
        if not isinstance(name, str) or not name:
            raise UsageError(f"an item's name is a text that is not empty. name={name!r}; rename it")


def check_metadata(metadata: Mapping[str, Fact]) -> dict[str, Fact]:
    """A copy of ``metadata``. Raises UsageError where it can't be stored with a snapshot."""
    if not isinstance(metadata, Mapping):
        raise UsageError(f"metadata is a dict of names to plain values. type={type(metadata).__name__}")
    if problem := metadata_problem(metadata):
        raise UsageError(problem)
    return dict(metadata)


def check_only(only: Sequence[str] | None) -> tuple[str, ...] | None:
    """The paths to restore, or None for all. Raises UsageError where ``only`` is no list of texts."""
    if only is None:
        return None
    if isinstance(only, (str, bytes)) or not all(isinstance(path, str) for path in only):
        raise UsageError(f"only is a list of leaf names or prefixes. only={only!r}; write only=['model']")
    return tuple(only)


def check_tag(tag: str) -> None:
    """Raises UsageError where ``tag`` can't name a snapshot."""
    if not isinstance(tag, str) or not tag_ok(tag):
        raise UsageError(f"a tag is 1 to 128 printable characters without blanks at its ends. tag={tag!r}")
