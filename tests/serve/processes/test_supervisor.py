"""``ckpt serve APP`` keeps replicas running, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.keepers.served import until
from kit.servers.process import free_port
from kit.serving import (
    FrontProcess,
    Load,
    ServingGroup,
    Training,
    ask,
    check_reply,
    program_environment,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "store")
    yield training
    training.close()


@pytest.fixture
def group(tmp_path: Path, training: Training) -> Iterator[ServingGroup]:
    group = ServingGroup(tmp_path, training.store, group=f"g{tmp_path.name}", wanted=2)
    yield group
    group.close()


def serve(group: ServingGroup, *words: str) -> FrontProcess:
    given = ("answering:replica", "--group", group.group, "--replicas", "2", "--standby", "1")
    env = program_environment(group.store)
    front = FrontProcess(group.folder, *given, *words, port=free_port(), env=env)
    group.fronts.append(front)
    return front


def test_replica_that_dies_is_replaced_and_started_again(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    front = serve(group)
    front.wait_ready()
    until(lambda: len(group.view().serving) == 2 and len(group.view().replicas) == 3)
    before = group.view()
    lost = before.serving[0]
    with Load(front.port, rate=40) as load:
        load.wait_for(20)
        os.kill(lost.pid, signal.SIGKILL)
        until(lambda: lost.name not in group.view().replicas)
        until(lambda: len(group.view().serving) == 2 and len(group.view().replicas) == 3)
        load.wait_for(40)
    assert load.failed == []
    new = (group.view().replicas.keys() - before.replicas.keys()).pop()
    assert group.view().role(new) == "standby", "the one that waited has the place"
    assert f"{lost.name} ended by signal 9" in front.said
    assert f"in the place of {lost.name}" in front.said


def test_sigterm_answers_what_was_begun_and_ends_all(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    front = serve(group)
    front.wait_ready()
    until(lambda: len(group.view().replicas) == 3 and len(group.view().serving) == 2)
    with Load(front.port, rate=8, path="/answer?sleep=0.5") as load:
        load.wait_for(8)
        term_s = time.monotonic()
        front._process.send_signal(signal.SIGTERM)
        assert front._process.wait(60) == 0
        load._stop.set()
    # What came later finds a connection that is closed, or 503: nothing of it was begun.
    assert {result.status for result in load.failed} <= {0, 503}
    assert all(result.due_s > term_s for result in load.failed)
    assert len([result for result in load.results if result.due_s <= term_s]) >= 8
    assert not group.view().replicas
    assert front.said.count("leaves: takes no new requests") == 3
    assert "no replica can serve" not in front.said


def test_replicas_leave_when_the_process_that_started_them_is_killed(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    front = serve(group)
    until(lambda: len(group.view().replicas) == 3)
    pids = [replica.pid for replica in group.view().replicas.values()]
    front.kill()
    until(lambda: not group.view().replicas)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_program_that_cannot_be_loaded_ends_it(training: Training, group: ServingGroup) -> None:
    env = program_environment(group.store)
    given = ("answering:nothing", "--group", group.group)
    front = FrontProcess(group.folder, *given, port=free_port(), env=env)
    group.fronts.append(front)
    assert front._process.wait(60) == 2
    assert "the app names no ckpt.serve.Replica. app=answering:nothing" in front.said
    assert "error: the replicas can't begin" in front.said


def test_port_that_is_taken_ends_it_before_anything_is_started(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    front = group.front()
    other = FrontProcess(
        group.folder / "store", "front", "--group", group.group, port=front.port, env={}
    )
    group.fronts.append(other)
    assert other._process.wait(60) == 11
    assert f"can't listen. address=127.0.0.1:{front.port}" in other.said


def test_number_of_replicas_is_that_of_the_last_start(
    training: Training, group: ServingGroup
) -> None:
    """And an order given before holds."""
    training.commit(1)
    first = serve(group)
    until(lambda: len(group.view().serving) == 2)
    first._process.send_signal(signal.SIGTERM)
    assert first._process.wait(60) == 0
    again = serve(group, "--replicas", "1")
    again.wait_ready()
    until(lambda: len(group.view().replicas) == 2 and len(group.view().serving) == 1)
    assert check_reply(ask(again.port, "/answer")) == 1
    roles = group.view().roles
    assert roles is not None
    assert roles.wanted == 1
