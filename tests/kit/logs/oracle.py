"""What must hold of a simulated log at any moment, whoever looks at it."""

from __future__ import annotations

from ckpt.errors import NotFoundError, UnavailableError, UsageError
from ckpt.log.catalog import load_manifest
from ckpt.log.high_water import FILES
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from kit.logs.people import Scene
from kit.logs.simulation import Process, Still
from kit.logs.stores import SmallReplicated


def look(scene: Scene, heard: set[int]) -> LogState | None:
    """The log as one sees it who hears only these sites, nothing else happening; None where that is
    an error."""
    world = scene.world
    plan = scene.known_plan()
    heard -= {site.number for site in world.sites if site.lost}
    everywhere = tuple(range(len(world.sites)))
    stores = [Still(world.sites[n], heard=n in heard) for n in everywhere]
    process = Process(world, "/dev/null")  # one who has seen nothing before
    process.patient = True
    try:
        with process.running():
            backend = SmallReplicated(stores, plan.write_quorum)
            journal = Journal.open(backend)
            state = journal.refresh()
            scene.seen(state, len(world.ledger.told), flagged=bool(state.stale_reason))
            if len(heard) == sum(not site.lost for site in world.sites):
                for entry in state.snapshots:
                    assert load_manifest(backend, state, entry.snapshot).snapshot == entry.snapshot
                    assert entry.manifest_digest not in scene.refused, (
                        "what was refused does not count"
                    )
            return state
    except (UnavailableError, NotFoundError, UsageError):
        return None
    finally:
        process.end()
        FILES.forget()  # that no mark can be kept in /dev/null is not for the next test to report


def check(scene: Scene) -> None:
    """What must hold at any moment."""
    world, ledger = scene.world, scene.world.ledger
    assert len(scene.opened) == len(set(scene.opened)), "no epoch is given to two writers"
    told = ledger.state
    members = told.stores
    for pair, digest in scene.committed.items():
        entry = told.find(pair)
        assert pair in scene.dropped or (entry is not None and entry.manifest_digest == digest), (
            "what was told durable is"
        )
    if members is None:
        return
    everyone = {site.number for site in world.sites if not site.lost}
    state = look(scene, everyone)
    if state is None and scene.strays():
        return
    assert state is not None, "with all stores that are left, there is a log"
    assert len(ledger.chain(state.head_digest)) >= len(ledger.told), (
        "what was told is seen by who hears all"
    )
    assert set(state.voids) == {void for void in state.voids if void.code == "repeat"}, (
        "writers see voids beforehand"
    )
    sound = [
        site.number
        for site in world.sites
        if site.body.store_id in members.ids and site.number not in world.hurt
    ]
    outside = [n for n in everyone if world.sites[n].body.store_id not in members.ids]
    world.dice.shuffle(sound)
    # What was written when W was lower is on fewer stores: until a scrub, more of them have to be
    # heard.
    enough = len(members.ids) - world.quorum_min + 1
    if len(sound) >= enough:
        state = look(
            scene,
            {*sound[:enough], *world.dice.sample(outside, world.dice.randint(0, len(outside)))},
        )
        if state is None and scene.strays():
            return
        assert state is not None, "who hears enough finds the log"
        assert len(ledger.chain(state.head_digest)) >= len(ledger.told), (
            "what was told is seen by who hears enough"
        )
        assert not state.short or state.stores != members, "who hears enough knows it"
    few = set(sound[: members.answers_min - 1]) | set(outside)
    state = look(scene, few)
    if state is not None and ledger.latest.stores == members:
        assert state.stale_reason, "who hears fewer knows that something newer may exist"
