"""Who may speak to a keeper, and when it ends."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from kit.keepers.served import WAIT_S, Served, open_epoch, until

from ckpt.backends.file.store import FileBackend
from ckpt.errors import ConflictError, UnavailableError, UsageError
from ckpt.ipc.client import KeeperClient
from ckpt.ipc.messages import (
    WIRE_VERSION,
    Choices,
    Count,
    Done,
    GetChoices,
    GetSlots,
    Number,
    OtherSettings,
    Policy,
    Settings,
    Slots,
    Welcome,
)
from ckpt.keeper import daemon as daemon_module
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId

Serve = Callable[..., Served]
LINGERS = Policy(linger_s=30.0, hang_s=0.0)
PAIR = SnapshotId(1, 5)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "TICK_S_MAX", 0.05)


def durable(served: Served) -> list[SnapshotId]:
    return [entry.snapshot for entry in Journal.open(FileBackend(served.store)).refresh().snapshots]


def test_it_ends_at_once_when_all_left_as_planned(serve: Serve) -> None:
    served = serve(LINGERS)
    trainers = [served.trainer(rank, 2) for rank in range(2)]
    trainers[0].leave()
    assert served.report().state == "in place"
    trainers[1].leave()
    assert served.ends()


def test_what_was_handed_in_is_durable_before_it_ends(serve: Serve) -> None:
    served = serve()
    trainer = served.trainer()
    open_epoch(trainer)
    trainer.hand_in(PAIR)
    trainer.leave()
    assert served.ends()
    assert durable(served) == [PAIR]


def test_process_of_another_user_is_refused_and_counted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    trainer = served.trainer()
    monkeypatch.setattr(daemon_module, "peer_uid", lambda sock: os.geteuid() + 1)
    for _ in range(20):
        wire = served.wire()
        assert wire.receive(WAIT_S) is None, "closed before a word"
        wire.close()
    monkeypatch.undo()
    told = [event.facts for event in served.events if event.kind == "stranger-refused"]
    assert told == [{"uid": os.geteuid() + 1, "refused": 1}], "the log is not filled by others"
    assert served.home is not None
    assert served.home.strangers == 20
    assert served.report().state == "in place"
    trainer.leave()
    assert served.ends()


def test_tools_do_not_keep_it_alive(serve: Serve) -> None:
    served = serve()
    trainer, tool = served.trainer(), served.tool()
    trainer.leave()
    assert served.ends()
    tool.close()


def test_a_peer_that_says_nothing_keeps_it_for_a_while_only(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    mute = served.wire()
    served.trainer().leave()
    monkeypatch.setattr(daemon_module, "FIRST_HELLO_S", 0.2)
    assert served.ends()
    mute.close()


def test_a_connection_without_a_hello_is_ended_and_its_descriptors_with_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    trainer, mute = served.trainer(), served.wire()
    with monkeypatch.context() as brief:
        brief.setattr(daemon_module, "FIRST_HELLO_S", 0.2)
        assert mute.receive(WAIT_S) is None
    mute.close()
    assert served.report().ranks[0].trainer_pid == os.getpid()
    trainer.leave()


def test_a_hello_counts_once(serve: Serve) -> None:
    served = serve()
    trainer, tool = served.trainer(0, 2), served.tool()
    for calls in (trainer.calls, tool):
        with pytest.raises(UsageError, match="hello twice"):
            calls.ask(served.hello(rank=1, ranks=2), Welcome, timeout_s=WAIT_S)
    tool.close()
    trainer.leave()


def test_a_tool_may_only_ask(serve: Serve) -> None:
    served = serve()
    trainer, tool = served.trainer(), served.tool()
    with pytest.raises(UsageError, match="a tool does not send"):
        tool.ask(Count(key="k", amount=5), Number, timeout_s=WAIT_S)
    assert trainer.calls.ask(Count(key="k", amount=1), Number, timeout_s=WAIT_S).number == 1
    tool.close()
    trainer.leave()


def test_a_keeper_that_nobody_speaks_to_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "FIRST_HELLO_S", 0.1)
    assert serve().ends(3.0)


def test_another_launch_is_refused_while_the_first_lives(serve: Serve) -> None:
    served = serve()
    first = served.trainer(launch="a")
    with pytest.raises(
        ConflictError, match=rf"running already on this node.*pids=\[{os.getpid()}\]; stop it first"
    ):
        served.trainer(launch="b")
    with pytest.raises(ConflictError):
        served.trainer(0, 2, launch="a")
    first.leave()


def test_ranks_of_one_launch_that_name_different_stores_are_refused(serve: Serve) -> None:
    served = serve()
    stores, access = served.spec.stores_digest(), served.spec.access_digest()
    first = served.trainer(0, 2, stores=stores, access=access)
    with pytest.raises(ConflictError, match="names other stores"):
        served.trainer(1, 2, stores="others", access=access)
    with pytest.raises(ConflictError, match="running already"):
        served.trainer(0, 2, launch="b", stores="others", access=access)
    token_of_its_own = served.trainer(1, 2, stores=stores, access="another token")
    token_of_its_own.leave()
    first.leave()


def test_keeper_whose_successor_cannot_start_goes_on(serve: Serve) -> None:
    served = serve(LINGERS)
    first = served.trainer()
    open_epoch(first)
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering")
    calls = KeeperClient(served.wire())
    other = served.hello(launch="b", stores=served.spec.stores_digest(), access="other")
    assert isinstance(calls.call(other, timeout_s=WAIT_S), OtherSettings)
    settings = Settings(spec=served.spec.encode(), environment={}, program=("/bin/false",))
    with pytest.raises(UnavailableError, match="exited with status 1"):
        calls.call(settings, timeout_s=WAIT_S)
    calls.close()
    assert served.report().state == "lingering"
    second = served.trainer(launch="c")
    second.leave()


def test_rank_whose_launch_was_admitted_before_its_settings_came_says_hello_again(
    serve: Serve,
) -> None:
    served = serve()
    stores, access = served.spec.stores_digest(), served.spec.access_digest()
    late = KeeperClient(served.wire())
    hello = served.hello(launch="b", rank=1, ranks=2, stores=stores, access="token of its own")
    assert isinstance(late.call(hello, timeout_s=WAIT_S), OtherSettings)
    first = served.trainer(0, 2, launch="b", stores=stores, access=access)
    settings = Settings(spec=served.spec.encode(), environment={}, program=("/bin/false",))
    with pytest.raises(UnavailableError, match="closed it"):
        late.call(settings, timeout_s=WAIT_S)
    late.close()
    again = served.trainer(1, 2, launch="b", stores=stores, access="token of its own")
    again.leave()
    first.leave()


def test_settings_that_nobody_asked_for_are_refused(serve: Serve) -> None:
    served = serve()
    trainer = served.trainer()
    settings = Settings(spec=served.spec.encode(), environment={}, program=("/bin/false",))
    for calls in (trainer.calls, KeeperClient(served.wire())):
        with pytest.raises(UsageError):
            calls.call(settings, timeout_s=WAIT_S)
        if calls is not trainer.calls:
            calls.close()
    trainer.leave()


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), (0, 5000)])
def test_a_rank_that_cannot_be_is_refused(serve: Serve, rank: int, ranks: int) -> None:
    served = serve()
    first = served.trainer(0, 2)
    with pytest.raises(UsageError, match="out of range"):
        served.trainer(rank, ranks)
    first.leave()


@pytest.mark.slow
def test_a_role_that_is_none_is_refused(serve: Serve) -> None:
    served = serve()
    with pytest.raises(UsageError, match="unknown role"):
        served.trainer(role="boss")


def test_another_release_is_refused_and_told_why(serve: Serve) -> None:
    served = serve()
    one = served.trainer()
    with pytest.raises(UsageError, match=f"another release.*theirs={WIRE_VERSION} ours=99"):
        served.trainer(version=99)
    one.leave()


@pytest.mark.slow
def test_who_speaks_before_its_hello_is_refused(serve: Serve) -> None:
    served = serve()
    calls = KeeperClient(served.wire())
    with pytest.raises(UsageError, match="say hello first"):
        calls.call(Count(key="c", amount=1))
    calls.close()


@pytest.mark.parametrize("seed", range(8))
def test_garbage_of_one_peer_does_not_hurt_the_others(serve: Serve, seed: int) -> None:
    served = serve()
    well = served.trainer()
    rng = random.Random(seed)
    for _ in range(10):
        sock = served.folder.connect()
        body = rng.randbytes(rng.randrange(1, 300))
        framed = struct.pack("<I", rng.choice([len(body), len(body) // 2, 1 << 31, 0])) + body
        sock.sendall(rng.choice([framed, body, framed[:3]]))
        if rng.random() < 0.5:
            sock.shutdown(1)
        assert well.calls.ask(Count(key="c", amount=1), Number).number > 0
        sock.close()
    well.leave()
    assert served.ends()


@pytest.mark.slow
def test_a_garbled_trainer_is_cut_off_alone(serve: Serve) -> None:
    served = serve(LINGERS)
    well, bad = served.trainer(0, 2), served.trainer(1, 2)
    bad.calls._wire._socket.sendall(b"\xff" * 64)
    until(lambda: served.told("peer-lost"))
    assert well.calls.ask(Count(key="c", amount=1), Number).number == 1
    bad.leave(planned=False)
    well.leave()


def test_an_abandoned_job_is_made_durable_and_its_slots_wait_for_the_next_launch(
    serve: Serve,
) -> None:
    served = serve(LINGERS)
    first = served.trainer(launch="a")
    open_epoch(first)
    first.stage(PAIR)
    first.leave(planned=False)
    until(lambda: served.store.exists() and durable(served) == [PAIR])
    assert served.report().state == "lingering"
    second = served.trainer(launch="b")
    assert len(second.calls.ask(GetSlots(rank=0), Slots).slots) == 1
    found = second.calls.ask(GetChoices(), Choices).choices
    assert [(choice.snapshot, choice.tier) for choice in found] == [
        (PAIR, "staged"),
        (PAIR, "durable"),
    ]
    assert open_epoch(second, PAIR) == 2
    second.leave()
    assert served.ends(), "the end of the second launch was planned"


@pytest.mark.slow
def test_an_abandoned_job_ends_after_it_lingered(serve: Serve) -> None:
    served = serve(Policy(linger_s=0.3, hang_s=0.0))
    first = served.trainer()
    open_epoch(first)
    first.stage(PAIR)
    left_s = time.monotonic()
    first.leave(planned=False)
    assert served.ends()
    assert time.monotonic() - left_s >= 0.3
    assert durable(served) == [PAIR]


def test_what_survivors_held_is_durable_though_the_last_one_left_as_planned(serve: Serve) -> None:
    served = serve(Policy(linger_s=0.0, hang_s=0.0))
    trainers = [served.trainer(rank, 2) for rank in range(2)]
    open_epoch(trainers[0])
    for trainer in trainers:
        trainer.stage(PAIR)
    trainers[1].leave(planned=False)
    trainers[0].leave()
    assert served.ends()
    assert durable(served) == [PAIR]


def test_a_launch_of_another_size_starts_with_nothing_of_the_old_one(serve: Serve) -> None:
    served = serve(LINGERS)
    first = served.trainer(launch="a")
    open_epoch(first)
    first.hand_in(PAIR)
    assert first.outcome().error is None
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering" and served.daemon._job.state.uploads.idle)
    others = [served.trainer(rank, 3, launch="b") for rank in range(3)]
    assert [one.board.ranks for one in others] == [3] * 3
    assert others[0].calls.ask(GetSlots(rank=0), Slots).slots == ()
    found = others[0].calls.ask(GetChoices(), Choices).choices
    assert [(choice.snapshot, choice.tier) for choice in found] == [(PAIR, "durable")]
    for one in others:
        one.leave()


def test_a_launch_of_another_size_waits_for_what_the_old_one_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), Journal.commit
    monkeypatch.setattr(
        Journal, "commit", lambda *args, **named: go_on.wait(WAIT_S) and write(*args, **named)
    )
    served = serve(LINGERS)
    first = served.trainer(launch="a")
    open_epoch(first)
    first.stage(PAIR)
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering")
    for role in ("trainer", "supervisor"):
        refused = served.peer(role=role, rank=0, ranks=3, launch="b")
        error = refused.next(Done).error
        assert error is not None
        assert error.code == "unavailable"
        assert error.text.startswith("step 5 is still being uploaded; wait.")
        refused.leave(planned=False)
    go_on.set()
    until(lambda: served.daemon._job.state.uploads.idle)
    second = served.trainer(0, 3, launch="b")
    assert durable(served) == [PAIR]
    second.leave()


def test_a_job_that_ended_well_is_settled_before_another_size_takes_its_place(serve: Serve) -> None:
    served = serve(LINGERS)
    first, tool = served.trainer(launch="a"), served.wire()  # which says nothing, and keeps it
    open_epoch(first)
    first.stage(PAIR)
    go_on = served.pause()
    first.leave()
    refused = served.peer(rank=0, ranks=2, launch="b")
    go_on.set()
    error = refused.next(Done).error
    assert error is not None
    assert "step 5 is still being uploaded" in error.text
    until(lambda: served.daemon._job.state.uploads.idle)
    second = served.trainer(0, 2, launch="b")
    assert durable(served) == [PAIR]
    for one in (refused, second):
        one.leave()
    tool.close()


def test_what_cannot_be_settled_keeps_no_launch_of_another_size_out(serve: Serve) -> None:
    served = serve(LINGERS)
    first = served.trainer(launch="a")
    open_epoch(first)
    first.stage(PAIR)
    Journal.open(FileBackend(served.store)).open_epoch(
        resume=None
    )  # somebody else goes on with the job
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering" and served.daemon._job.state.uploads.idle)
    served.trainer(0, 3, launch="b").leave()


def test_what_a_hello_needs_is_imported_quickly() -> None:
    heavy = ("numpy", "fsspec", "asyncio", "ckpt.keeper.uploads.uploads", "ckpt.save.persister")
    code = f"import ckpt.keeper.__main__, ckpt.keeper.daemon, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_connection_that_waits_when_all_is_over_is_served(serve: Serve) -> None:
    served = serve()
    first = served.trainer(launch="a")
    go_on = served.pause()
    first.leave()
    second = served.wire()
    go_on.set()
    calls = KeeperClient(second)
    assert calls.ask(served.hello(launch="b"), Welcome, timeout_s=WAIT_S).boot == "b00t"
    calls.close()


def test_posting_after_the_end_is_harmless(serve: Serve) -> None:
    served = serve()
    served.trainer().leave()
    assert served.ends()
    read, write = os.pipe2(os.O_NONBLOCK)
    more = [os.dup(write) for _ in range(20)]
    served.daemon.post(lambda: None)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    for fd in (read, write, *more):
        os.close(fd)


def test_a_posted_call_that_fails_is_told_and_not_the_end(serve: Serve) -> None:
    served = serve()
    one = served.trainer()
    served.daemon.post(lambda: 1 // 0)
    until(lambda: served.told("keeper-failed"))
    assert one.calls.ask(Count(key="c", amount=1), Number).number == 1
    one.leave()
