"""Job folders are private, found by name, and swept only when nobody lives in them or moves in."""

from __future__ import annotations

import fcntl
import os
import pwd
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckpt.errors import UnavailableError, UsageError
from ckpt.ipc import runtime_dir as runtime
from ckpt.ipc.runtime_dir import JobFolder, claim_instance, kept_logs, list_jobs, runtime_root


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def folder() -> JobFolder:
    return JobFolder("/data/runs", "gpt")


# ---- the root


def test_the_root_is_made_private(root: Path) -> None:
    assert runtime_root() == root
    assert root.stat().st_mode & 0o777 == 0o700
    assert runtime_root() == root


def test_the_root_of_a_login_session_serves_only_where_there_is_no_tmp(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv("CKPT_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime._root_of_environment() == Path(f"/tmp/ckpt-{os.getuid()}")
    monkeypatch.setattr(runtime, "TMP", tmp_path / "no-tmp")
    assert runtime_root() == tmp_path / "ckpt"


def test_a_folder_without_room_for_stacks_is_entered_all_the_same(folder: JobFolder) -> None:
    with folder.in_use():
        folder.stacks.rmdir()
        folder.stacks.touch()
    with folder.in_use():
        assert folder.stacks.is_file()


@pytest.mark.parametrize("session", [None, "", "missing", "file", "foreign"])
def test_the_root_without_a_usable_login_session(
    tmp_path: Path, monkeypatch, session: str | None
) -> None:
    monkeypatch.delenv("CKPT_RUNTIME_DIR")
    monkeypatch.setattr(runtime, "TMP", tmp_path / "no-tmp")
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    if session == "foreign":
        if os.getuid() != 0:
            pytest.skip("only root can make a folder of somebody else")
        os.chown(tmp_path / "foreign", 12345, 12345)
    if session is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / session) if session else "")
    assert runtime._root_of_environment() == tmp_path / "no-tmp" / f"ckpt-{os.getuid()}"


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o702])
def test_a_root_open_to_others_is_refused(root: Path, mode: int) -> None:
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(UsageError, match="open to others"):
        runtime_root()


def test_a_root_of_somebody_else_is_refused(root: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a folder of somebody else")
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(UsageError, match="owner=12345"):
        runtime_root()


def test_a_root_that_is_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="open to others"):
        runtime_root()


@pytest.mark.parametrize("taken", ["file", "link", "foreign"])
def test_a_name_in_tmp_that_another_user_took_is_replaced_by_a_private_folder_at_home(
    tmp_path: Path, monkeypatch, taken: str
) -> None:
    monkeypatch.delenv("CKPT_RUNTIME_DIR")
    monkeypatch.setattr(runtime, "TMP", tmp_path)
    entry = pwd.struct_passwd(("me", "x", os.getuid(), 1, "", str(tmp_path / "home"), ""))
    monkeypatch.setattr("pwd.getpwuid", lambda uid: entry)
    name = tmp_path / f"ckpt-{os.getuid()}"
    match taken:
        case "file":
            name.touch()
        case "link":
            name.symlink_to(tmp_path)
        case "foreign":
            if os.getuid() != 0:
                pytest.skip("only root can make a folder of somebody else")
            name.mkdir(mode=0o700)
            os.chown(name, 12345, 12345)
    root = runtime_root()
    assert root.is_relative_to(tmp_path / "home")
    assert socket.gethostname() in root.name
    assert root.stat().st_mode & 0o777 == 0o700
    assert runtime_root() == root


def test_a_name_that_was_taken_is_refused_where_the_user_has_no_home(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv("CKPT_RUNTIME_DIR")
    monkeypatch.setattr(runtime, "TMP", tmp_path)
    (tmp_path / f"ckpt-{os.getuid()}").touch()

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UsageError, match="set CKPT_RUNTIME_DIR"):
        runtime_root()


def test_a_root_that_cannot_be_made_names_the_remedy(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "file" / "run"))
    with pytest.raises(UsageError, match="set CKPT_RUNTIME_DIR"):
        runtime_root()


# ---- folders


def test_each_job_and_store_has_a_folder_of_its_own(root: Path) -> None:
    paths = {
        JobFolder(store, job).path
        for store, job in [("/a", "b"), ("/a", "c"), ("/b", "b"), ("/ab", "")]
    }
    assert len(paths) == 4
    assert all(path.parent == root and len(path.name) == 16 for path in paths)
    assert JobFolder("/a", "b") == JobFolder("/a", "b") == JobFolder.at(JobFolder("/a", "b").path)
    assert not any(path.exists() for path in paths)


def test_a_folder_is_made_private_and_described(folder: JobFolder) -> None:
    assert folder.read_info() is None
    with folder.in_use():
        assert folder.path.stat().st_mode & 0o777 == 0o700
        assert folder.stacks.is_dir()
        folder.write_info("/data/runs", "gpt")
    assert folder.read_info() == runtime.JobFolderInfo("/data/runs", "gpt", os.getpid())
    assert list_jobs() == [folder]
    (folder.path / "job.json").write_bytes(b"{")
    assert folder.read_info() is None


def test_other_things_in_the_root_are_no_jobs(root: Path, folder: JobFolder) -> None:
    with folder.in_use():
        (root / "notes.txt").touch()
        (root / ("a" * 16)).touch()
        (root / "abc").mkdir()
    assert list_jobs() == [folder]


def test_the_tail_of_a_log(folder: JobFolder) -> None:
    assert folder.log_tail() == ""
    with folder.in_use():
        folder.log_path.write_bytes(b"old\n" + b"x" * 100 + b"\xff end\n")
    assert folder.log_tail(limit_bytes=9) == "xxx\N{REPLACEMENT CHARACTER} end"
    assert folder.log_tail(start_bytes=4) == "x" * 100 + "\N{REPLACEMENT CHARACTER} end"


# ---- locks


def test_one_process_holds_the_lock(folder: JobFolder) -> None:
    assert not folder.has_keeper()
    lock = folder.try_lock()
    assert lock is not None
    assert not os.get_inheritable(lock)
    assert folder.has_keeper()
    assert folder.try_lock() is None
    other = folder.try_lock(name="starting")
    assert other is not None
    os.close(other)
    os.close(lock)
    assert not folder.has_keeper()
    again = folder.try_lock()
    assert again is not None
    os.close(again)


def test_a_lock_outlives_the_process_that_took_it_in_its_child(folder: JobFolder) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom ckpt.ipc.runtime_dir import JobFolder\n"
        "JobFolder.at(Path(sys.argv[1])).try_lock()\n"
        "if os.fork(): os._exit(0)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder.path)], stdin=subprocess.PIPE
    ) as parent:
        assert parent.wait(30) == 0
        assert folder.has_keeper()
        watch = os.open(folder.lock_path, os.O_RDWR)
        parent.stdin.close()
        fcntl.flock(watch, fcntl.LOCK_EX)  # waits for the child's end
        os.close(watch)
    assert not folder.has_keeper()


# ---- sockets


def talk(folder: JobFolder, listener: socket.socket) -> None:
    with folder.connect() as mine, listener.accept()[0] as theirs:
        assert mine.gettimeout() is None
        theirs.sendall(b"hello")
        assert mine.recv(5) == b"hello"


def test_who_connects_meets_who_listens(folder: JobFolder) -> None:
    assert folder.try_connect() is None
    with folder.in_use(), folder.listen() as listener:
        talk(folder, listener)


def test_a_path_too_long_for_a_socket_works_all_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / ("d" * 120)))
    folder = JobFolder("/data/runs", "gpt")
    assert folder.try_connect() is None
    with folder.in_use():
        assert folder.try_connect() is None
        with folder.listen() as listener:
            talk(folder, listener)
        assert folder.try_connect() is None


def test_a_stale_socket_is_replaced(folder: JobFolder) -> None:
    with folder.in_use():
        folder.listen().close()
        (folder.path / "socket.new").touch()
        assert folder.socket_path.is_socket()
        assert folder.try_connect() is None
        with pytest.raises(UnavailableError, match="no keeper listens"):
            folder.connect()
        with folder.listen() as listener:
            talk(folder, listener)


def test_a_full_backlog_is_not_waited_for(monkeypatch, folder: JobFolder) -> None:
    monkeypatch.setattr(runtime, "BACKLOG", 0)
    with folder.in_use(), folder.listen(), folder.connect():
        assert folder.try_connect() is None


# ---- removing


def test_its_keeper_removes_a_folder(folder: JobFolder) -> None:
    lock = folder.try_lock()
    assert lock is not None
    listener = folder.listen()
    (folder.stacks / "rank-0").touch()
    listener.close()
    folder.remove()
    os.close(lock)
    assert not folder.path.exists()
    folder.remove()


def test_a_keeper_leaves_its_folder_to_who_has_entered_it(folder: JobFolder) -> None:
    lock = folder.try_lock()
    assert lock is not None
    folder.listen().close()
    with folder.in_use():
        folder.remove()
        os.close(lock)
        assert folder.path.is_dir()
        assert not folder.socket_path.exists()


def test_user_without_a_home_keeps_no_logs_and_folders_are_removed_all_the_same(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "CKPT_STATE_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for remove in (folder.sweep, folder.remove):
        with folder.in_use():
            folder.log_path.write_text("a line\n")
        remove()
        assert not folder.path.exists()
    assert kept_logs() == []


def sweep_dead() -> list[JobFolder]:
    return [folder for folder in list_jobs() if folder.sweep()]


def test_sweeping_removes_only_folders_that_nobody_uses(root: Path) -> None:
    dead, alive, starting, fresh = (JobFolder("/data", name) for name in "abcd")
    for each in (dead, alive):
        lock = each.try_lock()
        assert lock is not None
        if each is dead:
            os.close(lock)
    fresh.path.mkdir()
    with starting.in_use():
        assert {each.path for each in sweep_dead()} == {dead.path, fresh.path}
        assert {each.path for each in list_jobs()} == {alive.path, starting.path}
    os.close(lock)
    assert {each.path for each in sweep_dead()} == {alive.path, starting.path}
    assert list_jobs() == []


def test_a_folder_that_is_swept_under_who_enters_is_made_again(
    folder: JobFolder, monkeypatch
) -> None:
    lock = fcntl.flock
    swept = []

    def sweep_first(fd: int, flags: int) -> None:
        if flags == fcntl.LOCK_SH and not swept:
            swept.append(folder.sweep())
        lock(fd, flags)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with folder.in_use():
        assert folder.path.is_dir()
    assert swept == [True]


def test_enterers_and_sweepers_at_once_never_lose_a_folder(folder: JobFolder) -> None:
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            sweep_dead()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(60):
            lock = folder.try_lock(name="lock")
            if lock is not None:  # None: the sweeper was looking
                folder.write_info("/data/runs", "gpt")
                assert folder.read_info() is not None
                os.close(lock)
    finally:
        stop.set()
        sweeper.join()


def test_agents_of_one_job_on_one_machine_have_numbers_and_folders_of_their_own(root: Path) -> None:
    first, second = claim_instance("job"), claim_instance("job")
    assert (first.number, second.number, claim_instance("another").number) == (0, 1, 0)
    folders = {JobFolder("/data/runs", "gpt", one.number).path for one in (first, second)}
    assert len(folders) == 2 and JobFolder("/data/runs", "gpt").path in folders
    first.release()
    assert claim_instance("job").number == 0, "an agent that comes again finds what was there"
    second.release()
