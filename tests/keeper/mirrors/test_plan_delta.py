"""What of a share is sent, and that an earlier share with it is the new one, whatever changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.cluster.peermem.http import RANGES_MAX, ranges_problem
from ckpt.format.canonical import digest
from ckpt.keeper.mirrors import plan as mirror_delta
from ckpt.keeper.mirrors.plan import (
    CHANGED_SHARE_MAX,
    JOIN_BYTES,
    DeltaRanges,
    StagedShare,
    WholeShare,
    delta_of,
)
from ckpt.staging.layout import lay_out
from ckpt.values import (
    CHUNK_BYTES,
    PAGE_BYTES,
    Box,
    Leaf,
    LeafKind,
    SnapshotId,
    StagedIndex,
    StagedShard,
)

HEADER_BYTES = PAGE_BYTES


@dataclass(frozen=True)
class Made:
    """A share and its bytes."""

    share: StagedShare
    data: bytes


def made(
    bodies: list[bytes],
    *,
    step: int,
    data_bytes: int = 0,
    filler: bytes = b"\xee",
    chunk_bytes: int = CHUNK_BYTES,
) -> Made:
    """Bodies laid out as a trainer does it; what lies between is ``filler``, of which no index
    tells."""
    offsets, end = lay_out([len(body) for body in bodies])
    size_bytes = max(end, data_bytes)
    data = bytearray(filler * size_bytes)
    shards = []
    for number, (offset, body) in enumerate(zip(offsets, bodies, strict=True)):
        data[offset : offset + len(body)] = body
        leaf = Leaf(
            name=f"w/{number}", kind=LeafKind.TENSOR, dtype="uint8", shape=(len(body),), rank=0
        )
        digests = tuple(
            digest(body[at : at + chunk_bytes]) for at in range(0, len(body), chunk_bytes)
        )
        shards.append(
            StagedShard(
                leaf=leaf,
                box=Box.whole(leaf.shape),
                offset_bytes=offset,
                size_bytes=len(body),
                digests=digests,
            )
        )
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=tuple(shards))
    return Made(
        StagedShare(index, HEADER_BYTES, size_bytes), bytes([step]) * HEADER_BYTES + bytes(data)
    )


def applied(changed: DeltaRanges, new: Made, base: Made) -> bytes:
    """What a peer makes of it."""
    out = bytearray(base.data)
    for offset, length in changed.ranges:
        out[offset : offset + length] = new.data[offset : offset + length]
    return bytes(out)


def right(found: bytes, new: Made) -> bool:
    """Whether these are the header and all shards of ``new``."""
    spans = [(0, HEADER_BYTES)] + [
        (HEADER_BYTES + one.offset_bytes, one.size_bytes) for one in new.share.index.shards
    ]
    return all(found[at : at + size] == new.data[at : at + size] for at, size in spans)


SHORT_BYTES = 3 * PAGE_BYTES
"""A chunk, so that there are many."""

SIZES = st.lists(
    st.integers(0, 200)
    | st.integers(PAGE_BYTES, 20 * PAGE_BYTES)
    | st.sampled_from((SHORT_BYTES, 7 * SHORT_BYTES + 5)),
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(SIZES, st.data())
def test_earlier_share_with_what_is_sent_is_the_new_share(
    sizes: list[int], data: st.DataObject
) -> None:
    first = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    data_bytes = (sum(sizes) + 100_000) * data.draw(st.sampled_from((1, 4)))
    base = made(first, step=1, data_bytes=data_bytes, chunk_bytes=SHORT_BYTES)
    bodies = []
    for body in first:
        match (
            data.draw(st.sampled_from(("same", "same", "byte", "all", "length")))
            if body
            else "same"
        ):
            case "byte":
                at = data.draw(st.integers(0, len(body) - 1))
                bodies.append(body[:at] + b"\xff" + body[at + 1 :])
            case "all":
                bodies.append(bytes([data.draw(st.integers(100, 110))]) * len(body))
            case "length":
                bodies.append(body[: data.draw(st.integers(0, len(body)))])
            case _:
                bodies.append(body)
    new = made(bodies, step=2, data_bytes=data_bytes, filler=b"\xdd", chunk_bytes=SHORT_BYTES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mirror_delta, "CHUNK_BYTES", SHORT_BYTES)
        found = delta_of(new.share, base.share)
    if isinstance(found, WholeShare):
        assert found.why == "most has changed"
        return
    assert ranges_problem(found.ranges, size_bytes=new.share.size_bytes) is None
    out = applied(found, new, base)
    assert right(out, new)
    assert found.size_bytes <= CHANGED_SHARE_MAX * new.share.size_bytes
    if not any(body != old for body, old in zip(bodies, first, strict=True)):
        assert found.ranges == ((0, HEADER_BYTES),), "the header alone"


@pytest.mark.slow
def test_only_chunks_that_changed_are_sent_and_neighbours_as_one_range() -> None:
    body = bytes(6 * CHUNK_BYTES)
    base = made([body, b"x" * PAGE_BYTES], step=1)
    spoiled = bytearray(body)
    for chunk in (2, 3, 5):
        spoiled[chunk * CHUNK_BYTES + 7] = 1
    new = made([bytes(spoiled), b"x" * PAGE_BYTES], step=2)
    assert delta_of(new.share, base.share) == DeltaRanges(
        (
            (0, HEADER_BYTES),
            (HEADER_BYTES + 2 * CHUNK_BYTES, 2 * CHUNK_BYTES),
            (HEADER_BYTES + 5 * CHUNK_BYTES, CHUNK_BYTES),
        )
    )


def test_ranges_that_nearly_touch_are_one() -> None:
    bodies = [bytes([number + 1]) * PAGE_BYTES for number in range(40)]
    base = made(bodies, step=1)
    near, far = HEADER_BYTES + 2 * PAGE_BYTES, HEADER_BYTES + (3 * PAGE_BYTES + JOIN_BYTES)
    for number in (2, 3 + JOIN_BYTES // PAGE_BYTES):
        bodies[number] = bytes(PAGE_BYTES)
    assert delta_of(made(bodies, step=2).share, base.share) == DeltaRanges(
        ((0, near + PAGE_BYTES), (far, PAGE_BYTES))
    )


def test_empty_share_is_its_header() -> None:
    assert delta_of(
        made([], step=2, data_bytes=PAGE_BYTES).share, made([], step=1, data_bytes=PAGE_BYTES).share
    ) == (DeltaRanges(((0, HEADER_BYTES),)))


def test_all_is_sent_where_most_changed_and_not_just_below() -> None:
    bodies = [bytes([number + 1]) * JOIN_BYTES * 2 for number in range(16)]
    base = made(bodies, step=1)
    for count, whole in ((11, False), (13, True)):
        other = [bytes(len(body)) if number < count else body for number, body in enumerate(bodies)]
        found = delta_of(made(other, step=2).share, base.share)
        assert isinstance(found, WholeShare) == whole
    assert found == WholeShare("most has changed")


@pytest.mark.parametrize(
    "facts", [{"header_bytes": 2 * PAGE_BYTES}, {"data_bytes": 8 * PAGE_BYTES}]
)
def test_all_is_sent_where_header_or_data_is_of_another_length(facts: dict[str, int]) -> None:
    base = made([bytes(PAGE_BYTES)], step=1, data_bytes=4 * PAGE_BYTES).share
    assert isinstance(delta_of(base, base), DeltaRanges)
    assert delta_of(replace(base, **facts), base) == WholeShare("another length of header or data")


def test_shard_that_moved_is_sent_though_its_digest_is_known() -> None:
    one, two = b"a" * PAGE_BYTES, b"b" * PAGE_BYTES
    base = made([one, two, bytes(200_000)], step=1)
    new = made([two, one, bytes(200_000)], step=2)
    found = delta_of(new.share, base.share)
    assert found == DeltaRanges(((0, HEADER_BYTES + 2 * PAGE_BYTES),))
    assert right(applied(found, new, base), new)


def test_changes_that_make_too_many_ranges_go_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirror_delta.RANGES_MAX == RANGES_MAX
    monkeypatch.setattr(mirror_delta, "RANGES_MAX", 3)
    bodies = [bytes([number + 1]) * (JOIN_BYTES * 2) for number in range(20)]
    base = made(bodies, step=1)
    for number, whole in ((3, False), (8, False), (12, True)):
        bodies[number] = bytes(JOIN_BYTES * 2)
        found = delta_of(made(bodies, step=2).share, base.share)
        assert isinstance(found, WholeShare) == whole
    assert found == WholeShare("changes are too far apart")
