"""Nodes whose stores are not those of the log: nothing that they wrote there becomes durable."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ckpt.backends.base import Backend, Buffer
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UnavailableError
from ckpt.format.canonical import digest
from ckpt.format.keys import PACKS, PARTS, part_key, writer_name
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.records import Stores
from ckpt.ipc.mailbox import InProcessMailbox, InProcessRoom
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal, StoreProof
from ckpt.save.chunks import NO_COMPRESSION
from ckpt.save.persister import Persister, SaveTarget, SealedSlot
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

WAIT_S = 30.0
ROW = 64 << 10


def sealed(rank: int, step: int) -> SealedSlot:
    """The row of a rank at a step."""
    data = np.full(ROW, 16 * step + rank, dtype=np.uint8)
    leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="uint8", shape=(2, ROW))
    shard = StagedShard(
        leaf=leaf,
        box=Box((rank, 0), (1, ROW)),
        offset_bytes=0,
        size_bytes=ROW,
        digests=(digest(data.data),),
    )
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=rank, world_size=2, shards=(shard,))
    return SealedSlot(index=index, data=memoryview(data), release=lambda: None, shared={})


class TwoNodes:
    """Two nodes of one rank each. Each reaches the store, or stores, by a backend of its own."""

    def __init__(self, root: Backend, other: Backend) -> None:
        self.root, self.other = root, other
        self.journal = Journal.open(root, job="job", create=True)
        self.epoch = self.journal.open_epoch(resume=None)
        room = InProcessRoom()
        self.persisters = [
            Persister(
                InProcessMailbox(room, rank=rank, size=2),
                SaveTarget(
                    backend=backend,
                    writer=writer_name("node", f"{rank:016x}"),
                    epoch=lambda: self.epoch,
                    journal=self.journal if rank == 0 else None,
                ),
                compression=NO_COMPRESSION,
                verify=True,
                emit=lambda _: None,
            )
            for rank, backend in enumerate((root, other))
        ]

    def save(self, step: int) -> None:
        """Raises what the nodes' saves failed with; otherwise the snapshot can be read."""
        futures = [
            persister.submit(sealed(rank, step), tags=())
            for rank, persister in enumerate(self.persisters)
        ]
        for future in futures:
            assert future.result(WAIT_S).step == step
        index = load_index(self.root, self.journal.refresh(), SnapshotId(1, step))
        for location in index.locations().values():
            assert self.root.stat(location.pack) is not None, "it counts, and cannot be read"

    @property
    def steps(self) -> list[int]:
        """The steps that count."""
        return [entry.snapshot.step for entry in self.journal.refresh().snapshots]

    def close(self) -> None:
        for persister in self.persisters:
            persister.stop_waiting()
        for persister in self.persisters:
            persister.close()


@pytest.fixture
def start() -> Iterator[Callable[[Backend, Backend], TwoNodes]]:
    """Starts the nodes, and ends them with the test."""
    started: list[TwoNodes] = []

    def begin(root: Backend, other: Backend) -> TwoNodes:
        started.append(TwoNodes(root, other))
        return started[-1]

    yield begin
    for nodes in started:
        nodes.close()


class Mount:
    """A place at which one store or another is mounted. ``then`` is called at the next put of a
    key that begins with ``at``, before it."""

    def __init__(self, store: Backend) -> None:
        self.inner = store
        self.at = ""
        self.then: Callable[[], object] | None = None

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if self.then is not None and key.startswith(self.at):
            then, self.then = self.then, None
            then()
        self.inner.put(key, data, create_only=create_only)

    def exchange_at(
        self, at: str, store: Backend, then: Callable[[], object] | None = None
    ) -> None:
        """Mount another store at the next put of a key that begins with ``at``."""

        def exchange() -> None:
            self.inner = store
            if then is not None:
                then()

        self.at, self.then = at, exchange

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_folder_unmounted_between_snapshots_takes_none_that_counts(
    tmp_path: Path, start: Callable[[Backend, Backend], TwoNodes]
) -> None:
    disk, mount = tmp_path / "disk", tmp_path / "mount"
    mount.symlink_to(disk)
    nodes = start(FileBackend(disk), FileBackend(mount))
    nodes.save(1)
    mount.unlink()
    mount.mkdir()
    with pytest.raises(UnavailableError, match="store identity changed"):
        nodes.save(2)
    with pytest.raises(UnavailableError, match="in the place of the store"):
        nodes.other.put(f"{PACKS}x", [b"x"])  # as one would that began before
    assert not list(mount.rglob("*.pack")), "a bare folder is not written to"
    shutil.rmtree(mount)
    with pytest.raises(UnavailableError):
        nodes.save(3)
    assert not mount.exists(), "a folder that is gone is not made anew"
    mount.symlink_to(disk)
    nodes.save(4)
    assert nodes.steps == [1, 4]


@pytest.mark.parametrize("fails_meanwhile", [False, True])
def test_lone_store_that_is_mounted_anew_takes_the_next_snapshot(
    fails_meanwhile: bool, tmp_path: Path, start: Callable[[Backend, Backend], TwoNodes]
) -> None:
    disk, again, mount = tmp_path / "disk", tmp_path / "again", tmp_path / "mount"
    disk.mkdir()
    mount.symlink_to(disk)
    nodes = start(FileBackend(mount), FileBackend(mount))
    nodes.save(1)
    mount.unlink()
    if fails_meanwhile:
        with pytest.raises(UnavailableError):
            nodes.save(2)
        assert not mount.exists(), "a folder that is gone is not made anew"
    shutil.copytree(disk, again)  # the same store, whose folder is another one to the system
    mount.symlink_to(again)
    nodes.save(3)
    nodes.save(4)
    assert nodes.steps == [1, 3, 4]


@pytest.mark.parametrize("other", [None, "another"])
def test_place_exchanged_while_a_share_is_written_fails_the_snapshot(
    other: str | None, start: Callable[[Backend, Backend], TwoNodes]
) -> None:
    store, bare = MemoryBackend("job"), MemoryBackend("bare")
    if other is not None:
        Journal.open(bare, job=other, create=True)
    mount = Mount(store)
    nodes = start(store, mount)  # type: ignore[arg-type]
    nodes.save(1)
    mount.exchange_at(PACKS, bare)
    with pytest.raises(UnavailableError, match="store identity changed"):
        nodes.save(2)
    assert list(bare.list(PACKS)), "it was exchanged after the first look"
    mount.inner = store
    nodes.save(3)
    assert nodes.steps == [1, 3]


def replicated(stores: Sequence[Backend]) -> ReplicatedBackend:
    """Three stores of which two must have an object."""
    return ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=1)


def test_bare_store_of_a_node_without_the_log_does_not_count(
    start: Callable[[Backend, Backend], TwoNodes],
) -> None:
    stores = [MemoryBackend(str(number)) for number in range(3)]
    full = FaultyBackend(stores[1], [Fault(harm=Harm.FULL, key=PACKS, times=None)])
    root, other = replicated(stores), replicated([stores[0], full, MemoryBackend("bare")])
    nodes = start(root, other)
    with pytest.raises(UnavailableError, match="too few stores"):
        nodes.save(1)
    assert nodes.steps == []
    root.close()
    other.close()


def test_store_exchanged_under_a_snapshot_that_the_others_have_whole_costs_nothing(
    start: Callable[[Backend, Backend], TwoNodes],
) -> None:
    stores = [MemoryBackend(str(number)) for number in range(3)]
    mount = Mount(stores[2])
    root, other = replicated(stores), replicated([stores[0], stores[1], mount])  # type: ignore[list-item]
    nodes = start(root, other)
    nodes.save(1)
    bare = MemoryBackend("bare")
    mount.exchange_at(PACKS, bare)
    nodes.save(2)
    packs = {one.key for one in stores[0].list(PACKS)}
    assert packs == {one.key for one in stores[1].list(PACKS)}
    written = len(list(bare.list(PACKS)))
    nodes.save(3)
    assert len(list(bare.list(PACKS))) == written, "it is written to no more"
    assert nodes.steps == [1, 2, 3]
    root.close()
    other.close()


def test_store_exchanged_between_snapshots_takes_nothing_of_the_next(
    start: Callable[[Backend, Backend], TwoNodes],
) -> None:
    stores = [MemoryBackend(str(number)) for number in range(3)]
    mount = Mount(stores[2])
    root, other = replicated(stores), replicated([stores[0], stores[1], mount])  # type: ignore[list-item]
    nodes = start(root, other)
    nodes.save(1)
    mount.inner = bare = MemoryBackend("bare")
    nodes.save(2)
    assert not list(bare.list(PACKS))
    assert nodes.steps == [1, 2]
    root.close()
    other.close()


def test_store_exchanged_fails_the_snapshot_though_the_log_is_read_before_its_stores_are_proven(
    start: Callable[[Backend, Backend], TwoNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.log.replicated.PROVE_S", 0.1)
    stores = [MemoryBackend(str(number)) for number in range(3)]
    full = FaultyBackend(stores[1], [Fault(harm=Harm.FULL, key=PACKS, times=None)])
    mount = Mount(stores[2])
    root = replicated([stores[0], full, mount])  # type: ignore[list-item]
    other = replicated([stores[0], full, stores[2]])
    nodes = start(root, other)
    nodes.save(1)
    # Its packs are on the first store and on this one, which is gone when its part is written.
    mount.exchange_at(PARTS, MemoryBackend("bare"), nodes.journal.refresh)
    with pytest.raises(UnavailableError, match="another one now, or none"):
        nodes.save(2)
    assert nodes.steps == [1]
    root.close()
    other.close()


def test_commit_of_what_is_on_a_store_that_left_the_log_is_refused() -> None:
    stores = [MemoryBackend(str(number)) for number in range(3)]
    backend = replicated(stores)
    journal = Journal.open(backend, job="job", create=True)
    epoch = journal.open_epoch(resume=None)
    before = journal.refresh().stores
    assert before is not None
    proof = StoreProof(backend)
    proof.begin(1)
    proven = proof.finish(1)
    assert set(proven) == set(before.ids)
    ids = (*before.ids[:2], "f" * 32)
    journal.change_stores(Stores(ids, 2, before.sequencer), before=before)
    key = part_key(SnapshotId(epoch, 1), writer_name("node", "0" * 16))
    part = PartRef(key=key, digest="0" * 32, size_bytes=9, rank=0, ranks=1)
    manifest = Manifest(
        job="job",
        snapshot=SnapshotId(epoch, 1),
        world_size=1,
        parts=(part,),
        size_bytes=0,
        new_bytes=0,
        created_unix_s=0.0,
        base=None,
        metadata={},
    )
    for stores_of_a_node in (proven, (), before.ids[:1]):
        with pytest.raises(UnavailableError, match="do not hold this log, or to too few"):
            journal.commit(manifest, epoch=epoch, proven=[ids, stores_of_a_node])
    assert journal.commit(manifest, epoch=epoch, proven=[ids, before.ids[:2]]).step == 1
    backend.close()
