"""The log as the keeper's loop knows it: as it was last read, with what was issued and committed
since."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ckpt.errors import FencedError, InternalError, SupersededError, UsageError
from ckpt.ipc.messages import Choice
from ckpt.keeper.uploads.choices import (
    NOT_WRITTEN,
    best_first,
    missing_opens,
    not_needed,
    own_staged,
    restorable,
    superseded,
    with_pending,
)
from ckpt.keeper.uploads.store_log import FirstOpened, IssuedEpoch, LogReading, new_origin
from ckpt.log.state import LogState, OpenedEpoch
from ckpt.values import MembershipEpoch, SnapshotId


@dataclass(slots=True)
class LogView:
    """Never asks a store, so the loop may use it at any time."""

    _state: LogState | None = None
    _opens: list[OpenedEpoch] = field(default_factory=list)
    _ids: dict[int, str] = field(default_factory=dict)
    _commits: list[SnapshotId] = field(default_factory=list)
    log_id: str | None = None
    """The id of the store that was used last; "" if there was none, None before any was looked
    for."""
    stores: int = 0
    """How often the store was found to be another one, or gone."""
    staged: dict[SnapshotId, str] = field(default_factory=dict)
    """The snapshots, with origins, that all ranks' slots held when choices were last asked for."""

    @property
    def epoch(self) -> int:
        """The newest epoch that was issued here; 0 before the first."""
        return self._opens[-1].epoch if self._opens else 0

    @property
    def state(self) -> LogState:
        """The log's fold as it will be once all that was issued is written."""
        if self._state is None:
            raise InternalError("the log was used before it was read.")
        return with_pending(self._state, self._opens, self._commits)

    def origin_of(self, epoch: int) -> str:
        """The write id of the record that opens ``epoch``; "" if it is not known."""
        return self._ids.get(epoch, "")

    def committed(self, snapshot: SnapshotId) -> None:
        """A snapshot became durable."""
        self._commits.append(snapshot)

    def commits(self) -> frozenset[SnapshotId]:
        """What became durable here since the log was last read."""
        return frozenset(self._commits)

    def update(self, reading: LogReading, before: Collection[SnapshotId]) -> bool:
        """Take in what was read; ``before``: what was committed before the read. True if another
        writer's epoch is open.

        If a number that was issued here has another writer's record, it and all that was issued
        after it are foreign.
        """
        self._state = reading.state
        # What was committed while the log was being read may be missing in it, and stays pending.
        self._commits = [pair for pair in self._commits if pair not in before]
        issued = [opened.epoch for opened in self._opens]
        overtaken = [
            epoch
            for epoch in issued
            if epoch in reading.ids and reading.ids[epoch] != self._ids.get(epoch)
        ]
        foreign = bool(overtaken) or reading.state.epoch > self.epoch
        if overtaken:
            self._opens = [opened for opened in self._opens if opened.epoch < min(overtaken)]
            self._ids = {
                epoch: origin for epoch, origin in self._ids.items() if epoch < min(overtaken)
            }
        self._ids.update(reading.ids)
        return foreign

    def fenced(self, mine: MembershipEpoch | None) -> FencedError | SupersededError:
        """The error of a writer, of the membership epoch ``mine``, that finds a foreign epoch."""
        newest, opens = self.state.epoch, self.state.opens
        later = opens[-1].membership if opens else None
        if later is not None and later.supersedes(mine):
            return SupersededError(
                "a later membership epoch has opened an epoch of the log. "
                f"membership={mine} newest={later} this node's attempt is over"
            )
        return FencedError(
            f"another writer opened an epoch of this job. newest={newest} mine={self.epoch} stop "
            "this one"
        )

    def begin(self, begun: FirstOpened) -> None:
        """Take in the first epoch of a launch."""
        self._state = begun.seen.state
        # What an earlier launch issued and never wrote will not be written any more.
        self._opens = [opened for opened in self._opens if opened.epoch <= begun.seen.state.epoch]
        self._opens += begun.opens
        self._ids.update(begun.ids)

    def store_changed(self, log_id: str) -> bool:
        """Whether the store is another one than before, or gone (""): then all that was known of it
        is forgotten."""
        before, self.log_id = self.log_id, log_id
        if not before or before == log_id:
            return False
        self._state = None
        self.stores += 1
        self._opens, self._ids, self._commits, self.staged = [], {}, [], {}
        return True

    def issue(self, resume: SnapshotId | None) -> IssuedEpoch:
        """Issue the next epoch, to be recorded later. Raises UsageError if the epoch of ``resume``
        was never opened."""
        state = self.state
        if resume is not None and all(opened.epoch != resume.epoch for opened in state.opens):
            raise UsageError(f"continues from an epoch that was never opened. from={resume}")
        issued = IssuedEpoch(state.epoch + 1, resume, new_origin(self.origin_of(self.epoch)))
        self._opens.append(OpenedEpoch(issued.epoch, NOT_WRITTEN, resume))
        self._ids[issued.epoch] = issued.write_id
        return issued

    def best_first(self, staged: Mapping[SnapshotId, str]) -> tuple[Choice, ...]:
        """What a restore tries, best first; empty before the log was read."""
        if self._state is None:
            return ()
        state = self.state
        counted = own_staged(state, self._ids, staged)
        return best_first(with_pending(state, missing_opens(state, counted)), counted)

    def restorable(self, snapshot: SnapshotId, origin: str) -> bool:
        """Whether a staged snapshot is on the lineage, so that a restart would continue from it."""
        return snapshot in restorable(self.state, self._ids, {snapshot: origin})

    def superseded(self, snapshot: SnapshotId) -> bool:
        """Whether ``snapshot`` is committed, or a later one of its epoch is."""
        return self._state is not None and superseded(self.state, snapshot)

    def has(self, snapshot: SnapshotId) -> bool:
        """Whether ``snapshot`` is committed, as far as the log is known."""
        return self._state is not None and self.state.find(snapshot) is not None

    def not_needed(self, snapshot: SnapshotId) -> bool:
        """Whether committing ``snapshot`` would help no restore, as far as the log is known."""
        return self._state is not None and not_needed(self.state, snapshot)
