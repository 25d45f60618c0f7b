"""Real programs on three stores, whatever becomes of one store or of the machine: no bit of
training differs."""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kit.jobs import SEED, SOAK, Fleet, Job, differences, plain, ranks, wait_for
from kit.programs.little import digest
from kit.regions import OWN, S3, Folder, Region, Regions, ask, unequal
from kit.servers.fixtures import Servers
from kit.servers.proxy import FaultProxy
from kit.servers.rules import Request
from kit.servers.s3 import Gateway, Moto

from ckpt.format.keys import JOB_KEY

STEPS, EVERY = 200 if not SOAK else 1200, 5
PAUSE_S = 0.2
"""Between two steps of a run that is disturbed, until it is told to hurry: it lasts longer than any
store's recovery."""

NUMBERS = 32 << 10
"""How many the payload has, of four bytes each."""

MARK = bytes(range(65, 97)) + b"ckpt: a mark that nothing else h"
"""What stands in the state and nowhere else."""

LOOK_S = 0.3
"""How often stores are asked from outside."""

HELD_S_MAX = 20.0
"""Beside twenty times its usual length, a step may take so long: the machine has other things to
do."""

ROUNDS = 1 if not SOAK else 8

GATEWAY, OTHER_GATEWAY, MOTO, FOLDER = "gateway", "gateway-2", "moto", "folder"
REGIONS = (GATEWAY, OTHER_GATEWAY, FOLDER)

Make = Callable[..., Regions]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The undisturbed run, on one folder."""
    yield from undisturbed(Fleet(tmp_path_factory.mktemp("calm")), plain)


@pytest.fixture(scope="module")
def calm_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The same on two ranks."""
    yield from undisturbed(Fleet(tmp_path_factory.mktemp("calm-ranks")), ranks)


def undisturbed(fleet: Fleet, how: Callable[..., list[str]]) -> Iterator[Job]:
    job = fleet.start(how(*program(Regions((Folder(fleet.folder / "store"),), 1))), "calm")
    try:
        assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
        fleet.wait_gone()
        yield job
    finally:
        fleet.kill_all()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """As elsewhere, but that the servers which a test starts are none of it."""
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.kill_all()


@pytest.fixture
def make(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    _s3_servers: Servers,
    fault_proxy: Callable[..., FaultProxy],
) -> Make:
    """Makes a job's stores, each in a new place. What of them is ``watched`` is reached through a
    proxy."""
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path / "state"))
    folders = 0

    def one(kind: str, watched: str) -> Region:
        nonlocal folders
        if kind == FOLDER:
            folders += 1
            return Folder(tmp_path / f"folder-{folders}" / "run")
        server = _s3_servers.get(Moto if kind == MOTO else Gateway, int(kind == OTHER_GATEWAY))
        return S3(server.bucket(), fault_proxy(server.endpoint) if kind == watched else None)

    def make(*kinds: str, watched: str = "", key: str | None = None) -> Regions:
        return Regions(tuple(one(kind, watched) for kind in kinds), key=key)

    return make


def program(regions: Regions, *, steps: int = STEPS, pause_s: float = 0.0) -> list[str]:
    """What ``plain`` and ``ranks`` are given."""
    words = map(str, (steps, "--every", EVERY, "--step-s", pause_s))
    return ["stored.py", "{folder}", *words, *regions.words]


def begin(
    fleet: Fleet,
    regions: Regions,
    *,
    how: Callable[..., list[str]] = plain,
    steps: int = STEPS,
    pause_s: float = PAUSE_S,
) -> Job:
    """Start the program, or start it again, on these stores."""
    return fleet.start(
        how(*program(regions, steps=steps, pause_s=pause_s)), env=regions.environment
    )


def hurry(job: Job) -> None:
    """Let it train on without pauses."""
    (job.folder / "hurry").touch()


def seldom(until: Callable[[], bool]) -> Callable[[], bool]:
    """The same condition, looked at now and then: it costs more than a glance."""
    next_s = 0.0

    def look() -> bool:
        nonlocal next_s
        if time.monotonic() < next_s:
            return False
        found = until()
        next_s = time.monotonic() + LOOK_S
        return found

    return look


def wait_durable(regions: Regions, step: int, fleet: Fleet) -> None:
    """Wait until that step, or a later one, is the newest for a reader of these stores."""
    wait_for(
        seldom(lambda: regions.newest_step() >= step),
        f"step {step} in the stores",
        say=fleet.describe,
    )


def wait_counting(regions: Regions, fleet: Fleet) -> None:
    """Wait until all stores count."""
    everybody = set(regions.urls)
    wait_for(
        seldom(lambda: regions.counting().keys() == everybody),
        "all stores to count",
        say=fleet.describe,
    )


def wait_whole(regions: Regions, step: int, fleet: Fleet) -> None:
    """Wait until all copies are there and right, and each store by itself gives that step or a
    later one."""
    last: list[object] = []

    def whole() -> bool:
        last[:] = [regions.ask("verify", "--all", "--all-replicas")]
        if last[0][0]:
            return False
        for store in regions.stores:
            status, found = regions.only(store).ask("verify")
            last.append((status, found))
            if status or found["snapshots"][0]["step"] < step:
                return False
        return True

    wait_for(seldom(whole), "all stores to be whole", say=lambda: f"{last}\n{fleet.describe()}")


def killed_in_a_save(victim: S3, fleet: Fleet) -> None:
    """SIGKILL the server when it is next sent a pack."""
    assert victim.proxy is not None
    killed = threading.Event()

    def kill(request: Request) -> None:
        if request.method == "PUT" and "/packs/" in request.path and not killed.is_set():
            victim.lose()
            killed.set()

    victim.proxy.rule = kill
    wait_for(killed.is_set, "an upload", say=fleet.describe)


def walls(job: Job, rank: int = 0) -> list[float]:
    """How long each step took."""
    return [
        float(line.split()[1])
        for line in (job.folder / f"walls-{rank}.txt").read_text().splitlines()
    ]


def check_unaffected(calm: Job, job: Job) -> None:
    """It ends as the calm run, without a restart, an exception or a step that waited for a
    store."""
    assert job.wait_end() == 0, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert job.attempts() == 1, job.output()
    assert "Traceback" not in (job.folder / "output.txt").read_text(), job.output()
    assert max(walls(job)) < 20 * statistics.median(walls(calm)) + HELD_S_MAX


def check_restores(regions: Regions, calm: Job) -> None:
    """What is restored from these stores is the calm run's end."""
    state = {
        "payload": torch.zeros(NUMBERS, dtype=torch.int32),
        "progress": {"seen": 0, "mean": torch.zeros(6), "last": []},
    }
    with regions.reader() as reader:
        assert reader.restore(state).step == STEPS
    assert {name: digest(one) for name, one in state.items()} == {
        name: calm.finals()[name] for name in state
    }


@pytest.mark.slow
@pytest.mark.parametrize("empty", [True, False] if SOAK else [True])
def test_store_killed_in_the_middle_of_a_save_comes_back_and_is_whole_again_while_training_goes_on(
    fleet: Fleet, calm: Job, make: Make, empty: bool
) -> None:
    regions = make(*REGIONS, watched=GATEWAY)
    victim, other, _ = regions.stores
    assert isinstance(victim, S3)
    rest = regions.but(victim)
    job = begin(fleet, regions)
    for number in range(ROUNDS):
        job.wait_steps(2 * EVERY if number == 0 else job.completed + EVERY)
        ids = regions.counting()
        killed_in_a_save(victim, fleet)
        wait_durable(rest, job.completed + 2 * EVERY, fleet)
        if empty:
            # Not even its bucket is there at first, and that holds up nobody.
            victim.server.wipe()
            wait_durable(rest, job.completed + EVERY, fleet)
            victim.make_bucket()
        else:
            victim.come_back()
        back = job.completed
        wait_counting(regions, fleet)
        wait_whole(regions, back, fleet)
        now = regions.counting()
        assert (now[victim.url] != ids[victim.url]) is empty
        assert all(now[store.url] == ids[store.url] for store in rest.stores)
    hurry(job)
    check_unaffected(calm, job)
    fleet.wait_gone()
    other.lose()
    check_restores(regions, calm)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_one_damaged_copy_of_every_object_harms_no_run_and_is_mended(
    fleet: Fleet, calm: Job, make: Make, number: int
) -> None:
    chance = random.Random(f"{SEED}/{number}")
    regions = make(*REGIONS)
    job = begin(fleet, regions, steps=STEPS // 4, pause_s=0.0)
    assert job.wait_end() == 0, job.output()
    fleet.wait_gone()
    status, said = regions.ask_all("scrub")
    assert status == 0, said
    assert unequal(regions.stores) == []
    right = {
        key for key in regions.stores[0].objects() if key != JOB_KEY and not key.startswith(OWN)
    }
    for key in sorted(right):
        chance.choice(regions.stores).harm(key, chance)
    harmed = unequal(regions.stores)
    assert len(harmed) == len(right)
    job = begin(fleet, regions, pause_s=0.0)
    assert job.wait_end() == 0, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert job.losses[0].poll().redone == 0, job.output()
    fleet.wait_gone()
    left = unequal(regions.stores)
    with regions.reader() as reader:
        for info in reader.snapshots():
            assert reader.verify(step=info.step).ok
        mended = seldom(lambda: len(unequal(regions.stores)) < len(left))
        wait_for(mended, "some bad copy that was met to be mended", say=lambda: str(left))
    status, said = regions.ask_all("scrub")
    assert status == 0, said
    assert unequal(regions.stores) == []
    # A store that does not say which one it is counts for nothing: that alone is as much as one may
    # lose.
    ids = regions.counting()
    nameless = chance.choice(regions.stores)
    nameless.harm(JOB_KEY, chance)
    check_restores(regions, calm)
    status, said = regions.ask_all("scrub")
    assert status == 0, said
    assert regions.counting() == ids


@pytest.mark.slow
# A file of the machine gave out the log's places; in the long form also where stores that create a
# key once did.
@pytest.mark.parametrize(
    "kinds", [REGIONS, (MOTO, FOLDER, FOLDER)] if SOAK else [REGIONS], ids="-".join
)
def test_lost_machine_and_one_lost_store_cost_nothing_that_was_committed(
    fleet: Fleet, calm: Job, make: Make, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    regions = make(*kinds)
    lost = regions.stores[0]
    rest = regions.but(lost)
    job = begin(fleet, regions)
    job.wait_steps(3 * EVERY)
    wait_durable(regions, 3 * EVERY, fleet)
    fleet.kill_all()
    job.wait_end()
    for gone in (fleet.runtime, tmp_path / "state"):
        shutil.rmtree(gone, ignore_errors=True)
    lost.lose()
    newest, done = rest.newest_step(), job.completed
    assert newest >= 3 * EVERY
    hurry(job)
    if MOTO not in kinds:
        before = rest.stores[1].objects()
        again = begin(fleet, regions)
        assert again.wait_end() != 0
        assert "take over with `ckpt stores takeover`" in again.output()
        assert rest.stores[1].objects() == before
        status, said = rest.ask("stores", "takeover")
        assert status == 0, said
    again = begin(fleet, regions)
    assert again.wait_end() == 0, again.output()
    assert differences(calm, again, world_size=1) == [], again.output()
    twice = [step for step, losses in again.losses[0].poll().of_step.items() if len(losses) > 1]
    assert twice == list(range(newest, done))
    check_restores(rest, calm)
    fleet.wait_gone()


@pytest.mark.slow
def test_trainer_killed_while_a_store_is_down_costs_a_step(
    fleet: Fleet, calm_ranks: Job, make: Make
) -> None:
    regions = make(MOTO, GATEWAY, FOLDER)
    victim = regions.stores[0]
    assert isinstance(victim, S3)
    rest = regions.but(victim)
    chance = random.Random(SEED)
    job = begin(fleet, regions, how=ranks)
    job.wait_steps(2 * EVERY)
    for _ in range(ROUNDS):
        victim.lose()
        wait_durable(rest, job.completed + EVERY, fleet)
        rank = chance.randrange(2)
        entered, redone = job.attempts(rank), max(losses.poll().redone for losses in job.losses)
        assert fleet.send(job.trainer(rank), signal.SIGKILL)
        wait_for(lambda: job.attempts(rank) > entered, "another attempt", say=job.output)  # noqa: B023
        job.wait_steps(job.completed + EVERY)
        assert max(losses.poll().redone for losses in job.losses) <= redone + 1
        wait_durable(rest, job.completed, fleet)
        victim.come_back()  # it kept everything in its memory
        victim.make_bucket()
        wait_counting(regions, fleet)
    hurry(job)
    assert job.wait_end() == 0, job.output()
    assert differences(calm_ranks, job, world_size=2) == [], job.output()
    fleet.wait_gone()
    assert rest.newest_step() == STEPS


@pytest.mark.slow
def test_encrypted_job_goes_on_after_a_kill_and_shows_nothing_to_its_stores(
    fleet: Fleet, calm: Job, make: Make, tmp_path: Path
) -> None:
    keys = [f"file:{tmp_path / name}" for name in ("job.key", "other.key")]
    for key in keys:
        status, said = ask("key", "new", key.removeprefix("file:"), "--json")
        assert status == 0, said
    regions = make(*REGIONS, key=keys[0])
    job = begin(fleet, regions)
    job.wait_steps(2 * EVERY)
    wait_durable(regions, 2 * EVERY, fleet)
    fleet.kill_all()
    job.wait_end()
    shutil.rmtree(fleet.runtime)
    hurry(job)
    before = [store.objects() for store in regions.stores]
    for key, why in ((keys[1], "wrong encryption key"), (None, "give its key with encryption_key")):
        other = begin(fleet, Regions(regions.stores, key=key))
        assert other.wait_end() == 1
        assert why in other.output()
        assert "failures in a row" not in other.output(), "starting it again would not help"
        status, said = Regions(regions.stores, key=key).ask("ls")
        assert status == 2, said
        assert why in said["error"]["message"]
    fleet.wait_gone()
    assert [store.objects() for store in regions.stores] == before
    job = begin(fleet, regions)
    assert job.wait_end() == 0, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    fleet.wait_gone()
    check_restores(regions, calm)
    for store in regions.stores:
        assert not [key for key, data in store.objects().items() if MARK in data]
    plain_store = Folder(calm.folder.parent / "store")
    assert [key for key, data in plain_store.objects().items() if MARK in data], (
        "it is to be seen where it is plain"
    )


@pytest.mark.slow
def test_dead_stores_are_replaced_by_hand_while_the_job_trains(
    fleet: Fleet, calm: Job, make: Make
) -> None:
    regions = make(GATEWAY, FOLDER, FOLDER)
    bucket, folder, kept = regions.stores
    job = begin(fleet, regions)
    job.wait_steps(2 * EVERY)
    ids = regions.counting()
    # A folder that is suddenly empty may be a disk that isn't mounted: it counts no more, and is
    # left alone.
    folder.lose()
    wait_for(
        lambda: "no longer holds this log" in fleet.describe(),
        "an alarm",
        say=fleet.describe,
    )
    assert folder.url not in regions.counting()
    status, said = regions.ask("stores", "replace", "--id", ids[folder.url], new=folder)
    assert status == 0, said
    back = job.completed
    wait_whole(regions, back, fleet)
    # A bucket that is lost for good is replaced by another store; the job learns of that when it is
    # started anew.
    bucket.lose()
    rest, new = regions.but(bucket), make(FOLDER).stores[0]
    status, said = rest.ask("stores", "replace", "--id", ids[bucket.url], new=new)
    assert status == 0, said
    changed = Regions((new, folder, kept))
    assert changed.counting().keys() == set(changed.urls)
    wait_durable(rest, job.completed + EVERY, fleet)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait_end() == 128 + signal.SIGTERM, job.output()
    assert job.attempts() == 1, job.output()
    stopped = job.completed
    assert changed.newest_step() == stopped
    hurry(job)
    job = begin(fleet, changed)
    assert job.wait_end() == 0, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert job.losses[0].poll().redone == 0
    fleet.wait_gone()
    kept.lose()
    check_restores(changed, calm)
    kept.come_back()
    # What a snapshot left that met the loss of a store, and so was not committed, is on no other.
    status, said = changed.ask_all("gc", "--grace=0", "--yes")
    assert status == 0, said
    status, said = changed.ask_all("scrub")
    assert status == 0, said
    assert unequal(changed.stores) == []
