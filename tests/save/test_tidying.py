"""A persister writes chunks anew that keep nearly empty packs alive, and knows how large packs
are."""

from __future__ import annotations

import numpy as np
import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.format.canonical import digest
from ckpt.format.keys import writer_name
from ckpt.ipc.mailbox import InProcessMailbox, InProcessRoom
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.save.chunks import NO_COMPRESSION
from ckpt.save.packs import PackSizes
from ckpt.save.persister import Persister, SaveTarget, SealedSlot
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

WAIT_S = 60.0
LEAVES = 8
LEAF_BYTES = 64 << 10


def sealed(step: int, values: list[int]) -> SealedSlot:
    data = np.repeat(np.array(values, np.uint8), LEAF_BYTES)
    shards = []
    for place in range(LEAVES):
        leaf = Leaf(name=f"w{place}", kind=LeafKind.TENSOR, dtype="uint8", shape=(LEAF_BYTES,))
        at = place * LEAF_BYTES
        shards.append(
            StagedShard(
                leaf=leaf,
                box=Box.whole(leaf.shape),
                offset_bytes=at,
                size_bytes=LEAF_BYTES,
                digests=(digest(data[at : at + LEAF_BYTES].data),),
            )
        )
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=tuple(shards))
    return SealedSlot(index=index, data=memoryview(data), release=lambda: None, shared={})


@pytest.fixture
def store() -> CountingBackend:
    return CountingBackend(MemoryBackend("tidying"))


def persister(store: CountingBackend, journal: Journal, boot: str) -> Persister:
    place = SaveTarget(
        backend=store, writer=writer_name("node", boot * 16), epoch=lambda: 1, journal=journal
    )
    channel = InProcessMailbox(InProcessRoom(), rank=0, size=1)
    return Persister(channel, place, compression=NO_COMPRESSION, verify=True, emit=lambda _: None)


def test_last_chunks_of_a_pack_are_written_anew_when_most_of_it_is_not_needed_any_more(
    store,
) -> None:
    journal = Journal.open(store, job="job", create=True)
    journal.open_epoch(resume=None)
    writing = persister(store, journal, "0")
    values = list(range(LEAVES))
    new = []
    for step in range(1, 7):
        new.append(
            writing.submit(sealed(step, values), tags=()).result(WAIT_S).new_bytes // LEAF_BYTES
        )
        values[step - 1] = 100 + step  # one leaf a step changes, from the first one on
    # Four of eight are enough to keep a pack; with three the rest moves, beside the one that
    # changed.
    assert new == [8, 1, 1, 1, 1, 4]
    assert len(load_index(store, journal.refresh(), SnapshotId(1, 6)).packs()) == 5
    assert store.calls("stat", prefix="packs/") == [], "it wrote them all itself"
    writing.close()


def test_packs_of_another_process_are_asked_for_once(store) -> None:
    journal = Journal.open(store, job="job", create=True)
    journal.open_epoch(resume=None)
    first = persister(store, journal, "0")
    values = list(range(LEAVES))
    info = first.submit(sealed(1, values), tags=()).result(WAIT_S)
    first.close()
    known = load_index(store, journal.refresh(), info.id).locations()
    second = persister(store, journal, "1")
    second.refer_to(info.id, known)
    values[:5] = range(100, 105)
    assert second.submit(sealed(2, values), tags=()).result(WAIT_S).new_bytes == LEAVES * LEAF_BYTES
    assert second.submit(sealed(3, values), tags=()).result(WAIT_S).new_bytes == 0
    second.close()
    assert len(store.calls("stat", prefix="packs/")) == 1


def test_pack_that_cannot_be_asked_for_is_passed_over_and_asked_for_again() -> None:
    inner = MemoryBackend("tidying")
    inner.put("packs/a", [b"1234"])
    faulty = FaultyBackend(inner, [Fault(harm=Harm.LOST_REQUEST, op="stat")])
    sizes = PackSizes(faulty)
    assert sizes.of(["packs/a", "packs/b"]) == {}
    assert sizes.of(["packs/a", "packs/a", "packs/b"]) == {"packs/a": 4}
    sizes.note({"packs/c": 7})
    assert sizes.of(["packs/c"]) == {"packs/c": 7}
    assert sizes.of(["packs/a"]) == {"packs/a": 4}


def test_ages_are_from_the_write_or_from_the_stores_stamp() -> None:
    store = MemoryBackend()
    store.put("there", [b"x" * 10])
    stat = store.stat("there")
    assert stat is not None
    now_unix_s = [stat.modified_unix_s + 5.0]
    sizes = PackSizes(store, clock=lambda: now_unix_s[0])
    sizes.note({"written": 7})
    now_unix_s[0] += 100.0
    assert sizes.of(["there", "written"]) == {"there": 10, "written": 7}
    assert sizes.ages_s() == {"there": 105.0, "written": 100.0}
    sizes.of(["there"])
    assert set(sizes.ages_s()) == {"there"}
