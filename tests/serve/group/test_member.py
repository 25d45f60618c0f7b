"""Processes of a group agree on who serves, over a file and over etcd, and after it was away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.etcd import EtcdCluster
from kit.keepers.served import until

from ckpt.errors import ConflictError, NotFoundError, UsageError
from ckpt.events import Event
from ckpt.keyspace.address import EtcdOptions
from ckpt.keyspace.base import Delete, Put, Transaction
from ckpt.serve.group.decide import drained, follow_order, promoted
from ckpt.serve.group.member import (
    GroupMember,
    await_view,
    open_group,
    parse_group,
    read_view,
    write_decision,
)
from ckpt.serve.group.records import (
    ORDER,
    REPLICAS,
    ROLES,
    GroupView,
    ReplicaRecord,
    RolesRecord,
    encode,
)

TTL_S = 3.0


class Group:
    """A group whose members are threads of this process."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.keyspace = open_group(address)
        self.events: list[Event] = []
        self.members: list[GroupMember] = []

    def join(
        self, name: str = "", *, suspects: Callable[[], frozenset[str]] = frozenset
    ) -> GroupMember:
        record = ReplicaRecord(name=name, address="127.0.0.1:1", state="ready") if name else None
        member = GroupMember(
            open_group(self.address),
            wanted=2,
            emit=self.events.append,
            replica=record,
            ttl_s=TTL_S,
            suspects=suspects,
        )
        self.members.append(member)
        return member

    def serving(self) -> str:
        view, _ = read_view(self.keyspace)
        return "".join(replica.name for replica in view.serving)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture(params=["file", "etcd"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Group]:
    name = f"g{tmp_path.name}"
    if request.param == "etcd":
        cluster: EtcdCluster = request.getfixturevalue("etcd_one")
        name = f"etcd://{cluster.endpoints[0]}/{name}"
    made = Group(name)
    yield made
    for member in made.members:
        member.close()
    made.keyspace.close()


def test_standby_serves_when_a_lease_runs_out(group: Group) -> None:
    lost = group.join("a")
    until(lambda: group.serving() == "a")
    group.join("b")
    until(lambda: group.serving() == "ab")
    group.join("c")
    until(lambda: "c" in read_view(group.keyspace)[0].replicas)
    assert group.serving() == "ab"
    lost._closed.set()  # as a process that was killed: it renews no more and gives nothing up
    until(lambda: group.serving() == "bc")
    promoted = [event.text for event in group.events if event.kind == "replica-promoted"]
    assert "c serves from now on in the place of a" in promoted
    assert len(promoted) == 3, "said once, whoever wrote it"


def test_one_that_leaves_is_replaced_at_once_and_one_that_comes_stands_by(group: Group) -> None:
    members = {name: group.join(name) for name in "ab"}
    until(lambda: len(group.serving()) == 2)
    group.join("c")
    until(lambda: "c" in read_view(group.keyspace)[0].replicas)
    members["b"].close()
    until(lambda: set(group.serving()) == {"a", "c"}, wait_s=TTL_S)


def test_suspicion_of_a_front_moves_the_role(group: Group) -> None:
    suspected: set[str] = set()
    for name in "ab":
        group.join(name)
    until(lambda: len(group.serving()) == 2)
    group.join("c")
    until(lambda: "c" in read_view(group.keyspace)[0].replicas)
    group.join(suspects=lambda: frozenset(suspected))
    suspected.add("a")
    until(lambda: set(group.serving()) == {"b", "c"})


def test_own_record_is_written_when_it_changes(group: Group) -> None:
    member = group.join("a")
    until(lambda: group.serving() == "a")
    member.update(generation="1-10", kept=("1-10",), state="draining")

    def written() -> bool:
        record = read_view(group.keyspace)[0].replicas["a"]
        return record.generation == "1-10" and record.state == "draining"

    until(written)
    until(lambda: group.serving() == "")
    assert "group-empty" not in group.kinds(), "a group that is ended is nobody's loss"


def test_group_without_anybody_who_can_serve_is_said(group: Group) -> None:
    member = group.join("a")
    until(lambda: group.serving() == "a")
    other = group.join("b")
    until(lambda: len(group.serving()) == 2)
    other.update(state="warming")
    member.update(state="draining")
    until(lambda: "group-empty" in group.kinds())


def test_record_that_is_gone_with_its_lease_comes_back(group: Group) -> None:
    """As after a pause of the process that was longer than the lease."""
    member = group.join("a")
    until(lambda: group.serving() == "a")
    assert member._record is not None
    group.keyspace.revoke(member._record._lease_id)
    until(lambda: group.serving() == "a")


def test_broken_records_stop_nobody_and_are_said_once(group: Group) -> None:
    puts = (Put(REPLICAS + "x", b"{"), Put(ROLES, b"[]"), Put(ORDER, b"7"))
    group.keyspace.transact(Transaction(then=puts))
    _, problems = read_view(group.keyspace)
    assert len(problems) == 3
    group.join("a")
    until(lambda: group.serving() == "a")
    group.keyspace.transact(Transaction(then=(Delete(REPLICAS + "x"), Delete(ORDER))))
    until(lambda: "group-well" in group.kinds())
    assert group.kinds().count("group-unreadable") == 1


def test_commands_are_written_over_what_others_write(group: Group) -> None:
    for name in "abc":
        group.join(name)
    until(lambda: len(group.serving()) == 2)
    until(lambda: len(read_view(group.keyspace)[0].replicas) == 3)
    (standby,) = set("abc") - set(group.serving())
    taken = group.serving()[0]
    roles = write_decision(group.keyspace, lambda view: drained(view, taken))
    assert standby in roles.serving
    assert taken in roles.drained
    write_decision(group.keyspace, lambda view: promoted(view, taken))
    order = write_decision(group.keyspace, lambda view: follow_order(view, "tag:prod"))
    assert order.serial == 1
    seen, reached = await_view(
        group.keyspace, lambda view: taken in group.serving(), timeout_s=60.0
    )
    assert reached
    assert seen.order == order
    with pytest.raises(NotFoundError, match="no such replica"):
        write_decision(group.keyspace, lambda view: promoted(view, "nobody"))


def test_command_gives_up_if_others_always_come_first(group: Group) -> None:
    def interrupted(view: GroupView) -> RolesRecord:
        other = RolesRecord(wanted=view.revision + 10)
        group.keyspace.transact(Transaction(then=(Put(ROLES, encode(other)),)))
        return RolesRecord(wanted=1)

    with pytest.raises(ConflictError, match="always came first"):
        write_decision(group.keyspace, interrupted)


def test_what_is_not_reached_is_given_back_as_it_is(group: Group) -> None:
    view, reached = await_view(group.keyspace, lambda view: False, timeout_s=0.0)
    assert not reached
    assert not view.replicas


@pytest.mark.slow
def test_group_goes_on_after_etcd_was_away(
    etcd_three: EtcdCluster,
) -> None:
    """While it is away the last roles hold; then the leases that ran out are taken anew."""
    address = f"etcd://{','.join(etcd_three.endpoints)}/away{os.getpid()}"
    group = Group(address)
    try:
        for name in "abc":
            group.join(name)
        until(lambda: len(group.serving()) == 2)
        until(lambda: len(read_view(group.keyspace)[0].replicas) == 3)
        before = group.serving()
        etcd_three.stop()
        until(lambda: "group-silent" in group.kinds())
        etcd_three.start()
        until(lambda: "group-well" in group.kinds())
        until(lambda: group.serving() == before)
        until(lambda: len(read_view(group.keyspace)[0].replicas) == 3)
        until(lambda: group.kinds().count("group-silent") == group.kinds().count("group-well"))
        assert group.kinds().count("group-silent") <= len(group.members)
    finally:
        for member in group.members:
            member.close()
        group.keyspace.close()


def test_name_of_a_group() -> None:
    path, name = parse_group("chat")
    assert isinstance(path, Path)
    assert (path.name, name) == ("chat.db", "chat")
    options, name = parse_group("etcd://h1:2379,[::1]:2379/chat-2?user=u&password_file=/dev/null")
    assert isinstance(options, EtcdOptions)
    assert options.endpoints == ("h1:2379", "[::1]:2379")
    assert (options.user, name) == ("u", "chat-2")
    for wrong in ("", "a b", "etcd://h1:2379", "etcd://h1:2379/", "etcd://h/a?x=1", "../up", "."):
        with pytest.raises(UsageError):
            parse_group(wrong)
