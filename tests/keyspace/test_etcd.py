"""What happens to a job's membership when something happens to etcd: to one member, to the leader,
to all, to the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import etcd3
import pytest
from kit.etcd import EtcdCluster, EtcdMember, revision_of
from kit.membership.keyspace_contract import DEADLINE_S
from kit.membership.members_contract import info, open_epoch, record_of, until
from kit.membership.zombie import zombie_is_refused

from ckpt.cluster.membership.decide import MembershipOptions, NewEpoch, WaitTimers, decide
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership, boottime_s
from ckpt.cluster.membership.outcomes import Leading, NotPublished, Published
from ckpt.cluster.membership.records import ViewScope
from ckpt.errors import FencedError, UnavailableError
from ckpt.keyspace.address import EtcdOptions, split_endpoint
from ckpt.keyspace.base import Keys
from ckpt.keyspace.etcd import EtcdKeyspace

pytestmark = pytest.mark.slow

TTL_S = 12.0
CALL_S = 0.5
Make = Callable[..., KeyspaceMembership]


def options(cluster: EtcdCluster, first: int = 0) -> EtcdOptions:
    """All endpoints, the one of member ``first`` first."""
    endpoints = cluster.endpoints[first:] + cluster.endpoints[:first]
    return EtcdOptions(endpoints=endpoints, call_s=CALL_S)


@pytest.fixture
def make(etcd_three: EtcdCluster, job: str) -> Iterator[Make]:
    """Makes nodes of the job that have joined; each asks another member first."""
    made: list[KeyspaceMembership] = []

    def join(first: int | None = None, ttl_s: float = TTL_S) -> KeyspaceMembership:
        first = len(made) % 3 if first is None else first
        made.append(
            KeyspaceMembership(EtcdKeyspace(options(etcd_three, first), job), job, ttl_s=ttl_s)
        )
        made[-1].join(info())
        return made[-1]

    yield join
    for member in made:
        with contextlib.suppress(UnavailableError):
            member.leave()


def node_of(member: KeyspaceMembership) -> str:
    return member.keepalive.ticket.node


def held_over(members: list[KeyspaceMembership]) -> None:
    """All go on as members, at every moment until keepalives that were sent from now on have been
    answered."""
    now_s = boottime_s()

    def renewed() -> bool:
        standings = [member.lease_status() for member in members]
        assert all(standing.state is LeaseState.VALID for standing in standings), standings
        return all(standing.act_until_s > now_s + TTL_S for standing in standings)

    until(renewed)


def still_works(members: list[KeyspaceMembership]) -> None:
    """All see each other and one another's epochs."""
    nodes = {node_of(member) for member in members}
    until(lambda: all(nodes <= set(member.view().by_node) for member in members))
    leader = next((member for member in members if member.lead() == Leading()), None)
    assert leader is not None
    before = members[-1].view(ViewScope.HEAD)
    record = open_epoch(leader, *sorted(nodes))
    assert members[-1].wait_change(before.revision, timeout_s=DEADLINE_S, scope=ViewScope.HEAD)
    assert all(member.view().epoch == record for member in members)
    until(lambda: all(member.lease_status().epoch == record.number for member in members))


def harm(cluster: EtcdCluster, which: str) -> EtcdMember:
    return (
        cluster.leader()
        if which == "leader"
        else next(one for one in cluster.members if one != cluster.leader())
    )


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_a_member_of_etcd_dies_and_nobody_loses_its_membership(
    etcd_three: EtcdCluster, make: Make, which: str
) -> None:
    members = [make() for _ in range(3)]
    still_works(members)
    harm(etcd_three, which).kill()
    held_over(members)
    still_works(members)


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_a_member_of_etcd_hangs_and_another_one_is_asked(
    etcd_three: EtcdCluster, make: Make, which: str
) -> None:
    hung = harm(etcd_three, which)
    members = [make(etcd_three.members.index(hung)) for _ in range(3)]
    still_works(members)
    hung.process.freeze()
    held_over(members)
    still_works(members)
    hung.process.thaw()
    still_works(members)


def test_all_of_etcd_starts_anew_and_memberships_and_epoch_are_still_there(
    etcd_three: EtcdCluster, make: Make
) -> None:
    members = [make(ttl_s=8.0) for _ in range(2)]
    still_works(members)
    epoch = members[0].view().epoch
    etcd_three.stop()
    with pytest.raises(UnavailableError):
        members[0].view()
    assert members[0].lease_status().state is LeaseState.VALID
    etcd_three.start()
    until(lambda: _quiet(members[0].view) is not None)
    assert members[0].view().epoch == epoch
    still_works(members)
    held_over(members)


def _quiet(look: Callable[[], object]) -> object:
    try:
        return look()
    except UnavailableError:
        return None


def test_etcd_is_gone_for_longer_than_a_lease_and_the_node_stops_acting_in_time(
    etcd_three: EtcdCluster, make: Make
) -> None:
    member = make(ttl_s=2.0)
    etcd_three.stop()
    until(lambda: member.lease_status().state is not LeaseState.VALID)
    standing = member.lease_status()
    assert standing.state is LeaseState.LAPSED
    assert standing.act_until_s <= boottime_s()
    assert "etcd did not answer" in standing.reason
    etcd_three.start()
    # A new leader of etcd lets every lease begin anew, so this one may come back; if not, the node
    # learns that.
    until(lambda: member.lease_status().state is not LeaseState.LAPSED)
    assert member.keepalive._thread is not None
    if member.lease_status().state is LeaseState.VALID:
        still_works([member])


def test_no_majority_answers_no_read_though_the_member_is_up(
    etcd_three: EtcdCluster, make: Make
) -> None:
    member = make(0)
    still_works([member])
    for other in etcd_three.members[1:]:
        other.process.freeze()
    until(lambda: _quiet(member.view) is None)  # an answer may have been on its way
    assert (
        revision_of(etcd_three.members[0].endpoint) > 0
    )  # what a serializable read would have believed


def test_a_dead_node_is_seen_by_others_within_its_ttl_and_a_second(
    etcd_three: EtcdCluster, make: Make
) -> None:
    ttl_s, watcher, late_s = 2.0, make(), 2.0
    for _ in range(3):  # a machine that is busy for a moment says nothing about etcd
        dead = make(ttl_s=ttl_s)
        node = node_of(dead)
        dead.keepalive._stopping.set()
        assert dead.keepalive._thread is not None
        dead.keepalive._thread.join(DEADLINE_S)
        view = watcher.view()
        last_s = dead.lease_status().act_until_s + 0.1 * ttl_s
        while node in view.by_node:
            watcher.wait_change(view.revision, timeout_s=DEADLINE_S)
            view = watcher.view()
        assert dead.lease_status().act_until_s <= boottime_s()
        late_s = boottime_s() - last_s
        with pytest.raises(FencedError):
            dead.put_fact("a", b"1")
        if late_s <= 1.0:
            break
    assert late_s <= 1.0


def test_a_watch_survives_compaction(etcd_three: EtcdCluster, make: Make) -> None:
    one, other = make(0), make(1)
    revision = one.view().revision
    assert not one.wait_change(revision, timeout_s=0.1)
    for number in range(20):
        other.put_fact("holdings", b"%d" % number)
    host, port = split_endpoint(etcd_three.endpoints[1])
    with etcd3.client(host=host, port=port) as client:
        client.compact(other.view().revision, physical=True)
    late = EtcdKeyspace(options(etcd_three), one._job)
    try:
        assert late.wait(
            (Keys("said/", "said0"),), revision, timeout_s=DEADLINE_S
        )  # began before what is left
        now = one.view().revision
        other.put_fact("holdings", b"last")
        assert late.wait((Keys("said/", "said0"),), now, timeout_s=DEADLINE_S)
        assert one.wait_change(now, timeout_s=DEADLINE_S)
    finally:
        late.close()


@pytest.mark.parametrize("which", ["kill", "freeze"])
def test_a_watch_moves_on_when_the_member_it_listens_to_is_lost(
    etcd_three: EtcdCluster, make: Make, which: str
) -> None:
    one, other = make(0), make(1)
    revision = one.view().revision
    assert not one.wait_change(revision, timeout_s=0.1)
    if which == "kill":
        etcd_three.members[0].kill()
    else:
        etcd_three.members[0].process.freeze()
    until(
        lambda: (
            _quiet(lambda: other.put_fact("holdings", b"1")) is None
            and other.read_facts("holdings")
        )
    )
    assert one.wait_change(revision, timeout_s=DEADLINE_S)


def test_a_wiped_etcd_knows_no_epoch_and_the_next_one_exceeds_all_that_were_seen(
    etcd_one_of_ours: EtcdCluster, job: str
) -> None:
    cluster = etcd_one_of_ours
    old = KeyspaceMembership(EtcdKeyspace(options(cluster), job), job, ttl_s=TTL_S)
    old.join(info())
    for _ in range(3):
        open_epoch(old, node_of(old), "x")
    view = old.view()
    assert not old.wait_change(view.revision, timeout_s=0.1)
    cluster.wipe()
    until(lambda: old.lease_status().state is LeaseState.LOST)
    assert old.wait_change(
        view.revision, timeout_s=DEADLINE_S
    )  # what was seen is not there any more
    fresh = KeyspaceMembership(EtcdKeyspace(options(cluster), job), job, ttl_s=TTL_S)
    fresh.join(info())
    assert fresh.lead() == Leading()
    view = fresh.view()
    assert (view.epoch, view.epoch_revision) == (None, 0)
    decided = decide(
        view, WaitTimers(), MembershipOptions(nodes_min=1, nodes_max=1, epoch_floor=3), boottime_s()
    )
    assert isinstance(decided, NewEpoch)
    assert decided.record.number == 4
    # A zombie of the old cluster can do nothing to the new one, whatever its revisions were.
    for act in (old.lead, lambda: old.put_fact("a", b"x")):
        with pytest.raises(FencedError):
            act()
    assert isinstance(fresh.publish(decided.record, view), Published)
    for member in (old, fresh):
        with contextlib.suppress(UnavailableError):
            member.leave()


@pytest.fixture
def etcd_one_of_ours(tmp_path: Path, etcd_one: EtcdCluster) -> Iterator[EtcdCluster]:
    """A cluster of one that may be harmed."""
    with EtcdCluster(tmp_path / "mine", 1) as cluster:
        yield cluster


def test_a_zombie_has_stopped_by_its_own_clock_and_is_refused(
    etcd_three: EtcdCluster, make: Make, job: str
) -> None:
    zombie_is_refused(",".join(etcd_three.endpoints), make(), job, ttl_s=2.0)


def test_two_leaders_that_do_not_know_of_each_other_open_one_epoch(make: Make) -> None:
    """The one that is not leader any more has the older view; both publish at the same moment, many
    times."""
    one, other, witness = make(), make(), make()
    for _ in range(5):
        open_epoch(one, node_of(one))
        old_view = one.view()
        other.suspect(node_of(one), "x")
        witness.suspect(node_of(one), "x")
        assert other.lead(other.view()) == Leading()
        new_view = other.view()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(one.publish, record_of(old_view, node_of(one)), old_view)
            second = pool.submit(other.publish, record_of(new_view, node_of(other)), new_view)
            assert (type(first.result()), type(second.result())) == (NotPublished, Published)
        witness.suspect(node_of(one), None)
        other.suspect(node_of(one), None)
        one, other = other, one
