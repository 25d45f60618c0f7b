"""Which snapshot is meant. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.errors import NewerSnapshotError, NotFoundError, UnavailableError, UsageError
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

NEAREST_SHOWN = 5
TAGS_SHOWN = 20


def select(
    state: LogState, *, step: int | None = None, epoch: int | None = None, tag: str | None = None
) -> SnapshotId:
    """The snapshot that is meant: by default the newest on the line.

    ``step``: the one of that step on the line, of the newest captured epoch where several have it.
    ``step`` and ``epoch``: exactly that one, on the line or off it. ``epoch`` alone: the last of
    that captured epoch. ``tag``: what it names. Raises NotFoundError that lists the nearest steps
    or the tags there are, UnavailableError where too few stores answered to know that there is
    none, UsageError for a tag beside the others.
    """
    if tag is not None:
        if step is not None or epoch is not None:
            raise UsageError(f"a tag names a snapshot alone. tag={tag!r} leave out step and epoch")
        return _by_tag(state, tag)
    if epoch is not None:
        return _by_epoch(state, epoch, step)
    line = state.lineage
    if step is None:
        if not line:
            raise _absent(
                state,
                f"no snapshot on the line of the newest epoch. job={state.job!r} "
                f"{_elsewhere(state)}",
            )
        return line[0]
    found = next((pair for pair in line if pair.step == step), None)
    if found is None:
        raise _absent(
            state,
            f"no snapshot of that step. step={step} {_nearest(line, step)} {_elsewhere(state)}",
        )
    return found


def candidates(state: LogState) -> tuple[SnapshotId, ...]:
    """What a restore tries, best first: the line of the newest epoch, newest first."""
    return state.lineage


@dataclass(frozen=True, slots=True)
class ResumeChoice:
    """When it was decided what training goes on from: ``newest`` was the newest snapshot on the
    line then (None: none)."""

    newest: SnapshotId | None


def require_newest(state: LogState, resume: SnapshotId | None, choice: ResumeChoice | None) -> None:
    """Raises NewerSnapshotError where what was committed since ``chosen`` is newer than ``resume``;
    None: no matter.

    A writer that was paused may land a commit between that decision and the epoch that fences it.
    Gone on from ``resume``, the line would leave behind what somebody was told is durable.
    """
    newest = state.newest()
    if choice is None or newest is None or newest == choice.newest:
        return
    if resume is None or newest > resume:
        raise NewerSnapshotError(
            f"a newer snapshot was committed while training was about to go on. newest={newest} "
            f"resume={resume} choose again"
        )


def older_than(state: LogState, snapshot: SnapshotId) -> tuple[SnapshotId, ...]:
    """What a restore falls back to where ``snapshot`` can't be read: its own line below it, newest
    first."""
    return tuple(pair for pair in state.lineage_from(snapshot) if pair != snapshot)


def _by_tag(state: LogState, tag: str) -> SnapshotId:
    tags = state.tags
    if tag not in tags:
        known = ", ".join(repr(name) for name in sorted(tags)[:TAGS_SHOWN]) or "none"
        raise _absent(state, f"no such tag. tag={tag!r} tags={known}")
    return tags[tag]


def _by_epoch(state: LogState, epoch: int, step: int | None) -> SnapshotId:
    inside = [entry.snapshot for entry in state.snapshots if entry.snapshot.epoch == epoch]
    if step is None and inside:
        return inside[-1]
    wanted = next((pair for pair in inside if pair.step == step), None)
    if wanted is None:
        near = _nearest(tuple(inside), step or 0)
        raise _absent(
            state, f"no snapshot of that epoch and step. epoch={epoch} step={step} {near}"
        )
    return wanted


def _absent(state: LogState, text: str) -> NotFoundError | UnavailableError:
    """What is not there; or may be there, and is only not seen."""
    if state.short:
        return UnavailableError(
            f"{text}, as far as can be seen: {state.short} repeat when more answer"
        )
    return NotFoundError(text)


def _nearest(pairs: tuple[SnapshotId, ...], step: int) -> str:
    near = sorted({pair.step for pair in pairs}, key=lambda found: (abs(found - step), found))[
        :NEAREST_SHOWN
    ]
    return f"nearest_steps={', '.join(map(str, sorted(near))) or 'none'}"


def _elsewhere(state: LogState) -> str:
    off = len(state.snapshots) - len(state.lineage)
    return f"off_the_line={off} name one with epoch and step" if off else "off_the_line=0"
