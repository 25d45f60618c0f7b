"""Ranks of several nodes: one part and one receipt a node, one outcome for all."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import (
    CkptError,
    ConflictError,
    IntegrityError,
    InternalError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format.canonical import digest
from ckpt.format.keys import PARTS, part_key, writer_name
from ckpt.ipc.mailbox import InProcessMailbox, InProcessRoom
from ckpt.log.catalog import load_index, load_manifest
from ckpt.log.journal import Journal
from ckpt.restore.verify import verify
from ckpt.save.chunks import NO_COMPRESSION
from ckpt.save.persister import LocalRanks, Persister, SaveTarget, SealedSlot
from ckpt.save.receipts import Receipt, merge_receipts
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, SnapshotInfo, StagedIndex, StagedShard

WAIT_S = 60.0
NODES = (3, 1, 2)
"""How many ranks each has."""
WORLD = sum(NODES)
HEADS = (0, 3, 4)
ROW = 4096
FULL_STEP = 9
"""The store is full for the parts of this one, for each head once."""


def _writer(rank: int) -> str:
    return writer_name("node", f"{rank:016x}")


def sealed(
    rank: int, step: int, *, spoil: bool = False, let_go: threading.Event | None = None
) -> SealedSlot:
    """A row of a tensor that all share, and what all hold alike."""
    data = np.full(ROW, step * WORLD + rank, dtype=np.uint8)
    leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="uint8", shape=(WORLD * ROW,))
    shard = StagedShard(
        leaf=leaf,
        box=Box((rank * ROW,), (ROW,)),
        offset_bytes=0,
        size_bytes=ROW,
        digests=(digest(data.data),),
    )
    if spoil:
        data[7] += 1
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=rank, world_size=WORLD, shards=(shard,))
    release = (lambda: None) if let_go is None else let_go.set
    return SealedSlot(
        index=index, data=memoryview(data), release=release, shared={"all": (WORLD, "x")}
    )


class LocalRanksBench:
    """A persister a rank, over a store in memory that may fail."""

    def __init__(self) -> None:
        full = [
            Fault(harm=Harm.FULL, key=part_key(SnapshotId(1, FULL_STEP), _writer(head)))
            for head in HEADS
        ]
        self.store = FaultyBackend(MemoryBackend("job"), full)
        self.journal = Journal.open(self.store, job="job", create=True)
        self.epoch = self.journal.open_epoch(resume=None)
        self.room = InProcessRoom()
        self.persisters: list[Persister] = []
        self.mates: list[LocalRanks] = []
        for ranks in NODES:
            self.mates.append(mates := LocalRanks(len(self.persisters), ranks))
            for _ in range(ranks):
                rank = len(self.persisters)
                place = SaveTarget(
                    backend=self.store,
                    writer=_writer(rank),
                    epoch=lambda: self.epoch,
                    journal=self.journal if rank == 0 else None,
                )
                channel = InProcessMailbox(self.room, rank=rank, size=WORLD)
                self.persisters.append(
                    Persister(
                        channel,
                        place,
                        compression=NO_COMPRESSION,
                        verify=True,
                        emit=lambda _: None,
                        local_ranks=mates,
                    )
                )

    def save(
        self, step: int, *, but: dict[int, SealedSlot] | None = None
    ) -> list[Future[SnapshotInfo]]:
        """All hand in."""
        shares = {rank: sealed(rank, step) for rank in range(WORLD)} | (but or {})
        return [self.persisters[rank].submit(share, tags=()) for rank, share in shares.items()]

    def commit_alone(self, step: int) -> None:
        """Another process commits that step, of a world of one rank."""
        whole = sealed(0, step)
        (shard,) = whole.index.shards
        leaf = replace(shard.leaf, shape=(ROW,))
        shards = (replace(shard, leaf=leaf, box=Box.whole(leaf.shape)),)
        place = SaveTarget(
            backend=self.store,
            writer=_writer(WORLD),
            epoch=lambda: self.epoch,
            journal=self.journal,
        )
        persister = Persister(
            InProcessMailbox(InProcessRoom(), rank=0, size=1),
            place,
            compression=NO_COMPRESSION,
            verify=True,
            emit=lambda _: None,
        )
        index = replace(whole.index, world_size=1, shards=shards)
        persister.submit(replace(whole, index=index, shared={}), tags=()).result(WAIT_S)
        persister.close()

    def saved(self, step: int) -> None:
        """All hand in, and it becomes durable; nothing but this one's messages is left."""
        infos = {future.result(WAIT_S).id for future in self.save(step)}
        assert infos == {SnapshotId(1, step)}
        numbers = {key.split("/")[1] for key in self.room.values}
        assert len(numbers) == 1 and len(self.room.values) <= len(NODES), "older words are freed"
        for mates in self.mates:
            assert mates._shares == {}, "parts are not kept"
            assert len(mates._outcomes) == 1


def errors(futures: list[Future[SnapshotInfo]]) -> set[str]:
    """The codes of what all failed with."""
    found = [future.exception(WAIT_S) for future in futures]
    assert all(isinstance(one, CkptError) for one in found), found
    return {one.code for one in found if isinstance(one, CkptError)}


@pytest.fixture
def world() -> Iterator[LocalRanksBench]:
    """Three nodes."""
    made = LocalRanksBench()
    yield made
    for persister in made.persisters:
        persister.stop_waiting()
    for persister in made.persisters:
        assert persister.abandon(WAIT_S)


def test_each_node_writes_one_part_and_posts_one_receipt(world: LocalRanksBench) -> None:
    for step in (1, 2, 3):
        world.saved(step)
    state = world.journal.refresh()
    manifest = load_manifest(world.store, state, SnapshotId(1, 3))
    assert [(part.rank, part.ranks) for part in manifest.parts] == list(
        zip(HEADS, NODES, strict=True)
    )
    assert manifest.world_size == WORLD and manifest.size_bytes == WORLD * ROW
    assert len(list(world.store.list(PARTS))) == 3 * len(NODES)
    index = load_index(world.store, state, SnapshotId(1, 3))
    assert [shard.box.offsets[0] for shard in index.shards("w")] == [
        rank * ROW for rank in range(WORLD)
    ]
    assert verify(index, world.store).ok
    assert set(world.room.values) == {"outcome/3", "receipt/3/3", "receipt/3/4"}


def test_base_that_was_dropped_meanwhile_has_all_nodes_write_everything(
    world: LocalRanksBench,
) -> None:
    world.saved(1)
    world.saved(2)
    world.commit_alone(3)
    world.journal.drop([SnapshotId(1, 2)])
    # Rank 4 has forgotten its base, after an error that only it met: its share is whole already.
    world.persisters[4]._share_writer.refer_to(None, {})
    freed = [threading.Event() for _ in range(WORLD)]
    shares = {rank: sealed(rank, 4, let_go=freed[rank]) for rank in range(WORLD)}
    assert {one.result(WAIT_S).id for one in world.save(4, but=shares)} == {SnapshotId(1, 4)}
    assert all(one.is_set() for one in freed)
    state = world.journal.refresh()
    manifest = load_manifest(world.store, state, SnapshotId(1, 4))
    assert manifest.base is None
    assert [(part.rank, part.ranks) for part in manifest.parts] == list(
        zip(HEADS, NODES, strict=True)
    )
    assert verify(load_index(world.store, state, SnapshotId(1, 4)), world.store).ok
    world.saved(5)
    assert set(world.room.values) == {"outcome/4", "receipt/4/3", "receipt/4/4"}, (
        "all else is freed"
    )


def test_second_turn_is_taken_only_if_all_ranks_offer_it() -> None:
    receipts = [Receipt(snapshot=SnapshotId(1, 1), rank=rank, repeats=True) for rank in range(2)]
    assert merge_receipts(receipts).repeats
    older = Receipt(snapshot=SnapshotId(1, 1), rank=2)
    assert not merge_receipts([*receipts, older]).repeats


@pytest.mark.parametrize("rank", range(WORLD))
def test_share_that_can_not_be_written_fails_all_and_frees_all_slots(
    world: LocalRanksBench, rank: int
) -> None:
    gone = [threading.Event() for _ in range(WORLD)]
    but = {one: sealed(one, 1, spoil=one == rank, let_go=gone[one]) for one in range(WORLD)}
    assert errors(world.save(1, but=but)) == {IntegrityError.code}
    assert all(one.is_set() for one in gone)
    world.saved(2)


@pytest.mark.parametrize("rank", range(WORLD))
def test_rank_that_refuses_fails_all(world: LocalRanksBench, rank: int) -> None:
    world.saved(1)
    refused = world.persisters[rank].submit_failure(SnapshotId(1, 2), UsageError("not this one"))
    others = [
        world.persisters[one].submit(sealed(one, 2), tags=()) for one in range(WORLD) if one != rank
    ]
    assert errors(others) == {UsageError.code}
    refused.result(WAIT_S)
    world.saved(3)
    assert world.persisters[0].passed_step == 3
    assert all(persister.in_flight == 0 for persister in world.persisters)


@pytest.mark.parametrize("rank", [0, 1])
def test_refusal_of_rank_0s_node_is_settled_only_when_all_let_go(
    world: LocalRanksBench, rank: int
) -> None:
    go_on, let_go = threading.Event(), threading.Event()

    def slowly() -> None:
        let_go.set()
        assert go_on.wait(WAIT_S)

    slow = replace(sealed(5, 1), release=slowly)
    refused = world.persisters[rank].submit_failure(SnapshotId(1, 1), UsageError("not this one"))
    others = [one for one in range(WORLD) if one != rank]
    futures = [
        world.persisters[one].submit(slow if one == 5 else sealed(one, 1), tags=())
        for one in others
    ]
    assert let_go.wait(WAIT_S)
    if rank == 0:
        assert not refused.done() and world.persisters[0].in_flight == 1
        assert futures[others.index(1)].exception(WAIT_S) is not None, "mates hear of it at once"
    assert world.persisters[0].in_flight == 1
    assert world.persisters[0].passed_step == -1
    go_on.set()
    assert errors(futures) == {UsageError.code}
    refused.result(WAIT_S)
    assert world.persisters[0].passed_step == 1
    world.saved(2)


def test_step_that_all_passed_is_the_least_that_one_captured(world: LocalRanksBench) -> None:
    world.saved(1)
    errors(world.save(7, but={4: sealed(4, 2)}))
    assert world.persisters[0].passed_step == 2
    world.saved(8)


@pytest.mark.slow
def test_share_that_never_comes_is_named_and_moves_nothing(
    world: LocalRanksBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.saved(1)
    monkeypatch.setattr("ckpt.save.persister.LOCAL_RANKS_WAIT_S", 2.0)
    futures = [
        world.persisters[rank].submit(sealed(rank, 2), tags=())
        for rank in range(WORLD)
        if rank != 5
    ]
    assert errors(futures) == {UnavailableError.code}
    assert "missing=5" in str(futures[0].exception()) and "look at its log" in str(
        futures[0].exception()
    )
    assert world.persisters[0].passed_step == 1, "rank 5 is not known to have passed step 2"
    late = world.persisters[5].submit(sealed(5, 2), tags=())
    assert errors([late]) == {UnavailableError.code}
    monkeypatch.undo()
    world.saved(3)


@pytest.mark.parametrize("rank", range(WORLD))
def test_bug_of_one_rank_leaves_nobody_waiting(world: LocalRanksBench, rank: int) -> None:
    def broken() -> None:
        raise RuntimeError("no such slot")

    futures = world.save(1, but={rank: replace(sealed(rank, 1), release=broken)})
    assert errors(futures) == {InternalError.code}
    world.saved(2)


def test_receipt_of_more_ranks_than_there_are_commits_nothing(world: LocalRanksBench) -> None:
    lie = Receipt(snapshot=SnapshotId(1, 1), rank=4, ranks=100)
    futures = [world.persisters[rank].submit(sealed(rank, 1), tags=()) for rank in range(4)]
    world.room.values["receipt/1/4"] = msgspec.msgpack.encode(lie)
    assert errors(futures) == {InternalError.code}
    assert world.journal.refresh().newest() is None


def test_all_refuse(world: LocalRanksBench) -> None:
    futures = [
        one.submit_failure(SnapshotId(1, 1), UsageError("none has it")) for one in world.persisters
    ]
    for future in futures:
        future.result(WAIT_S)
    world.saved(2)


def test_part_that_can_not_be_put_fails_all(world: LocalRanksBench) -> None:
    world.saved(1)
    assert errors(world.save(FULL_STEP)) == {StoreFullError.code}
    assert sorted(key for _, key, _ in world.store.struck) == [
        part_key(SnapshotId(1, FULL_STEP), _writer(head)) for head in HEADS
    ]
    for persister in world.persisters:
        persister.write_as(writer_name("again", secrets.token_hex(8)))
    world.saved(FULL_STEP)


def test_ranks_that_captured_different_steps_make_no_snapshot(world: LocalRanksBench) -> None:
    futures = world.save(1, but={5: sealed(5, 2)})
    assert errors(futures) == {ConflictError.code}
    assert "4 to 5" not in str(futures[0].exception()) and "5: epoch 1 step 2" in str(
        futures[0].exception()
    )
    world.saved(3)


@pytest.mark.slow
def test_persisters_that_are_abandoned_wait_for_no_mate(world: LocalRanksBench) -> None:
    futures = [world.persisters[rank].submit(sealed(rank, 1), tags=()) for rank in (0, 1, 4)]
    for persister in world.persisters:
        persister.stop_waiting()
    assert errors(futures) == {UnavailableError.code}
