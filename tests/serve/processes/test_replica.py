"""A replica process answers by one generation, does what operators order, and leaves in peace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.keepers.served import until
from kit.serving import ServingGroup, Training, ask, check_reply

from ckpt.errors import UsageError
from ckpt.serve import headers
from ckpt.serve.group.decide import follow_order, rollback_order, stay_order
from ckpt.serve.group.member import write_decision
from ckpt.serve.group.records import OrderRecord
from ckpt.serve.processes.options import ReplicaOptions, encode_options
from ckpt.serve.processes.replica import followed_by, load_replica

pytestmark = pytest.mark.slow


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "store")
    yield training
    training.close()


@pytest.fixture
def group(tmp_path: Path, training: Training) -> Iterator[ServingGroup]:
    group = ServingGroup(tmp_path, training.store, group=f"g{tmp_path.name}", wanted=1)
    yield group
    group.close()


def test_replica_warms_up_serves_and_follows(training: Training, group: ServingGroup) -> None:
    a = group.start("a")
    a.wait_ready()
    early = ask(a.port, "/answer")
    assert early.status == 503
    assert early.headers[headers.NOT_HANDLED] == headers.AWAY
    assert ask(a.port, headers.HEALTH).status == 503
    training.commit(1)
    group.wait_serving("a")
    assert check_reply(ask(a.port, "/answer")) == 1
    assert ask(a.port, headers.HEALTH).status == 200
    training.commit(2)
    until(lambda: check_reply(ask(a.port, "/answer")) == 2)
    until(lambda: group.view().replicas["a"].generation == "1-2")
    assert set(group.view().replicas["a"].kept) == {"1-1", "1-2"}
    assert group.view().replicas["a"].repeatable == ("/answer",)


def test_request_may_name_its_generation(training: Training, group: ServingGroup) -> None:
    training.commit(1)
    a = group.start("a")
    group.wait_serving("a")
    training.commit(2)
    until(lambda: check_reply(ask(a.port, "/answer")) == 2)
    assert check_reply(ask(a.port, "/answer", X_Ckpt_Generation="1-1")) == 1
    gone = ask(a.port, "/answer", X_Ckpt_Generation="1-7")
    assert gone.status == 409
    assert set(gone.json["kept"]) == {"1-1", "1-2"}


def test_answers_and_errors_of_handlers(training: Training, group: ServingGroup) -> None:
    training.commit(1)
    a = group.start("a")
    group.wait_serving("a")
    sent = ask(a.port, "/once", method="POST", body=b"hello")
    assert check_reply(sent) == 1
    assert sent.json["body"] == "hello"
    assert sent.replica == "a"
    for how, status, body in (
        ("usage", 400, b'{"error": "a number is missing"}'),
        ("text", 200, b"text"),
        ("bytes", 200, b"\0\1"),
        ("raise", 500, b'{"error": "RuntimeError: broken on purpose"}'),
        ("raise", 500, b'{"error": "RuntimeError: broken on purpose"}'),
    ):
        reply = ask(a.port, f"/fail?how={how}", method="POST", body=b"{")
        assert (reply.status, reply.body) == (status, body)
    no_json = ask(a.port, "/fail?how=json", method="POST", body=b"{")
    assert no_json.status == 400
    assert "no JSON" in no_json.json["error"]
    assert a.said.count("said once") == 1, "a failing handler is said once"
    assert ask(a.port, "/nowhere").status == 404
    assert ask(a.port, "/once").status == 405
    bad = ask(a.port, "/answer", X_Ckpt_Deadline_Ms="soon")
    assert bad.status == 400


def test_what_is_too_much_or_too_late_is_refused_before_it_begins(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    a = group.start("a", threads=1, queue=1)
    group.wait_serving("a")
    replies = []

    def send(**given: str) -> None:
        replies.append(ask(a.port, "/answer?sleep=1", **given))

    threads = [threading.Thread(target=send) for _ in range(2)]
    threads[0].start()
    until(lambda: ask(a.port, headers.STATUS).json["outstanding"] == 1)
    threads[1].start()
    until(lambda: ask(a.port, headers.STATUS).json["outstanding"] == 2)
    refused = ask(a.port, "/answer")
    assert refused.status == 503
    assert refused.headers[headers.RETRY_AFTER] == "1"
    assert refused.headers[headers.NOT_HANDLED] == headers.BUSY
    for thread in threads:
        thread.join()
    assert [reply.status for reply in replies] == [200, 200]

    first = threading.Thread(target=send)
    first.start()
    until(lambda: ask(a.port, headers.STATUS).json["outstanding"] == 1)
    late = ask(a.port, "/answer", X_Ckpt_Deadline_Ms="100")
    first.join()
    assert late.status == 503
    assert "deadline" in late.json["error"]


def test_orders_are_carried_out_by_all_and_hold_for_those_who_come_later(
    training: Training, group: ServingGroup
) -> None:
    for step in (1, 2):
        training.commit(step)
        if step == 1:
            group.start("a")
            group.wait_serving("a")
    until(lambda: group.view().replicas["a"].generation == "1-2")
    order = write_decision(group.keyspace, rollback_order)
    assert order.generation == "1-1"
    until(lambda: group.view().replicas["a"].order == order.serial)
    assert check_reply(ask(group.replicas["a"].port, "/answer")) == 1
    training.commit(3)
    group.start("b")
    group.wait_ready("b")
    assert check_reply(ask(group.replicas["b"].port, "/answer")) == 1, "it never serves the newest"
    order = write_decision(group.keyspace, lambda view: follow_order(view, "latest"))
    until(lambda: group.view().replicas["b"].order == order.serial)
    for name in "ab":
        until(lambda: check_reply(ask(group.replicas[name].port, "/answer")) == 3)  # noqa: B023
    order = write_decision(group.keyspace, lambda view: stay_order(view, None))
    assert order.generation == "1-3"
    until(lambda: group.view().replicas["a"].order == order.serial)
    training.commit(4, tag="prod")
    order = write_decision(group.keyspace, lambda view: follow_order(view, "tag:prod"))
    until(lambda: check_reply(ask(group.replicas["a"].port, "/answer")) == 4)
    order = write_decision(group.keyspace, lambda view: follow_order(view, "no such"))
    until(lambda: "follow is" in group.view().replicas["a"].problem)


def test_sigterm_answers_what_was_begun_and_ends_well(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    a = group.start("a")
    group.wait_serving("a")
    group.start("b")
    group.wait_ready("b")
    replies = []
    sender = threading.Thread(target=lambda: replies.append(ask(a.port, "/answer?sleep=2")))
    sender.start()
    until(lambda: ask(a.port, headers.STATUS).json["outstanding"] == 1)
    a._process.send_signal(signal.SIGTERM)
    group.wait_serving("b")
    sender.join()
    assert check_reply(replies[0]) == 1
    assert a._process.wait(60) == 0
    assert "a" not in group.view().replicas
    assert "leaves: takes no new requests" in a.said


def test_replica_leaves_with_the_process_that_started_it(
    training: Training, group: ServingGroup
) -> None:
    training.commit(1)
    options = ReplicaOptions(
        app="answering:replica", group=group.group, name="a", leave_at_eof=True
    )
    path = str(Path(__file__).parents[2] / "kit/programs")
    with subprocess.Popen(
        [sys.executable, "-m", "ckpt.serve.processes.replica", encode_options(options)],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "ANSWERING_STORE": str(training.store)},
    ) as process:
        group.wait_serving("a")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    assert not group.view().replicas


def test_metrics_are_prometheus_text(training: Training, group: ServingGroup) -> None:
    training.commit(7)
    a = group.start("a")
    group.wait_serving("a")
    ask(a.port, "/answer")
    text = ask(a.port, headers.METRICS).body.decode()
    for line in (
        'ckpt_replica_requests_total{code="200"} 1.0',
        "ckpt_replica_generation_step 7.0",
        "ckpt_replica_swaps_total 1.0",
        "ckpt_replica_outstanding 0.0",
        'ckpt_replica_request_seconds_bucket{le="30.0"} 1.0',
    ):
        assert line in text.splitlines()
    assert 'ckpt_replica_swap_seconds{phase="fill"}' in text


@pytest.mark.parametrize(
    ("app", "problem"),
    [
        ("nowhere_to_be_found:replica", "no such module"),
        ("json:dumps", "names no ckpt.serve.Replica"),
        ("json:none", "names no ckpt.serve.Replica"),
    ],
)
def test_app_that_is_none_ends_it_with_what_to_do(app: str, problem: str, tmp_path: Path) -> None:
    options = encode_options(ReplicaOptions(app=app, group="none"))
    done = subprocess.run(
        [sys.executable, "-m", "ckpt.serve.processes.replica", options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert problem in done.stderr
    with pytest.raises(UsageError, match=problem):
        load_replica(app)


def test_options_are_checked() -> None:
    for wrong in ({"app": "x"}, {"app": "a:b", "threads": 0}, {"app": "a:b", "queue": -1}):
        with pytest.raises(UsageError):
            ReplicaOptions(group="g", **wrong)  # type: ignore[arg-type]
    assert json.loads(encode_options(ReplicaOptions(app="a:b", group="g")))["app"] == "a:b"


def test_what_an_order_follows() -> None:
    assert followed_by(OrderRecord(serial=1, follow="12")) == 12
    assert followed_by(OrderRecord(serial=1, follow="tag:x")) == "tag:x"
    assert followed_by(OrderRecord(serial=1, follow="latest", generation="3-9")) == 9
