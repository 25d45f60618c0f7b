"""What can be restored, and how the log will look once all that this keeper issued is written.
Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ckpt.ipc.messages import Choice
from ckpt.log.select import candidates
from ckpt.log.state import Committed, LogState, OpenedEpoch, lineage_segments, whole_epoch
from ckpt.values import SnapshotId

STAGED = "staged"
DURABLE = "durable"
NOT_WRITTEN = -1
"""The ``seq`` of an entry that was not in the log when it was read."""


def with_pending(
    state: LogState, opens: Sequence[OpenedEpoch], commits: Sequence[SnapshotId] = ()
) -> LogState:
    """``state`` with what was issued and committed since it was read: ``opens`` and ``commits``,
    both in their order.

    Entries that ``state`` already contains, or has passed, are left out.
    """
    committed = {entry.snapshot for entry in state.snapshots}
    fresh = dict.fromkeys(pair for pair in commits if pair not in committed)
    return replace(
        state,
        opens=(*state.opens, *(opened for opened in opens if opened.epoch > state.epoch)),
        snapshots=(
            *state.snapshots,
            *(Committed(pair, "", None, NOT_WRITTEN, pair.epoch) for pair in fresh),
        ),
    )


LAUNCH_PREFIX_CHARS = 16
"""How much of an open's write id is shared by all opens that one keeper wrote for one launch; the
rest is its own."""


def launch_prefix(origin: str) -> str:
    """What the opens of one keeper and launch have in common."""
    return origin[:LAUNCH_PREFIX_CHARS]


def own_staged(
    state: LogState, ids: Mapping[int, str], staged: Mapping[SnapshotId, str]
) -> dict[SnapshotId, str]:
    """Those of ``staged`` (snapshot and origin) whose epoch is the one that ``state`` has under
    that number, or will have.

    ``ids``: the write ids of the log's opens. An epoch that is not in the log is still to be
    written only if no other writer opened one since the last of its launch, because the first open
    of a launch is written before anything is captured. Without an origin the number alone decides.
    """
    # Numbers are issued by several keepers at once: while one's store is away it issues 5, and
    # another node opens its own 5. So the origin, the write id of the opening record, decides.
    recorded = {opened.epoch for opened in state.opens}
    newest = launch_prefix(ids.get(state.epoch, ""))

    def counts(pair: SnapshotId, origin: str) -> bool:
        if not origin:
            return True
        return (
            ids.get(pair.epoch) == origin
            if pair.epoch in recorded
            else newest == launch_prefix(origin)
        )

    return {pair: origin for pair, origin in staged.items() if counts(pair, origin)}


def restorable(
    state: LogState, ids: Mapping[int, str], staged: Mapping[SnapshotId, str]
) -> tuple[SnapshotId, ...]:
    """Those of ``staged`` that a restart may continue from, newest first: own ones, on the lineage
    of the newest epoch."""
    counted = own_staged(state, ids, staged)
    return on_lineage(with_pending(state, missing_opens(state, counted)), counted)


def on_lineage(state: LogState, pairs: Collection[SnapshotId]) -> tuple[SnapshotId, ...]:
    """Those of ``pairs``, committed or not, that are on the lineage of the newest epoch, newest
    first."""
    opens = {opened.epoch: opened for opened in state.opens}
    last = {
        segment.epoch: segment.last_step
        for segment in lineage_segments(opens, whole_epoch(state.epoch))
    }
    kept = {pair for pair in pairs if pair.epoch in last and _within(pair.step, last[pair.epoch])}
    return tuple(sorted(kept, reverse=True))


def missing_opens(state: LogState, staged: Collection[SnapshotId]) -> tuple[OpenedEpoch, ...]:
    """The opens that are missing in ``state`` although captures of their epochs are staged.

    An earlier keeper of this job issued those epochs and died before it wrote the records. Each is
    taken to continue from the newest snapshot known below it, because that is what a restart
    chooses.
    """
    missing: tuple[OpenedEpoch, ...] = ()
    for epoch in sorted({pair.epoch for pair in staged if pair.epoch > state.epoch}):
        # Ascending: the open found for one epoch is part of the lineage that the next one
        # continues.
        before = with_pending(state, missing)
        below = [
            *on_lineage(before, [pair for pair in staged if pair.epoch < epoch]),
            *candidates(before),
        ]
        missing = (*missing, OpenedEpoch(epoch, NOT_WRITTEN, max(below, default=None)))
    return missing


def best_first(state: LogState, staged: Collection[SnapshotId]) -> tuple[Choice, ...]:
    """What a restore tries: snapshots of the lineage, newest first; of one in both tiers the staged
    copy first."""
    # The staged copy first: it is in memory of this node, while a durable one must be downloaded.
    choices = [Choice(pair, STAGED) for pair in on_lineage(state, staged)]
    choices += [Choice(pair, DURABLE) for pair in candidates(state)]
    return tuple(
        sorted(choices, key=lambda choice: (choice.snapshot, choice.tier == STAGED), reverse=True)
    )


def superseded(state: LogState, snapshot: SnapshotId) -> bool:
    """Whether ``snapshot`` is committed, or can't be any more because its epoch has a later
    commit."""
    return any(
        entry.snapshot.epoch == snapshot.epoch and entry.snapshot.step >= snapshot.step
        for entry in state.snapshots
    )


def not_needed(state: LogState, snapshot: SnapshotId) -> bool:
    """Whether committing ``snapshot`` helps no restore: it is superseded, or the lineage has a
    newer one."""
    newest = state.newest()
    return superseded(state, snapshot) or (newest is not None and newest >= snapshot)


def _within(step: int, last_step: int | None) -> bool:
    return last_step is None or step <= last_step
