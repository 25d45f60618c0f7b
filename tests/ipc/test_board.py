"""The board shows one process what another wrote, and never half of it."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import IntegrityError, UsageError
from ckpt.ipc import board as module
from ckpt.ipc.board import (
    RANKS_MAX,
    RING_WORDS,
    SLOTS_MAX,
    STAGE,
    Board,
    BoardSlot,
    newest_common,
    now_ns,
    open_anonymous,
)
from ckpt.values import SnapshotId, TrainerPhase


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(3)
    yield made
    made.close()


def another(board: Board) -> contextlib.closing[Board]:
    """The same board, mapped once more."""
    return contextlib.closing(Board.attach(os.dup(board.fd)))


# ---- header and decisions


def test_what_one_mapping_writes_another_reads(board: Board) -> None:
    with another(board) as other:
        assert other.ranks == 3
        board.attempt = 4
        board.extend_act_until(1 << 62)
        board.extend_act_until(1 << 61)  # said late
        mine = board.rank(2)
        mine.attempt, mine.phase, mine.first_step_done = 4, TrainerPhase.TRAINING, True
        mine.staged, mine.skipped, mine.longest_step_ns = 5, 6, 7
        theirs = other.rank(2)
        assert (other.attempt, other.act_until_ns) == (4, 1 << 62)
        assert (theirs.attempt, theirs.phase, theirs.first_step_done) == (
            4,
            TrainerPhase.TRAINING,
            True,
        )
        assert (theirs.staged, theirs.skipped, theirs.longest_step_ns) == (5, 6, 7)
        assert (other.rank(0).attempt, other.rank(1).attempt) == (0, 0)


@pytest.mark.slow
def test_decisions_are_of_one_attempt_and_one_boundary(board: Board) -> None:
    board.begin_attempt(1)
    assert board.decision(0) is None
    board.decide(0, 0)
    board.decide(7, STAGE)
    assert (board.decision(0), board.decision(7), board.decision(8)) == (0, STAGE, None)
    assert board.decision(7 + RING_WORDS) is None
    board.decide(7 + RING_WORDS, 0)
    assert (board.decision(7), board.decision(7 + RING_WORDS)) == (None, 0)
    board.attempt = 2
    assert board.decision(0) is None


def test_nothing_is_decided_before_the_first_attempt(board: Board) -> None:
    assert board.decision(0) is None
    with pytest.raises(UsageError, match="no attempt"):
        board.decide(0, STAGE)


@pytest.mark.parametrize(("boundary", "flags"), [(-1, 0), (1 << 46, 0), (1, 4), (1, -1)])
def test_what_does_not_fit_a_word_is_no_decision(board: Board, boundary: int, flags: int) -> None:
    board.begin_attempt(1)
    with pytest.raises(UsageError, match="not a decision"):
        board.decide(boundary, flags)


@given(st.integers(1, 1 << 20), st.integers(0, (1 << 46) - 1), st.integers(0, 3))
def test_any_decision_is_read_back(attempt: int, boundary: int, flags: int) -> None:
    with contextlib.closing(Board.create(1)) as board:
        board.begin_attempt(attempt)
        board.decide(boundary, flags)
        assert board.decision(boundary) == flags


def test_a_new_attempt_resets_counters_and_decisions_and_keeps_slots(board: Board) -> None:
    board.begin_attempt(1)
    mine = board.rank(1)
    mine.attempt, mine.phase, mine.first_step_done, mine.staged, mine.skipped = (
        1,
        TrainerPhase.TRAINING,
        True,
        2,
        3,
    )
    mine.beat(9)
    mine.publish(2, SnapshotId(1, 8), 5)
    mine.hold(2)
    board.decide(10, STAGE)
    board.begin_attempt(2)
    assert board.attempt == 2
    assert (mine.attempt, mine.completed, mine.beat_ns, mine.phase) == (
        0,
        None,
        0,
        TrainerPhase.STARTING,
    )
    assert (mine.first_step_done, mine.longest_step_ns, mine.staged, mine.skipped) == (
        False,
        0,
        0,
        0,
    )
    assert mine.slot(2) == BoardSlot(2, SnapshotId(1, 8), 5, True)
    board.attempt = 1
    assert board.decision(10) is None
    with pytest.raises(UsageError, match="from 1"):
        board.begin_attempt(0)


# ---- beats


def test_a_beat_says_what_is_complete_and_when(board: Board) -> None:
    mine = board.rank(0)
    assert (mine.completed, mine.beat_ns) == (None, 0)
    before = now_ns()
    mine.beat(0)
    assert mine.completed == 0
    assert before <= mine.beat_ns <= now_ns()
    mine.completed = None
    assert mine.completed is None


def test_the_longest_recent_step_is_published_and_forgotten(monkeypatch, board: Board) -> None:
    mine = board.rank(0)
    clock = iter([10, 11, 16, *range(17, 17 + module.RECENT_STEPS)])
    monkeypatch.setattr(module, "now_ns", lambda: next(clock))
    seen = []
    for completed in range(module.RECENT_STEPS + 3):
        mine.beat(completed)
        seen.append(mine.longest_step_ns)
    assert seen == [0, 1, *([5] * module.RECENT_STEPS), 1]


def test_a_step_with_a_pause_in_it_says_nothing_about_steps(monkeypatch, board: Board) -> None:
    mine = board.rank(0)
    clock = iter([10, 11, 5000, 5002])
    monkeypatch.setattr(module, "now_ns", lambda: next(clock))
    mine.beat(0)
    mine.beat(1)
    mine.phase = TrainerPhase.PAUSED
    mine.phase = TrainerPhase.TRAINING
    mine.beat(2)
    assert mine.longest_step_ns == 1
    mine.beat(3)
    assert mine.longest_step_ns == 2


def test_a_phase_of_a_later_version_reads_as_starting(board: Board) -> None:
    board._words[module.first_word(0) + module._PHASE] = 99
    assert board.rank(0).phase is TrainerPhase.STARTING


# ---- slots


def test_slots_are_published_held_and_cleared(board: Board) -> None:
    mine = board.rank(0)
    assert mine.slots() == [BoardSlot(index, None, 0, False) for index in range(SLOTS_MAX)]
    mine.publish(15, SnapshotId(2, 30), 4)
    mine.hold(15)
    assert mine.slot(15) == BoardSlot(15, SnapshotId(2, 30), 4, True)
    assert mine.sealed_snapshots() == {SnapshotId(2, 30)}
    mine.clear(15)
    assert mine.sealed_snapshots() == frozenset()
    assert mine.slot(15) == BoardSlot(15, None, 0, True)
    mine.release(15)
    assert mine.slots() == board.rank(1).slots()


@pytest.mark.parametrize("index", [-1, SLOTS_MAX])
def test_there_is_no_slot_beyond_the_last(board: Board, index: int) -> None:
    mine = board.rank(0)
    for call in (mine.slot, mine.clear, mine.hold, mine.release):
        with pytest.raises(UsageError, match="no such slot"):
            call(index)
    with pytest.raises(UsageError):
        mine.publish(index, SnapshotId(1, 1), 1)


def test_a_sealed_slot_has_a_generation(board: Board) -> None:
    with pytest.raises(UsageError, match="generation"):
        board.rank(0).publish(0, SnapshotId(1, 1), 0)


def test_a_pair_is_complete_once_every_rank_holds_it(board: Board) -> None:
    assert board.newest_complete() is None
    for rank in range(3):
        board.rank(rank).publish(0, SnapshotId(1, 10), 1)
    assert board.newest_complete() == SnapshotId(1, 10)
    for rank in range(2):
        board.rank(rank).publish(1, SnapshotId(1, 11), 1)
    assert board.newest_complete() == SnapshotId(1, 10)
    board.rank(2).publish(5, SnapshotId(1, 11), 9)
    assert board.newest_complete() == SnapshotId(1, 11)
    board.rank(0).clear(1)
    assert board.newest_complete() == SnapshotId(1, 10)


pairs = st.builds(SnapshotId, st.integers(1, 3), st.integers(0, 5))


@given(st.lists(st.frozensets(pairs, max_size=6), max_size=4))
def test_newest_common_is_the_greatest_pair_in_all(sets: list[frozenset[SnapshotId]]) -> None:
    shared = [pair for pair in {p for one in sets for p in one} if all(pair in one for one in sets)]
    assert newest_common(iter(sets)) == (max(shared) if shared else None)


def test_a_reader_never_mixes_two_publications(board: Board) -> None:
    mine = board.rank(0)
    stop = threading.Event()

    def write() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            mine.publish(0, SnapshotId(count, count), count)

    thread = threading.Thread(target=write)
    thread.start()
    seen = 0
    try:
        with another(board) as other:
            until = time.monotonic() + 10
            while seen < 2000 and time.monotonic() < until:
                word = other.rank(0).slot(0)
                if word.snapshot is not None:
                    assert word.snapshot == SnapshotId(word.generation, word.generation)
                    seen += 1
    finally:
        stop.set()
        thread.join()
    assert seen == 2000


# ---- two processes

OTHER = textwrap.dedent("""
    import socket, sys
    from ckpt.ipc.board import Board
    from ckpt.values import TrainerPhase
    from ckpt.values import SnapshotId

    sock = socket.socket(fileno=int(sys.argv[1]))
    _, (fd,), _, _ = socket.recv_fds(sock, 1, 1)
    board = Board.attach(fd)
    mine = board.rank(1)
    mine.attempt = board.attempt
    mine.phase = TrainerPhase.TRAINING
    for step in range(1, 20001):
        mine.beat(step)
        mine.publish(step % 3, SnapshotId(board.attempt, step), step)
    sock.sendall(b"d")
    sock.recv(1)
""")


@pytest.mark.slow
def test_another_process_sees_beats_and_slots_and_its_death_leaves_them(board: Board) -> None:
    board.begin_attempt(7)
    ours, theirs = socket.socketpair()
    with ours:
        child = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        socket.send_fds(ours, [b"b"], [board.fd])
        mine, last = board.rank(1), 0
        ours.setblocking(False)
        ended = b""
        while not ended:
            completed = mine.completed or 0
            assert completed >= last
            last = completed
            for word in mine.slots():
                if word.snapshot is not None:
                    assert word.snapshot == SnapshotId(7, word.generation)
            with contextlib.suppress(BlockingIOError):
                ended = ours.recv(1)
                assert ended == b"d", "the other process ended early"
        child.kill()
        child.wait(10)
    assert (mine.attempt, mine.completed, mine.phase) == (7, 20000, TrainerPhase.TRAINING)
    assert [word.snapshot for word in mine.slots()[:3]] == [
        SnapshotId(7, step) for step in (19998, 19999, 20000)
    ]


# ---- attaching


@pytest.mark.parametrize("ranks", [0, -1, RANKS_MAX + 1])
def test_numbers_of_ranks_that_cannot_be(ranks: int) -> None:
    with pytest.raises(UsageError, match="number of ranks"):
        Board.create(ranks)


def test_there_is_no_rank_beyond_the_last(board: Board) -> None:
    for rank in (-1, 3):
        with pytest.raises(UsageError, match="no such rank"):
            board.rank(rank)


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, 1), (1, 3), (2, 0), (2, 1000), (2, 1 << 63)],
    ids=["magic", "version", "none", "many", "huge"],
)
def test_what_is_no_board_is_refused_and_closed(board: Board, word: int, value: int) -> None:
    board._words[word] = value
    fd = os.dup(board.fd)
    with pytest.raises(IntegrityError, match="not a board"):
        Board.attach(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("size_bytes", [0, 4096 - 8])
def test_memory_that_is_too_small_is_no_board(size_bytes: int) -> None:
    fd = open_anonymous("small")
    os.ftruncate(fd, size_bytes)
    with pytest.raises(IntegrityError, match="too small"):
        Board.attach(fd)


def test_what_cannot_be_mapped_is_no_board() -> None:
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(IntegrityError, match="not a board"):
        Board.attach(read)


def test_a_closed_board_stays_closed(board: Board) -> None:
    mine = board.rank(0)
    board.close()
    board.close()
    assert board.fd == -1
    with pytest.raises(ValueError, match="released"):
        mine.beat(1)


def test_memory_without_memfds_is_shared_too(monkeypatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    fd = open_anonymous("ckpt-test")
    os.ftruncate(fd, 4096)
    with mmap.mmap(fd, 4096) as one, mmap.mmap(fd, 4096) as other:
        one[0] = 7
        assert other[0] == 7
    assert os.fstat(fd).st_nlink == 0
    assert not os.get_inheritable(fd)
    os.close(fd)
