"""Two hundred snapshots with few changes each: what is stored stays near what is needed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from kit.collected_store import OBJECTS

from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.format import keys
from ckpt.format.manifest import Manifest
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.maintenance.gc.drop import drop
from ckpt.maintenance.gc.sweep import sweep
from ckpt.maintenance.retention import KeepPolicy, keep_every, keep_last
from ckpt.restore.verify import verify
from ckpt.save.chunks import NO_COMPRESSION, plan_repacking
from ckpt.save.packs import persist, put_part
from ckpt.testing.sample import stage, tensor
from ckpt.values import ChunkLocation, Digest, SnapshotId

LEAVES = 100
LEAF_BYTES = 32 << 10
STATE_BYTES = LEAVES * LEAF_BYTES
WRITER = keys.writer_name("node", "0" * 16)
CHANGES = 6
STEPS = 200


class Training:
    """A state of which a few leaves change between snapshots; the first half of them never does."""

    def __init__(
        self, store: MemoryBackend | FileBackend, *, budget_bytes: int, seed: int = 3
    ) -> None:
        self.store = store
        self.budget_bytes = budget_bytes
        self.dice = random.Random(seed)
        self.values = list(range(LEAVES))
        self.journal = Journal.open(store, job="job", create=True)
        self.epoch = self.journal.open_epoch(resume=None)
        self.known: dict[Digest, ChunkLocation] = {}
        self.base: SnapshotId | None = None
        self.packs = 0
        self.moved_bytes = 0
        self.new_bytes = 0

    def save(self, step: int) -> None:
        for place in self.dice.sample(range(LEAVES // 2, LEAVES), CHANGES):
            self.values[place] = step * LEAVES + place
        pieces = [
            tensor(f"leaf{n:03d}", np.full(LEAF_BYTES // 8, value, np.int64))
            for n, value in enumerate(self.values)
        ]
        staged, data = stage(SnapshotId(self.epoch, step), pieces, rank=0, world_size=1)
        wanted = {one for shard in staged.shards for one in shard.digests}
        packs = {place.pack for place in self.known.values()}
        sizes = {
            pack: stat.size_bytes for pack in packs if (stat := self.store.stat(pack)) is not None
        }
        thinned = plan_repacking(self.known, wanted, sizes, budget_bytes=self.budget_bytes)
        done = persist(
            staged,
            data,
            stored_chunks=thinned.stored_chunks,
            backend=self.store,
            writer=WRITER,
            pack_start=self.packs,
            compression=NO_COMPRESSION,
        )
        ref = put_part([done.part], backend=self.store, writer=WRITER)
        self.packs += done.packs
        self.moved_bytes += thinned.rewritten_bytes
        self.new_bytes += done.new_bytes
        manifest = Manifest(
            job="job",
            snapshot=staged.snapshot,
            world_size=1,
            parts=(ref,),
            size_bytes=STATE_BYTES,
            new_bytes=done.new_bytes,
            created_unix_s=0.0,
            base=self.base,
        )
        self.journal.commit(manifest, epoch=self.epoch)
        self.known, self.base = done.locations, staged.snapshot

    def tidy(self, policy: KeepPolicy) -> None:
        _, state = drop(self.store, self.journal, policy, now_unix_s=0.0)
        assert sweep(self.store, state, grace_s=0.0).ok

    def stored_bytes(self) -> int:
        return sum(stat.size_bytes for stat in self.store.list(keys.PACKS))

    def needed_bytes(self) -> int:
        """The bytes of the distinct chunks that snapshots that exist refer to."""
        places: set[ChunkLocation] = set()
        state = self.journal.refresh()
        for entry in state.snapshots:
            places |= set(load_index(self.store, state, entry.snapshot).locations().values())
        return sum(place.stored_bytes for place in places)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_stored_bytes_stay_near_the_needed_ones_and_exactly_the_referenced_packs_are_left(
    kind: str, tmp_path
) -> None:
    store = MemoryBackend() if kind == "memory" else FileBackend(tmp_path / "store")
    training = Training(store, budget_bytes=STATE_BYTES // 5)
    for step in range(1, STEPS + 1):
        training.save(step)
        if step % 10 == 0:
            training.tidy(keep_last(1))
            assert training.stored_bytes() <= 2 * STATE_BYTES, (
                f"step={step}: half of each pack is needed"
            )
    training.tidy(keep_last(2) | keep_every(50))
    state = training.journal.refresh()
    referenced: set[str] = set()
    for entry in state.snapshots:
        index = load_index(store, state, entry.snapshot)
        assert verify(index, store).ok
        referenced |= index.packs() | {ref.key for ref in index.manifest.parts}
        referenced.add(keys.manifest_key(entry.snapshot, entry.manifest_digest))
    assert {stat.key for prefix in OBJECTS for stat in store.list(prefix)} == referenced
    assert training.stored_bytes() <= 2 * training.needed_bytes()
    # The price: moving costs less than the changes themselves.
    assert 0 < training.moved_bytes < training.new_bytes - training.moved_bytes


@pytest.mark.slow
def test_without_moving_anything_nearly_empty_packs_pile_up() -> None:
    """What the test above would see if nothing were moved: the reason for it."""
    training = Training(MemoryBackend(), budget_bytes=0)
    most = 0.0
    for step in range(1, STEPS + 1):
        training.save(step)
        if step % 10 == 0:
            training.tidy(keep_last(1))
            most = max(most, training.stored_bytes() / STATE_BYTES)
    assert training.moved_bytes == 0
    assert most > 1.5
