"""How a keeper is found, while it lives and while it ends."""

from __future__ import annotations

import errno
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.keepers.served import WAIT_S, Served, until

from ckpt.ipc.client import KeeperClient
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import Count, Number, Policy, Welcome
from ckpt.keeper import daemon as daemon_module
from ckpt.keeper.process import KeeperListener

Serve = Callable[..., Served]
LINGERS = Policy(linger_s=30.0, hang_s=0.0)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "TICK_S_MAX", 0.05)


def test_whoever_found_it_just_before_it_hid_is_served_by_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    home = served.home
    assert home is not None
    came: list[MessageSocket] = []
    hide = home.hide

    def hide_late() -> None:
        if not came:
            came.append(served.wire())
        hide()

    monkeypatch.setattr(home, "hide", hide_late)
    served.trainer().leave()
    until(lambda: bool(came))
    calls = KeeperClient(came[0])
    assert calls.ask(served.hello(launch="b"), Welcome, timeout_s=WAIT_S).boot == "b00t"
    another = served.trainer(launch="b")
    another.leave()
    calls.close()
    assert served.ends()
    assert not served.folder.socket_path.exists()


def take_away(folder: Path) -> None:
    """Remove a folder at once: the keeper may make new things in it while it is emptied."""
    aside = folder.with_name(f"{folder.name}-gone")
    folder.rename(aside)
    shutil.rmtree(aside)


@pytest.mark.parametrize("lost", ["root", "all", "socket", "lock", "another socket"])
def test_a_keeper_whose_folder_was_taken_away_is_found_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(daemon_module, "FOLDER_CHECK_S", 0.05)
    served = serve(LINGERS)
    one = served.trainer(0, 2)
    waits = served.folder.connect() if lost == "socket" else None
    if lost == "root":
        take_away(served.folder.path.parent)
    elif lost == "all":
        take_away(served.folder.path)
    elif lost == "another socket":
        served.folder.listen().close()
    else:
        (served.folder.path / lost).unlink()
    until(lambda: served.told("home-renewed"))
    assert one.calls.ask(Count(key="c", amount=1), Number).number == 1
    two = served.trainer(1, 2)
    assert served.folder.has_keeper()
    assert served.folder.stacks.is_dir()
    note = served.folder.read_info()
    assert note is not None
    assert note.job == "job"
    if waits is not None:
        waits.close()
    for trainer in (one, two):
        trainer.leave()
    assert served.ends()


def test_a_small_thing_that_is_missing_is_made_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "FOLDER_CHECK_S", 0.05)
    served = serve(LINGERS)
    one = served.trainer()
    served.folder.stacks.rmdir()
    until(lambda: served.folder.stacks.exists() and served.folder.read_info() is not None)
    assert not served.told("home-renewed")
    one.leave()


@pytest.mark.slow
def test_a_keeper_whose_folder_another_one_took_over_goes_on_with_those_it_has(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "FOLDER_CHECK_S", 0.05)
    served = serve(LINGERS)
    one = served.trainer()
    go_on = served.pause()
    shutil.rmtree(served.folder.path)
    other = KeeperListener.acquire(served.spec, served.folder)
    assert other is not None
    go_on.set()
    until(lambda: served.told("home-lost"))
    looked_s = served.daemon._folder_check_s
    until(lambda: served.daemon._folder_check_s > looked_s)
    assert len(served.told("home-lost")) == 1
    assert one.calls.ask(Count(key="c", amount=1), Number).number == 1
    one.leave()
    assert served.ends()
    assert other.is_reachable()
    other.close()


@pytest.mark.slow
def test_no_descriptor_for_a_connection_is_waited_out_quietly(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(LINGERS)
    one = served.trainer()
    home = served.home
    assert home is not None
    tries: list[float] = []
    real = home.listener

    class Full:
        """A listener of a process that has no descriptor left, three times."""

        def accept(self) -> tuple[socket.socket, object]:
            tries.append(time.monotonic())
            if len(tries) <= 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    monkeypatch.setattr(home, "listener", Full())
    two = served.peer(rank=0, ranks=1)
    two.next(Welcome)
    assert len(tries) == 4
    assert len(served.told("full")) == 1
    assert tries[-1] - tries[0] > 2.5 * daemon_module.FULL_WAIT_S
    assert one.calls.ask(Count(key="c", amount=1), Number).number == 1
    monkeypatch.undo()
    two.leave()
    one.leave()
