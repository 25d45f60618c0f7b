"""Three peers as one store: losing one of them loses nothing and stops nothing."""

from __future__ import annotations

import random

from kit.peers.servers import PeerServers, until

from ckpt.backends.checked import read_checked
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.store import PeerClientLimits

BYTES = 700_000


def test_objects_survive_a_peer_that_dies_between_and_during_puts(world: PeerServers) -> None:
    servers = [world.serve() for _ in range(3)]
    limits = PeerClientLimits(connect_s=1.0, timeouts=PeerTimeouts(grace_s=1.0))
    events: list[object] = []
    store = ReplicatedBackend(
        [world.store(one, limits=limits) for one in servers], write_quorum=2, emit=events.append
    )
    rng = random.Random(3)
    bodies = {f"packs/{number}": rng.randbytes(BYTES) for number in range(8)}
    for number, (key, body) in enumerate(bodies.items()):
        if number == 4:
            servers[1].stop()
        memory = bytearray(body)
        store.put(key, [memory])
        memory[:] = bytes(BYTES)  # as slots are: the put is over, and its memory is used anew
    for key, body in bodies.items():
        out = memoryview(bytearray(BYTES))
        read_checked(
            store, key, out, lambda found, body=body: None if found == body else "other bytes"
        )  # type: ignore[misc]
        assert out == body
    assert [one.key for one in store.list("packs/")] == sorted(bodies)
    for server in (servers[0], servers[2]):
        until(lambda server=server: len(server.memory.list()) == len(bodies))  # type: ignore[misc]
    store.close()


def test_a_bad_copy_in_one_peer_is_mended_from_another(world: PeerServers) -> None:
    servers = [world.serve() for _ in range(3)]
    store = ReplicatedBackend(
        [world.store(one) for one in servers], write_quorum=2, emit=lambda event: None
    )
    body = bytes(range(256)) * 1000
    store.put("packs/a", [body])
    until(lambda: all(server.memory.stat("packs/a") for server in servers))
    with servers[0].memory.incoming("packs/a", len(body)) as incoming:
        incoming.view[:] = bytes(len(body))
        incoming.publish()
    for _ in range(3):
        out = memoryview(bytearray(len(body)))
        read_checked(store, "packs/a", out, lambda found: None if found == body else "other bytes")
        assert out == body
    store.close()
