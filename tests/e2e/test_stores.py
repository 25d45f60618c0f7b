"""Jobs on three stores of which one at a time is lost, spoiled, replaced; real S3 servers, real processes, real kills."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import SEED, Fleet, Job, plain, wait_for
from regions import Bucketed, Folder, Stores, kind_of, run_ckpt, same_everywhere
from servers.proxy import FaultProxy
from servers.rules import Fault, Request
from servers.s3 import Moto, S3Server

import ckpt

pytestmark = pytest.mark.slow


SIZE = ("--ballast-mib", 4)
"""Large enough that a save takes a while."""


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
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Starts programs. This process has another runtime folder, or the servers that it starts would pass for programs."""
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.kill_all()


@pytest.fixture
def buckets(two_s3_servers: tuple[S3Server, S3Server], fault_proxy: Callable[..., FaultProxy]) -> list[Bucketed]:
    """A bucket in each of two regions, whose servers do not create a key only once."""
    return [Bucketed(server, fault_proxy(server.endpoint)) for server in two_s3_servers]


@pytest.fixture
def three(buckets: list[Bucketed], tmp_path: Path) -> Stores:
    """Two regions and a folder, two of three needed to write: a file of this machine gives out the places."""
    return Stores([*buckets, Folder(tmp_path / "store")])


@pytest.fixture
def folders(tmp_path: Path) -> Stores:
    """Three folders, which give out the places together."""
    return Stores([Folder(tmp_path / name) for name in ("a", "b", "c")])


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's folder for files that give out places."""
    folder = tmp_path / "state"
    monkeypatch.setenv("CKPT_STATE_DIR", str(folder))
    return folder


def start(fleet: Fleet, stores: Stores, *options: object) -> Job:
    """A job that trains on ``stores`` until ``stop``; started again it goes on in the same folder."""
    folder = fleet.folder / "job"
    stores.write_to(folder)
    (folder / "stop").unlink(missing_ok=True)
    return fleet.start(plain("stored.py", folder, *options))


def stop(fleet: Fleet, job: Job) -> None:
    """Let the job end as planned, and its keeper."""
    (job.folder / "stop").touch()
    assert job.wait_end() == 0, job.output()
    wait_for(lambda: not fleet.members(), "the keeper's end", say=fleet.describe)


def goes_on(fleet: Fleet, stores: Stores, job: Job, *options: object) -> None:
    """The program, started again, has the very state that ``job`` ended with."""
    ended, steps = job.finals(), job.completed
    again = start(fleet, stores, "--steps", steps, *options)
    assert again.wait_end() == 0, again.output()
    assert (again.finals(), again.losses[0].poll().completed) == (ended, steps)
    wait_for(lambda: not fleet.members(), "the keeper's end", say=fleet.describe)


def steps_saved(stores: Stores) -> list[int]:
    """The steps of all snapshots, oldest first."""
    listed = stores.ckpt("ls", "--json")
    assert listed.status == 0, listed
    return sorted(one["step"] for one in listed.json["snapshots"])


def sets(stores: Stores) -> list[dict[str, object]]:
    """The log's ``stores`` records."""
    done = stores.ckpt("log", "--json")
    assert done.status == 0, done
    return [one for one in done.json["records"] if one["kind"] == "stores" and one["void"] is None]


def wait_saves(stores: Stores, count: int, job: Job) -> None:
    """Wait until there are that many more snapshots."""
    wanted = len(steps_saved(stores)) + count
    wait_for(lambda: len(steps_saved(stores)) >= wanted, f"{count} more snapshots", say=job.output)


def whole(stores: Stores) -> bool:
    """Whether every store counts and holds every record and object rightly."""
    if stores.ckpt("verify", "--all-replicas", "--all").status != 0:
        return False
    shown = stores.ckpt("stores", "show", "--json")
    return shown.status == 0 and all(one["counts"] for one in shown.json["stores"])


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
def test_region_that_is_killed_in_the_middle_of_a_save_is_not_missed_and_is_whole_again(
    fleet: Fleet, three: Stores, *, empty: bool
) -> None:
    victim = three.regions[0]
    assert isinstance(victim, Bucketed)
    job = start(fleet, three, *SIZE, "--step-s", 0.05)
    job.wait_steps(25)
    victim.proxy.rule = rule = KillAt(victim, 2)
    wait_for(rule.done.is_set, "the region's end", say=job.output)
    wait_saves(three, 3, job)
    first = sets(three)
    if empty:
        victim.wipe()
    else:
        victim.server.start()
    wait_for(lambda: whole(three), "the region to be whole", say=lambda: f"{job.output()}\n{fleet.describe()}")
    wait_saves(three, 1, job)
    stop(fleet, job)
    scrubbed = three.ckpt("scrub", "--json")
    assert (scrubbed.status, scrubbed.json["troubles"]) == (0, []), scrubbed
    same_everywhere(three)
    if empty:
        last = sets(three)[-1]
        assert len(sets(three)) == len(first) + 1
        assert [one != other for one, other in zip(first[-1]["ids"], last["ids"], strict=True)] == [True, False, False]
    else:
        assert sets(three) == first
    assert job.attempts() == 1
    assert job.losses[0].poll().redone == 0
    assert "is not durable" not in (job.folder / "output.txt").read_text()
    goes_on(fleet, three, job, *SIZE)


KINDS = ("packs", "parts", "manifests", "log", "folds", "ckpt.json")


def spoiled(data: bytes, chance: random.Random) -> bytes:
    """The same with a few other bytes, or cut off."""
    if chance.random() < 0.2:
        return data[: chance.randrange(len(data))]
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        found[chance.randrange(len(found))] ^= chance.randint(1, 255)
    return bytes(found)


@pytest.mark.parametrize("mode", ["regions", "folders"])
def test_one_bad_copy_of_anything_harms_no_restore_and_a_scrub_makes_it_right(
    mode: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: Stores = request.getfixturevalue("three" if mode == "regions" else "folders")
    monkeypatch.setenv("CKPT_KEEPER", "off")
    wanted = stores.fill(saves=3, records=1024 if mode == "folders" else 0)
    same_everywhere(stores)
    right = [region.objects() for region in stores.regions]
    print(f"seed={SEED} (CKPT_SEED={SEED} repeats it)")
    chance = random.Random(f"{SEED}/{mode}")
    for number, region in enumerate(stores.regions):
        for kind in KINDS:
            keys = [key for key in right[number] if kind_of(key) == kind]
            assert keys or (kind == "folds" and mode == "regions"), kind
            for key in chance.sample(keys, min(2, len(keys))):
                bad = spoiled(right[number][key], chance)
                region.put(key, bad)
                where = f"{key} of {region.url}, {len(bad)} bytes"
                assert stores.read_all() == wanted, where
        # All kinds at once, on the same store: still no more than one store is harmed.
        for key in chance.sample(sorted(right[number]), 10):
            region.put(key, spoiled(right[number][key], chance))
        for key in chance.sample(sorted(right[number]), 5):
            region.delete(key)
        assert stores.read_all() == wanted
        scrubbed = stores.ckpt("scrub", "--json")
        assert scrubbed.status == 0, scrubbed
        assert region.objects() == right[number]
    assert [region.objects() for region in stores.regions] == right
