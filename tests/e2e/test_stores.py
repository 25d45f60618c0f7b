"""Jobs on three stores, two of them S3 servers of which one is lost in the middle of a save."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Fleet, plain, wait_for
from regions import Bucketed, Done, Folder, Stores
from servers.proxy import FaultProxy
from servers.rules import Fault, Request
from servers.s3 import S3Server

pytestmark = pytest.mark.slow


class KillAt:
    """A proxy's rule that kills the server at the n-th request that writes a pack: that object is cut off."""

    def __init__(self, region: Bucketed, nth: int) -> None:
        self._region, self._left = region, nth
        self.done = threading.Event()

    def __call__(self, request: Request) -> Fault | None:
        if request.method == "PUT" and "/packs/" in request.path:
            self._left -= 1
            if self._left == 0:
                self._region.server.stop()
                self.done.set()
        return None


@pytest.fixture
def buckets(two_s3_servers: tuple[S3Server, S3Server], fault_proxy: Callable[..., FaultProxy]) -> list[Bucketed]:
    """A bucket in each of two regions."""
    return [Bucketed(server, fault_proxy(server.endpoint)) for server in two_s3_servers]


@pytest.fixture
def three(buckets: list[Bucketed], tmp_path: Path) -> Stores:
    """Two regions and a folder, two of three needed to write."""
    return Stores([*buckets, Folder(tmp_path / "store")])


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path / "state"))


def commits(stores: Stores) -> int:
    listed = stores.ckpt("ls", "--json")
    assert listed.status == 0, listed
    return len(listed.json["snapshots"])


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
def test_region_that_is_killed_in_the_middle_of_a_save_is_not_missed_and_is_whole_again(
    fleet: Fleet, three: Stores, *, empty: bool
) -> None:
    victim = three.regions[0]
    assert isinstance(victim, Bucketed)
    folder = fleet.folder / "job"
    three.write_to(folder)
    job = fleet.start(plain("stored.py", folder, "--ballast-mib", 4), env={"CKPT_STATE_DIR": os.environ["CKPT_STATE_DIR"]})
    job.wait_steps(25)
    print(three.ckpt("stores", "show"))
    rule = KillAt(victim, 3)
    victim.proxy.rule = rule
    wait_for(rule.done.is_set, "the region's end", say=job.output)
    before, steps = commits(three), job.completed
    wait_for(lambda: commits(three) >= before + 2, "saves without the region", say=job.output)
    job.wait_steps(steps + 25)
    if empty:
        victim.wipe()
    else:
        victim.server.start()
    import time
    for _ in range(16):
        time.sleep(2)
        d = three.ckpt("verify", "--all-replicas", "--all", "--json")
        s = three.ckpt("stores", "show", "--json")
        j = d.json
        print(d.status, [(x["counts"]) for x in s.json["stores"]], j["records"], len(j["troubles"]), sorted((t["key"][-20:], t["store"]) for t in j["troubles"])[:3], d.err[-300:])
        if d.status == 0 and all(x["counts"] for x in s.json["stores"]): break
    print(job.output())
    print(fleet.describe())
    (folder / "stop").touch()
    assert job.wait_end() == 0
    print(three.ckpt("log").out)
