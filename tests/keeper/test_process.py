"""A keeper as a process of its own: how quickly it is there, how little it takes, and that nothing
of it is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.keepers.served import POLICY, WAIT_S, until
from kit.keepers.slot_makers import MadeSlot

from ckpt.ipc import messages as words
from ckpt.ipc.client import KeeperClient, KeeperSpec, ensure_keeper
from ckpt.ipc.messages import GetStatus, Hello, SlotCreated, Status, Welcome
from ckpt.ipc.runtime_dir import JobFolder

START_S_WANTED, START_S_MAX = 0.2, 5.0
"""What an idle machine shows, and what a test on a busy one may demand."""
OWN_BYTES_MAX = 100 << 20
SLOT_BYTES = 64 << 20

WITH_STORES = (
    "-c",
    "import importlib.util\n"
    "for name in ('fsspec', 's3fs', 'etcd3'):\n"
    "    if importlib.util.find_spec(name): __import__(name)\n"
    "import sys\n"
    "from ckpt.keeper.__main__ import main\n"
    "sys.exit(main())",
)
HELLO = Hello(
    id=1,
    version=words.WIRE_VERSION,
    role="trainer",
    pid=1,
    launch="l",
    rank=0,
    ranks=1,
    policy=POLICY,
)


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[KeeperSpec]:
    one = KeeperSpec(job="job", store=str(tmp_path / "store"))
    yield one
    folder = JobFolder(one.store, one.job)
    note = folder.read_info()
    if folder.has_keeper() and note is not None:
        os.kill(note.pid, signal.SIGKILL)
        until(lambda: not folder.has_keeper())
    folder.sweep()


@pytest.mark.slow
def test_a_keeper_answers_soon_after_its_start_began(spec: KeeperSpec) -> None:
    took_s = []
    for _ in range(2):
        began_s = time.monotonic()
        calls = KeeperClient(ensure_keeper(spec))
        calls.ask(HELLO, Welcome, timeout_s=WAIT_S)
        took_s.append(time.monotonic() - began_s)
        calls.close()
        until(lambda: not JobFolder(spec.store, spec.job).path.exists())
    print(
        f"keeper started: best {min(took_s):.3f} s, worst {max(took_s):.3f} s, wanted "
        f"{START_S_WANTED} s"
    )
    assert min(took_s) < START_S_MAX


@pytest.mark.slow
def test_a_keeper_takes_little_memory_besides_its_slots(spec: KeeperSpec) -> None:
    calls = KeeperClient(ensure_keeper(spec, program=WITH_STORES))
    calls.ask(HELLO, Welcome, timeout_s=WAIT_S)
    slot = MadeSlot(SLOT_BYTES)
    slot.memory[:] = bytes([1]) * SLOT_BYTES
    calls.call(SlotCreated(index=0, size_bytes=SLOT_BYTES), [slot.fd], timeout_s=WAIT_S)
    report = calls.ask(GetStatus(), Status, timeout_s=WAIT_S).report
    assert report is not None
    loaded = [name for name in ("s3fs", "etcd3") if _found(name)]
    print(f"keeper's own memory: {report.rss_bytes / 1e6:.1f} MB with fsspec {' '.join(loaded)}")
    assert report.slot_bytes == SLOT_BYTES
    assert 0 < report.rss_bytes < OWN_BYTES_MAX
    calls.close()
    slot.close()
    until(lambda: not JobFolder(spec.store, spec.job).path.exists())


@pytest.mark.slow
def test_a_keeper_stays_through_a_terminals_signals_and_removes_its_folder(
    spec: KeeperSpec,
) -> None:
    calls = KeeperClient(ensure_keeper(spec))
    pid = calls.ask(HELLO, Welcome, timeout_s=WAIT_S).pid
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(pid, number)
    report = calls.ask(GetStatus(), Status, timeout_s=WAIT_S).report
    assert report is not None
    assert report.pid == pid != os.getpid()
    folder = JobFolder(spec.store, spec.job)
    assert folder.has_keeper()
    assert os.getsid(pid) == pid, "a session of its own"
    calls.close()
    until(lambda: not folder.path.exists())


@pytest.mark.slow
def test_a_killed_keeper_is_followed_by_another(spec: KeeperSpec) -> None:
    first = KeeperClient(ensure_keeper(spec))
    welcome = first.ask(HELLO, Welcome, timeout_s=WAIT_S)
    os.kill(welcome.pid, signal.SIGKILL)
    until(lambda: not JobFolder(spec.store, spec.job).has_keeper())
    first.close()
    second = KeeperClient(ensure_keeper(spec))
    assert second.ask(HELLO, Welcome, timeout_s=WAIT_S).boot != welcome.boot
    second.close()


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
