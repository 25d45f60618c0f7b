"""Stores misbehave at random for a while and are then well: no wrong byte, no early
acknowledgement, all mended in the end."""

from __future__ import annotations

import os
import random

import pytest
from kit.replicated.simulation import BODY_BYTES, MOODS, ReplicationSimulation

SOAK = os.environ.get("CKPT_SOAK") == "1"
SEEDS = 200 if not SOAK else 20_000
BATCH = 100
BATCHES = [
    0,
    *(pytest.param(first, marks=pytest.mark.slow) for first in range(BATCH, SEEDS, BATCH)),
]

TROUBLE_S = 400.0
HEALING_S = 3000.0
KEYS = 30


def trouble(world: ReplicationSimulation) -> None:
    """Plan what happens: puts and reads all the time, moods that change, and (unless clean) copies
    that rot or vanish."""
    dice = world.dice
    for number in range(KEYS):
        key = f"k/{number}"
        world.right[key] = bytes(dice.randrange(256) for _ in range(BODY_BYTES))
        world.at(dice.uniform(0, TROUBLE_S), lambda key=key: world.start(world.put(key)))
    for _ in range(KEYS * 3):
        low = dice.randrange(BODY_BYTES)
        high = dice.randrange(low + 1, BODY_BYTES + 1)
        world.at(
            dice.uniform(0, TROUBLE_S * 1.2), lambda low=low, high=high: read_any(world, low, high)
        )
    moods = [mood for mood in MOODS if mood != "lies" or not world.clean]
    for _ in range(dice.randrange(2, 14)):
        store, mood = dice.choice(world.stores), dice.choice(moods)
        world.at(dice.uniform(0, TROUBLE_S), lambda store=store, mood=mood: world.feel(store, mood))
    if not world.clean:
        for _ in range(dice.randrange(8)):
            world.at(dice.uniform(0, TROUBLE_S), lambda: harm(world))
    for store in world.stores:
        world.at(TROUBLE_S, lambda store=store: world.feel(store, "well"))
    world.care()


def read_any(world: ReplicationSimulation, low: int, high: int) -> None:
    if world.acked:
        world.start(world.read(world.dice.choice(sorted(world.acked)), low, high))


def harm(world: ReplicationSimulation) -> None:
    """One copy rots, is cut short, or vanishes."""
    store = world.dice.choice(world.stores)
    if not store.objects:
        return
    key = world.dice.choice(sorted(store.objects))
    world.harmed.add(key)
    body = bytearray(store.objects[key])
    match world.dice.randrange(3):
        case 0 if body:
            body[world.dice.randrange(len(body))] ^= 1
            store.objects[key] = bytes(body)
        case 1:
            store.objects[key] = bytes(body[: world.dice.randrange(len(body) + 1)])
        case _:
            del store.objects[key]


def play(seed: int, *, clean: bool) -> ReplicationSimulation:
    world = ReplicationSimulation(seed, clean=clean)
    trouble(world)
    world.run(TROUBLE_S * 1.3)
    while not world.healed() and world.now_s < TROUBLE_S + HEALING_S:
        world.run(world.now_s + 30.0)
    left = [dict(needs) for needs in world.ledger.needs]
    assert not any(left), f"seed={seed} clean={clean} never mended: {left}"
    assert world.healed(), f"seed={seed} clean={clean} a well store is still left alone"
    for store in world.stores:
        for key, versions in store.ever.items():
            # What is written under a key is what was meant, or a copy of a copy that had rotted.
            assert versions == {world.right[key]} or key in world.harmed or not clean, (
                seed,
                store.place,
                key,
            )
        assert clean is False or world.ledger.scrub[store.place] is False, (seed, store.place)
        for key, body in world.acked.items():
            if clean:
                assert store.objects.get(key) == body, (seed, store.place, key)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("first", BATCHES)
def test_clean_trouble_ends_with_every_acknowledged_object_in_every_store(first: int) -> None:
    worlds = [play(seed, clean=True) for seed in range(first, first + BATCH)]
    assert sum(world.mended for world in worlds) > BATCH
    assert sum(world.delivered for world in worlds) > BATCH * KEYS
    assert sum(world.failed_puts for world in worlds) > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", BATCHES)
def test_rot_and_lies_never_deliver_a_wrong_byte(first: int) -> None:
    worlds = [play(seed, clean=False) for seed in range(first, first + BATCH)]
    assert sum(len(world.harmed) for world in worlds) > 0
    assert sum(world.delivered for world in worlds) > BATCH * KEYS


def test_same_seed_gives_the_same_run() -> None:
    one, other = (
        play(random.Random(5).randrange(1000), clean=False),
        play(random.Random(5).randrange(1000), clean=False),
    )
    assert [store.objects for store in one.stores] == [store.objects for store in other.stores]
    assert (one.mended, one.delivered) == (other.mended, other.delivered)
