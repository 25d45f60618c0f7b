"""What a node must do that lives under another's lease, and one whose lease others live under.
Subclassed as the others are."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ckpt.cluster.membership import transactions as names
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.outcomes import Following, Leading, NotPublished, Published
from ckpt.cluster.membership.records import StateInventory, encode_inventory
from ckpt.errors import FencedError, UsageError
from ckpt.keyspace.base import Keys, Keyspace, Put, Transaction
from kit.membership.keyspace_contract import get, lease
from kit.membership.members_contract import info, joined, open_epoch, record_of, until

Make = Callable[..., KeyspaceMembership]
MakeKeyspace = Callable[[], Keyspace]


def under(keyspace: Keyspace, lease_id: int) -> set[str]:
    """The keys of a lease."""
    (found,) = keyspace.transact(Transaction(reads=(Keys("a", "z"),))).found
    return {one.key for one in found if one.lease_id == lease_id}


class LodgingContract:
    """For the fixtures ``make_member``, ``make_keyspace`` and ``ttl_s``."""

    def test_all_that_a_node_wrote_moves_under_another_lease_and_its_own_is_gone(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, keyspace = make_member(), make_keyspace()
        ticket = member.join(info())
        member.put_fact("fact", b"x")
        member.put_fact("other", b"y")
        member.put_fact("other", None)
        member.put_fact(names.INVENTORY_FACT, encode_inventory(StateInventory(8, {0: 7})))
        member.suspect("n1", "reset")
        open_epoch(member, ticket.node)
        before, other = member.view(), lease(keyspace)
        assert member.borrow_lease(other)
        assert member.borrow_lease(other)
        assert member.borrowed_lease_id == other
        assert keyspace.renew(ticket.lease_id) == 0
        assert under(keyspace, other) == {
            f"nodes/{ticket.node}",
            f"said/fact/{ticket.node}",
            f"said/holdings/{ticket.node}",
            f"suspects/n1/{ticket.node}",
            "leader",
        }
        after = member.view()
        assert (
            after.by_node[ticket.node].joined_revision
            == before.by_node[ticket.node].joined_revision
        )
        assert after.by_node[ticket.node].inventory == StateInventory(8, {0: 7})
        assert (after.epoch, after.suspicions) == (before.epoch, before.suspicions)

    def test_who_lives_under_another_lease_goes_on_to_lead_and_to_speak(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, node = joined(make_member)
        follower, _ = joined(make_member)
        open_epoch(member, node)
        older, other, keyspace = member.view(), lease(make_keyspace()), make_keyspace()
        assert member.borrow_lease(other)
        assert follower.lead() == Following(node)
        assert isinstance(member.publish(record_of(older, node, "x"), older), NotPublished)
        view = member.view()
        assert isinstance(member.publish(record_of(view, node, "x"), view), Published)
        member.put_fact("fact", b"1")
        member.suspect("n1", "reset")
        assert under(keyspace, other) == {
            f"nodes/{node}",
            f"said/fact/{node}",
            f"suspects/n1/{node}",
            "leader",
        }
        assert member.borrow_lease(third := lease(keyspace))
        assert under(keyspace, other) == set()
        assert keyspace.renew(other) > 0
        assert member.lead() == Leading()
        assert f"said/fact/{node}" in under(keyspace, third)

    def test_a_leader_that_was_followed_by_another_takes_the_lead_to_no_lease(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, _ = joined(make_member)
        leader, node = joined(make_member)
        assert [leader.lead(), member.lead()] == [Leading(), Following(node)]
        assert member.borrow_lease(other := lease(make_keyspace()))
        assert "leader" not in under(make_keyspace(), other)
        assert member.lead() == Following(node)

    def test_a_lease_that_is_over_is_not_moved_to(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, keyspace = make_member(), make_keyspace()
        ticket = member.join(info())
        member.put_fact("fact", b"x")
        other = lease(keyspace)
        keyspace.revoke(other)
        assert not member.borrow_lease(other)
        assert member.borrowed_lease_id == 0
        assert member.lease_status().state is LeaseState.VALID
        member.put_fact("fact", b"y")
        assert under(keyspace, ticket.lease_id) == {
            f"nodes/{ticket.node}",
            f"said/fact/{ticket.node}",
        }

    @pytest.mark.slow
    def test_back_under_a_lease_of_its_own_it_needs_no_other(
        self, make_member: Make, make_keyspace: MakeKeyspace, ttl_s: float
    ) -> None:
        ttl_s *= 2  # nothing may be late by as much as it lasts
        member, keyspace = make_member(ttl_s), make_keyspace()
        node = member.join(info()).node
        member.put_fact("fact", b"x")
        member.use_own_lease()
        other = lease(keyspace)
        assert member.borrow_lease(other)
        member.use_own_lease()
        member.use_own_lease()
        assert member.borrowed_lease_id == 0
        assert keyspace.renew(other) > 0
        keyspace.revoke(other)
        own = member._member()[0].lease_id
        assert under(keyspace, own) == {f"nodes/{node}", f"said/fact/{node}"}
        first_s = member.lease_status().act_until_s
        until(lambda: member.lease_status().act_until_s > first_s + 1.2 * ttl_s)
        assert member.lease_status().state is LeaseState.VALID
        assert node in member.view().by_node

    def test_nobody_sees_it_missing_while_it_moves_to_and_fro(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, node = joined(make_member)
        keyspace = make_keyspace()
        member.put_fact("fact", b"x")
        for _ in range(5):
            for move in (lambda: member.borrow_lease(lease(keyspace)), member.use_own_lease):
                move()
                assert node in member.view().by_node
                assert get(keyspace, f"said/fact/{node}") == b"x"

    @pytest.mark.slow
    def test_another_lease_is_not_kept_alive_and_its_end_is_noticed(
        self, make_member: Make, make_keyspace: MakeKeyspace, ttl_s: float
    ) -> None:
        ttl_s *= 2
        member, keyspace = make_member(ttl_s), make_keyspace()
        node = member.join(info()).node
        other = lease(keyspace, ttl_s)
        assert member.borrow_lease(other)
        assert member.lease_status().state is LeaseState.LAPSED
        until(lambda: member.lease_status().state is LeaseState.LOST)
        assert get(keyspace, names.node_key(node)) is None
        with pytest.raises(FencedError):
            member.put_fact("fact", b"x")
        with pytest.raises(FencedError):
            member.use_own_lease()
        again = member.join(info())
        assert member.borrowed_lease_id == 0
        assert set(member.view().by_node) == {again.node}

    def test_who_lives_under_another_lease_can_not_join_twice(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, _ = joined(make_member)
        assert member.borrow_lease(lease(make_keyspace()))
        with pytest.raises(UsageError):
            member.join(info())

    def test_who_was_taken_out_and_joins_anew_leaves_nothing_under_the_other_lease(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        leader, leads = joined(make_member)
        member, node = joined(make_member)
        keyspace = make_keyspace()
        other = lease(keyspace)
        assert member.borrow_lease(other)
        member.put_fact("fact", b"x")
        open_epoch(leader, leads, remove=(node,))
        with pytest.raises(FencedError):
            member.put_fact("fact", b"y")
        member.keepalive.mark_lost("as whoever looks says")
        member.join(info())
        assert under(keyspace, other) == set()
        assert keyspace.renew(other) > 0

    def test_who_leaves_takes_its_keys_from_the_other_lease_and_does_not_end_it(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, _ = joined(make_member)
        keyspace = make_keyspace()
        other = lease(keyspace)
        keyspace.transact(Transaction(then=(Put("nodes/lender", b"", other),)))
        member.put_fact("fact", b"x")
        member.suspect("n1", "reset")
        assert member.lead() == Leading()
        assert member.borrow_lease(other)
        member.leave()
        assert under(keyspace, other) == {"nodes/lender"}
        assert keyspace.renew(other) > 0

    def test_an_agent_is_named_under_the_lease_of_whoever_joined_for_it(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        member, keyspace = make_member(), make_keyspace()
        ticket = member.join(info(), agent="host-1a")
        assert under(keyspace, ticket.lease_id) == {
            f"nodes/{ticket.node}",
            f"said/agent.host-1a/{ticket.node}",
        }
        for agent in ("a/b", "a.b", "x" * 65):
            with pytest.raises(UsageError):
                make_member().join(info(), agent=agent)

    @pytest.mark.slow
    def test_who_names_an_agent_leaves_its_lease_to_run_out_and_takes_all_else_back(
        self, make_member: Make, make_keyspace: MakeKeyspace, ttl_s: float
    ) -> None:
        ttl_s *= 2
        member, keyspace = make_member(ttl_s), make_keyspace()
        ticket = member.join(info(), agent="host-1a")
        assert member.lead() == Leading()
        member.put_fact("fact", b"x")
        member.suspect("n1", "reset")
        keyspace.transact(Transaction(then=(Put("nodes/lodger", b"", ticket.lease_id),)))
        left_s = time.monotonic()
        member.leave()
        assert under(keyspace, ticket.lease_id) == {"nodes/lodger"}
        until(lambda: get(keyspace, "nodes/lodger") is None)
        assert time.monotonic() - left_s > 0.8 * ttl_s
        assert keyspace.renew(ticket.lease_id) == 0

    @pytest.mark.slow
    def test_who_lost_its_membership_names_its_agent_again_under_its_next_lease(
        self, make_member: Make, make_keyspace: MakeKeyspace
    ) -> None:
        leader, leads = joined(make_member)
        member, keyspace = make_member(), make_keyspace()
        first = member.join(info(), agent="host-1a")
        open_epoch(leader, leads, remove=(first.node,))
        until(lambda: member.lease_status().state is LeaseState.LOST)
        second = member.join(info(), agent="host-1a")
        assert under(keyspace, first.lease_id) == set()
        assert keyspace.renew(first.lease_id) > 0  # an agent may live under it yet
        assert f"said/agent.host-1a/{second.node}" in under(keyspace, second.lease_id)
