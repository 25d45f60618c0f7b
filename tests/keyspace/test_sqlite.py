"""The file of one machine: among real processes, over boots, and when the file is in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit.membership.keyspace_contract import DEADLINE_S, get, put
from kit.membership.members_contract import info, until
from kit.membership.zombie import zombie_is_refused

from ckpt.cluster.membership.open import open_membership
from ckpt.errors import UnavailableError
from ckpt.keyspace import sqlite as embedded
from ckpt.keyspace.base import Keys
from ckpt.keyspace.sqlite import SqliteKeyspace

JOINS = """
import sys, time
from pathlib import Path
from ckpt.cluster.membership.open import open_membership
from ckpt.cluster.membership.records import NodeInfo
member = open_membership(Path(sys.argv[1]), "j", ttl_s=5.0)
member.join(NodeInfo(node=sys.argv[2], host="h", slots=1))
print("joined", flush=True)
sys.stdin.readline()
member.leave()
"""


@pytest.mark.slow
def test_processes_see_each_other_come_go_and_die(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "job.sqlite3"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS, str(path), f"n{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    watcher = open_membership(path, "j", ttl_s=2.0)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        assert set(watcher.view().by_node) == {"n0", "n1", "n2"}
        processes[0].communicate("\n", timeout=DEADLINE_S)
        assert set(watcher.view().by_node) == {"n1", "n2"}
        processes[1].send_signal(signal.SIGKILL)
        view = watcher.view()
        assert watcher.wait_change(view.revision, timeout_s=DEADLINE_S)
        assert set(watcher.view().by_node) == {"n2"}
    finally:
        watcher.leave()
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


@pytest.mark.slow
def test_a_zombie_has_stopped_by_its_own_clock_and_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.sqlite3"
    other = open_membership(path, "j", ttl_s=8.0)
    other.join(info())
    zombie_is_refused(str(path), other, "j", ttl_s=2.0)
    other.leave()


def test_leases_do_not_outlive_the_boot_that_they_were_granted_in(tmp_path: Path) -> None:
    path = tmp_path / "job.sqlite3"
    before = SqliteKeyspace(path, clock_ns=lambda: 10**18, boot="one")
    lease_id = before.grant(7, 60.0).lease_id
    put(before, "leased", b"1", lease_id)
    put(before, "epoch", b"1")
    after = SqliteKeyspace(path, clock_ns=lambda: 5, boot="two")
    assert [get(after, "leased"), get(after, "epoch")] == [None, b"1"]
    assert after.renew(lease_id) == 0


def test_who_looked_too_long_ago_is_told_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "CHANGES_KEPT", 8)
    keyspace = SqliteKeyspace(tmp_path / "job.sqlite3", clock_ns=lambda: 0, boot="one")
    first = put(keyspace, "a", b"")
    for _ in range(8):
        last = put(keyspace, "b", b"", keyspace.grant(7, 60.0).lease_id)
    assert not keyspace.wait((Keys("a"),), first + 1, timeout_s=0.01)
    put(keyspace, "b", b"")
    put(keyspace, "b", b"")
    assert keyspace.wait((Keys("a"),), first, timeout_s=0.01)
    assert not keyspace.wait((Keys("a"),), last, timeout_s=0.01)


def test_a_file_that_was_replaced_by_an_older_one_wakes_who_waits(tmp_path: Path) -> None:
    keyspace = SqliteKeyspace(tmp_path / "job.sqlite3")
    assert keyspace.wait((Keys("a"),), 1000, timeout_s=DEADLINE_S)


def test_a_file_that_can_not_be_made_or_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UnavailableError):
        SqliteKeyspace(tmp_path / "file" / "job.sqlite3")
    (tmp_path / "job.sqlite3").write_bytes(b"not a database" * 1000)
    with pytest.raises(UnavailableError):
        SqliteKeyspace(tmp_path / "job.sqlite3")


def test_a_closed_keyspace_answers_nothing(tmp_path: Path) -> None:
    keyspace = SqliteKeyspace(tmp_path / "job.sqlite3")
    keyspace.close()
    with pytest.raises(UnavailableError, match="closed"):
        get(keyspace, "a")


def test_a_file_outlives_a_fork(tmp_path: Path) -> None:
    keyspace = SqliteKeyspace(tmp_path / "job.sqlite3")
    put(keyspace, "a", b"1")
    child = os.fork()
    if child == 0:
        put(keyspace, "b", b"2")
        os._exit(0 if get(keyspace, "a") == b"1" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    until(lambda: get(keyspace, "b") == b"2")
