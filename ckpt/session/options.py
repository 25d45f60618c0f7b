"""What a user may choose, checked once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from ckpt.backends.base import Backend
from ckpt.backends.replicated.open import key_source
from ckpt.capture.leaves import escape
from ckpt.errors import UsageError
from ckpt.events import Fact
from ckpt.format.manifest import is_job_name, metadata_problem
from ckpt.format.records import is_tag_name
from ckpt.ipc.messages import Retention
from ckpt.maintenance.gc.sweep import GRACE_S
from ckpt.maintenance.retention import KeepPolicy, duration_s, parse_policy
from ckpt.staging.memory import FREE_SHARE_AUTO

SLOTS_MAX = 64
SLOTS_AUTO_MAX = 3
"""One that is written, one that is complete, one that is uploaded."""

StorageOptions = Mapping[str, object] | Sequence[Mapping[str, object] | None] | None
"""What fsspec takes: for all stores, or one entry for each."""

StoreArgument = str | os.PathLike[str] | Backend | Sequence[str | os.PathLike[str]]
"""How a user names a job's store or stores."""

KeepArgument = KeepPolicy | str | None
"""What a user wants kept: a policy, or its text."""

StoreAddress = str | tuple[str, ...]
"""One store's path or URL, or those of several stores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Choices for one session. Raises UsageError naming the first that cannot work.

    One attribute for each choice: it is a plain record, and has no other state.
    """

    job: str | None = None
    slots: int | Literal["auto"] = 3
    compression: Literal["off", "auto", "on"] = "auto"
    verify_staged: bool = True
    only: tuple[str, ...] | None = None
    missing: Literal["error", "keep"] = "error"
    classes: Literal["same", "any"] = "same"
    threads: int | None = None
    read_budget_bytes: int = 512 << 20
    storage_options: StorageOptions = None
    write_quorum: int | None = None
    encryption_key: str | None = None
    scrub_every_s: float | None = None
    keep: KeepPolicy | None = None
    grace_s: float | None = None

    def __post_init__(self) -> None:
        if self.job is not None and not (isinstance(self.job, str) and is_job_name(self.job)):
            raise UsageError(f"a job's name is 1 to 200 printable characters. job={self.job!r}")
        if self.slots != "auto" and not (is_count(self.slots) and 1 <= self.slots <= SLOTS_MAX):
            raise UsageError(
                f"slots is a number from 1 to {SLOTS_MAX}, or 'auto'. slots={self.slots!r}"
            )
        if self.compression not in ("off", "auto", "on"):
            raise UsageError(
                f"compression is 'off', 'auto' or 'on'. compression={self.compression!r}"
            )
        if self.missing not in ("error", "keep"):
            raise UsageError(f"missing is 'error' or 'keep'. missing={self.missing!r}")
        if self.classes not in ("same", "any"):
            raise UsageError(f"classes is 'same' or 'any'. classes={self.classes!r}")
        if self.threads is not None and (not is_count(self.threads) or self.threads < 1):
            raise UsageError(f"threads counts from 1. threads={self.threads!r}")
        if self.write_quorum is not None and (
            not is_count(self.write_quorum) or self.write_quorum < 1
        ):
            raise UsageError(
                f"write_quorum counts stores from 1. write_quorum={self.write_quorum!r}"
            )
        if self.encryption_key is not None and not isinstance(self.encryption_key, str):
            raise UsageError(
                "encryption_key says where the key is: 'file:PATH', 'env:NAME' or 'command:WORDS'. "
                f"type={type(self.encryption_key).__name__}"
            )
        object.__setattr__(self, "encryption_key", key_source(self.encryption_key))

    @property
    def slots_max(self) -> int:
        """The number of slots, or the most that ``"auto"`` takes."""
        return SLOTS_AUTO_MAX if self.slots == "auto" else self.slots

    @property
    def free_share(self) -> float:
        """The part of all memory that slots leave free."""
        return FREE_SHARE_AUTO if self.slots == "auto" else 0.0


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number from 0 on. True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_store(store: StoreArgument, *, write_quorum: int | None = None) -> StoreAddress | Backend:
    """The address, addresses or store that is meant. Raises UsageError if ``store`` is none of
    them.
    """
    if isinstance(store, (list, tuple)):
        return _check_stores(store, write_quorum)
    if write_quorum not in (None, 1):
        raise UsageError(
            f"a write quorum is for several stores. write_quorum={write_quorum}; name them as a "
            "list"
        )
    if isinstance(store, os.PathLike):
        return os.fspath(store)
    if isinstance(store, str):
        return store
    if all(callable(getattr(store, name, None)) for name in ("put", "read_into")):
        return cast("Backend", store)
    raise UsageError(
        f"a store is a path, an fsspec URL, a list of these, or a Backend. store={store!r}"
    )


def _check_stores(
    stores: Sequence[str | os.PathLike[str]], write_quorum: int | None
) -> StoreAddress:
    for store in stores:
        if not isinstance(store, (str, os.PathLike)):
            raise UsageError(f"a list of stores holds paths and fsspec URLs. store={store!r}")
    addresses = tuple(os.fspath(store) for store in stores)
    if not addresses:
        raise UsageError("a list of stores is empty; name one at least")
    quorum = write_quorum if write_quorum is not None else len(addresses) // 2 + 1
    if not len(addresses) < 2 * quorum <= 2 * len(addresses):
        raise UsageError(
            "a write quorum is more than half of the stores, so that any two share one. "
            f"write_quorum={quorum} "
            f"stores={len(addresses)}"
        )
    return addresses[0] if len(addresses) == 1 else addresses


def check_items(items: Mapping[str, object]) -> None:
    """Raises UsageError if ``items`` is not a dict of names to objects."""
    if not isinstance(items, Mapping):
        raise UsageError(
            f"a state is a dict of names to objects. type={type(items).__name__}; write "
            f"{{'model': model}}"
        )
    for name in items:
        if not isinstance(name, str) or not name:
            raise UsageError(
                f"an item's name is a text that is not empty. name={name!r}; rename it"
            )


def check_metadata(metadata: Mapping[str, Fact]) -> dict[str, Fact]:
    """A copy of ``metadata``. Raises UsageError if it can't be stored with a snapshot."""
    if not isinstance(metadata, Mapping):
        raise UsageError(
            f"metadata is a dict of names to plain values. type={type(metadata).__name__}"
        )
    if problem := metadata_problem(metadata):
        raise UsageError(problem)
    return dict(metadata)


def check_only(only: Sequence[str] | None) -> tuple[str, ...] | None:
    """The paths to restore, or None for all. Raises UsageError if ``only`` is not a list of
    texts.
    """
    if only is None:
        return None
    if isinstance(only, (str, bytes)) or not all(isinstance(path, str) for path in only):
        raise UsageError(
            f"only is a list of leaf names or prefixes. only={only!r}; write only=['model']"
        )
    return tuple(only)


def only_below(only: tuple[str, ...] | None, items: Mapping[str, object]) -> tuple[str, ...] | None:
    """The part of ``only`` that is about ``items``."""
    if only is None:
        return None
    names = {escape(name) for name in items}
    return tuple(path for path in only if path.strip("/").split("/")[0] in names)


def check_keep(keep: KeepArgument) -> KeepPolicy | None:
    """The policy that is meant, or None to keep everything. Raises UsageError if ``keep`` is no
    policy.
    """
    if keep is None or isinstance(keep, KeepPolicy):
        return keep
    if isinstance(keep, str):
        return parse_policy(keep)
    raise UsageError(
        "keep is a policy, such as ckpt.keep_last(5) | ckpt.keep_every(1000), or its text. "
        f"type={type(keep).__name__}; "
        "write keep='last=5,every=1000', or None to keep everything"
    )


def retention_of(options: SessionOptions) -> Retention | None:
    """The retention that a keeper is asked for, or None to keep everything."""
    return (
        Retention(
            keep=str(options.keep),
            grace_s=options.grace_s if options.grace_s is not None else GRACE_S,
            adapts=options.grace_s is None,
        )
        if options.keep is not None
        else None
    )


def check_grace(grace: str) -> float | None:
    """Seconds in ``"24h"``, None for ``"auto"``.

    Raises UsageError if ``grace`` is not a duration.
    """
    if grace == "auto":
        return None
    if not isinstance(grace, str):
        raise UsageError(f"grace is a length of time such as '24h'. grace={grace!r}")
    return float(duration_s(grace))


def check_tag(tag: str) -> None:
    """Raises UsageError if ``tag`` can't name a snapshot."""
    if not isinstance(tag, str) or not is_tag_name(tag):
        raise UsageError(
            f"a tag is 1 to 128 printable characters without blanks at its ends. tag={tag!r}"
        )
