"""Jobs of several nodes in a real etcd of three members, which goes wrong too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from kit.etcd import EtcdCluster, require
from kit.jobs import SOAK, differences, wait_for
from kit.machines import TTL_S, Cluster, calm, cluster

import ckpt

STEPS = 100
KILL_AT = 15
REDONE_MAX = 12
"""Far fewer than from the beginning, where only the store would have them go on."""

ARGUMENTS = (STEPS, "--every", 1000, "--step-s", 0.2)


@pytest.fixture
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    require()
    with EtcdCluster(tmp_path_factory.mktemp("etcd") / "three", 3) as found:
        yield found


@pytest.fixture
def made(tmp_path: Path, etcd: EtcdCluster) -> Iterator[Callable[..., Cluster]]:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(os.urandom(32).hex())
    with ExitStack() as ending:
        where = f"etcd://{','.join(etcd.endpoints)}"
        yield lambda **how: ending.enter_context(
            cluster(tmp_path / "cluster", where=where, secret=secret, **how)
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """What two nodes compute when nothing happens."""
    return calm(tmp_path_factory, 2, ARGUMENTS)


def wake(pids: Iterable[int]) -> None:
    """Have stopped processes go on; who is awake first may have ended another already."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def check_end(one: Cluster, undisturbed) -> None:
    """All programs end well, as if nothing had happened, and what is stored is whole."""
    assert set(one.wait_end(240.0, hurry=True).values()) == {0}, one.output()
    assert differences(undisturbed, one.job, world_size=2) == [], one.output()
    one.wait_gone()
    assert ckpt.Checkpointer(str(one.results / "store")).verify().ok


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm", [*(["none"] if SOAK else []), "a member is dead", "the leader dies"]
)
def test_standby_takes_over_whatever_happens_to_one_member_of_etcd(
    made: Callable[..., Cluster], etcd: EtcdCluster, undisturbed, harm: str
) -> None:
    one = made(nodes="2")
    for _ in range(3):
        one.start(*ARGUMENTS)
    one.wait_steps(KILL_AT)
    if harm == "a member is dead":
        next(member for member in etcd.members if not member.is_leader()).kill()
    lost = one.of_rank(0)
    if harm == "the leader dies":
        etcd.leader().kill()
    lost.kill()
    ends = one.wait_end(hurry=True)
    assert {status for name, status in ends.items() if name != lost.name} == {0}, one.output()
    assert differences(undisturbed, one.job, world_size=2) == [], one.output()
    assert one.job.losses[0].poll().redone <= REDONE_MAX, one.output()
    one.wait_gone()
    newest = ckpt.Checkpointer(str(one.results / "store")).latest()
    assert newest is not None and newest.step == STEPS


@pytest.mark.slow
def test_training_goes_on_while_etcd_hangs_for_long_and_all_nodes_answer(
    made: Callable[..., Cluster], etcd: EtcdCluster, undisturbed
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS)
    one.wait_steps(KILL_AT)
    trainers = [one.job.trainer(rank) for rank in range(2)]
    frozen_s = time.monotonic()
    for member in etcd.members:
        member.process.freeze()
    try:
        wait_for(
            lambda: time.monotonic() > frozen_s + 2 * TTL_S,
            "more than their leases last",
            wait_s=60.0,
        )
        one.wait_steps(one.job.completed + 5)
        assert [one.job.trainer(rank) for rank in range(2)] == trainers, "nobody was restarted"
        assert one.job.completed < STEPS, "it was over before; make it longer"
    finally:
        for member in etcd.members:
            member.process.thaw()
    check_end(one, undisturbed)


@pytest.mark.slow
def test_nodes_stop_once_one_of_them_does_not_answer_while_etcd_hangs(
    made: Callable[..., Cluster], etcd: EtcdCluster, undisturbed
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS)
    one.wait_steps(KILL_AT)
    holder, other = one.of_rank(0), one.of_rank(1)
    trainer = one.job.trainer(0)
    silent = other.members()
    for member in etcd.members:
        member.process.freeze()
    for pid in silent:  # nothing of it is closed, nothing of it answers
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(
            lambda: not holder.has(trainer),
            "the end of the trainer",
            wait_s=TTL_S * 15,
            say=one.output,
        )
        assert one.job.completed < STEPS, "it was over before; make it longer"
    finally:
        wake(silent)
        for member in etcd.members:
            member.process.thaw()
    check_end(one, undisturbed)


@pytest.mark.slow
def test_paused_node_wakes_up_to_find_its_ranks_given_away(
    made: Callable[..., Cluster], undisturbed
) -> None:
    one = made(nodes="2")
    for _ in range(3):
        one.start(*ARGUMENTS)
    one.wait_steps(KILL_AT)
    paused, trainer = one.of_rank(1), one.job.trainer(1)
    members = paused.members()
    for pid in members:  # all of the machine at once, as if it slept
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: one.job.trainer(1) != trainer, "another trainer of rank 1", say=one.output)
        one.wait_steps(KILL_AT + 10)
    finally:
        wake(members)
    wait_for(
        lambda: not paused.has(trainer),
        "the end of the old trainer",
        wait_s=30.0,
        say=one.output,
    )
    check_end(one, undisturbed)
