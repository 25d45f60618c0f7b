"""A client without a front loses nothing that may be repeated when its replicas die."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.keepers.served import until
from kit.serving import ServingGroup, Training

import ckpt.serve
from ckpt.errors import (
    AnswerLostError,
    DeadlineError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    UsageError,
)

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
    group = ServingGroup(tmp_path, training.store, group=f"g{tmp_path.name}", wanted=2)
    for name in "ab":
        group.start(name)
    group.wait_serving("a", "b")
    group.start("c")
    group.wait_ready("c")
    yield group
    group.close()


def test_client_asks_those_who_serve_and_survives_them(
    group: ServingGroup, training: Training
) -> None:
    with ckpt.serve.Client(group.group) as client:
        replies = [client.post("/answer", json=[7]) for _ in range(20)]
        assert {reply.replica for reply in replies} == {"a", "b"}
        assert {reply.generation for reply in replies} == {"1-1"}
        assert replies[0].json()["body"] == "[7]"  # type: ignore[index]
        assert client.get("/answer?sleep=0").status == 200
        assert client.get("/nowhere").status == 404
        group.replicas["a"].kill()
        assert all(client.post("/answer").status == 200 for _ in range(20))
        training.commit(2)
        until(lambda: client.get("/answer").generation == "1-2")
        assert client.get("/answer", generation="1-1").generation == "1-1"
        with pytest.raises(NotFoundError, match="generation=1-9"):
            client.get("/answer", generation="1-9")
        group.replicas["b"].freeze()
        assert client.post("/answer", repeatable=True).status == 200
        with pytest.raises(DeadlineError):
            client.post("/once?sleep=5", deadline_s=0.3)
    client.close()
    with pytest.raises(UnavailableError, match="is closed"):
        client.get("/answer")


def test_answer_that_is_lost_is_said(group: ServingGroup) -> None:
    errors: list[Exception] = []

    def send() -> None:
        try:
            client.post("/once?sleep=30")
        except AnswerLostError as error:
            errors.append(error)

    with ckpt.serve.Client(group.group) as client:
        client.get("/answer")
        sender = threading.Thread(target=send)
        sender.start()
        until(lambda: any(target.outstanding for target in client._targets))
        (busy,) = [target.name for target in client._targets if target.outstanding]
        group.replicas[busy].kill()
        sender.join()
    assert len(errors) == 1
    assert f"replica={busy} path=/once?sleep=30" in str(errors[0])


def test_group_without_replicas_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    with (
        ckpt.serve.Client(f"g{tmp_path.name}") as client,
        pytest.raises(OverloadedError, match="no replica could take it"),
    ):
        client.get("/answer", deadline_s=0.2)
    with (
        ckpt.serve.Client(f"g{tmp_path.name}") as client,
        pytest.raises(UsageError, match="a path begins with /"),
    ):
        client.get("/a b")
    with pytest.raises(UsageError, match="no such policy"):
        ckpt.serve.Client("g", policy="best")
