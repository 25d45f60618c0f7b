"""Nodes with addresses of their own, one of which is cut off: it falls silent, stops by itself, and
comes back as a standby."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.jobs import SOAK, differences, wait_for
from kit.machines import TTL_S, calm, cluster
from kit.networks import Network, network

import ckpt

STEPS = 100
KILL_AT = 15
REDONE_MAX = 12
ARGUMENTS = (STEPS, "--every", 1000, "--step-s", 0.2)
ETCD = 9
"""The host on which etcd runs."""


@pytest.fixture
def lan() -> Iterator[Network]:
    with network(ETCD) as made:
        yield made


@pytest.fixture
def where(lan: Network, tmp_path: Path) -> Iterator[str]:
    """An etcd on a host of its own."""
    binary = shutil.which("etcd")
    if binary is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "etcd is not installed (Debian: apt-get install etcd-server)"
        )
    url = f"http://{lan.address(ETCD)}:2379"
    with (tmp_path / "etcd.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *lan.command(ETCD),
                binary,
                "--data-dir",
                str(tmp_path / "etcd"),
                "--listen-client-urls",
                url,
                "--advertise-client-urls",
                url,
                "--listen-peer-urls",
                f"http://{lan.address(ETCD)}:2380",
                "--initial-advertise-peer-urls",
                f"http://{lan.address(ETCD)}:2380",
                "--initial-cluster",
                f"default=http://{lan.address(ETCD)}:2380",
                "--unsafe-no-fsync",
                "--log-level",
                "error",
            ],
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        yield f"etcd://{lan.address(ETCD)}:2379"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1] if SOAK else [0])
def test_node_that_is_cut_off_stops_and_its_ranks_go_on_elsewhere_until_it_is_back(
    lan: Network, where: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, rank: int
) -> None:
    undisturbed = calm(tmp_path_factory, 2, ARGUMENTS)
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(os.urandom(32).hex())
    with cluster(tmp_path / "cluster", nodes="2", where=where, secret=secret) as one:
        hosts = {}
        for host in (1, 2, 3):
            machine = one.start(*ARGUMENTS, before=lan.command(host), host=lan.address(host))
            hosts[machine.name] = host
        one.wait_steps(KILL_AT)
        cut = one.of_rank(rank)
        trainer = one.job.trainer(rank)
        other = one.job.losses[1 - rank]
        lan.pull(hosts[cut.name])
        began_s = time.monotonic()
        wait_for(
            lambda: not cut.has(trainer),
            "the end of the trainer there",
            wait_s=TTL_S * 15,
            say=one.output,
        )
        stopped_s = time.monotonic() - began_s
        wait_for(
            lambda: one.job.trainer(rank) != trainer, "another trainer of its rank", say=one.output
        )
        reached = other.poll().completed
        wait_for(lambda: other.poll().completed > reached + 3, "new steps", say=one.output)
        print(
            f"stopped after {stopped_s:.2f} s, new steps after {time.monotonic() - began_s:.2f} s, "
            f"ttl {TTL_S:g} s"
        )
        assert one.of_rank(rank) is not cut
        lan.plug(hosts[cut.name])
        assert set(one.wait_end(240.0, hurry=True).values()) == {0}, one.output()
        assert differences(undisturbed, one.job, world_size=2) == [], one.output()
        assert one.job.losses[1 - rank].poll().redone <= REDONE_MAX, one.output()
        one.wait_gone()
        store = ckpt.Checkpointer(str(one.results / "store"))
        newest = store.latest()
        assert newest is not None and newest.step == STEPS
        assert store.verify().ok
