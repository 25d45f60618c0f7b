"""Nodes that speak TLS to each other: a lost node's state comes from a mirror all the same, and
nobody on the way reads it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.jobs import PROGRAMS, WAIT_S, differences, wait_for
from kit.machines import calm, cluster
from kit.networks import Network, network
from kit.servers.certificates import Authority
from kit.template import Program

import ckpt

STEPS = 100
KILL_AT = 15
REDONE_MAX = 12
"""Steps since the last pair that was on another node: far fewer than all, which the store would
leave."""

ARGUMENTS = (STEPS, "--every", 1000, "--step-s", 0.2)
BALLAST_MIB = 1
ELSEWHERE = "192.0.2.7"
"""An address of nobody (RFC 5737)."""


@pytest.mark.slow
def test_state_of_a_killed_node_comes_from_a_mirror_over_tls(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undisturbed = calm(tmp_path_factory, 2, ARGUMENTS)
    authority = Authority(tmp_path / "ca")
    with cluster(tmp_path / "cluster", nodes="2") as one:
        for number in range(3):
            one.start(*ARGUMENTS, more=authority.sign(f"node{number}").spec())
        one.wait_steps(KILL_AT)
        lost = one.of_rank(1)
        lost.kill()
        ends = one.wait_end(hurry=True)
        assert {status for name, status in ends.items() if name != lost.name} == {0}, one.output()
        assert differences(undisturbed, one.job, world_size=2) == [], one.output()
        assert one.job.losses[0].poll().redone <= REDONE_MAX, one.output()
        assert "nodes use TLS; this node's certificate is valid until" in lost.output()
        one.wait_gone()
        assert ckpt.Checkpointer(str(one.results / "store")).verify().ok


@pytest.mark.slow
@pytest.mark.parametrize("how", ["TLS", "plaintext"])
def test_on_the_way_state_is_read_in_the_clear_and_not_over_tls(
    lan: Network, tmp_path: Path, how: str
) -> None:
    """The second half shows that the first one looks at the right bytes."""
    authority = Authority(tmp_path / "ca")
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(os.urandom(32).hex())
    arguments = (*ARGUMENTS, "--ballast-mib", BALLAST_MIB)
    with (
        cluster(tmp_path / "cluster", nodes="2", secret=secret) as one,
        listening(lan, tmp_path / "heard.json") as heard,
    ):
        for host in (1, 2, 3):
            more = {"plaintext": True}
            if how == "TLS":
                more = {
                    "plaintext": False,
                    **authority.sign(f"node{host}", lan.address(host)).spec(),
                }
            one.start(*arguments, before=lan.command(host), host=lan.address(host), more=more)
        one.wait_steps(KILL_AT)
        lost = one.of_rank(1)
        lost.kill()
        ends = one.wait_end(hurry=True)
        assert {status for name, status in ends.items() if name != lost.name} == {0}, one.output()
        assert one.job.losses[0].poll().redone <= REDONE_MAX, one.output()
    found = json.loads(heard.read_text())
    print(found)
    assert found["packets"] > STEPS
    assert (found["clear"] == 0) == (how == "TLS"), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", ["nothing is said", "another host's certificate", "a key that isn't there"]
)
def test_node_that_may_not_lend_is_refused_before_it_trains(tmp_path: Path, wrong: str) -> None:
    files = Authority(tmp_path / "ca").sign("node")
    more = {
        "nothing is said": {},
        "another host's certificate": files.spec(),
        "a key that isn't there": {**files.spec(), "tls_key": str(tmp_path / "none.key")},
    }[wrong]
    says = {
        "nothing is said": "or say --plaintext if the network is yours alone",
        "another host's certificate": "certificate is not valid for '192.0.2.7'",
        "a key that isn't there": "none.key",
    }[wrong]
    with cluster(tmp_path / "cluster", nodes="1:2") as one:
        one.start(10, host=ELSEWHERE, more={"plaintext": False, **more})
        assert set(one.wait_end().values()) == {1}, one.output()
        said = (one.machines[0].folder / "output.txt").read_text()
        assert says in said, said
        assert one.job.attempts(0) == 0, "it trained"


@pytest.fixture
def lan() -> Iterator[Network]:
    with network(3) as made:
        yield made


@contextmanager
def listening(lan: Network, path: Path) -> Iterator[Path]:
    """Somebody who sees all packets of the network; what was seen is in the file afterwards."""
    process = Program([*lan.hub(), sys.executable, str(PROGRAMS / "listen_in.py"), str(path)])
    try:
        wait_for(path.exists, "a listener")
        yield path
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
