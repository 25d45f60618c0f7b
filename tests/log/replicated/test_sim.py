"""Several writers and readers on several stores, with everything going wrong that may. One seed is
one run.

Stores that create a key only once give out the places together (vote); where too few do, a file of
one machine (file) or etcd does.
"""

from __future__ import annotations

import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kit.logs.oracle import check
from kit.logs.people import Operator, Plan, Reader, Scene, Writer
from kit.logs.service import ANY_ETCD, Service, ServiceWay
from kit.logs.simulation import InlineLanes, LogSimulation, Site, Weather

from ckpt.format.records import BY_STORES
from ckpt.log import replicas as copies_room
from ckpt.log import sequencers as etcd_room
from ckpt.log import sequencers as giver_room
from ckpt.log import stored_fold as folds

SOAK = os.environ.get("CKPT_SOAK") == "1"
SEEDS = 10_000 if SOAK else 60
SHARDS = 40 if SOAK else 4
ACTIONS = 30
TRIES_MAX = 60
"""In so many tries a fresh writer must open an epoch and commit, once nothing goes wrong any more;
each tries what it draws."""

_WORLDS: list[LogSimulation] = []


def _lanes() -> InlineLanes:
    process = _WORLDS[-1].acting
    assert process is not None
    return InlineLanes(process)


def _one_by_one(items: Sequence[object], read: Callable[[object], object]) -> list[object]:
    return [read(item) for item in items]


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads: the dice alone choose the order of all calls."""
    monkeypatch.setattr(copies_room, "ThreadWorkers", _lanes)
    monkeypatch.setattr(copies_room, "read_all", _one_by_one)
    monkeypatch.setattr(
        secrets, "token_hex", lambda size: f"{_WORLDS[-1].dice.getrandbits(8 * size):0{2 * size}x}"
    )
    monkeypatch.setattr(folds, "FOLD_EVERY", 6)
    for room in (etcd_room, giver_room):
        monkeypatch.setattr(
            room,
            "etcd_of_environment",
            lambda: ANY_ETCD if _WORLDS[-1].service is not None else None,
        )
    monkeypatch.setattr(etcd_room, "open_keyspace", lambda where, job: ServiceWay(_WORLDS[-1]))


def scene_of(seed: int, folder: Path) -> Scene:
    """A world by its seed: how many stores, which W, who gives out places, how rough."""
    dice = random.Random(seed)
    stores = dice.choice([1, 2, 3, 3, 3, 4, 5])
    quorum = dice.randint(stores // 2 + 1, stores)
    kind = dice.choice(["vote", "vote", "vote", "file", "etcd"])
    able = stores if kind == "vote" else dice.randrange(stores)
    rough = dice.random() < 0.5
    races = dice.random() < 0.4
    weather = Weather(
        nested_in_votes=0.35 if races else 0.08,
        change=dice.choice([0.0, 0.01, 0.03]),
        disaster=dice.choice([0.0, 0.01, 0.03]),
        death=0.02 if rough else 0.005,
        lost_request=0.04 if rough else 0.01,
    )
    order = [True] * able + [False] * (stores - able)
    dice.shuffle(order)
    spare = dice.random() < 0.8
    sites = [Site(number, creates) for number, creates in enumerate([*order, spare])]
    world = LogSimulation(seed, sites, weather)
    _WORLDS[:] = [world]
    world.quorum_min = quorum
    scene = Scene(world, Plan(tuple(range(stores)), quorum))
    if kind == "etcd":
        world.service = Service()
    if kind != "vote":
        _begin_alone(scene, folder)
    machines = ["one"] * 3 if kind == "file" else ["one", "one", "two"]
    world.actors = [
        Writer(scene, f"node{n}", str(folder / machine)) for n, machine in enumerate(machines)
    ]
    if kind == "file":
        world.actors.append(Writer(scene, "elsewhere", str(folder / "two"), may_write=False))
    world.actors += [
        Reader(scene, "reader", str(folder / "two")),
        Operator(scene, "operator", str(folder / "one")),
    ]
    return scene


def _begin_alone(scene: Scene, folder: Path) -> None:
    """Where stores overwrite what is there, nothing keeps two from making a log at once: one makes
    it before others come."""
    weather, scene.world.weather = (
        scene.world.weather,
        Weather(**dict.fromkeys(Weather.__dataclass_fields__, 0.0)),
    )
    maker = Writer(scene, "maker", str(folder / "one"))
    maker.act()
    assert scene.world.ledger.told
    scene.world.weather = weather


def run(seed: int, folder: Path, actions: int = ACTIONS) -> Scene:
    """One run, checked after each action, and at its end for being alive."""
    scene = scene_of(seed, folder)
    for _ in range(actions):
        scene.world.dice.choice(scene.world.actors).act()
        check(scene)
    finish(scene, folder)
    return scene


def finish(scene: Scene, folder: Path) -> None:
    """All stores up and nothing going wrong: a fresh writer gets on."""
    world = scene.world
    world.calm()
    check(scene)
    world.mend()
    check(scene)
    commits = world.counts.get("commits", 0)
    last = Writer(scene, "last", str(folder / "one"))
    mender = Operator(scene, "mender", str(folder / "one"))
    for _ in range(TRIES_MAX):
        # A change of the set that was begun may have to be finished, in the new set too.
        last.everywhere = bool(world.ledger.told) and len(world.ledger.sets()) > 1
        last.act()
        if world.counts.get("commits", 0) > commits:
            break
        if _why_stuck(scene).startswith("too few left"):
            mender.act()  # who says that the lost stores are
        last.journal = None
    else:
        why = _why_stuck(scene)
        assert why, "a fresh writer gets on where nothing goes wrong"
        assert why != "too few left" or _is_beyond_help(scene), "a person can remove what is lost"
        world.note(f"stuck: {why}")
    check(scene)


def _why_stuck(scene: Scene) -> str:
    """Why no writer can get on, and no person can help; empty where one of them can."""
    world = scene.world
    members = world.ledger.latest.stores
    if members is None:
        return "lost while it was made" if world.hurt else ""
    here = {site.body.store_id: site for site in world.sites if not site.lost}
    for one in (members, world.ledger.state.stores):
        if one is None:
            continue
        left = [here[store_id] for store_id in one.ids if store_id in here]
        able = [site for site in left if site.creates or one.sequencer != BY_STORES]
        if len(able) < one.write_quorum:
            return "too few left"
    return "another log there" if scene.strays() else ""


def _is_beyond_help(scene: Scene) -> bool:
    """Whether nothing was told yet, too few are left to know what was, or one that cannot hold a
    log alone."""
    members = scene.world.ledger.latest.stores
    assert members is not None
    if not scene.world.ledger.told:
        return True
    here = {site.body.store_id for site in scene.world.sites if not site.lost}
    left = len(here.intersection(members.ids))
    return left < members.answers_min or (left == 1 and members.sequencer != BY_STORES)


@pytest.mark.slow
def test_one_history_in_a_few_runs(tmp_path: Path) -> None:
    for seed in range(10):
        print(f"seed {seed}")
        run(seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_one_history_whatever_is_lost_delayed_doubled_or_dies(shard: int, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(shard, SEEDS, SHARDS):
        print(f"seed {seed}")
        scene = run(seed, tmp_path / str(seed))
        counts.update(scene.world.counts)
    print(dict(counts))
    assert counts["commits"] >= SEEDS // SHARDS, "the runs get somewhere"
