"""A real HAProxy follows a group under load, and goes on alone while nobody controls it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.etcd import require
from kit.keepers.served import until
from kit.serving import HaproxyProcess, Load, ServingGroup, Training, ask, check_reply

pytestmark = pytest.mark.slow


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "store")
    training.commit(1)
    yield training
    training.close()


@pytest.fixture
def group(tmp_path: Path, training: Training) -> Iterator[ServingGroup]:
    """``a`` and ``b`` serve, ``c`` stands by."""
    require("haproxy")
    group = ServingGroup(tmp_path, training.store, group=f"g{tmp_path.name}", wanted=2)
    for name in "ab":
        group.start(name)
    group.wait_serving("a", "b")
    group.start("c")
    group.wait_ready("c")
    yield group
    group.close()


@pytest.fixture
def front(group: ServingGroup) -> Iterator[HaproxyProcess]:
    front = HaproxyProcess(group, "--deadline", "10")
    front.wait_ready()
    yield front
    front.close()


def test_lost_replica_costs_no_repeatable_request(
    group: ServingGroup, front: HaproxyProcess
) -> None:
    with Load(front.port, rate=50) as load:
        load.wait_for(50)
        group.replicas["a"].kill()
        group.wait_serving("b", "c")
        load.wait_for(100)
    assert load.failed == []
    assert {result.replica for result in load.results} == {"a", "b", "c"}


def test_stopped_replica_is_suspected_and_replaced(
    group: ServingGroup, front: HaproxyProcess
) -> None:
    with Load(front.port, rate=20, workers=40) as load:
        load.wait_for(20)
        group.replicas["a"].freeze()
        group.wait_serving("b", "c")
        load.wait_for(40)
    assert load.failed == [], "what it held was sent again when its time was over"


def test_haproxy_goes_on_alone_and_is_brought_up_to_date(
    group: ServingGroup, front: HaproxyProcess, training: Training
) -> None:
    with Load(front.port, rate=30) as load:
        load.wait_for(20)
        front.controller.kill()
        front.controller.wait()
        load.wait_for(20)
        group.start("d")
        group.wait_ready("d")
        front.controller = front.control()
        group.replicas["a"].kill()
        group.replicas["b"].kill()
        group.wait_serving("c", "d")
        training.commit(2)
        until(lambda: {result.step for result in load.results[-5:]} == {2})
    # Both that served died at once: until one of the others is ready HAProxy has nobody to ask. It
    # says so, or ends the client's connection, by which a client knows that it may ask again.
    assert {result.status for result in load.failed} <= {0, 503}
    assert check_reply(ask(front.port, "/answer")) == 2
    front.kill()
    until(lambda: "HAProxy does not answer at its runtime socket" in front.said)
