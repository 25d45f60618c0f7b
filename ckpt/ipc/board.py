"""The board: counters in shared memory, for the ranks of a node and their keeper.

All of them read and write it at every step. It is an array of 64-bit words in native byte order,
in one memfd that all of them map:

  header   0 magic  1 version  2 ranks  3 attempt  4 act until (ns, CLOCK_BOOTTIME)
           5 has remote ranks                                                        64 words
  ring     a decision for each boundary modulo 64:
           attempt << 48 | boundary << 2 | flags                                     64 words
  a rank   0 attempt  1 completed + 1  2 beat (ns, CLOCK_BOOTTIME)  3 phase
           4 first step done  5 longest recent step (ns)  6 staged  7 skipped
           from 16 on, four for each slot: epoch, step, generation (0: nothing
           sealed), held                                                            128 words
  remote   like one more rank, written by the keeper: what the ranks of all other
           nodes have in common                                                     128 words

Each word has one writer at a time and is written by one aligned 8-byte store, so a reader sees
the old value or the new one, never a mixture. Values of several words are read twice
(``RankBoard.slot``).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from ckpt.errors import IntegrityError, UsageError
from ckpt.values import PAGE_BYTES, SnapshotId, TrainerPhase


def open_anonymous(name: str) -> int:
    """The descriptor of fresh memory without a name in a file system, freed with its last holder.

    Closed on exec.

    A memfd, or an unlinked file if the system has none.
    """
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
    folder = Path("/dev/shm")
    path = (folder if folder.is_dir() else Path("/tmp")) / f"{name}-{os.urandom(8).hex()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


SLOTS_MAX = 16
"""Slots of one rank."""
RING_WORDS = 64
"""For how many boundaries decisions are kept."""
RECENT_STEPS = 64
"""The longest of that many steps is published."""
HEADER_WORDS = 64
COUNTERS = 16
"""Words of a rank before those of its slots."""

_RANK_WORDS = 128
_SLOT_WORDS = 4
_READS_MAX = 8

_OWN_ATTEMPT, _COMPLETED, _BEAT, _PHASE, _FIRST_STEP, _LONGEST_STEP, _STAGED, _SKIPPED = range(8)
_EPOCH, _STEP, _GENERATION, _HELD = range(4)

_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class BoardSlot:
    """One slot as the board shows it.

    ``snapshot`` is the sealed one (None: none), ``held``: an upload holds the slot.
    """

    index: int
    snapshot: SnapshotId | None
    generation: int
    held: bool


def now_ns() -> int:
    """The board's clock.

    It also runs while the machine sleeps, and is the same in all processes of a machine.
    """
    return time.clock_gettime_ns(_CLOCK)


def first_word(rank: int) -> int:
    """The index of a rank's first word."""
    return HEADER_WORDS + RING_WORDS + rank * _RANK_WORDS


class RankBoard:
    """One rank's part of a board.

    Its trainer writes it; its keeper writes the ``held`` words of slots.

    The class is larger than the project's limit of 20 public methods: each counter is one
    property.
    """

    __slots__ = ("_fence", "_first", "_last_beat_ns", "_recent_ns", "_words", "rank")

    def __init__(self, words: memoryview[int], rank: int, fence: threading.Lock) -> None:
        self._words = words
        self._first = first_word(rank)
        self._fence = fence
        self._last_beat_ns = 0
        self._recent_ns: deque[int] = deque(maxlen=RECENT_STEPS)
        self.rank = rank

    @property
    def attempt(self) -> int:
        """The attempt of the trainer that writes here; 0 before the first one."""
        return self._words[self._first + _OWN_ATTEMPT]

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._words[self._first + _OWN_ATTEMPT] = attempt

    @property
    def completed(self) -> int | None:
        """The number of completed steps; None before the first beat."""
        word = self._words[self._first + _COMPLETED]
        return word - 1 if word else None

    @completed.setter
    def completed(self, completed: int | None) -> None:
        self._words[self._first + _COMPLETED] = 0 if completed is None else completed + 1

    @property
    def beat_ns(self) -> int:
        """When the last boundary was reached, on the clock of ``now_ns``; 0: none yet."""
        return self._words[self._first + _BEAT]

    @property
    def phase(self) -> TrainerPhase:
        """What the trainer is doing.

        A value of a later version reads as STARTING, which has the longest limit.
        """
        with contextlib.suppress(ValueError):
            return TrainerPhase(self._words[self._first + _PHASE])
        return TrainerPhase.STARTING

    @phase.setter
    def phase(self, phase: TrainerPhase) -> None:
        self._words[self._first + _PHASE] = phase
        if phase is not TrainerPhase.TRAINING:
            self._last_beat_ns = 0  # the length of a step with a pause in it must not count

    @property
    def first_step_done(self) -> bool:
        """Whether this attempt's first step, which may include compilation, is over."""
        return bool(self._words[self._first + _FIRST_STEP])

    @first_step_done.setter
    def first_step_done(self, done: bool) -> None:
        self._words[self._first + _FIRST_STEP] = done

    @property
    def longest_step_ns(self) -> int:
        """The longest of the last RECENT_STEPS steps, in nanoseconds; 0: unknown yet."""
        return self._words[self._first + _LONGEST_STEP]

    @longest_step_ns.setter
    def longest_step_ns(self, longest_ns: int) -> None:
        self._words[self._first + _LONGEST_STEP] = longest_ns

    @property
    def staged(self) -> int:
        """The number of snapshots that this attempt staged."""
        return self._words[self._first + _STAGED]

    @staged.setter
    def staged(self, count: int) -> None:
        self._words[self._first + _STAGED] = count

    @property
    def skipped(self) -> int:
        """The number of due snapshots that this attempt skipped."""
        return self._words[self._first + _SKIPPED]

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._words[self._first + _SKIPPED] = count

    def beat(self, completed: int) -> None:
        """Publish a boundary: ``completed`` steps are done. About 3 microseconds.

        Always from one thread and on the same object, which remembers the time of the last beat.
        """
        now = now_ns()
        if self._last_beat_ns:
            self._recent_ns.append(now - self._last_beat_ns)
            self._words[self._first + _LONGEST_STEP] = max(self._recent_ns)
        self._last_beat_ns = now
        self._words[self._first + _COMPLETED] = completed + 1
        self._words[self._first + _BEAT] = now

    def slot(self, index: int) -> BoardSlot:
        """What slot ``index`` holds; nothing while it is being changed."""
        at = self._slot(index)
        words = self._words
        held = bool(words[at + _HELD])
        # The writer clears the generation, writes epoch and step, then sets the new generation. If
        # the generation is the same before and after, epoch and step between belong to it.
        for _ in range(_READS_MAX):
            generation = words[at + _GENERATION]
            if generation == 0:
                break
            snapshot = SnapshotId(words[at + _EPOCH], words[at + _STEP])
            if words[at + _GENERATION] == generation:
                return BoardSlot(index, snapshot, generation, held)
        return BoardSlot(index, None, 0, held)

    def slots(self) -> list[BoardSlot]:
        """All SLOTS_MAX slots, whether they exist or not."""
        return [self.slot(index) for index in range(SLOTS_MAX)]

    def sealed_snapshots(self) -> frozenset[SnapshotId]:
        """The snapshots that are sealed in slots. About 10 microseconds."""
        first = self._slot(0) + _GENERATION
        generations = self._words[first : first + SLOTS_MAX * _SLOT_WORDS : _SLOT_WORDS].tolist()
        slots = (self.slot(index) for index, generation in enumerate(generations) if generation)
        return frozenset(slot.snapshot for slot in slots if slot.snapshot is not None)

    def publish(self, index: int, snapshot: SnapshotId, generation: int) -> None:
        """Slot ``index`` is sealed and holds ``snapshot`` under ``generation`` (from 1)."""
        if generation < 1:
            raise UsageError(
                f"a sealed slot has a generation. index={index} generation={generation}"
            )
        at = self._slot(index)
        self.clear(index)
        # Releasing and taking a lock is the only memory barrier that Python has: a reader in
        # another process must never see the new generation with the old epoch or step.
        with self._fence:
            self._words[at + _EPOCH] = snapshot.epoch
            self._words[at + _STEP] = snapshot.step
        with self._fence:
            self._words[at + _GENERATION] = generation

    def clear(self, index: int) -> None:
        """Slot ``index`` holds nothing sealed any more. Call it before the slot is overwritten."""
        with self._fence:  # a barrier: later stores, also those into the slot, stay behind this one
            self._words[self._slot(index) + _GENERATION] = 0

    def hold(self, index: int) -> None:
        """An upload holds slot ``index``: it must not be overwritten."""
        self._words[self._slot(index) + _HELD] = 1

    def release(self, index: int) -> None:
        """No upload holds slot ``index`` any more."""
        self._words[self._slot(index) + _HELD] = 0

    def publish_remote(self, snapshots: Iterable[SnapshotId], completed: int | None) -> None:
        """On the part of remote ranks: publish what all of them have sealed and completed.

        Of the snapshots only the newest SLOTS_MAX. They are written before ``completed``: a
        reader that reads ``completed`` first then finds every snapshot that those ranks had
        sealed by that step.
        """
        wanted = sorted(set(snapshots), reverse=True)[:SLOTS_MAX]
        shown = {slot.snapshot: slot.index for slot in self.slots() if slot.snapshot is not None}
        for snapshot, index in shown.items():
            if snapshot not in wanted:
                self.clear(index)
        kept = {shown[snapshot] for snapshot in wanted if snapshot in shown}
        free = [index for index in range(SLOTS_MAX) if index not in kept]
        for snapshot in wanted:
            if snapshot not in shown:
                self.publish(free.pop(0), snapshot, 1)
        self.completed = completed

    def _slot(self, index: int) -> int:
        if not 0 <= index < SLOTS_MAX:
            raise UsageError(f"no such slot on a board. index={index} limit={SLOTS_MAX}")
        return self._first + COUNTERS + index * _SLOT_WORDS


# ---- the whole board

RANKS_MAX = 4096
"""The most ranks of one node; a reader refuses to map more."""
STAGE = 1
"""Flag of a decision: take a snapshot at this boundary."""

_MAGIC = int.from_bytes(b"ckptbord", "little")
_VERSION = 2
_ATTEMPT_MASK = (1 << 16) - 1
_BOUNDARY_MASK = (1 << 46) - 1
_FLAGS_MASK = 3

_RANKS, _ATTEMPT, _ACT_UNTIL, _OTHERS_COUNT = 2, 3, 4, 5


def newest_common(sets: Iterable[Set[SnapshotId]]) -> SnapshotId | None:
    """The newest snapshot that is in every set; None if there is none, or no set."""
    all_sets = list(sets)
    return (
        max(frozenset(all_sets[0]).intersection(*all_sets[1:]), default=None) if all_sets else None
    )


class Board:
    """The whole board, mapped.

    ``fd`` refers to its memory, for passing on; it belongs to the board.
    """

    __slots__ = ("_fence", "_map", "_promises", "_words", "fd", "ranks")

    def __init__(self, fd: int, ranks: int) -> None:
        self._map = mmap.mmap(fd, _size_bytes(ranks))
        self._words = memoryview(self._map).cast("Q")
        self._fence = threading.Lock()
        self._promises = threading.Lock()
        self.fd = fd
        self.ranks = ranks

    @classmethod
    def create(cls, ranks: int) -> Board:
        """A zeroed board for ``ranks`` ranks."""
        if not 1 <= ranks <= RANKS_MAX:
            raise UsageError(f"no such number of ranks. ranks={ranks} limit={RANKS_MAX}")
        fd = open_anonymous("ckpt-board")
        try:
            os.ftruncate(fd, _size_bytes(ranks))
            board = cls(fd, ranks)
        except BaseException:
            os.close(fd)
            raise
        # The magic is written last: a reader rejects a board that is not initialised.
        board._words[_RANKS] = ranks
        board._words[1] = _VERSION
        board._words[0] = _MAGIC
        return board

    @classmethod
    def attach(cls, fd: int) -> Board:
        """The board behind ``fd``.

        Takes ``fd`` over, even if it raises IntegrityError because ``fd`` is not a board.
        """
        try:
            ranks = _ranks_behind(fd)
            return cls(fd, ranks)
        except BaseException:
            os.close(fd)
            raise

    @property
    def attempt(self) -> int:
        """The node's current attempt, from 1; 0 before the first."""
        return self._words[_ATTEMPT]

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._words[_ATTEMPT] = attempt

    @property
    def act_until_ns(self) -> int:
        """Until when trainers may run, on the clock of ``now_ns``; 0: without limit."""
        return self._words[_ACT_UNTIL]

    def extend_act_until(self, until_ns: int) -> None:
        """Trainers may run at least until ``until_ns``.

        From any thread. An earlier promise is never shortened.
        """
        # Supervisors rely on every promise that they have read. The lock keeps ``close`` from
        # unmapping the memory under the keepalive thread.
        with self._promises:
            if self.fd >= 0 and until_ns > self._words[_ACT_UNTIL]:
                self._words[_ACT_UNTIL] = until_ns

    def rank(self, rank: int) -> RankBoard:
        """The part of one rank."""
        if not 0 <= rank < self.ranks:
            raise UsageError(f"no such rank on this board. rank={rank} ranks={self.ranks}")
        return RankBoard(self._words, rank, self._fence)

    @property
    def remote_ranks(self) -> RankBoard:
        """All other nodes' ranks as one: what all of them hold, and the step of the slowest."""
        return RankBoard(self._words, self.ranks, self._fence)

    @property
    def has_remote_ranks(self) -> bool:
        """Whether the job has ranks on other nodes."""
        return bool(self._words[_OTHERS_COUNT])

    @has_remote_ranks.setter
    def has_remote_ranks(self, count: bool) -> None:
        self._words[_OTHERS_COUNT] = count

    def all_ranks(self) -> list[RankBoard]:
        """The ranks of this node, and those of other nodes as one if there are any."""
        local = [self.rank(rank) for rank in range(self.ranks)]
        return [*local, self.remote_ranks] if self.has_remote_ranks else local

    def decide(self, boundary: int, flags: int) -> None:
        """Publish what all ranks do at ``boundary`` in the current attempt.

        Replaces the decision of 64 boundaries before.
        """
        attempt = self.attempt
        if attempt == 0:
            raise UsageError(
                f"no attempt has begun, so nothing can be decided. boundary={boundary}"
            )
        if not 0 <= boundary <= _BOUNDARY_MASK or not 0 <= flags <= _FLAGS_MASK:
            raise UsageError(f"not a decision. boundary={boundary} flags={flags}")
        self._words[HEADER_WORDS + boundary % RING_WORDS] = _decision(attempt, boundary) | flags

    def decision(self, boundary: int) -> int | None:
        """The flags decided for ``boundary`` in this attempt, or None.

        None also for a decision that is 64 boundaries old.
        """
        word = self._words[HEADER_WORDS + boundary % RING_WORDS]
        attempt = self.attempt
        return (
            word & _FLAGS_MASK
            if attempt and word & ~_FLAGS_MASK == _decision(attempt, boundary)
            else None
        )

    def newest_complete(self) -> SnapshotId | None:
        """The newest snapshot that a slot of every rank holds sealed.

        Ranks are read one after the other. A snapshot may be overwritten on one of them
        meanwhile, but only because a newer one was complete: some snapshot at least as new as the
        result is complete now.
        """
        return newest_common(rank.sealed_snapshots() for rank in self.all_ranks())

    def begin_attempt(self, attempt: int) -> None:
        """Reset all counters and decisions for a new attempt; slots keep what they hold.

        No trainer may be running.
        """
        if attempt < 1:
            raise UsageError(f"attempts count from 1. attempt={attempt}")
        for at in range(HEADER_WORDS, HEADER_WORDS + RING_WORDS):
            self._words[at] = 0
        for rank in range(self.ranks + 1):
            first = first_word(rank)
            for at in range(first, first + COUNTERS):
                self._words[at] = 0
        self.attempt = attempt

    def close(self) -> None:
        """Unmap the board and close its descriptor; its ``RankBoard``s are unusable afterwards.

        Idempotent.
        """
        if self.fd < 0:
            return
        with self._promises:
            fd, self.fd = self.fd, -1
        self._words.release()
        self._map.close()
        os.close(fd)


def _decision(attempt: int, boundary: int) -> int:
    return (attempt & _ATTEMPT_MASK) << 48 | (boundary & _BOUNDARY_MASK) << 2


def _size_bytes(ranks: int) -> int:
    return -(-first_word(ranks + 1) * 8 // PAGE_BYTES) * PAGE_BYTES


def _ranks_behind(fd: int) -> int:
    """The number of ranks of the board behind ``fd``.

    Raises IntegrityError if it is not a board.
    """
    size_bytes = os.fstat(fd).st_size
    if size_bytes < _size_bytes(1):
        raise IntegrityError(f"not a board: too small. size_bytes={size_bytes}")
    with mmap.mmap(fd, HEADER_WORDS * 8) as header, memoryview(header).cast("Q") as words:
        magic, version, ranks = words[0], words[1], words[_RANKS]
    if magic != _MAGIC or version != _VERSION:
        raise IntegrityError(
            f"not a board of this version. magic={magic:#x} version={version} known={_VERSION}"
        )
    if not 1 <= ranks <= RANKS_MAX or size_bytes < _size_bytes(ranks):
        raise IntegrityError(
            f"not a board: its size and its ranks differ. size_bytes={size_bytes} ranks={ranks}"
        )
    return ranks
