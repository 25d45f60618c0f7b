"""What torch expects of any rendezvous, over both kinds of membership."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from kit.agents import WAIT_S, Agents, Etcd, Waiting, seated, wait_for
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.utils.store import barrier

from ckpt.elastic import rendezvous
from ckpt.elastic.rendezvous import plugin as rendezvous_handler
from ckpt.elastic.rendezvous.plugin import StandbyReleased
from ckpt.elastic.verdict import VERDICT_VARIABLE, Verdict, give_verdict
from ckpt.errors import FencedError, UsageError
from ckpt.ipc.cluster_spec import nodes_from_environment
from ckpt.keyspace.base import Put, Transaction

Make = Callable[..., Agents]


@pytest.mark.slow
def test_all_come_and_each_has_a_rank_of_its_own(agents: Make) -> None:
    job = agents(3, 3)
    waiting = seated(job.come(3))
    assert [one.info.rank for one in waiting] == [0, 1, 2]
    assert {one.info.world_size for one in waiting} == {3}
    places = {
        (one.info.bootstrap_store_info.master_addr, one.info.bootstrap_store_info.master_port)
        for one in waiting
    }
    assert len(places) == 1
    assert [one.handler.num_nodes_waiting() for one in waiting] == [0, 0, 0]
    assert not waiting[0].handler.is_closed()


@pytest.mark.slow
def test_the_name_of_backend_and_run(agents: Make) -> None:
    job = agents(1, 1)
    handler = job.make()
    assert handler.get_backend() == "ckpt"
    assert handler.get_run_id() == job.job
    assert not handler.use_agent_store


@pytest.mark.slow
def test_many_come_at_once(agents: Make) -> None:
    waiting = seated(agents(12, 12).come(12))
    assert [one.info.rank for one in waiting] == list(range(12))


@pytest.mark.slow
def test_the_last_call_lets_a_round_begin_with_fewer(agents: Make) -> None:
    waiting = seated(agents(2, 3).come(2))
    assert [one.info.world_size for one in waiting] == [2, 2]


@pytest.mark.slow
def test_too_few_wait_until_their_time_is_over(agents: Make) -> None:
    (waiting,) = agents(2, 2, join_timeout="3").come(1)
    error = waiting.fails()
    assert isinstance(error, RendezvousTimeoutError)
    assert "waiting=1 nodes_min=2" in str(error)


@pytest.mark.slow
def test_who_gave_up_waiting_closes_nothing(agents: Make) -> None:
    job = agents(2, 2)
    (early,) = job.come(1, join_timeout="0.5")
    assert isinstance(early.fails(), RendezvousTimeoutError)
    assert early.handler.shutdown()
    assert [one.info.world_size for one in job.come(2)] == [2, 2]


@pytest.mark.slow
def test_closed_is_closed_for_all(agents: Make) -> None:
    job = agents(2, 2)
    waiting = job.come(2)
    assert [one.info.world_size for one in waiting] == [2, 2]
    waiting[0].handler.set_closed()
    assert waiting[1].handler.is_closed()
    assert isinstance(Waiting(waiting[1].handler).fails(), RendezvousClosedError)
    (late,) = job.come(1)
    assert isinstance(late.fails(), RendezvousClosedError)


@pytest.mark.slow
def test_the_end_of_an_agent_closes_and_the_same_job_can_be_run_again(agents: Make) -> None:
    job = agents(2, 2)
    first = job.come(2)
    assert [one.info.world_size for one in first] == [2, 2]
    assert [one.handler.shutdown() for one in first] == [True, True]
    assert first[0].handler.is_closed()
    again = job.come(2)
    assert [one.info.world_size for one in again] == [2, 2]
    assert not again[0].handler.is_closed()


def test_whoever_comes_back_brings_all_to_a_fresh_round(agents: Make) -> None:
    waiting = seated(agents(2, 2).come(2))
    waiting[0].info.store.set("said", "before")
    assert waiting[1].info.store.get("said") == b"before"
    failed = Waiting(waiting[1].handler)
    wait_for(lambda: waiting[0].handler.num_nodes_waiting() > 0, "the other one is asked back")
    assert failed.waits
    again = seated([failed, Waiting(waiting[0].handler)])
    assert [one.handler for one in again] == [
        one.handler for one in waiting
    ]  # survivors keep their ranks
    assert not again[0].info.store.check(["said"])
    assert (
        again[0].info.bootstrap_store_info.master_port
        != waiting[0].info.bootstrap_store_info.master_port
    )
    assert [one.handler.num_nodes_waiting() for one in again] == [0, 0]


def test_a_spare_waits_and_disturbs_nobody(agents: Make) -> None:
    job = agents(2, 2, join_timeout="20")
    waiting = job.come(2)
    assert [one.info.world_size for one in waiting] == [2, 2]
    (spare,) = job.come(1)
    look = spare.handler._agent.next_view
    wait_for(lambda: look(None, 1.0) is not None, "the spare has seen the round")
    wait_for(
        lambda: bool(waiting[0].handler._agent.latest_view().newcomers),
        "the others have seen the spare",
    )
    assert [one.handler.num_nodes_waiting() for one in waiting] == [0, 0]
    assert spare.waits
    for one in waiting:
        assert one.handler.shutdown()
    released = spare.fails()
    assert isinstance(released, StandbyReleased)
    assert released.code == 0
    assert spare.handler.shutdown()


@pytest.mark.slow
def test_a_spare_takes_over_from_an_agent_that_left(agents: Make) -> None:
    job = agents(2, 2)
    waiting = seated(job.come(2))
    (spare,) = job.come(1)
    wait_for(lambda: bool(waiting[1].handler._agent.latest_view().newcomers), "the spare waits")
    waiting[0].handler._agent.leave()
    wait_for(lambda: waiting[1].handler.num_nodes_waiting() > 0, "the other one is asked back")
    again = seated([Waiting(waiting[1].handler), spare])
    assert [one.handler for one in again] == [spare.handler, waiting[1].handler]
    assert [one.info.world_size for one in again] == [2, 2]


@pytest.mark.slow
def test_the_world_shrinks_where_the_minimum_allows(agents: Make) -> None:
    waiting = seated(agents(1, 2, shrink_timeout="0.3").come(2))
    assert waiting[0].info.world_size == 2
    waiting[0].handler._agent.leave()
    wait_for(lambda: waiting[1].handler.num_nodes_waiting() > 0, "the other one is asked back")
    assert Waiting(waiting[1].handler).info.world_size == 1


@pytest.mark.slow
def test_below_the_minimum_nobody_is_asked(agents: Make) -> None:
    waiting = seated(agents(2, 2).come(2))
    assert waiting[1].info.world_size == 2
    waiting[0].handler._agent.leave()
    wait_for(lambda: waiting[1].handler._agent.lost_for_s > 1.5, "the loss is known")
    assert waiting[1].handler.num_nodes_waiting() == 0


@pytest.mark.parametrize("grow", [False, True])
def test_a_job_grows_only_where_that_is_asked_for(agents: Make, grow: bool) -> None:
    job = agents(1, 2, grow=grow, last_call_timeout="0")
    (first,) = job.come(1)
    assert first.info.world_size == 1
    (second,) = job.come(1)
    wait_for(lambda: bool(first.handler._agent.latest_view().newcomers), "the second one waits")
    assert first.handler.num_nodes_waiting() == int(grow)
    if grow:
        assert [one.info.world_size for one in (Waiting(first.handler), second)] == [2, 2]


@pytest.mark.slow
def test_a_warm_spare_starts_at_once_with_ranks_that_cannot_train(
    agents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = agents(2, 2, standby="warm")
    waiting = job.come(2)
    assert [one.info.world_size for one in waiting] == [2, 2]
    (spare,) = job.come(1)
    info = spare.info
    assert info.rank >= info.world_size == 2
    info.store.set(
        f"torchelastic/role_info/{info.rank}", '{"role": "r", "rank": 2, "local_world_size": 8}'
    )
    assert info.store.get(f"torchelastic/assigned_ranks/{info.rank}") == b"[16, 16, 16, 16]"
    barrier(info.store, info.world_size, "torchelastic/agent/terminal_state", barrier_timeout=1)
    monkeypatch.setenv("MASTER_ADDR", info.bootstrap_store_info.master_addr)
    monkeypatch.setenv("MASTER_PORT", str(info.bootstrap_store_info.master_port))
    monkeypatch.setenv("RANK", "16")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match="this node is a standby"):
        dist.init_process_group("gloo")
    assert [one.handler.num_nodes_waiting() for one in (*waiting, spare)] == [0, 0, 0]
    assert spare.handler.shutdown()
    assert not waiting[0].handler.is_closed()


def test_whose_lease_was_lost_keeps_its_place(agents: Make) -> None:
    waiting = seated(agents(1, 2, grow=True).come(2))
    assert waiting[1].info.world_size == 2
    one = waiting[0].handler._agent
    lease = one.latest_view().live[one.name].lease_id
    before = one._node
    one.keyspace.revoke(lease)
    wait_for(lambda: one._node not in ("", before), "it joined anew")
    wait_for(
        lambda: one.name in waiting[1].handler._agent.latest_view().live, "the other one sees it"
    )
    assert [handler.handler.num_nodes_waiting() for handler in waiting] == [0, 0]


@pytest.mark.slow
def test_ranks_of_a_round_that_lost_its_first_agent_never_come_together(agents: Make) -> None:
    waiting = seated(agents(2, 2).come(2))
    first, second = waiting
    second.info.store.set(
        "torchelastic/role_info/1", '{"role": "r", "rank": 1, "local_world_size": 1}'
    )
    first.handler._agent.leave()
    rank, world, _, _ = json.loads(second.info.store.get("torchelastic/assigned_ranks/1"))
    assert 10**6 <= rank < world
    assert (
        second.handler.num_nodes_waiting() == 1
    )  # though too few are left: its workers must not hang


@pytest.mark.slow
def test_nobody_waits_at_the_end_for_an_agent_that_is_gone(agents: Make) -> None:
    waiting = agents(3, 3).come(3)
    assert waiting[0].info.world_size == 3
    waiting[0].handler._agent.leave()
    threads = [
        threading.Thread(
            target=barrier, args=(one.info.store, 3, "torchelastic/agent/terminal_state", WAIT_S)
        )
        for one in waiting[1:]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S / 2)
        assert not thread.is_alive()


def test_keepers_learn_where_they_meet(agents: Make, endpoint: str) -> None:
    job = agents(1, 2, domain="rack 1", mirrors="2", shrink_timeout="3", last_call_timeout="0")
    (one,) = job.come(1)
    assert one.info.world_size == 1
    spec = nodes_from_environment()
    assert spec.job == job.job
    assert spec.where.removeprefix("etcd://").startswith(endpoint)
    assert (spec.nodes_min, spec.nodes_max, spec.domain, spec.mirrors, spec.shrink_wait_s) == (
        1,
        2,
        "rack 1",
        2,
        3.0,
    )


@pytest.mark.slow
def test_workers_learn_which_end_of_the_job_is_theirs_wherever_they_come_in(agents: Make) -> None:
    job = agents(2, 2, standby="warm")
    handlers = [job.make() for _ in range(3)]
    keepers = handlers[0]._agent._keepers
    # The end of an earlier run of the job.
    before = keepers.transact(Transaction(then=(Put("epoch", b"an earlier end"),))).revision
    waiting = [Waiting(handler) for handler in handlers[:2]]
    assert [one.info.world_size for one in waiting] == [2, 2]
    assert nodes_from_environment().ends_after == before
    # This run's end comes as a late node starts: it is newer than what its round says.
    ended = keepers.transact(Transaction(then=(Put("epoch", b"this end"),))).revision
    assert Waiting(handlers[2]).info.rank >= 2
    assert nodes_from_environment().ends_after == before < ended


def test_missing_secret_is_refused_before_workers_are_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_NODES", "")
    job = Agents("127.0.0.1:1", "j", 2, 2, {"standby": "warm"})
    with pytest.raises(UsageError, match="ckpt key new"):
        job.make()
    open_to_all = tmp_path / "secret"
    open_to_all.write_text("0" * 64)
    open_to_all.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        job.make(secret=str(open_to_all))


@pytest.mark.slow
def test_agent_says_for_whom_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous_handler, "PENDING_FIRST_S", 0.1)
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("CKPT_NODES", "")
    job = Agents("", "trial", 2, 2, {"join_timeout": "5"})
    (one,) = job.come(1)
    assert isinstance(one.fails(), RendezvousTimeoutError)
    said = [record.message for record in caplog.records if "--rdzv-endpoint" in record.message]
    assert len(said) == 1, "once a minute"
    assert "waiting=1 nodes_min=2" in said[0] and "of this machine" in said[0]
    job.close()


@pytest.mark.slow
@pytest.mark.parametrize("status", [FencedError.exit_code, UsageError.exit_code])
def test_verdict_of_workers_stops_restarts_and_closes_only_what_is_over_for_all(
    agents: Make, status: int
) -> None:
    job = agents(2, 2)
    waiting = seated(job.come(2))
    first, second = (one.handler for one in waiting)
    assert second.num_nodes_waiting() == 0
    first._verdict.path.parent.mkdir(parents=True, exist_ok=True)
    os.environ[VERDICT_VARIABLE] = str(first._verdict.path)
    give_verdict(Verdict(status, "another writer opened an epoch of this job"))
    again = Waiting(first)
    assert isinstance(again.fails(), RendezvousClosedError)
    assert "another writer" in str(again.error)
    assert second.is_closed() is (status == FencedError.exit_code)
    if second.is_closed():
        assert isinstance(Waiting(second).fails(), RendezvousClosedError)
    first._verdict.remove()


def test_one_node_alone_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CKPT_NODES", "")
    job = Agents("", "none", 1, 1, {})
    (one,) = job.come(1)
    assert one.info.world_size == 1
    assert nodes_from_environment() is None
    assert one.handler.shutdown()
    assert one.handler.is_closed()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_keepers_wait_for_those_whose_agents_have_come(agents: Make) -> None:
    assert [one.info.world_size for one in agents(1, 2, last_call_timeout="30").come(2)] == [2, 2]
    assert nodes_from_environment().last_call_s == 30.0
    assert agents(1, 2, last_call_timeout="0.5").come(1)[0].info.world_size == 1
    assert nodes_from_environment().last_call_s == 1.0


@pytest.mark.slow
def test_an_outage_of_etcd_disturbs_nobody(tmp_path: Path) -> None:
    server = Etcd(tmp_path)
    server.start()
    job = Agents(server.endpoint, "outage", 2, 2, {"ttl": "2"})
    try:
        waiting = seated(job.come(2))
        assert waiting[0].info.world_size == 2
        server.kill()
        wait_for(
            lambda: all(one.handler._agent.problem is not None for one in waiting),
            "the outage is felt",
        )
        assert [one.handler.num_nodes_waiting() for one in waiting] == [0, 0]
        server.start()
        wait_for(
            lambda: all(one.handler._agent.problem is None for one in waiting), "all see again"
        )
        assert [one.handler.num_nodes_waiting() for one in waiting] == [0, 0]
        again = [Waiting(one.handler) for one in waiting]
        assert {one.info.world_size for one in again} == {2}
    finally:
        job.close()
        server.kill()


@pytest.mark.slow
def test_no_etcd_is_an_error_before_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_handler, "CONNECT_S", 1.0)
    job = Agents("127.0.0.1:9", "nowhere", 1, 1, {"ttl": "2"})
    try:
        (one,) = job.come(1)
        assert isinstance(one.fails(), RendezvousConnectionError)
        with pytest.raises(RendezvousConnectionError):
            one.handler.is_closed()
    finally:
        job.close()


def test_the_entry_point_makes_handlers(tmp_path: Path) -> None:
    create = rendezvous.handler()
    parameters = RendezvousParameters("ckpt", str(tmp_path), "job", 1, 1, timeout=900)
    assert create(parameters).get_backend() == "ckpt"
    with pytest.raises(UsageError, match="key=frob"):
        create(RendezvousParameters("ckpt", "", "job", 1, 1, frob=1))
