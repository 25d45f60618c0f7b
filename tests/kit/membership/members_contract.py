"""What membership must do over each kind of service. Subclassed where a fixture gives the
members."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from ckpt.cluster.membership import transactions as names
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import SUSPICIONS_MAX, KeyspaceMembership, boottime_s
from ckpt.cluster.membership.outcomes import Following, Leading, NotPublished, Published
from ckpt.cluster.membership.records import (
    EpochRecord,
    NodeInfo,
    NodePlacement,
    StateInventory,
    View,
    ViewScope,
    encode_inventory,
)
from ckpt.errors import ConflictError, FencedError, UsageError
from ckpt.keyspace.base import Keyspace
from kit.membership.keyspace_contract import DEADLINE_S, put

Make = Callable[..., KeyspaceMembership]


def info(node: str = "", **more: object) -> NodeInfo:
    return NodeInfo(node=node or secrets.token_hex(8), host="h", slots=2, **more)  # type: ignore[arg-type]


def joined(make: Make, node: str = "") -> tuple[KeyspaceMembership, str]:
    member = make()
    return member, member.join(info(node)).node


def record_of(view: View, *nodes: str, number: int = 0) -> EpochRecord:
    assert view.leader is not None
    number = number or (view.epoch.number if view.epoch else 0) + 1
    places = tuple(NodePlacement(node, 2) for node in nodes)
    return EpochRecord(
        job=view.job,
        number=number,
        places=places,
        leader=view.leader.node,
        nodes_min=1,
        nodes_max=9,
    )


def open_epoch(
    leader: KeyspaceMembership, *nodes: str, remove: tuple[str, ...] = (), number: int = 0
) -> EpochRecord:
    assert leader.lead() == Leading()
    view = leader.view()
    record = record_of(view, *nodes, number=number)
    assert isinstance(leader.publish(record, view, remove=remove), Published)
    return record


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class MembershipContract:
    """For the fixtures ``make_member``, ``make_keyspace`` and ``ttl_s``."""

    def test_who_joins_is_seen_by_all_with_what_it_says(self, make_member: Make) -> None:
        one, other = make_member(), make_member()
        said = info(domain="rack 7", address="10.0.0.1:7", capabilities=("gpu", "mirrors"))
        ticket = one.join(said)
        other_node = other.join(info()).node
        view = other.view()
        assert view.by_node[said.node].info == said
        assert view.by_node[said.node].lease_id == ticket.lease_id
        assert set(view.by_node) == {said.node, other_node}
        assert (view.epoch, view.leader, view.unreadable) == (None, None, ())

    def test_a_node_id_is_given_once(self, make_member: Make) -> None:
        _, node = joined(make_member)
        with pytest.raises(ConflictError):
            make_member().join(info(node))

    def test_a_member_can_not_join_twice(self, make_member: Make) -> None:
        one, _ = joined(make_member)
        with pytest.raises(UsageError):
            one.join(info())

    def test_before_it_joined_a_node_can_look_and_do_nothing_else(self, make_member: Make) -> None:
        member = make_member()
        assert member.lease_status().state is LeaseState.LOST
        assert member.view().members == ()
        for act in (member.lead, lambda: member.put_fact("a", b"")):
            with pytest.raises(FencedError):
                act()

    def test_who_leaves_is_gone_at_once_with_what_it_said(self, make_member: Make) -> None:
        one, _ = joined(make_member)
        other, node = joined(make_member)
        other.put_fact("fact", b"x")
        one.suspect(node, "why")
        assert other.lead() == Leading()
        before = one.view().revision
        other.leave()
        assert one.wait_change(before, timeout_s=DEADLINE_S)
        view = one.view()
        assert node not in view.by_node
        assert view.leader is None
        assert one.read_facts("fact") == {}

    @pytest.mark.slow
    def test_a_lease_is_kept_alive_far_beyond_its_life(
        self, make_member: Make, ttl_s: float
    ) -> None:
        ttl_s *= 2  # nothing may be late by as much as it lasts
        member = make_member(ttl_s)
        node = member.join(info()).node
        first_s = member.lease_status().act_until_s
        assert boottime_s() < first_s <= boottime_s() + ttl_s
        until(lambda: member.lease_status().act_until_s > first_s + 1.2 * ttl_s)
        assert member.lease_status().state is LeaseState.VALID
        assert node in member.view().by_node

    @pytest.mark.slow
    def test_each_time_that_it_is_prolonged_it_is_told_until_when_it_may_act(
        self, make_member: Make, ttl_s: float
    ) -> None:
        told: list[float] = []
        member = make_member(2 * ttl_s, on_act_until=told.append)
        member.join(info())
        until(lambda: len(told) >= 3)
        assert told == sorted(set(told))
        assert told[-1] <= member.lease_status().act_until_s
        member.leave()
        count = len(told)
        assert member.lease_status().state is LeaseState.LOST
        time.sleep(ttl_s / 2)
        assert len(told) == count

    def test_another_process_takes_a_membership_on(self, make_member: Make) -> None:
        one = make_member()
        ticket = one.join(info(address="old"))
        one.put_fact("fact", b"x")
        one.leave(keep=True)
        assert one.lease_status().state is LeaseState.LOST
        other = make_member()
        assert other.join(info(ticket.node, address="new"), lease_id=ticket.lease_id) == ticket
        view = other.view()
        assert view.by_node[ticket.node].info.address == "new"
        assert other.read_facts("fact") == {ticket.node: b"x"}
        assert other.lease_status().state is LeaseState.VALID

    def test_a_membership_that_is_over_is_not_taken_on(self, make_member: Make) -> None:
        one = make_member()
        ticket = one.join(info())
        one.leave()
        with pytest.raises(FencedError):
            make_member().join(info(ticket.node), lease_id=ticket.lease_id)

    def test_a_lease_does_not_take_on_another_nodes_membership(self, make_member: Make) -> None:
        one, other = make_member(), make_member()
        first, second = one.join(info()), other.join(info())
        other.leave(keep=True)
        with pytest.raises(ConflictError):
            make_member().join(info(first.node), lease_id=second.lease_id)

    def test_one_leads_and_the_others_follow(self, make_member: Make) -> None:
        one, node = joined(make_member)
        other, _ = joined(make_member)
        assert [one.lead(), other.lead(), one.lead()] == [Leading(), Following(node), Leading()]
        view = other.view()
        assert view.leader is not None and view.leader.node == node
        one.leave()
        assert other.lead() == Leading()

    def test_of_many_one_leads(self, make_member: Make) -> None:
        members = [joined(make_member)[0] for _ in range(5)]
        start = threading.Barrier(5)
        found: list[object] = []

        def race(member: KeyspaceMembership) -> None:
            start.wait(DEADLINE_S)
            found.append(member.lead())

        threads = [threading.Thread(target=race, args=(member,)) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert found.count(Leading()) == 1
        assert len(found) == 5

    def test_two_witnesses_put_another_leader_in_place_of_a_dead_one(
        self, make_member: Make
    ) -> None:
        dead, node = joined(make_member)
        one, other = joined(make_member)[0], joined(make_member)[0]
        open_epoch(dead, node)
        old_view = dead.view()
        one.suspect(node, "socket reset")
        assert one.lead(one.view()) == Following(node)
        other.suspect(node, "does not answer")
        assert one.lead() == Following(node)  # without a view that shows it nobody is put out
        assert one.lead(one.view()) == Leading()
        assert isinstance(dead.publish(record_of(old_view, node), old_view), NotPublished)
        assert isinstance(one.publish(record_of(view := one.view(), "x"), view), Published)

    def test_a_word_that_is_taken_back_puts_nobody_out(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        one, other = joined(make_member)[0], joined(make_member)[0]
        assert leader.lead() == Leading()
        one.suspect(node, "reset")
        other.suspect(node, "reset")
        view = one.view()
        other.suspect(node, None)
        assert one.lead(view) == Following(node)

    def test_an_epoch_is_seen_by_all(self, make_member: Make) -> None:
        one, node = joined(make_member)
        other, other_node = joined(make_member)
        spare, _ = joined(make_member)
        record = open_epoch(one, node, other_node)
        for member in (one, other, spare):
            assert member.view().epoch == record
            assert member.view(ViewScope.HEAD).epoch == record
        until(lambda: all(member.lease_status().epoch == 1 for member in (one, other, spare)))
        assert [member.lease_status().placed for member in (one, other, spare)] == [
            True,
            True,
            False,
        ]

    def test_the_head_alone_names_no_members(self, make_member: Make) -> None:
        one, node = joined(make_member)
        open_epoch(one, node)
        view = one.view(ViewScope.HEAD)
        assert (view.members, view.leader) == ((), one.view().leader)

    def test_who_does_not_lead_publishes_nothing(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        other, other_node = joined(make_member)
        open_epoch(leader, node)
        view = other.view()
        with pytest.raises(UsageError):
            other.publish(record_of(view, node), view)
        mine = replace(record_of(view, node), leader=other_node)
        assert isinstance(other.publish(mine, view), NotPublished)
        assert other.view().epoch == leader.view().epoch

    def test_an_epoch_that_was_decided_on_an_older_one_is_lost(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        open_epoch(leader, node)
        view = leader.view()
        open_epoch(leader, node, "x")
        assert isinstance(leader.publish(record_of(view, node, "y", number=7), view), NotPublished)

    def test_publishing_the_same_epoch_again_tells_that_it_holds(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        leader.lead()
        view = leader.view()
        record = record_of(view, node)
        first = leader.publish(record, view)
        assert leader.publish(record, view) == first
        assert isinstance(first, Published)

    def test_an_epoch_can_not_go_back(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        open_epoch(leader, node, number=5)
        view = leader.view()
        for number in (4, 5):
            with pytest.raises(UsageError):
                leader.publish(record_of(view, node, "x", number=number), view)

    def test_a_leader_that_left_and_leads_anew_publishes_nothing_from_before(
        self, make_member: Make
    ) -> None:
        leader, node = joined(make_member)
        leader.lead()
        view = leader.view()
        leader.leave()
        again, _ = joined(make_member, node)
        again.lead()
        assert isinstance(again.publish(record_of(view, node), view), NotPublished)

    @pytest.mark.slow
    def test_who_is_taken_out_learns_it_and_can_do_nothing_more(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        out, out_node = joined(make_member)
        open_epoch(leader, node, out_node)
        open_epoch(leader, node, remove=(out_node,))
        assert out_node not in leader.view().by_node
        for act in (
            lambda: out.put_fact("a", b"1"),
            out.lead,
            lambda: out.suspect(node, "revenge"),
        ):
            with pytest.raises(FencedError):
                act()
        until(lambda: out.lease_status().state is LeaseState.LOST)
        out.join(info())
        assert out.lease_status().state is LeaseState.VALID

    @pytest.mark.slow
    def test_more_nodes_are_taken_out_than_one_transaction_can(
        self, make_member: Make, make_keyspace: Callable[[], Keyspace]
    ) -> None:
        leader, node = joined(make_member)
        keyspace = make_keyspace()
        others = [f"n{number}" for number in range(250)]
        for other in others:
            put(keyspace, names.node_key(other), b"")
        open_epoch(leader, node, remove=tuple(others))
        assert leader.view().unreadable == ()

    def test_a_fact_is_heard_replaced_and_taken_back(self, make_member: Make) -> None:
        one, node = joined(make_member)
        other, other_node = joined(make_member)
        one.put_fact("address.7", b"1")
        other.put_fact("address.7", b"2")
        one.put_fact("address.70", b"9")
        assert other.read_facts("address.7") == {node: b"1", other_node: b"2"}
        one.put_fact("address.7", b"3")
        one.put_fact("address.7", b"3")
        assert other.read_facts("address.7")[node] == b"3"
        one.put_fact("address.7", None)
        one.put_fact("address.7", None)
        assert other.read_facts("address.7") == {other_node: b"2"}

    def test_facts_have_limits(self, make_member: Make) -> None:
        one, _ = joined(make_member)
        for fact in ("", "a/b", "a b", "x" * 101):
            with pytest.raises(UsageError):
                one.put_fact(fact, b"")
        with pytest.raises(UsageError):
            one.put_fact("a", bytes(1 << 20))

    def test_what_a_member_holds_is_part_of_the_view(self, make_member: Make) -> None:
        one, node = joined(make_member)
        other, other_node = joined(make_member)
        holdings = StateInventory(8, {3: 100, 0: 7})
        one.put_fact(names.INVENTORY_FACT, encode_inventory(holdings))
        other.put_fact(names.INVENTORY_FACT, b"nonsense")
        view = other.view()
        assert view.by_node[node].inventory == holdings
        assert view.by_node[other_node].inventory is None
        assert view.unreadable == (f"said/holdings/{other_node}",)

    def test_a_suspicion_is_seen_and_taken_back(self, make_member: Make) -> None:
        one, node = joined(make_member)
        other, other_node = joined(make_member)
        one.suspect(other_node, "socket reset")
        one.suspect(other_node, "still")
        (word,) = other.view().suspicions
        assert (word.node, word.by, word.reason) == (other_node, node, "still")
        one.suspect(other_node, None)
        assert other.view().suspicions == ()
        with pytest.raises(UsageError):
            one.suspect(node, "me")
        with pytest.raises(UsageError):
            one.suspect("a/b", "x")

    def test_a_witness_suspects_a_few_at_a_time(self, make_member: Make) -> None:
        one, _ = joined(make_member)
        for number in range(SUSPICIONS_MAX + 3):
            one.suspect(f"n{number}", "x")
        suspected = {word.node for word in one.view().suspicions}
        assert suspected == {f"n{number}" for number in range(3, SUSPICIONS_MAX + 3)}

    def test_what_nobody_can_read_is_no_member(
        self, make_member: Make, make_keyspace: Callable[[], Keyspace]
    ) -> None:
        one, node = joined(make_member)
        keyspace = make_keyspace()
        put(keyspace, "nodes/bad", b"{}")
        put(keyspace, "nodes/x/y", b"")
        view = one.view()
        assert set(view.by_node) == {node}
        assert view.unreadable == ("nodes/bad", "nodes/x/y")

    @pytest.mark.slow
    def test_a_follower_hears_of_epochs_and_not_of_each_member(self, make_member: Make) -> None:
        leader, node = joined(make_member)
        follower, _ = joined(make_member)
        leader.lead()
        before = follower.view(ViewScope.HEAD).revision
        joined(make_member)
        assert leader.wait_change(before, timeout_s=DEADLINE_S)
        assert not follower.wait_change(before, timeout_s=0.2, scope=ViewScope.HEAD)
        open_epoch(leader, node)
        assert follower.wait_change(before, timeout_s=DEADLINE_S, scope=ViewScope.HEAD)
