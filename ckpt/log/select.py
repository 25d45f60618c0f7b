"""Which snapshot a user or a restore means. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.errors import (
    CkptError,
    IntegrityError,
    NewerSnapshotError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

NEAREST_SHOWN = 5
TAGS_SHOWN = 20


def select(
    state: LogState, *, step: int | None = None, epoch: int | None = None, tag: str | None = None
) -> SnapshotId:
    """The snapshot that is meant: by default the newest on the lineage.

    * ``step``: that step on the lineage; of the newest captured epoch if several have it.
    * ``step`` and ``epoch``: exactly that snapshot, on the lineage or not.
    * ``epoch``: the last snapshot of that captured epoch.
    * ``tag``: the snapshot that it names.

    Raises NotFoundError that lists the nearest steps or the existing tags; UnavailableError if too
    few stores answered to know that it does not exist; UsageError for a tag with step or epoch.
    """
    if tag is not None:
        if step is not None or epoch is not None:
            raise UsageError(f"a tag names a snapshot alone. tag={tag!r} leave out step and epoch")
        return _by_tag(state, tag)
    if epoch is not None:
        return _by_epoch(state, epoch, step)
    lineage = state.lineage
    if step is None:
        if not lineage:
            raise _absent(
                state,
                f"no snapshot on the lineage of the newest epoch. job={state.job!r} "
                f"{_elsewhere(state)}",
            )
        return lineage[0]
    # Newest first, so of several epochs with that step the newest wins.
    snapshot = next((pair for pair in lineage if pair.step == step), None)
    if snapshot is None:
        near = _nearest(lineage, step)
        raise _absent(state, f"no snapshot of that step. step={step} {near} {_elsewhere(state)}")
    return snapshot


def candidates(state: LogState) -> tuple[SnapshotId, ...]:
    """The snapshots that a restore tries, best first: the lineage of the newest epoch."""
    return state.lineage


@dataclass(frozen=True, slots=True)
class ResumeChoice:
    """The moment of a decision to resume: ``newest`` was then the newest on the lineage (None:
    none)."""

    newest: SnapshotId | None


def require_newest(state: LogState, resume: SnapshotId | None, choice: ResumeChoice | None) -> None:
    """Raise NewerSnapshotError if a commit since ``choice`` is newer than ``resume``.

    A paused writer may land a commit between the choice and the epoch that fences it. If training
    resumed from ``resume`` all the same, that commit would be off the lineage, although its writer
    reported it as durable. ``choice`` None skips the check.
    """
    newest = state.newest()
    if choice is None or newest is None or newest == choice.newest:
        return
    if resume is None or newest > resume:
        raise NewerSnapshotError(
            f"a newer snapshot was committed while training was about to resume. newest={newest} "
            f"resume={resume} "
            "choose again"
        )


def require_known_newest(state: LogState) -> None:
    """Raise IntegrityError or UnavailableError if a newer snapshot than the newest of ``state`` may
    exist."""
    if not state.stale_reason:
        return
    kind = IntegrityError if state.hole is not None else UnavailableError
    raise kind(
        f"a newer snapshot than {state.newest()} may exist: {state.stale_reason} "
        + ("run ckpt scrub" if state.hole is not None else "repeat when more stores answer")
        + ", name a step or tag, or allow it with stale='allow'"
    )


def _by_tag(state: LogState, tag: str) -> SnapshotId:
    tags = state.tags
    if tag not in tags:
        names = ", ".join(repr(name) for name in sorted(tags)[:TAGS_SHOWN]) or "none"
        raise _absent(state, f"no such tag. tag={tag!r} tags={names}")
    return tags[tag]


def _by_epoch(state: LogState, epoch: int, step: int | None) -> SnapshotId:
    captured = [entry.snapshot for entry in state.snapshots if entry.snapshot.epoch == epoch]
    if step is None and captured:
        return captured[-1]
    snapshot = next((pair for pair in captured if pair.step == step), None)
    if snapshot is None:
        near = _nearest(tuple(captured), step or 0)
        raise _absent(
            state, f"no snapshot of that epoch and step. epoch={epoch} step={step} {near}"
        )
    return snapshot


def _absent(state: LogState, text: str) -> CkptError:
    """NotFoundError; IntegrityError if it may be behind damage, UnavailableError if it may exist on
    a store that did not answer."""
    if state.hole is not None:
        return IntegrityError(
            f"{text}, as far as the log can be read: {state.hole.reason} run ckpt scrub"
        )
    if state.short:
        return UnavailableError(
            f"{text}, as far as is known: {state.short} repeat when more stores answer"
        )
    return NotFoundError(text)


def _nearest(pairs: tuple[SnapshotId, ...], step: int) -> str:
    steps = {pair.step for pair in pairs}
    near = sorted(steps, key=lambda other: (abs(other - step), other))[:NEAREST_SHOWN]
    return f"nearest_steps={', '.join(map(str, sorted(near))) or 'none'}"


def _elsewhere(state: LogState) -> str:
    off_lineage = len(state.snapshots) - len(state.lineage)
    return (
        f"off_lineage={off_lineage} name one with epoch and step"
        if off_lineage
        else "off_lineage=0"
    )
