"""The log as a keeper's loop knows it: as it was read, with what was given out and committed
since."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ckpt.errors import FencedError, InternalError, UsageError
from ckpt.ipc.messages import Choice
from ckpt.keeper.uploads.choices import (
    NOT_WRITTEN,
    best_first,
    missing_opens,
    not_needed,
    own_staged,
    restorable,
    with_pending,
)
from ckpt.keeper.uploads.store_log import FirstOpened, IssuedEpoch, LogReading, new_origin
from ckpt.log.state import LogState, OpenedEpoch
from ckpt.values import SnapshotId


@dataclass(slots=True)
class LogView:
    """No store is asked here."""

    _state: LogState | None = None
    _opens: list[OpenedEpoch] = field(default_factory=list)
    _ids: dict[int, str] = field(default_factory=dict)
    _commits: list[SnapshotId] = field(default_factory=list)
    log_id: str | None = None
    """The id of the store that was met last; empty for none, None before any was looked for."""
    stores: int = 0
    """How often another store, or none, stood where one was."""
    staged: dict[SnapshotId, str] = field(default_factory=dict)
    """What all ranks' slots held when choices were last asked for, with origins."""

    @property
    def epoch(self) -> int:
        """The newest epoch that was given out here; 0 before the first."""
        return self._opens[-1].epoch if self._opens else 0

    @property
    def state(self) -> LogState:
        """The log's fold as it will be once all that was given out is written."""
        if self._state is None:
            raise InternalError("the log is looked into before it was read.")
        return with_pending(self._state, self._opens, self._commits)

    def origin_of(self, epoch: int) -> str:
        """The write id of the record that opens ``epoch``; empty where it is not known."""
        return self._ids.get(epoch, "")

    def committed(self, snapshot: SnapshotId) -> None:
        """A snapshot became durable."""
        self._commits.append(snapshot)

    def commits(self) -> frozenset[SnapshotId]:
        """What became durable here since the log was last read."""
        return frozenset(self._commits)

    def update(self, seen: LogReading, before: Collection[SnapshotId]) -> bool:
        """Take in what was read; ``before``: what was committed before the read. True where a
        foreign epoch is open.

        A number that was given out here and has another's record is foreign, and so is all that was
        given out after it.
        """
        self._state = seen.state
        self._commits = [pair for pair in self._commits if pair not in before]
        given = [opened.epoch for opened in self._opens]
        lost = [
            epoch
            for epoch in given
            if epoch in seen.ids and seen.ids[epoch] != self._ids.get(epoch)
        ]
        foreign = bool(lost) or seen.state.epoch > self.epoch
        if lost:
            self._opens = [opened for opened in self._opens if opened.epoch < min(lost)]
            self._ids = {epoch: origin for epoch, origin in self._ids.items() if epoch < min(lost)}
        self._ids.update(seen.ids)
        return foreign

    def fenced(self) -> FencedError:
        """The error of a writer who finds a foreign epoch."""
        newest = self.state.epoch
        return FencedError(
            f"another writer opened an epoch of this job. newest={newest} mine={self.epoch} stop "
            "this one"
        )

    def begin(self, begun: FirstOpened) -> None:
        """Take in the first epoch of a launch."""
        self._state = begun.seen.state
        # What an earlier launch gave out and is not in the log never comes there.
        self._opens = [opened for opened in self._opens if opened.epoch <= begun.seen.state.epoch]
        self._opens += begun.opens
        self._ids.update(begun.ids)

    def store_changed(self, log_id: str) -> bool:
        """Whether another store than before is there, or none (an empty id): all that was known is
        forgotten then."""
        before, self.log_id = self.log_id, log_id
        if not before or before == log_id:
            return False
        self._state = None
        self.stores += 1
        self._opens, self._ids, self._commits, self.staged = [], {}, [], {}
        return True

    def issue(self, resume: SnapshotId | None) -> IssuedEpoch:
        """The next epoch, to be recorded later. Raises UsageError where ``resume`` is of no epoch
        that was opened."""
        state = self.state
        if resume is not None and all(opened.epoch != resume.epoch for opened in state.opens):
            raise UsageError(f"goes on from an epoch that was never opened. from={resume}")
        given = IssuedEpoch(state.epoch + 1, resume, new_origin(self.origin_of(self.epoch)))
        self._opens.append(OpenedEpoch(given.epoch, NOT_WRITTEN, resume))
        self._ids[given.epoch] = given.write_id
        return given

    def best_first(self, staged: Mapping[SnapshotId, str]) -> tuple[Choice, ...]:
        """What a restore tries, best first; nothing before the log was read."""
        if self._state is None:
            return ()
        state = self.state
        counted = own_staged(state, self._ids, staged)
        return best_first(with_pending(state, missing_opens(state, counted)), counted)

    def restorable(self, snapshot: SnapshotId, origin: str) -> bool:
        """Whether a staged pair is on the line, so that a restart would go on from it."""
        return snapshot in restorable(self.state, self._ids, {snapshot: origin})

    def not_needed(self, snapshot: SnapshotId) -> bool:
        """Whether nobody needs ``snapshot`` committed any more, as far as the log is known."""
        return self._state is not None and not_needed(self.state, snapshot)
