"""Replicas, standbys, fronts, etcd and the store are lost while requests arrive: none fails that may
be repeated, and the group is back at full strength."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.etcd import EtcdCluster
from kit.keepers.served import until
from kit.serving import Load, ServingGroup, Training, ask, check_reply

from ckpt.serve import headers
from ckpt.serve.group.member import LEASE_TTL_S

pytestmark = pytest.mark.slow

RATE = 60.0
BACK_S = LEASE_TTL_S + 1.0


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "store")
    training.commit(1)
    yield training
    training.close()


@pytest.fixture
def group(tmp_path: Path, training: Training) -> Iterator[ServingGroup]:
    """Two that serve and one that stands by."""
    group = ServingGroup(tmp_path, training.store, group=f"g{tmp_path.name}", wanted=2)
    with started(group):
        yield group


@contextmanager
def started(group: ServingGroup) -> Iterator[None]:
    try:
        for name in "ab":
            group.start(name)
        group.wait_serving("a", "b")
        group.start("c")
        group.wait_ready("c")
        yield
    finally:
        group.close()


@pytest.mark.parametrize("harm", ["kill", "freeze"])
def test_lost_replica_costs_no_repeatable_request(group: ServingGroup, harm: str) -> None:
    front = group.front()
    with Load(front.port, rate=RATE) as load:
        load.wait_for(50)
        getattr(group.replicas["a"], harm)()
        begun_s = time.monotonic()
        group.wait_serving("b", "c")
        assert time.monotonic() - begun_s < BACK_S + 10.0  # generous; the benchmark measures
        load.wait_for(100)
        if harm == "freeze":
            group.replicas["a"].thaw()
            until(lambda: group.view().role("a") == "standby" and "a" in group.view().replicas)
            load.wait_for(50)
    assert load.failed == []
    assert {result.replica for result in load.results} == {"a", "b", "c"}
    group.wait_serving("b", "c")


def test_standby_that_is_lost_is_missed_by_no_request(group: ServingGroup) -> None:
    front = group.front()
    with Load(front.port, rate=RATE) as load:
        load.wait_for(20)
        group.replicas["c"].kill()
        until(lambda: "c" not in group.view().replicas)
        load.wait_for(50)
    assert load.failed == []
    assert group.serving() == {"a", "b"}


def test_request_that_must_not_be_repeated_is_lost_only_with_its_replica(
    group: ServingGroup,
) -> None:
    front = group.front()
    with Load(front.port, rate=RATE, path="/once?sleep=0.05") as load:
        load.wait_for(50)
        under_way = ask(group.replicas["a"].port, headers.STATUS).json["outstanding"]
        group.replicas["a"].kill()
        load.wait_for(100)
    assert len(load.failed) <= under_way + 4, "those in flight on it, and what came before its end"
    assert {result.status for result in load.failed} <= {502}


def test_one_of_two_fronts_is_lost(group: ServingGroup) -> None:
    lost, front = group.front(), group.front()
    with Load(front.port, rate=RATE) as load:
        load.wait_for(20)
        lost.kill()
        load.wait_for(50)
        group.replicas["b"].kill()
        group.wait_serving("a", "c")
        load.wait_for(50)
    assert load.failed == []


def test_store_that_is_away_is_missed_by_no_request(
    group: ServingGroup, training: Training
) -> None:
    front = group.front()
    away = training.store.with_name("away")
    with Load(front.port, rate=RATE) as load:
        load.wait_for(20)
        training.store.rename(away)
        load.wait_for(200)
        away.rename(training.store)
        training.commit(2)
        # Each replica asks again on its own, so that they come to the new step one by one.
        until(lambda: {result.step for result in load.results[-20:]} == {2})
    assert load.failed == []


def test_swaps_under_load_mix_nothing(group: ServingGroup, training: Training) -> None:
    front = group.front()
    with Load(front.port, rate=RATE) as load:
        for step in range(2, 8):
            training.commit(step)
            load.wait_for(30)
        until(lambda: check_reply(ask(front.port, "/answer")) == 7)
        load.wait_for(20)
    assert load.failed == []
    assert {result.step for result in load.results} >= {1, 7}


def test_bad_snapshot_is_served_by_nobody(group: ServingGroup, training: Training) -> None:
    front = group.front()
    with Load(front.port, rate=RATE) as load:
        load.wait_for(20)
        training.commit(2, value=float("nan"))
        until(lambda: all("refused" in replica.said for replica in group.replicas.values()))
        load.wait_for(50)
        training.commit(3)
        until(lambda: check_reply(ask(front.port, "/answer")) == 3)
    assert load.failed == []
    assert {result.step for result in load.results} <= {1, 3}
    assert all(replica.said.count("is refused") == 1 for replica in group.replicas.values())


def test_etcd_that_is_away_is_missed_by_no_request(
    tmp_path: Path, training: Training, etcd_three: EtcdCluster
) -> None:
    """Longer than all leases: fronts go on with those whom they knew."""
    address = f"etcd://{','.join(etcd_three.endpoints)}/away{os.getpid()}"
    group = ServingGroup(tmp_path, training.store, group=address, wanted=2)
    with started(group):
        front = group.front()
        with Load(front.port, rate=RATE) as load:
            load.wait_for(20)
            etcd_three.stop()
            until(lambda: "can't be read" in front.said)
            load.wait_for(int(RATE * (LEASE_TTL_S + 2)))
            etcd_three.start()
            until(lambda: "can be read again" in front.said)
            until(lambda: len(group.serving()) == 2)
            load.wait_for(50)
            lost = min(group.serving())
            group.replicas[lost].kill()
            until(lambda: lost not in group.serving() and len(group.serving()) == 2)
            load.wait_for(50)
        assert load.failed == []
