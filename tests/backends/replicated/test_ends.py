"""Closing, forking and exiting, with stores that hang; and opening by URL."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from kit.replicated.stores import (
    QUICK,
    WAIT_S,
    Gated,
    Heard,
    Remembering,
    away,
    read,
    replicated,
    wait_until,
)

from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.open import open_stores
from ckpt.backends.replicated.store import CLOSE_S, ReplicatedBackend
from ckpt.errors import UsageError

EXIT_S = 60.0


def test_close_waits_for_stragglers_and_repeats_harmlessly() -> None:
    stores = [Gated(Remembering(name)) for name in "abc"]
    store = ReplicatedBackend(stores, emit=Heard(), limits=QUICK)
    stores[2].stop("put")
    store.put("k", [b"x"])
    stores[2].wait_inside()
    threading.Timer(0.1, stores[2].release).start()
    store.close()
    assert stores[2].inner.held("k") == b"x"
    store.close()


@pytest.mark.slow
def test_close_leaves_hanging_calls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.backends.replicated.store.CLOSE_S", 0.2)
    assert CLOSE_S > 0.2
    stores = [Gated(Remembering(name)) for name in "abc"]
    store = ReplicatedBackend(stores, emit=Heard(), limits=QUICK)
    stores[2].stop("put")
    store.put("k", [b"x"])
    stores[2].wait_inside()
    store.close()
    assert stores[2].inside == 1
    stores[2].release()


def test_threads_end_with_close() -> None:
    with replicated([Remembering(name) for name in "abc"]) as store:
        store.put("k", [b"x"])
        assert read(store, "k", 1) == b"x"
        assert any(thread.name.startswith("ckpt-write") for thread in threading.enumerate())
    wait_until(
        lambda: (
            not any(
                t.name.startswith(("ckpt-write", "ckpt-read", "ckpt-mend"))
                for t in threading.enumerate()
            )
        )
    )


@pytest.mark.slow
def test_interpreter_exits_though_a_store_hangs_and_nobody_closed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, time, threading
        from ckpt.backends.file.store import FileBackend
        from ckpt.backends.replicated.store import ReplicatedBackend
        from ckpt.backends.replicated.policy import ReplicationLimits

        class Hanging(FileBackend):
            def put(self, key, data, *, create_only=False):
                threading.Event().wait()
            def stat(self, key):
                threading.Event().wait()
            def read_into(self, key, out, *, offset_bytes=0):
                threading.Event().wait()

        stores = [Hanging(sys.argv[1] + "/a"), FileBackend(sys.argv[1] + "/b"), FileBackend(sys.argv[1] + "/c")]
        store = ReplicatedBackend(stores, emit=lambda event: None, limits=ReplicationLimits(grace_s_max=0.1, hedge_s_first=0.1))
        store.put("k", [bytearray(b"x" * 1000)])
        out = bytearray(1000)
        store.read_into("k", memoryview(out))
        assert out == b"x" * 1000
        print("done", flush=True)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=EXIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_puts_and_reads_still_work_while_the_interpreter_ends(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import atexit, sys
        from ckpt.backends.file.store import FileBackend
        from ckpt.backends.replicated.store import ReplicatedBackend

        store = ReplicatedBackend([FileBackend(sys.argv[1] + "/" + name) for name in "abc"], emit=lambda event: None)

        def last():
            store.put("k", [bytearray(b"x" * 1000)])
            out = bytearray(1000)
            store.read_into("k", memoryview(out))
            print([entry.key for entry in store.list("")], out == b"x" * 1000, flush=True)

        atexit.register(last)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=EXIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "['k'] True\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_child_of_a_fork_starts_with_threads_of_its_own(tmp_path: Path) -> None:
    with replicated([FileBackend(tmp_path / name) for name in "abc"]) as store:
        store.put("k/parent", [b"x"])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store.put("k/child", [b"y"])
                status = 0 if read(store, "k/parent", 1) == b"x" else 2
            finally:
                os._exit(status)
        deadline_s = time.monotonic() + WAIT_S
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline_s, "the child hangs"
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        assert read(store, "k/child", 1) == b"y"


def test_dead_store_at_start_is_told_and_the_others_serve() -> None:
    heard = Heard()
    memories = [Remembering(name) for name in "abc"]
    memories[0].away = away(memories[0])
    with replicated(memories, tell=heard) as store:
        for number in range(5):
            store.put(f"k/{number}", [b"x"])
            assert read(store, f"k/{number}", 1) == b"x"
        assert heard.wait_for("store-down").alarm
        memories[0].wipe()
        memories[0].away = None
        assert store.await_caught_up(WAIT_S)
        assert [memories[0].held(f"k/{number}") for number in range(5)] == [b"x"] * 5


# Opening.


def test_one_url_is_the_plain_store(tmp_path: Path) -> None:
    store = open_stores([str(tmp_path / "a")], emit=Heard())
    assert isinstance(store, FileBackend)
    assert (stores_of(store), write_quorum_of(store)) == ((store,), 1)
    assert isinstance(
        open_stores([str(tmp_path / "a")], None, write_quorum=1, emit=Heard()), FileBackend
    )


def test_several_urls_are_one_store_with_a_majority(tmp_path: Path) -> None:
    store = open_stores([str(tmp_path / name) for name in "abc"], None, emit=Heard())
    assert [one.url for one in stores_of(store)] == [str(tmp_path / name) for name in "abc"]
    assert write_quorum_of(store) == 2
    assert (
        write_quorum_of(open_stores([str(tmp_path / name) for name in "abcd"], emit=Heard())) == 3
    )
    assert (
        write_quorum_of(
            open_stores([str(tmp_path / name) for name in "abc"], write_quorum=3, emit=Heard())
        )
        == 3
    )
    assert list(tmp_path.iterdir()) == []
    store.close()


@pytest.mark.parametrize("quorum", [0, 1, 4])
def test_quorum_that_is_no_majority_is_refused(tmp_path: Path, quorum: int) -> None:
    with pytest.raises(UsageError, match="write_quorum"):
        open_stores([str(tmp_path / name) for name in "abc"], write_quorum=quorum, emit=Heard())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("{0}/a", "{0}/a"),
        ("{0}/a", "{0}/b/../a"),
        ("{0}/a", "file://{0}/a"),
        ("{0}/a/", "{0}/a"),
        ("{0}/a", "{0}/link"),
        ("memory://run/a", "memory://run/a/"),
    ],
)
def test_one_store_named_twice_is_refused(tmp_path: Path, one: str, other: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match="named twice"):
        open_stores([one.format(tmp_path), other.format(tmp_path)], emit=Heard())


def test_same_object_twice_is_refused() -> None:
    memory = MemoryBackend()
    with pytest.raises(UsageError, match="named twice"):
        ReplicatedBackend([memory, memory], emit=Heard())


def test_options_go_to_each_url_or_to_all_that_are_no_folders(tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    store = open_stores([folder, "memory://run/x"], {}, emit=Heard())
    assert len(stores_of(store)) == 2
    with pytest.raises(UsageError, match=r"TypeError|options"):
        open_stores([folder, "memory://run/x"], [{"key": "x"}, None], emit=Heard())
    with pytest.raises(UsageError, match=r"one for each. urls=2 options=1"):
        open_stores([folder, "memory://run/x"], [None], emit=Heard())
    with pytest.raises(UsageError, match="a folder takes no storage options"):
        open_stores([folder, str(tmp_path / "b")], {"key": "x"}, emit=Heard())
    with pytest.raises(UsageError, match="come in a list"):
        open_stores(folder, emit=Heard())
    with pytest.raises(UsageError):
        open_stores([], emit=Heard())
