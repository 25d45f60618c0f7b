"""Which snapshot a follower serves next. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from ckpt.errors import NotFoundError, UsageError
from ckpt.format.records import is_tag_name
from ckpt.log.select import select
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

TAG_PREFIX = "tag:"


@dataclass(frozen=True, slots=True)
class Followed:
    """What to follow: a tag, a step, or, with neither, the newest snapshot."""

    tag: str | None = None
    step: int | None = None

    def __str__(self) -> str:
        if self.tag is not None:
            return TAG_PREFIX + self.tag
        return "latest" if self.step is None else f"step {self.step}"


def parse_followed(follow: object) -> Followed:
    """``"latest"``, ``"tag:NAME"`` or a step. Raises UsageError for anything else."""
    if follow == "latest":
        return Followed()
    if isinstance(follow, int) and not isinstance(follow, bool) and follow >= 0:
        return Followed(step=follow)
    if isinstance(follow, str) and follow.startswith(TAG_PREFIX):
        tag = follow.removeprefix(TAG_PREFIX)
        if is_tag_name(tag):
            return Followed(tag=tag)
    raise UsageError(f"follow is 'latest', 'tag:NAME' or a step. follow={follow!r}")


def next_snapshot(
    state: LogState,
    followed: Followed,
    *,
    served: SnapshotId | None,
    refused: Container[SnapshotId],
) -> SnapshotId | None:
    """The snapshot to serve instead of ``served``; None if that is right as it is.

    A tag or a step is served as it is named, also backwards. The newest is the newest that was not
    refused, and never older than what is served: a view of the log that lacks records, because
    stores do not answer, takes nothing back. Raises NotFoundError if a step or tag does not exist,
    and what ``select`` raises if that can't be known.
    """
    if followed.step is not None or followed.tag is not None:
        named = select(state, step=followed.step, tag=followed.tag)
        return None if named == served or named in refused else named
    for snapshot in state.lineage:
        if served is not None and snapshot <= served:
            return None
        if snapshot not in refused:
            return snapshot
    if served is None:
        raise NotFoundError(f"no snapshot that can be served. job={state.job!r}")
    return None
