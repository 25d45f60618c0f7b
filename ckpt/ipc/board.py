"""One rank's part of the board: what its trainer tells at each step, and which pairs its slots hold. Layout: see ``board``."""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt.errors import UsageError
from ckpt.values import SnapshotId

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


class Phase(enum.IntEnum):
    """What a trainer is at. Only in TRAINING does a step that takes too long mean that it hangs."""

    STARTING = 0
    BUILDING = 1
    TRAINING = 2
    PAUSED = 3
    DEBUGGING = 4
    FINISHED = 5


@dataclass(frozen=True, slots=True)
class SlotWord:
    """What the board says of one slot: the pair that it holds sealed (None: nothing) under which generation, and whether an
    upload holds it."""

    index: int
    snapshot: SnapshotId | None
    generation: int
    held: bool


def now_ns() -> int:
    """The board's clock: it goes on while the machine sleeps, and all processes of a machine share it."""
    return time.clock_gettime_ns(_CLOCK)


def first_word(rank: int) -> int:
    """Where the words of a rank begin."""
    return HEADER_WORDS + RING_WORDS + rank * _RANK_WORDS


class RankBoard:
    """One rank's part of a board. Its trainer writes it; its keeper writes what is said about slots that uploads hold."""

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
        """The attempt of the trainer that writes here; 0 where none has come yet."""
        return self._words[self._first + _OWN_ATTEMPT]

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._words[self._first + _OWN_ATTEMPT] = attempt

    @property
    def completed(self) -> int | None:
        """How many steps are complete; None before the first beat."""
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
    def phase(self) -> Phase:
        """What the trainer is at. A value of a later version reads as STARTING, which nobody judges."""
        with contextlib.suppress(ValueError):
            return Phase(self._words[self._first + _PHASE])
        return Phase.STARTING

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._words[self._first + _PHASE] = phase
        if phase is not Phase.TRAINING:
            self._last_beat_ns = 0  # how long a step with a pause in it took says nothing

    @property
    def first_step_done(self) -> bool:
        """Whether this attempt's first step, which may compile, is over."""
        return bool(self._words[self._first + _FIRST_STEP])

    @first_step_done.setter
    def first_step_done(self, done: bool) -> None:
        self._words[self._first + _FIRST_STEP] = done

    @property
    def longest_step_ns(self) -> int:
        """The longest of the last RECENT_STEPS steps, in nanoseconds; 0: not known yet."""
        return self._words[self._first + _LONGEST_STEP]

    @longest_step_ns.setter
    def longest_step_ns(self, longest_ns: int) -> None:
        self._words[self._first + _LONGEST_STEP] = longest_ns

    @property
    def staged(self) -> int:
        """How many snapshots this attempt staged."""
        return self._words[self._first + _STAGED]

    @staged.setter
    def staged(self, count: int) -> None:
        self._words[self._first + _STAGED] = count

    @property
    def skipped(self) -> int:
        """How many due snapshots this attempt skipped."""
        return self._words[self._first + _SKIPPED]

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._words[self._first + _SKIPPED] = count

    def beat(self, completed: int) -> None:
        """A boundary is reached: ``completed`` steps are done. About 3 microseconds. One thread, and always the same object."""
        now = now_ns()
        if self._last_beat_ns:
            self._recent_ns.append(now - self._last_beat_ns)
            self._words[self._first + _LONGEST_STEP] = max(self._recent_ns)
        self._last_beat_ns = now
        self._words[self._first + _COMPLETED] = completed + 1
        self._words[self._first + _BEAT] = now

    def slot(self, index: int) -> SlotWord:
        """What slot ``index`` holds. One that is being changed holds nothing."""
        at = self._slot(index)
        words = self._words
        held = bool(words[at + _HELD])
        for _ in range(_READS_MAX):
            generation = words[at + _GENERATION]
            if generation == 0:
                break
            snapshot = SnapshotId(words[at + _EPOCH], words[at + _STEP])
            if words[at + _GENERATION] == generation:
                return SlotWord(index, snapshot, generation, held)
        return SlotWord(index, None, 0, held)

    def slots(self) -> list[SlotWord]:
        """All SLOTS_MAX slots, whether they are there or not."""
        return [self.slot(index) for index in range(SLOTS_MAX)]

    def pairs(self) -> frozenset[SnapshotId]:
        """What the slots hold sealed. About 10 microseconds."""
        first = self._slot(0) + _GENERATION
        generations = self._words[first : first + SLOTS_MAX * _SLOT_WORDS : _SLOT_WORDS].tolist()
        words = (self.slot(index) for index, generation in enumerate(generations) if generation)
        return frozenset(word.snapshot for word in words if word.snapshot is not None)

    def publish(self, index: int, snapshot: SnapshotId, generation: int) -> None:
        """Slot ``index`` is sealed and holds ``snapshot`` under ``generation`` (from 1)."""
        if generation < 1:
            raise UsageError(f"a sealed slot has a generation. index={index} generation={generation}")
        at = self._slot(index)
        self.clear(index)
        with self._fence:
            self._words[at + _EPOCH] = snapshot.epoch
            self._words[at + _STEP] = snapshot.step
        with self._fence:
            self._words[at + _GENERATION] = generation

    def clear(self, index: int) -> None:
        """Slot ``index`` holds nothing sealed any more. Before it is begun."""
        with self._fence:  # giving up a lock and taking it again keeps later stores behind this one
            self._words[self._slot(index) + _GENERATION] = 0

    def hold(self, index: int) -> None:
        """An upload holds slot ``index``: it must not be overwritten."""
        self._words[self._slot(index) + _HELD] = 1

    def let_go(self, index: int) -> None:
        """No upload holds slot ``index`` any more."""
        self._words[self._slot(index) + _HELD] = 0

    def show(self, pairs: Iterable[SnapshotId], completed: int | None) -> None:
        """For ranks elsewhere: they hold these pairs (the newest SLOTS_MAX) and completed so many steps. Pairs come first.

        Who reads ``completed`` before pairs then finds every pair that those ranks had sealed by then.
        """
        wanted = sorted(set(pairs), reverse=True)[:SLOTS_MAX]
        there = {word.snapshot: word.index for word in self.slots() if word.snapshot is not None}
        for pair, index in there.items():
            if pair not in wanted:
                self.clear(index)
        free = [index for index in range(SLOTS_MAX) if index not in {there[pair] for pair in wanted if pair in there}]
        for pair in wanted:
            if pair not in there:
                self.publish(free.pop(0), pair, 1)
        self.completed = completed

    def _slot(self, index: int) -> int:
        if not 0 <= index < SLOTS_MAX:
            raise UsageError(f"no such slot on a board. index={index} limit={SLOTS_MAX}")
        return self._first + COUNTERS + index * _SLOT_WORDS
