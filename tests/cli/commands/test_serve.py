"""What operators ask of a serving group: what is shown, what is written, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
from kit.keepers.served import until

from ckpt.cli.commands import serve
from ckpt.serve.group.member import GroupMember, open_group, read_view
from ckpt.serve.group.records import GroupView, ReplicaRecord

Ckpt = Callable[..., Any]
GROUP = "operated"


class ObedientReplica:
    """A member that does what orders say, or says why not."""

    def __init__(self, name: str, *, problem: str = "", deaf: bool = False) -> None:
        self._problem = problem
        self._deaf = deaf
        self._made = threading.Event()
        self.member = GroupMember(
            open_group(GROUP),
            wanted=2,
            emit=lambda event: None,
            replica=ReplicaRecord(
                name=name,
                address="127.0.0.1:1",
                host="here",
                pid=7,
                state="ready",
                generation="1-20",
                kept=("1-20", "1-10"),
            ),
            on_view=self._see,
        )
        self._made.set()

    def _see(self, view: GroupView) -> None:
        order = view.order
        if order is None or self._deaf:
            return
        self._made.wait()
        generation = order.generation or "1-20"
        self.member.update(order=order.serial, generation=generation, problem=self._problem)


@pytest.fixture
def start() -> Iterator[Callable[..., ObedientReplica]]:
    made: list[ObedientReplica] = []

    def one(name: str, **options: Any) -> ObedientReplica:
        made.append(ObedientReplica(name, **options))
        until(lambda: name in view().replicas)
        return made[-1]

    yield one
    for replica in made:
        replica.member.close()
    until(lambda: not view().replicas)
    keyspace = open_group(GROUP)
    file = keyspace._path  # type: ignore[attr-defined]
    keyspace.close()
    for path in file.parent.glob(f"{GROUP}.db*"):
        path.unlink()


def view() -> GroupView:
    keyspace = open_group(GROUP)
    try:
        return read_view(keyspace)[0]
    finally:
        keyspace.close()


def serving() -> list[str]:
    return [replica.name for replica in view().serving]


@pytest.fixture
def three(start: Callable[..., ObedientReplica]) -> None:
    """``a`` and ``b`` serve, ``c`` stands by."""
    for name in "abc":
        start(name)
        until(lambda: len(serving()) == min(2, len(view().replicas)))
    until(lambda: serving() == ["a", "b"])


def test_status_shows_who_serves_what(ckpt: Ckpt, three: None) -> None:
    done = ckpt("serve", "status", "--group", GROUP)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{GROUP}: 2 of 2 serve; follows what its program says"
    assert [line.split()[:4] for line in lines[2:]] == [
        ["a", "serving", "ready", "1-20"],
        ["b", "serving", "ready", "1-20"],
        ["c", "standby", "ready", "1-20"],
    ]
    document = ckpt("--json", "serve", "status", "--group", GROUP).json
    assert document["wanted"] == 2
    assert document["order"] is None
    assert document["replicas"][2] == {
        "name": "c",
        "role": "standby",
        "state": "ready",
        "generation": "1-20",
        "kept": ["1-20", "1-10"],
        "order": 0,
        "problem": "",
        "address": "127.0.0.1:1",
        "host": "here",
        "pid": 7,
    }


def test_status_waits_until_enough_serve(ckpt: Ckpt, start: Callable[..., ObedientReplica]) -> None:
    start("a")
    until(lambda: serving() == ["a"])
    assert ckpt("serve", "status", "--group", GROUP, "--wait", "0.1").code == 11
    later = threading.Timer(0.3, lambda: start("b"))
    later.start()
    done = ckpt("serve", "status", "--group", GROUP, "--wait", "60")
    later.join()
    assert done.code == 0
    assert "2 of 2 serve" in done.out


def test_roles_are_moved(ckpt: Ckpt, three: None) -> None:
    assert ckpt("serve", "promote", "c", "--group", GROUP).code == 0
    assert serving() == ["a", "c"]
    done = ckpt("serve", "drain", "a", "--group", GROUP, "--json")
    assert done.code == 0
    roles = {replica["name"]: replica["role"] for replica in done.json["replicas"]}
    assert roles == {"b": "serving", "c": "serving", "a": "drained"}
    assert ckpt("serve", "scale", "1", "--group", GROUP).code == 0
    assert len(serving()) == 1
    assert ckpt("serve", "scale", "3", "--group", GROUP).code == 11, "fewer serve than wanted"
    assert ckpt("serve", "promote", "a", "--group", GROUP).code == 0
    assert len(serving()) == 3


def test_orders_are_waited_for(ckpt: Ckpt, three: None) -> None:
    back = ckpt("serve", "rollback", "--group", GROUP)
    assert back.code == 0
    assert "stays at 1-10" in back.out.splitlines()[0]
    assert {replica.generation for replica in view().serving} == {"1-10"}
    pinned = ckpt("serve", "pin", "--group", GROUP, "--json").json
    assert pinned["order"] == {"serial": 2, "follow": "latest", "generation": "1-10"}
    follows = ckpt("serve", "follow", "tag:prod", "--group", GROUP)
    assert follows.out.splitlines()[0].endswith("follows tag:prod")
    assert ckpt("serve", "rollback", "1-7", "--group", GROUP).code == 0
    assert view().order.generation == "1-7"  # type: ignore[union-attr]


def test_order_that_is_not_carried_out_is_an_error(
    ckpt: Ckpt,
    start: Callable[..., ObedientReplica],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start("a", problem="no such tag")
    until(lambda: serving() == ["a"])
    done = ckpt("--json", "serve", "follow", "tag:x", "--group", GROUP)
    assert done.code == 12
    assert "{'a': 'no such tag'}" in done.error["message"]
    start("b", deaf=True)
    until(lambda: serving() == ["a", "b"])
    monkeypatch.setattr(serve, "ORDER_S", 0.2)
    late = ckpt("--json", "serve", "follow", "--group", GROUP)
    assert late.code in (11, 12)


def test_what_cannot_be_done_is_refused(ckpt: Ckpt, three: None) -> None:
    for words, code, text in (
        (("promote", "x"), 10, "replicas=['a', 'b', 'c']"),
        (("drain", "x"), 10, "no such replica"),
        (("pin", "yesterday"), 2, "EPOCH-STEP"),
        (("follow", "sometimes"), 2, "follow is latest, tag:NAME or a step"),
        (("scale", "0"), 2, "Invalid value"),
        (("status", "--group", "../x"), 2, "it begins with etcd://"),
    ):
        done = ckpt("serve", *words, *(() if "--group" in words else ("--group", GROUP)))
        assert done.code == code, done.err
        assert text in done.err
    assert ckpt("serve", "drain", "a", "--group", GROUP).code == 0
    assert ckpt("serve", "drain", "b", "--group", GROUP).code == 11
    last = ckpt("serve", "drain", "c", "--group", GROUP)
    assert last.code == 12
    assert "nobody would serve" in last.err


def test_group_that_does_not_exist_is_not_made(ckpt: Ckpt) -> None:
    for _ in range(2):
        done = ckpt("serve", "status", "--group", "nothing")
        assert done.code == 10
        assert "no such group on this machine. group=nothing groups=[" in done.err


def test_every_command_has_help_and_those_that_show_facts_take_json() -> None:
    group = serve.command
    assert isinstance(group, click.Group)
    for name, command in group.commands.items():
        assert command.help, name
        flags = {flag for one in command.params for flag in one.opts}
        assert "--group" in flags
        assert ("--json" in flags) == (name not in ("run", "replica", "front", "haproxy"))
