"""Living under another's lease keeps one contract over each kind of service; and what lost answers
and late requests leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit.membership.keyspace_contract import get, lease
from kit.membership.lodging_contract import LodgingContract, under
from kit.membership.memory_keyspace import MemoryKeyspace, MemoryServer

from ckpt.cluster.membership.leases import (
    LeaseGone,
    LeaseSeen,
    LeaseSilent,
    LeaseState,
    apply_answer,
    borrowed_lease,
)
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.outcomes import Leading, MembershipUnknown
from ckpt.cluster.membership.records import NodeInfo
from ckpt.errors import UnavailableError
from ckpt.keyspace.base import Transaction, TransactionResult


class TestLodging(LodgingContract):
    pass


class Lossy(MemoryKeyspace):
    """Loses what it is told to: ``lose`` is asked for each transaction; ``late`` holds those that
    have yet to land."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server)
        self.fates: list[str] = []
        self.late: list[Transaction] = []

    def transact(self, transaction: Transaction) -> TransactionResult:
        fate = self.fates.pop(0) if self.fates else ""
        if fate == "late":
            self.late.append(transaction)
        if fate in ("late", "request lost"):
            raise UnavailableError(fate)
        outcome = super().transact(transaction)
        if fate:
            raise UnavailableError(fate)
        return outcome

    def land(self) -> list[bool]:
        """Whether each of those that come late did anything."""
        late, self.late = self.late, []
        return [MemoryKeyspace.transact(self, one).succeeded for one in late]


@pytest.fixture
def lossy() -> Lossy:
    return Lossy(MemoryServer())


@pytest.fixture
def member(lossy: Lossy) -> KeyspaceMembership:
    made = KeyspaceMembership(lossy, "j", ttl_s=60.0, threads=False)
    made.join(NodeInfo(node="n", host="h", slots=1))
    made.put_fact("fact", b"x")
    return made


FATES = ["request lost", "answer lost", "late"]


@pytest.mark.parametrize("first", FATES)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    "settle",
    [
        lambda one, other: one.borrow_lease(other),
        lambda one, other: one.put_fact("fact", b"y"),
        lambda one, other: one.lead(),
        lambda one, other: one.suspect("n1", "reset"),
        lambda one, other: one.use_own_lease(),
    ],
)
def test_a_move_without_an_answer_is_settled_by_whatever_is_written_next(
    lossy: Lossy,
    member: KeyspaceMembership,
    first: str,
    at: int,
    settle: Callable[[KeyspaceMembership, int], object],
) -> None:
    own, other = member._member()[0].lease_id, lease(lossy)
    lossy.fates = [""] * at + [first]
    with pytest.raises(UnavailableError):
        member.borrow_lease(other)
    member.keepalive.round()
    assert (
        member.lease_status().state is LeaseState.LAPSED
    )  # it may live under a lease of which it knows nothing
    settle(member, other)
    now = member._member()[0].lease_id
    assert under(lossy, now) >= {"nodes/n", "said/fact/n"}
    assert lossy.land() in ([], [True], [False])  # what reads does no harm
    assert under(lossy, now) >= {"nodes/n", "said/fact/n"}
    assert lossy.renew(own) == 0
    member.keepalive.round()
    assert member.lease_status().state is not LeaseState.LOST


@pytest.mark.parametrize("first", FATES)
def test_a_way_back_without_an_answer_is_settled_as_well(
    lossy: Lossy, member: KeyspaceMembership, first: str
) -> None:
    other = lease(lossy)
    assert member.borrow_lease(other)
    lossy.fates = ["", first]
    with pytest.raises(UnavailableError):
        member.use_own_lease()
    member.use_own_lease()
    lossy.land()
    lossy.revoke(other)
    assert get(lossy, "nodes/n") is not None
    assert member.borrowed_lease_id == 0
    member.keepalive.round()
    assert member.lease_status().state is LeaseState.VALID
    assert under(lossy, member._member()[0].lease_id) == {"nodes/n", "said/fact/n"}


@pytest.mark.parametrize("first", FATES)
@pytest.mark.parametrize("back", [False, True])
def test_who_leaves_after_a_move_without_an_answer_leaves_nothing_however_late_it_lands(
    lossy: Lossy, member: KeyspaceMembership, first: str, back: bool
) -> None:
    other = lease(lossy)
    if back:
        assert member.borrow_lease(other)
    assert member.lead() == Leading()
    lossy.fates = ["", first]
    with pytest.raises(UnavailableError):
        member.use_own_lease() if back else member.borrow_lease(other)
    late, server = lossy.late, lossy._server
    member.leave()
    after = MemoryKeyspace(server)
    assert server.keys == {}
    assert not any(after.transact(one).succeeded for one in late)
    assert set(server.leases) == {other}


def test_a_move_that_is_made_twice_does_nothing_the_second_time(
    lossy: Lossy, member: KeyspaceMembership
) -> None:
    other = lease(lossy)
    lossy.fates = ["", "late"]
    with pytest.raises(UnavailableError):
        member.borrow_lease(other)
    assert member.borrow_lease(other)
    revision = lossy._server.revision
    assert lossy.land() == [False]
    assert lossy._server.revision == revision


def test_what_was_said_before_a_move_without_an_answer_waits_for_it(
    lossy: Lossy, member: KeyspaceMembership
) -> None:
    lossy.fates = ["", "answer lost", "request lost", "request lost", "request lost"]
    with pytest.raises(UnavailableError):
        member.borrow_lease(lease(lossy))
    with pytest.raises(UnavailableError):
        member.put_fact("fact", b"y")
    assert isinstance(member.lead(), MembershipUnknown)
    with pytest.raises(UnavailableError):
        member.suspect("n1", "reset")
    member.put_fact("fact", b"y")
    assert get(lossy, "said/fact/n") == b"y"


def test_a_borrowed_lease_is_looked_at_once_in_its_ttl_and_gives_no_time_to_act() -> None:
    held = borrowed_lease(7, ttl_s=6.0, margin_s=0.5, now_s=100.0)
    assert (held.state(100.0), held.next_keepalive_s) == (LeaseState.LAPSED, 106.0)
    held = apply_answer(held, LeaseSeen(106.0))
    assert (held.state(106.0), held.next_keepalive_s) == (LeaseState.LAPSED, 112.0)
    assert apply_answer(held, LeaseSilent(112.0, "x")).next_keepalive_s == 112.5
    assert apply_answer(held, LeaseGone("taken out")).state(100.0) is LeaseState.LOST
