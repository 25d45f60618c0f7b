"""One rank's queue: order, names, bases, and slots that are let go."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError
from ckpt.events import Event
from ckpt.format.canonical import digest
from ckpt.format.keys import writer_name
from ckpt.ipc.mailbox import InProcessMailbox, InProcessRoom
from ckpt.log.catalog import load_index, load_manifest
from ckpt.log.journal import Journal
from ckpt.restore.verify import verify
from ckpt.save.chunks import NO_COMPRESSION
from ckpt.save.persister import SUSPECT_KEY, Persister, SaveTarget, SealedSlot
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

WAIT_S = 60.0
SIZE_BYTES = 64 << 10


def _sealed(
    step: int,
    *,
    value: int | None = None,
    spoil: bool = False,
    release: Callable[[], None] = lambda: None,
) -> SealedSlot:
    data = np.full(SIZE_BYTES, step if value is None else value, dtype=np.uint8)
    leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="uint8", shape=(SIZE_BYTES,))
    shard = StagedShard(
        leaf=leaf,
        box=Box.whole(leaf.shape),
        offset_bytes=0,
        size_bytes=SIZE_BYTES,
        digests=(digest(data.data),),
    )
    if spoil:
        data[7] += 1
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=(shard,))
    return SealedSlot(index=index, data=memoryview(data), release=release, shared={})


class PersisterBench:
    """A rank over a store in memory."""

    def __init__(self) -> None:
        self.store = MemoryBackend("job")
        self.journal = Journal.open(self.store, job="job", create=True)
        self.epoch = self.journal.open_epoch(resume=None)
        place = SaveTarget(
            backend=self.store,
            writer=writer_name("node", "0" * 16),
            epoch=lambda: self.epoch,
            journal=self.journal,
        )
        channel = InProcessMailbox(InProcessRoom(), rank=0, size=1)
        self.persister = Persister(
            channel, place, compression=NO_COMPRESSION, verify=True, emit=lambda _: None
        )

    def base_of(self, step: int) -> SnapshotId | None:
        """What the commit of that step refers to."""
        return load_manifest(self.store, self.journal.refresh(), SnapshotId(1, step)).base


@pytest.fixture
def world() -> PersisterBench:
    """One rank."""
    return PersisterBench()


def test_epoch_is_asked_when_the_record_is_written(world: PersisterBench) -> None:
    persister = world.persister
    assert persister.submit(_sealed(1), tags=()).result(WAIT_S).step == 1
    persister.call(
        lambda: setattr(world, "epoch", world.journal.open_epoch(resume=SnapshotId(1, 1)))
    )
    assert persister.submit(_sealed(2), tags=("old",)).result(WAIT_S).tags == ("old",)
    persister.close()
    state = world.journal.refresh()
    assert [entry.writer_epoch for entry in state.snapshots] == [1, 2]
    assert state.snapshots[1].snapshot == SnapshotId(1, 2), "captured in an older epoch"


def test_calls_are_done_in_the_order_they_came(world: PersisterBench) -> None:
    done: list[int] = []
    futures = [world.persister.call(lambda n=n: done.append(n)) for n in range(3)]  # type: ignore[misc]
    saved = world.persister.submit(_sealed(1), tags=())
    after = world.persister.call(saved.done)
    assert after.result(WAIT_S) is True
    assert [future.done() for future in futures] == [True] * 3
    assert done == [0, 1, 2]
    assert world.persister.last_info == saved.result()
    world.persister.close()


def test_base_may_be_named_while_none_is_known(world: PersisterBench) -> None:
    first = world.persister.submit(_sealed(1), tags=()).result(WAIT_S)
    world.persister.close()
    place = SaveTarget(
        backend=world.store,
        writer=writer_name("node", "1" * 16),
        epoch=lambda: 1,
        journal=world.journal,
    )
    persister = Persister(
        InProcessMailbox(InProcessRoom(), rank=0, size=1),
        place,
        compression=NO_COMPRESSION,
        verify=True,
        emit=lambda _: None,
    )
    known = load_index(world.store, world.journal.refresh(), first.id).locations()
    persister.submit(_sealed(2, spoil=True), tags=())
    persister.refer_next(first.id, known)
    assert persister.submit(_sealed(3, value=1), tags=()).result(WAIT_S).new_bytes == 0
    assert world.base_of(3) == first.id
    persister.refer_next(first.id, known)
    persister.submit(_sealed(4), tags=()).result(WAIT_S)
    assert world.base_of(4) == SnapshotId(1, 3), "a committed one is known already"
    persister.close()


def test_snapshot_whose_base_was_dropped_meanwhile_is_written_whole_from_its_slot(
    world: PersisterBench,
) -> None:
    first = world.persister.submit(_sealed(1), tags=()).result(WAIT_S)
    known = load_index(world.store, world.journal.refresh(), first.id).locations()
    world.persister.submit(_sealed(2), tags=()).result(WAIT_S)
    world.persister.close()
    told: list[Event] = []
    place = SaveTarget(
        backend=world.store,
        writer=writer_name("node", "1" * 16),
        epoch=lambda: 1,
        journal=world.journal,
    )
    channel = InProcessMailbox(InProcessRoom(), rank=0, size=1)
    persister = Persister(
        channel,
        place,
        compression=NO_COMPRESSION,
        verify=True,
        emit=told.append,
        base=first.id,
        stored_chunks=known,
    )
    world.journal.drop([first.id])
    freed: list[int] = []
    sealed = _sealed(3, value=1, release=lambda: freed.append(3))
    assert persister.submit(sealed, tags=("kept",)).result(WAIT_S).tags == ("kept",)
    assert (world.base_of(3), freed) == (None, [3])
    index = load_index(world.store, world.journal.refresh(), SnapshotId(1, 3))
    packs = {location.pack for location in index.locations().values()}
    assert packs.isdisjoint(location.pack for location in known.values())
    assert verify(index, world.store).ok
    assert [event.kind for event in told] == ["base-gone", "durable"]
    assert persister.submit(_sealed(4, value=1), tags=()).result(WAIT_S).new_bytes == 0
    assert world.base_of(4) == SnapshotId(1, 3)
    persister.close()


def test_slot_of_a_share_with_a_base_is_held_until_the_outcome_is_known(
    world: PersisterBench,
) -> None:
    world.persister.submit(_sealed(1), tags=()).result(WAIT_S)
    committed_at_release: list[bool] = []

    def release() -> None:
        found = world.journal.refresh().find(SnapshotId(1, 2))
        committed_at_release.append(found is not None)

    world.persister.submit(_sealed(2, release=release), tags=()).result(WAIT_S)
    assert committed_at_release == [True]
    world.persister.close()


def test_snapshot_handed_in_again_is_written_under_another_name(world: PersisterBench) -> None:
    persister = world.persister
    failed = persister.submit(_sealed(1, spoil=True), tags=())
    with pytest.raises(IntegrityError):
        failed.result(WAIT_S)
    persister.write_as(writer_name("node", "2" * 16))
    persister.submit(_sealed(1), tags=()).result(WAIT_S)
    persister.close()
    manifest = load_manifest(world.store, world.journal.refresh(), SnapshotId(1, 1))
    assert all("2" * 16 in part.key for part in manifest.parts)
    assert all("2" * 16 in stat.key for stat in world.store.list("packs/"))


def test_error_that_is_kept_does_not_keep_the_slot(world: PersisterBench) -> None:
    let_go = threading.Event()
    sealed = _sealed(1, spoil=True, release=let_go.set)
    memory = weakref.ref(sealed.data.obj)
    failed = world.persister.submit(sealed, tags=())
    del sealed
    error = failed.exception(WAIT_S)
    assert error is not None
    world.persister.close()
    gc.collect()
    assert let_go.is_set()
    assert memory() is None, "the slot's memory is free although the error lives"


def test_abandoned_queue_says_whether_its_thread_ended(world: PersisterBench) -> None:
    go_on, began = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        assert go_on.wait(WAIT_S)

    hung = world.persister.call(hang)
    behind = world.persister.submit(_sealed(1), tags=())
    assert began.wait(WAIT_S)
    assert not world.persister.abandon(0.0)
    assert behind.cancelled()
    go_on.set()
    hung.result(WAIT_S)
    assert world.persister.abandon()


@pytest.mark.parametrize(("digests", "marked"), [(("a", "a"), False), (("a", "b"), True)])
def test_snapshot_of_replicas_that_differ_is_committed_marked_and_told(
    world: PersisterBench, digests: tuple[str, str], marked: bool
) -> None:
    room, told = InProcessRoom(), []
    futures = []
    persisters = []
    for rank, found in enumerate(digests):
        place = SaveTarget(
            backend=world.store,
            writer=writer_name("node", f"{rank}" * 16),
            epoch=lambda: world.epoch,
            journal=world.journal if rank == 0 else None,
        )
        persister = Persister(
            InProcessMailbox(room, rank=rank, size=2),
            place,
            compression=NO_COMPRESSION,
            verify=True,
            emit=told.append,
        )
        sealed = _sealed(1)
        index = structs_of_rank(sealed.index, rank)
        samples = {"all": ("m/w", found)}
        futures.append(persister.submit(replace(sealed, index=index, samples=samples), tags=()))
        persisters.append(persister)
    for future in futures:
        assert future.result(WAIT_S).step == 1
    for persister in persisters:
        persister.close()
    manifest = load_manifest(world.store, world.journal.refresh(), SnapshotId(1, 1))
    alarms = [event.text for event in told if event.kind == "replicas-diverged"]
    assert (SUSPECT_KEY in manifest.metadata) is marked
    assert len(alarms) == int(marked)
    if marked:
        assert manifest.metadata[SUSPECT_KEY] == "m/w (ranks 0 and 1)"
        assert "m/w (ranks 0 and 1)" in alarms[0]


def structs_of_rank(index: StagedIndex, rank: int) -> StagedIndex:
    """The same shard as one that each of two ranks has for itself."""
    shards = tuple(replace(one, leaf=replace(one.leaf, rank=rank)) for one in index.shards)
    return replace(index, rank=rank, world_size=2, shards=shards)
