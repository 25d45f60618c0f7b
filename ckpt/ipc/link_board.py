"""The board: what the ranks of a node tell each other and their keeper at every step, in shared memory.

It is an array of 64-bit words in native byte order, in one memfd that all map:

    header   0 magic  1 version  2 ranks  3 attempt  4 act until (ns, CLOCK_BOOTTIME)  5 others count              64 words
    ring     a decision for each boundary modulo 64: attempt << 48 | boundary << 2 | flags                       64 words
    a rank   0 attempt  1 completed + 1  2 beat (ns, CLOCK_BOOTTIME)  3 phase  4 first step done
             5 longest recent step (ns)  6 staged  7 skipped
             from 16 on, four for each slot: epoch, step, generation (0: nothing sealed), held                  128 words
    others   as one more rank, written by the keeper: what the ranks of all other nodes have in common            128 words

Each word has one writer at a time and is written with one aligned 8-byte store, so a reader sees an old value or the new
one. What takes several words is read twice.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Set

from ckpt.errors import IntegrityError, UsageError
from ckpt.ipc.anonymous import open_anonymous
from ckpt.ipc.board import COUNTERS, HEADER_WORDS, RING_WORDS, RankBoard, first_word
from ckpt.values import PAGE_BYTES, SnapshotId

RANKS_MAX = 4096
"""Ranks of one node; a reader refuses to map more."""
STAGE = 1
"""Flag of a decision: take a snapshot at this boundary."""

_MAGIC = int.from_bytes(b"ckptbord", "little")
_VERSION = 2
_ATTEMPT_MASK = (1 << 16) - 1
_BOUNDARY_MASK = (1 << 46) - 1
_FLAGS_MASK = 3

_RANKS, _ATTEMPT, _ACT_UNTIL, _OTHERS_COUNT = 2, 3, 4, 5


def newest_common(sets: Iterable[Set[SnapshotId]]) -> SnapshotId | None:
    """The newest pair that is in every set; None where there is none, or no set."""
    every = list(sets)
    return max(frozenset(every[0]).intersection(*every[1:]), default=None) if every else None


class Board:
    """The whole board, mapped. ``fd`` refers to its memory for handing on and belongs to the board."""

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
        """A board of zeros for ``ranks`` ranks."""
        if not 1 <= ranks <= RANKS_MAX:
            raise UsageError(f"no such number of ranks. ranks={ranks} limit={RANKS_MAX}")
        fd = open_anonymous("ckpt-board")
        try:
            os.ftruncate(fd, _size_bytes(ranks))
            board = cls(fd, ranks)
        except BaseException:
            os.close(fd)
            raise
        board._words[_RANKS] = ranks
        board._words[1] = _VERSION
        board._words[0] = _MAGIC
        return board

    @classmethod
    def attach(cls, fd: int) -> Board:
        """The board behind ``fd``, which is the board's from now on, even where IntegrityError says that it is none."""
        try:
            ranks = _ranks_behind(fd)
            return cls(fd, ranks)
        except BaseException:
            os.close(fd)
            raise

    @property
    def attempt(self) -> int:
        """The attempt that the node is in, from 1; 0 before the first."""
        return self._words[_ATTEMPT]

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._words[_ATTEMPT] = attempt

    @property
    def act_until_ns(self) -> int:
        """Until when trainers may go on, on the clock of ``now_ns``; 0: for ever."""
        return self._words[_ACT_UNTIL]

    def act_until(self, until_ns: int) -> None:
        """They may go on until then, at least; from any thread. What was once promised is not taken back."""
        with self._promises:
            if self.fd >= 0 and until_ns > self._words[_ACT_UNTIL]:
                self._words[_ACT_UNTIL] = until_ns

    def rank(self, rank: int) -> RankBoard:
        """The part of one rank."""
        if not 0 <= rank < self.ranks:
            raise UsageError(f"no such rank on this board. rank={rank} ranks={self.ranks}")
        return RankBoard(self._words, rank, self._fence)

    @property
    def others(self) -> RankBoard:
        """The ranks of all other nodes as one: it holds what all of them hold, and has come as far as the last of them."""
        return RankBoard(self._words, self.ranks, self._fence)

    @property
    def others_count(self) -> bool:
        """Whether the job has ranks on other nodes."""
        return bool(self._words[_OTHERS_COUNT])

    @others_count.setter
    def others_count(self, count: bool) -> None:
        self._words[_OTHERS_COUNT] = count

    def everyone(self) -> list[RankBoard]:
        """The ranks of this node, and those of others as one where there are any."""
        here = [self.rank(rank) for rank in range(self.ranks)]
        return [*here, self.others] if self.others_count else here

    def decide(self, boundary: int, flags: int) -> None:
        """Publish what all ranks do at ``boundary``, in the current attempt. Replaces what was decided 64 boundaries before."""
        attempt = self.attempt
        if attempt == 0:
            raise UsageError(f"no attempt has begun, so nothing can be decided. boundary={boundary}")
        if not 0 <= boundary <= _BOUNDARY_MASK or not 0 <= flags <= _FLAGS_MASK:
            raise UsageError(f"not a decision. boundary={boundary} flags={flags}")
        self._words[HEADER_WORDS + boundary % RING_WORDS] = _decision(attempt, boundary) | flags

    def decision(self, boundary: int) -> int | None:
        """The flags decided for ``boundary`` in this attempt; None where nothing was, or it is 64 boundaries ago."""
        word = self._words[HEADER_WORDS + boundary % RING_WORDS]
        attempt = self.attempt
        return word & _FLAGS_MASK if attempt and word & ~_FLAGS_MASK == _decision(attempt, boundary) else None

    def complete(self) -> SnapshotId | None:
        """The newest pair that a slot of every rank holds sealed.

        Ranks are read one after the other. A pair may have been overwritten on one of them meanwhile, but only because a newer
        one was complete: a pair at least as new as the answer is complete now.
        """
        return newest_common(one.pairs() for one in self.everyone())

    def begin_attempt(self, attempt: int) -> None:
        """Reset all counters and decisions for a new attempt; what slots hold stays. No trainer may be running."""
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
        """Unmap and give up the descriptor; parts of ranks are of no use any more. Idempotent."""
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
    """How many ranks the board behind ``fd`` has. Raises IntegrityError where it is no board."""
    size_bytes = os.fstat(fd).st_size
    if size_bytes < _size_bytes(1):
        raise IntegrityError(f"not a board: too small. size_bytes={size_bytes}")
    with mmap.mmap(fd, HEADER_WORDS * 8) as header, memoryview(header).cast("Q") as words:
        magic, version, ranks = words[0], words[1], words[_RANKS]
    if magic != _MAGIC or version != _VERSION:
        raise IntegrityError(f"not a board of this version. magic={magic:#x} version={version} known={_VERSION}")
    if not 1 <= ranks <= RANKS_MAX or size_bytes < _size_bytes(ranks):
        raise IntegrityError(f"not a board: its size and its ranks differ. size_bytes={size_bytes} ranks={ranks}")
    return ranks
