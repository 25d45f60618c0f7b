"""A pair of several nodes restored from this node's slots, slots that others lend, and mirrors: bit
for bit, or not at all."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from ckpt.backends.base import Backend, Buffer
from ckpt.backends.memory import MemoryBackend
from ckpt.cluster.peermem.keys import mirror_key, slot_key
from ckpt.errors import FencedError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format.canonical import digest
from ckpt.ipc.messages import Source
from ckpt.restore.fetch import fetch
from ckpt.restore.plan import Want, plan_reads
from ckpt.session import peer_memory as far_slots
from ckpt.session.peer_memory import open_memory
from ckpt.staging.header import INDEX_OFFSET_BYTES, Header
from ckpt.values import PAGE_BYTES, Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

SNAPSHOT = SnapshotId(2, 7)
RANKS = 3
ROW_BYTES = 2 * PAGE_BYTES + 100
ROWS = Leaf(name="model/rows", kind=LeafKind.TENSOR, dtype="uint8", shape=(RANKS, ROW_BYTES))


def row(rank: int) -> bytes:
    return bytes((rank * 7 + at) % 251 for at in range(ROW_BYTES))


WHOLE = b"".join(row(rank) for rank in range(RANKS))


def slot(
    rank: int,
    *,
    snapshot: SnapshotId = SNAPSHOT,
    header_pages: int = 3,
    origin: str = "o",
    data: bytes | None = None,
) -> bytearray:
    """A sealed slot's memory; a mirror's has a shorter header."""
    memory = bytearray(header_pages * PAGE_BYTES + 4 * PAGE_BYTES)
    header = Header(memoryview(memory), header_bytes=header_pages * PAGE_BYTES)
    header.begin()
    at = header_pages * PAGE_BYTES
    memory[at : at + ROW_BYTES] = data or row(rank)
    shard = StagedShard(
        leaf=ROWS,
        box=Box((rank, 0), (1, ROW_BYTES)),
        offset_bytes=0,
        size_bytes=ROW_BYTES,
        digests=(digest(row(rank)),),
    )
    header.seal(
        StagedIndex(snapshot=snapshot, rank=rank, world_size=RANKS, shards=(shard,), origin=origin)
    )
    return memory


def why(error: BaseException) -> str:
    """What an error says, and what it came of."""
    return f"{error} {why(error.__cause__)}" if error.__cause__ is not None else str(error)


class Node(MemoryBackend):
    """What a node lends, and how it fails. ``reads`` counts bytes."""

    def __init__(self, objects: Mapping[str, Buffer]) -> None:
        super().__init__()
        for key, data in objects.items():
            self.put(key, [data])
        self.fails: Exception | None = None
        self.lies_bytes: int | None = None
        self.reads: list[int] = []

    def stat(self, key: str):
        """See Backend."""
        if self.fails is not None:
            raise self.fails
        found = super().stat(key)
        return (
            found
            if found is None or self.lies_bytes is None
            else type(found)(key, self.lies_bytes, 0.0)
        )

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend."""
        if self.fails is not None:
            raise self.fails
        self.reads.append(len(out))
        super().read_into(key, out, offset_bytes=offset_bytes)


class NodesWithMemory:
    """Rank 0 is here, rank 1 in a slot of ``b``, with a mirror at ``c``, rank 2 in a mirror at
    ``b`` and another at ``c``."""

    def __init__(self) -> None:
        self.here = slot(0)
        self.nodes: dict[str, Node] = {
            "b": Node(
                {slot_key(SNAPSHOT, 1): slot(1), mirror_key(SNAPSHOT, 2): slot(2, header_pages=1)}
            ),
            "c": Node(
                {mirror_key(SNAPSHOT, rank): slot(rank, header_pages=1) for rank in range(RANKS)},
            ),
        }
        self.sources: list[Source] = [
            Source(local=0, slots=("c",), mirrors=("c",)),
            Source(slots=("b", "c"), mirrors=("b", "c")),
            Source(slots=("b", "c"), mirrors=("b", "c")),
        ]

    def own(self) -> dict[int, Sequence[memoryview]]:
        return {0: [memoryview(slot(0, snapshot=SnapshotId(2, 6))), memoryview(self.here)]}

    def reach(self, address: str) -> Backend:
        return self.nodes[address]

    def restore(
        self, between: Callable[[], object] = lambda: None, box: Box | None = None
    ) -> bytes:
        with open_memory(SNAPSHOT, self.sources, self.own(), open_peer=self.reach, job="job") as (
            index,
            store,
        ):
            between()
            plan = plan_reads(
                index,
                [Want("model/rows", None, box or Box.whole(ROWS.shape))],
                coalesce_bytes=1 << 20,
            )
            outputs = [bytearray(size) for size in plan.output_bytes]
            fetch(store, plan, [memoryview(one) for one in outputs])
        return bytes(outputs[0])


@pytest.fixture
def world() -> Iterator[NodesWithMemory]:
    return NodesWithMemory()


def test_pair_is_whole_from_slots_here_slots_there_and_mirrors(world: NodesWithMemory) -> None:
    assert world.restore() == WHOLE
    assert world.nodes["c"].reads == [], "who has it in a slot, or comes first, is enough"


def test_each_begins_behind_its_own_ranks(world: NodesWithMemory) -> None:
    """All restore at the same moment: they must not all be at the same node."""
    asked: list[str] = []

    class Noted(Node):
        def stat(self, key: str):
            asked.append(key)
            return super().stat(key)

    key = [mirror_key(SNAPSHOT, rank) for rank in range(RANKS)]
    world.nodes["c"] = Noted({key[rank]: slot(rank, header_pages=1) for rank in range(RANKS)})
    world.sources = [
        Source(mirrors=("c",)),
        Source(local=0, mirrors=("c",)),
        Source(mirrors=("c",)),
    ]
    own = {1: [memoryview(slot(1))]}
    with open_memory(SNAPSHOT, world.sources, own, open_peer=world.reach, job="job"):
        assert asked == [key[2], key[0]]


def test_only_the_header_and_what_is_wanted_are_read(world: NodesWithMemory) -> None:
    assert world.restore(box=Box((0, 0), (1, ROW_BYTES))) == row(0)
    assert sum(world.nodes["b"].reads) < ROW_BYTES


@pytest.mark.parametrize(
    "error",
    [UnavailableError("gone"), FencedError("a newer epoch is open"), NotFoundError("no such slot")],
)
@pytest.mark.parametrize("late", [False, True])
def test_node_that_fails_is_replaced_by_the_next(
    world: NodesWithMemory, error: Exception, late: bool
) -> None:
    def fail() -> None:
        world.nodes["b"].fails = error

    if not late:
        fail()
    assert world.restore(fail) == WHOLE


def test_share_that_no_node_lends_any_more_is_damage(world: NodesWithMemory) -> None:
    def fail() -> None:
        for node in world.nodes.values():
            node.fails = UnavailableError("gone")

    with pytest.raises(IntegrityError) as found:
        world.restore(fail)
    assert "no node has this share" in why(found.value)
    with pytest.raises(IntegrityError, match="no node has this share"):
        world.restore()
    world.sources[1] = Source()
    with pytest.raises(IntegrityError, match="rank=1"):
        world.restore()


def test_slot_overwritten_there_before_it_is_read_is_found_in_a_mirror(
    world: NodesWithMemory,
) -> None:
    def overwrite() -> None:
        world.nodes["b"].delete(slot_key(SNAPSHOT, 1))

    assert world.restore(overwrite) == WHOLE
    world.nodes["b"].put(slot_key(SNAPSHOT, 1), [slot(1, snapshot=SnapshotId(2, 8))])
    assert world.restore() == WHOLE


def test_bytes_that_changed_are_not_believed(world: NodesWithMemory) -> None:
    changed = slot(1, data=b"x" * ROW_BYTES)
    with pytest.raises(IntegrityError, match="differ from their digest"):
        world.restore(lambda: world.nodes["b"].put(slot_key(SNAPSHOT, 1), [changed]))


def test_next_place_must_hold_the_very_same_share(world: NodesWithMemory) -> None:
    world.nodes["c"].put(mirror_key(SNAPSHOT, 1), [slot(1, origin="another")])

    def fail() -> None:
        world.nodes["b"].fails = UnavailableError("gone")

    with pytest.raises(IntegrityError) as found:
        world.restore(fail)
    assert "holds another share" in why(found.value)


def test_slots_of_two_openings_make_no_pair(world: NodesWithMemory) -> None:
    world.nodes["b"].put(slot_key(SNAPSHOT, 1), [slot(1, origin="another")])
    with pytest.raises(IntegrityError, match="not one snapshot"):
        world.restore()


def test_own_slot_that_was_overwritten_is_read_elsewhere(world: NodesWithMemory) -> None:
    world.here = slot(0, snapshot=SnapshotId(2, 9))
    assert world.restore() == WHOLE
    world.sources[0] = Source(local=0)
    with pytest.raises(IntegrityError, match="no slot of this rank"):
        world.restore()


def test_own_slot_overwritten_while_it_is_read_is_told_at_the_end(world: NodesWithMemory) -> None:
    def begin() -> None:
        Header(memoryview(world.here), header_bytes=3 * PAGE_BYTES).begin()

    with pytest.raises(IntegrityError, match="overwritten while it was read"):
        world.restore(begin, Box((1, 0), (1, ROW_BYTES)))


HEAD = struct.Struct("=8Q")
MAGIC = int.from_bytes(b"ckptslot", "little")


def head(*words: int) -> bytes:
    return HEAD.pack(MAGIC, 1, 3, *words, *([0] * (5 - len(words)))) + bytes(
        4 * PAGE_BYTES - HEAD.size
    )


@pytest.mark.parametrize(
    ("data", "lies_bytes"),
    [
        (b"", None),
        (b"x" * 100, None),
        (b"\xff" * (4 * PAGE_BYTES), None),
        (bytes(4 * PAGE_BYTES), None),
        (head(PAGE_BYTES, 3 * PAGE_BYTES, 1 << 62), None),
        (head(1 << 63, 1 << 63, 1 << 40), None),
        (head(PAGE_BYTES, 3 * PAGE_BYTES, PAGE_BYTES), None),
        (head(0, 4 * PAGE_BYTES, 10), None),
        (head(PAGE_BYTES, 3 * PAGE_BYTES, 10), None),
        (head(PAGE_BYTES, (1 << 45) - PAGE_BYTES, 10), 1 << 45),
        (head(PAGE_BYTES, (1 << 62) - PAGE_BYTES, 10), 1 << 62),
        (bytes(slot(1))[:-PAGE_BYTES], None),
        (bytes(slot(2)), None),
    ],
)
def test_what_is_no_slot_is_refused_in_words_and_without_its_memory(
    world: NodesWithMemory, data: bytes, lies_bytes: int | None
) -> None:
    world.nodes["d"] = hostile = Node({slot_key(SNAPSHOT, 1): data})
    hostile.lies_bytes = lies_bytes
    world.sources[1] = Source(slots=("d",))
    with pytest.raises(IntegrityError, match="no node has this share"):
        world.restore()
    assert sum(hostile.reads) <= len(data)
    world.sources[1] = Source(slots=("d", "c"), mirrors=("c",))
    assert world.restore() == WHOLE


def test_index_of_another_digest_is_refused(world: NodesWithMemory) -> None:
    torn = slot(1)
    torn[INDEX_OFFSET_BYTES + 5] ^= 1
    world.nodes["b"].put(slot_key(SNAPSHOT, 1), [torn])
    assert world.restore() == WHOLE


def test_memory_is_only_read(world: NodesWithMemory) -> None:
    with open_memory(SNAPSHOT, world.sources, world.own(), open_peer=world.reach, job="job") as (
        _,
        store,
    ):
        assert [stat.key for stat in store.list("slot/")] == [
            f"slot/{rank}" for rank in range(RANKS)
        ]
        assert {stat.size_bytes for stat in store.list("", after="slot/0")} == {4 * PAGE_BYTES}
        with pytest.raises(UsageError):
            store.put("slot/0", [b""])
        with pytest.raises(UsageError):
            store.delete("slot/0")
        with pytest.raises(NotFoundError):
            store.read_into("slot/9", memoryview(bytearray(1)))
        with pytest.raises(IntegrityError, match="ends too early"):
            store.read_into("slot/1", memoryview(bytearray(2)), offset_bytes=4 * PAGE_BYTES - 1)
        assert store.stat("slot/9") is None


def test_header_of_a_share_takes_no_more_than_its_index(world: NodesWithMemory) -> None:
    assert world.restore(box=Box((0, 0), (1, 10))) == row(0)[:10]
    assert all(size < PAGE_BYTES for size in world.nodes["b"].reads)
    assert far_slots.SLOT_BYTES_MAX > 1 << 40
