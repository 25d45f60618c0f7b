"""Gathering what is referred to in rounds gives the same as gathering it at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.format.part import Part, StoredShard
from ckpt.maintenance.copies import Pack, PackReferences
from ckpt.values import Box, ChunkLocation, Codec, Leaf, LeafKind, SnapshotId

References = list[list[tuple[int, int]]]
"""For each part its references: a pack's number and a chunk's."""


def part(references: list[tuple[int, int]]) -> Part:
    leaf = Leaf(name="a", kind=LeafKind.TENSOR, dtype="uint8", shape=(len(references),))
    places = tuple(
        ChunkLocation(f"packs/{pack:03d}", chunk * 8, 8, 8, Codec.RAW) for pack, chunk in references
    )
    shard = StoredShard(
        leaf=leaf,
        box=Box.whole(leaf.shape),
        size_bytes=len(references),
        digests=tuple(bytes([chunk]) * 16 for _, chunk in references),
        locations=places,
    )
    return Part(snapshot=SnapshotId(1, 1), writer="w", rank=0, world_size=1, shards=(shard,))


def rounds(
    parts: References, places_max: int
) -> tuple[dict[str, Pack], dict[str, frozenset[int]], int, int]:
    gathered, found, users, count, most = PackReferences(places_max), {}, {}, 0, 0
    while True:
        for number, references in enumerate(parts):
            gathered.add(part(references), number)
        held = [gathered.pack(key) for key in gathered.packs()]
        most = max(most, sum(len(one.chunks) for one in held) if len(held) > 1 else 0)
        assert not found.keys() & {one.key for one in held}
        found.update({one.key: one for one in held})
        users.update({key: gathered.users(key) for key in gathered.packs()})
        count += 1
        if gathered.complete:
            return found, users, count, most
        gathered = gathered.next_round()


references = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=20), max_size=8
)


@pytest.mark.slow
@given(references, st.integers(1, 30))
def test_any_limit_finds_every_chunk_of_every_pack_once_within_it(
    parts: References, places_max: int
) -> None:
    whole, whole_users, _, _ = rounds(parts, 10_000)
    found, users, count, most = rounds(parts, places_max)
    assert found == whole
    assert users == whole_users
    assert most <= places_max
    assert count <= max(1, len(whole))
