"""The file that gives out places, with real processes that claim at once and are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from kit.logs.claimers import LOG_ID, claim_for_ever, claim_many

from ckpt.errors import UnavailableError, UsageError
from ckpt.log import sequencers as sqlite
from ckpt.log.sequencers import Appended, KeyTaken, SqliteSequencer, WriteUnknown, database_path

WAIT_S = 120.0
SOAK = os.environ.get("CKPT_SOAK") == "1"
CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "log.sqlite3"


@pytest.fixture
def running() -> Iterator[list[BaseProcess]]:
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def answer_of(pipe: Connection) -> object:
    assert pipe.poll(WAIT_S), "a process does not answer"
    return pipe.recv()


@pytest.mark.slow
def test_of_many_processes_that_claim_at_once_each_place_has_one_winner(
    path: Path, running: list[BaseProcess]
) -> None:
    racers, each = 4, 30
    pipes = []
    for me in range(racers):
        mine, theirs = CONTEXT.Pipe()
        running.append(
            CONTEXT.Process(target=claim_many, args=(path, me, each, theirs), daemon=True)
        )
        running[-1].start()
        pipes.append(mine)
    for pipe in pipes:
        assert answer_of(pipe) == "ready"  # all of them made the file, which one of them did
    for pipe in pipes:
        pipe.send("go")
    won: dict[int, bytes] = {}
    for pipe in pipes:
        mine_won = answer_of(pipe)
        assert isinstance(mine_won, dict) and not set(won) & set(mine_won), "one winner a place"
        won |= mine_won
    assert sorted(won) == list(range(racers * each)), "no gaps"
    file = SqliteSequencer(path, LOG_ID)
    assert all(file.append(seq, b"late") == KeyTaken(data) for seq, data in won.items()), (
        "the winner's bytes are there"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10 if SOAK else 2))
def test_processes_killed_at_any_moment_leave_no_gap_and_lose_nothing(
    path: Path, running: list[BaseProcess], seed: int
) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    SqliteSequencer(path, LOG_ID).make(0)
    won: dict[int, bytes] = {}
    pipes: dict[Connection, BaseProcess] = {}

    def start(me: int) -> None:
        mine, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=claim_for_ever, args=(path, me, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append(process)
        pipes[mine] = process

    for me in range(3):
        start(me)
    kills = 0
    while kills < 6:
        for pipe in wait(list(pipes), WAIT_S):
            assert isinstance(pipe, Connection)
            try:
                seq, data = pipe.recv()
            except EOFError:
                del pipes[pipe]  # it was killed, and all that it said is heard
                continue
            assert seq not in won, "one winner a place"
            won[seq] = data
            process = pipes[pipe]
            if process.is_alive() and dice.random() < 0.1:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                start(3 + kills)
    for process in running:
        process.kill()
        process.join()
    file = SqliteSequencer(path, LOG_ID)
    top = max(won)
    given = {}
    for seq in range(top + 1):
        found = file.append(seq, b"late")
        assert isinstance(found, KeyTaken), "no gap"
        given[seq] = found.data
    assert won == {seq: given[seq] for seq in won}, "what a process was told stands"
    assert len(set(given.values())) == len(given), "nothing was given two places"


@pytest.mark.slow
def test_claiming_again_is_harmless_and_tells_who_has_the_place(path: Path) -> None:
    file = SqliteSequencer(path, LOG_ID)
    assert file.make(0) == file.make(0) == file.name
    assert file.append(0, b"a") == Appended()
    assert file.append(0, b"a") == Appended()
    assert file.append(0, b"b") == KeyTaken(b"a")
    assert file.append(1, b"b") == Appended()


def test_a_file_older_than_its_log_refuses(path: Path, tmp_path: Path) -> None:
    file = SqliteSequencer(path, LOG_ID)
    file.make(0)
    for seq in range(3):
        file.append(seq, b"%d" % seq)
    shutil.copytree(path.parent, tmp_path / "copy")
    for seq in range(3, 6):
        file.append(seq, b"%d" % seq)
    old = SqliteSequencer(tmp_path / "copy" / path.name, LOG_ID)
    assert old.name == file.name
    with pytest.raises(UsageError, match=r"older than its log.*its_next=3 wanted=6"):
        old.append(6, b"new")


def test_a_machine_without_the_file_or_with_another_logs_says_so(path: Path) -> None:
    file = SqliteSequencer(path, LOG_ID)
    for ask in (lambda: file.name, lambda: file.append(0, b"a")):
        with pytest.raises(UsageError, match="this machine does not give out"):
            ask()
    assert not path.exists(), "asking makes none"
    SqliteSequencer(path, "2" * 32).make(0)
    for ask in (lambda: file.name, lambda: file.append(0, b"a"), lambda: file.make(0)):
        with pytest.raises(UsageError, match="to another log"):
            ask()


def test_a_file_that_can_not_be_read_is_no_answer(path: Path) -> None:
    file = SqliteSequencer(path, LOG_ID)
    file.make(0)
    for side in path.parent.iterdir():
        side.unlink()
    path.write_bytes(b"this is no database, it is a note of somebody" * 100)
    assert isinstance(file.append(0, b"a"), WriteUnknown)
    for ask in (lambda: file.name, lambda: file.make(0)):
        with pytest.raises(UnavailableError, match=r"did not answer|cannot be made"):
            ask()


def test_a_file_whose_making_was_cut_short_is_made_by_the_next(path: Path) -> None:
    path.parent.mkdir()
    sqlite3.connect(path).close()
    path.touch()
    file = SqliteSequencer(path, LOG_ID)
    with pytest.raises(UnavailableError, match="did not answer"):
        _ = file.name
    assert file.make(0).startswith("sqlite:")
    assert file.append(0, b"a") == Appended()


def test_a_writer_that_slept_while_thousands_of_places_went_reads_the_log_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "SQLITE_RECORDS_KEPT", 5)
    file = SqliteSequencer(path, LOG_ID)
    file.make(0)
    for seq in range(10):
        file.append(seq, b"%d" % seq)
    assert isinstance(file.append(2, b"late"), WriteUnknown)
    assert file.append(7, b"late") == KeyTaken(b"7")


def test_a_file_that_another_process_holds_is_waited_for_and_then_no_answer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_S", 0.05)
    file = SqliteSequencer(path, LOG_ID)
    file.make(0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert isinstance(file.append(0, b"a"), WriteUnknown)
    other.execute("ROLLBACK")
    other.close()
    assert file.append(0, b"a") == Appended()


def test_the_file_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(sqlite.STATE_VARIABLE, str(tmp_path / "here"))
    assert database_path("3" * 32) == tmp_path / "here" / ("3" * 32 + ".sqlite3")
    monkeypatch.delenv(sqlite.STATE_VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert database_path("3" * 32).parent == tmp_path / "state" / "ckpt"


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:2 - nfs4 filer:/home rw,vers=4.2
31 30 0:41 / /home/my\\040disk rw - xfs /dev/sdb1 rw
32 22 0:42 / /scratch rw - lustre mds@tcp:/scratch rw
33 22 0:43 / /scratch rw - tmpfs tmpfs rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/ckpt/x", "ext4"),
        ("/home/ada/.local/state/ckpt/x", "nfs4"),
        ("/homes/ada/x", "ext4"),
        ("/home/my disk/x", "xfs"),
        ("/scratch/x", "tmpfs"),
        ("/home", "nfs4"),
    ],
)
def test_file_system_is_that_of_the_innermost_mount(path: str, kind: str) -> None:
    assert sqlite.file_system_type(MOUNTS, path) == kind
    assert sqlite.file_system_type("", path) == ""


def test_a_network_file_system_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SqliteSequencer(path, LOG_ID)
    name = file.make(0)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"30 22 0:40 / {os.path.realpath(tmp_path)} rw - nfs4 filer:/home rw\n")
    monkeypatch.setattr(sqlite, "MOUNTS", mounts)
    for ask in (lambda: file.make(0), lambda: file.name, lambda: file.append(0, b"a"), file.renew):
        with pytest.raises(UsageError, match=r"network file system.*type=nfs4.*CKPT_STATE_DIR"):
            ask()
    other = SqliteSequencer(tmp_path / "other" / "log.sqlite3", LOG_ID)
    with pytest.raises(UsageError, match="network file system"):
        other.make(0)
    monkeypatch.setattr(sqlite, "MOUNTS", tmp_path / "a system without that file")
    assert file.name == name, "nothing was changed"


def test_another_machine_is_refused_until_it_takes_over(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = tmp_path / "machine-id"
    monkeypatch.setattr(sqlite, "MACHINE_ID", machine)
    file = SqliteSequencer(path, LOG_ID)
    machine.write_text("aaaa\n")
    name = file.make(0)
    assert file.append(0, b"a") == Appended()
    machine.write_text("bbbb\n")
    for ask in (lambda: file.name, lambda: file.append(1, b"b"), lambda: file.make(0)):
        with pytest.raises(UsageError, match="made on another machine"):
            ask()
    machine.write_text("aaaa\n")
    assert file.name == name
    machine.write_text("bbbb\n")
    assert file.renew() != name
    assert file.append(1, b"b") == Appended()


def test_a_file_from_before_machines_were_recorded_still_serves(path: Path) -> None:
    file = SqliteSequencer(path, LOG_ID)
    name = file.make(0)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE machine")
    db.close()
    assert file.name == name
    assert file.append(0, b"a") == Appended()


def test_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    for variable in (sqlite.STATE_VARIABLE, "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UsageError, match=rf"no home.*set {sqlite.STATE_VARIABLE} to a folder"):
        database_path("3" * 32)
