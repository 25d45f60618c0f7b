"""Nodes are killed, stopped, cut off and told wrong times, etcd is too, and stores stall, fill and
come back, while a job of three trains: one seed is one run.

``CKPT_SEED=7 pytest -s tests/scenarios/nodes/test_nodes_nemesis.py`` does one run again,
``CKPT_SEED=7-20`` some; ``CKPT_SOAK=1`` does 60, ten to a job (``CKPT_CHAIN`` says how many). What
becomes durable is in one folder, or where the chain's number is odd in three, of whose log etcd
gives out the places (``CKPT_STORES`` says how many), each a file system of its own. Each prints what
was done to whom, and when. In what state a process is hit depends on how busy the machine is, so a
rare failure may take some repetitions. Root makes the network; wall clocks that jump are
libfaketime's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from kit import networks
from kit.jobs import wait_for
from kit.nemesis import clock as nemesis_clock
from kit.nemesis import disks
from kit.nemesis.checker import check, lateness_s
from kit.nemesis.clock import Clock
from kit.nemesis.etcd import require
from kit.nemesis.run import nemesis
from kit.nemesis.schedule import CLOCK_JUMP_S, TTL_S, draw

SOAK = os.environ.get("CKPT_SOAK") == "1"
NAMED = os.environ.get("CKPT_SEED", "")
FIRST, _, LAST = NAMED.partition("-")
SEEDS = range(int(FIRST), int(LAST or FIRST) + 1) if NAMED else range(1, 61) if SOAK else (32, 57)
CHAIN = int(os.environ.get("CKPT_CHAIN", "10" if SOAK and not NAMED else "1"))
"""How many schedules one job lives through."""

LEASE_S = float(os.environ.get("CKPT_TTL_S", TTL_S))
"""On a machine with far more to do than it can, leases of two seconds run out for no other reason;
then take longer ones."""

STORES = int(os.environ.get("CKPT_STORES", "0"))

CHAINS = [SEEDS[first : first + CHAIN] for first in range(0, len(SEEDS), CHAIN)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", CHAINS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_no_split_brain_whatever_happens_to_nodes_network_clocks_etcd_and_stores(
    seeds: Sequence[int], tmp_path: Path
) -> None:
    networks.require()
    nemesis_clock.require()
    disks.require()
    require("etcd")
    require("etcdctl")
    stores = STORES or (3 if seeds[0] // CHAIN % 2 else 1)
    with nemesis([draw(seed, ttl_s=LEASE_S) for seed in seeds], tmp_path, stores=stores) as run:
        history = run.play()
        wrong = check(history)
        print(
            f"{len(history.entered)} trainers, {len(history.steps)} steps, "
            f"{len(history.snapshots)} snapshots, "
            f"latest beat {lateness_s(history):+.3f} s from its node's time"
        )
        assert wrong == [], "\n".join([*wrong, run.describe()])


@pytest.mark.slow
def test_wall_clock_of_a_running_program_jumps_and_no_other_does(tmp_path: Path) -> None:
    nemesis_clock.require()
    clock = Clock(tmp_path / "clock")
    told = tmp_path / "told"
    program = (
        f"import time\nwhile True:\n  open({str(told)!r}, 'a').write(f'{{time.time()}} "
        f"{{time.monotonic()}} "
        "{time.clock_gettime(time.CLOCK_BOOTTIME)}\\n')\n  time.sleep(0.05)"
    )
    process = subprocess.Popen([*clock.command(), sys.executable, "-c", program])
    try:

        def newest() -> list[float]:
            lines = told.read_text().splitlines() if told.exists() else []
            return (
                [float(one) for one in lines[-1].split()]
                if lines and len(lines[-1].split()) == 3
                else []
            )

        wait_for(lambda: bool(newest()), "a first time")
        before = newest()
        clock.set(CLOCK_JUMP_S)
        wait_for(lambda: newest() != [] and newest()[0] > before[0] + CLOCK_JUMP_S, "the jump")
        after = newest()
        assert after[1] - before[1] < CLOCK_JUMP_S / 2
        assert after[2] - before[2] < CLOCK_JUMP_S / 2
    finally:
        process.kill()
        process.wait()


HEAR = """
import socket, sys
listening = socket.socket(type=socket.SOCK_DGRAM)
listening.bind(("", 7000))
while True:
    with open(sys.argv[1], "a") as heard:
        heard.write(listening.recv(9).decode() + "\\n")
"""
SAY = "import socket, sys\nsocket.socket(type=socket.SOCK_DGRAM).sendto(sys.argv[2].encode(), (sys.argv[1], 7000))"


@pytest.mark.slow
def test_what_is_sent_one_way_can_be_lost_while_the_other_way_is_well(tmp_path: Path) -> None:
    with networks.network(2) as lan:
        heard = {host: tmp_path / f"heard-{host}" for host in (1, 2)}

        def say(host: int, word: str) -> None:
            subprocess.run(
                [*lan.command(host), sys.executable, "-c", SAY, lan.address(3 - host), word],
                check=True,
            )

        def reaches(host: int, word: str) -> None:
            """What a host says now arrives; what was said before has then arrived, or is lost."""

            def there() -> bool:
                say(host, word)
                return word in heard[3 - host].read_text().split()

            wait_for(there, f"a word of host {host}")

        for path in heard.values():
            path.touch()
        listeners = [
            subprocess.Popen([*lan.command(host), sys.executable, "-c", HEAR, str(path)])
            for host, path in heard.items()
        ]
        try:
            reaches(1, "a")
            reaches(2, "b")
            lan.lose(1, 2)
            say(1, "lost")
            reaches(2, "c")
            lan.deliver(1, 2)
            reaches(1, "d")
            assert "lost" not in heard[2].read_text().split()
        finally:
            for one in listeners:
                one.kill()
                one.wait()
