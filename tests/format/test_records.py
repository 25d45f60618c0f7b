from __future__ import annotations

import dataclasses
import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import INT_MAX, Manifest, PartRef
from ckpt.format.records import (
    Commit,
    Drop,
    Open,
    Record,
    Stores,
    Tag,
    Untag,
    decode_record,
    make_record,
)
from ckpt.format.store import JobRecord
from ckpt.values import MembershipEpoch, SnapshotId

WRITER = keys.writer_name("node", "0123456789abcdef")
pairs = st.builds(SnapshotId, st.integers(0, keys.EPOCH_MAX), st.integers(0, keys.STEP_MAX))
hexes = st.binary(min_size=16, max_size=16).map(bytes.hex)
names = st.text(min_size=1, max_size=20).filter(
    lambda text: text.isprintable() and text == text.strip()
)
bodies = st.one_of(
    st.builds(Open, st.integers(1, keys.EPOCH_MAX), st.none() | pairs),
    st.builds(Commit, pairs, hexes, st.none() | pairs).filter(lambda c: c.base != c.snapshot),
    st.builds(
        Drop,
        st.sets(pairs, min_size=1, max_size=4).map(lambda s: tuple(sorted(s))),
        st.none() | pairs,
    ),
    st.builds(Tag, names, pairs),
    st.builds(Untag, names),
    st.lists(hexes, min_size=1, max_size=5, unique=True).map(
        lambda ids: Stores(tuple(ids), len(ids) // 2 + 1)
    ),
)
records = st.builds(
    lambda body, seq, epoch, write_id, prev: make_record(
        body, job="run-a", seq=seq, epoch=epoch, write_id=write_id, prev=prev if seq else ""
    ),
    bodies,
    st.integers(0, keys.SEQ_MAX),
    st.integers(0, keys.EPOCH_MAX),
    st.from_regex(r"[0-9a-zA-Z_-]{1,64}", fullmatch=True),
    hexes,
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-INT_MAX - 1, INT_MAX)
    | st.floats()
    | st.text(max_size=10)
)
metadatas = st.dictionaries(st.text(max_size=10), scalars, max_size=6)
changes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3)


def make_manifest(
    metadata: dict[str, bool | int | float | str | None] | None = None, world: int = 2
) -> Manifest:
    pair = SnapshotId(2, 30)
    parts = tuple(
        PartRef(
            key=keys.part_key(pair, keys.writer_name(f"node{rank}", "0123456789abcdef")),
            digest="0" * 32,
            size_bytes=100 + rank,
            rank=rank,
        )
        for rank in range(world)
    )
    return Manifest(
        job="run-a",
        snapshot=pair,
        world_size=world,
        base=SnapshotId(1, 20),
        parts=parts,
        size_bytes=1000,
        new_bytes=10,
        created_unix_s=1.7e9,
        metadata=metadata or {},
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    return type(a) is type(b) and a == b


def resealed(data: bytes, **fields: object) -> bytes:
    """``data`` with members replaced (None-like ``...`` removes) and its digest made right
    again."""
    found = json.loads(data) | fields
    found = {key: value for key, value in found.items() if value is not ... and key != "digest"}
    found["digest"] = digest_hex(msgspec.json.encode(found, order="sorted"))
    return msgspec.json.encode(found, order="sorted")


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(records)
def test_a_record_comes_back_equal_and_spelled_alike(record: Record) -> None:
    data = record.encode()
    assert decode_record(data) == record
    assert decode_record(data).encode() == data
    plain = data.replace(f'"digest":"{record.digest}",'.encode(), b"", 1)
    assert digest_hex(plain) == record.digest


@settings(max_examples=100, deadline=None)
@given(metadatas)
def test_a_manifest_comes_back_equal_also_with_floats_that_json_lacks(
    metadata: dict[str, bool | int | float | str | None],
) -> None:
    data = make_manifest(metadata).encode()
    found = Manifest.decode(data)
    assert found.metadata.keys() == metadata.keys()
    assert all(same(found.metadata[name], value) for name, value in metadata.items())
    assert found.encode() == data
    assert make_manifest(dict(reversed(list(metadata.items())))).encode() == data


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(records, changes, st.integers(0, 30))
def test_a_mutated_record_is_equal_or_refused(
    record: Record, changed: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(record.encode())
    for at, byte in changed:
        data[at % len(data)] = byte
    del data[len(data) - cut :]
    try:
        found = decode_record(bytes(data))
    except (IntegrityError, FormatVersionError):
        return
    assert found == record


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(metadatas, changes)
def test_a_mutated_manifest_is_equal_or_refused(
    metadata: dict[str, bool | int | float | str | None], changed: list[tuple[int, int]]
) -> None:
    good = make_manifest(metadata).encode()
    data = bytearray(good)
    for at, byte in changed:
        data[at % len(data)] = byte
    try:
        found = Manifest.decode(bytes(data))
    except (IntegrityError, FormatVersionError):
        return
    assert found.encode() == good


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for decode in (decode_record, Manifest.decode, JobRecord.decode):
        with pytest.raises(IntegrityError):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"v":1' + b" " * 100,
        b'{"v":true}',
        b'{"v":1.0}',
        b'{"v":"1"}',
        b'{"v":' + b"9" * 400 + b"}",
    ],
)
def test_hostile_json_is_an_integrity_error(data: bytes) -> None:
    with pytest.raises((IntegrityError, FormatVersionError)):
        decode_record(data)


def test_an_oversized_record_is_refused_unread() -> None:
    with pytest.raises(IntegrityError, match="too large"):
        decode_record(b" " * ((1 << 20) + 1))


def test_doubled_keys_blanks_and_unknown_members_are_refused() -> None:
    data = make_record(Open(1, None), job="j", seq=0, epoch=1, write_id="w", prev="").encode()
    assert decode_record(resealed(data)) == decode_record(data)
    for wrong in (
        data.replace(b'"v":1', b'"v":1,"v":1'),
        data.replace(b'"v":1', b'"v": 1'),
        resealed(data, novel=1),
        resealed(data, body={"kind": "open", "epoch": 1, "from": None, "novel": 1}),
        resealed(data, body={"kind": "open", "epoch": 1, "resume": None}),
        resealed(data, write_id=...),
    ):
        with pytest.raises(IntegrityError):
            decode_record(wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"seq": -1},
        {"seq": 2**63},
        {"seq": 1},
        {"epoch": 10**10},
        {"epoch": True},
        {"epoch": 1.0},
        {"prev": "0" * 32},
        {"job": ""},
        {"write_id": "a/b"},
        {"body": {"kind": "novel"}},
        {"body": {"kind": "open", "epoch": 0, "from": None}},
        {"body": {"kind": "open", "epoch": 2, "from": {"epoch": -1, "step": 0}}},
        {"body": {"kind": "open", "epoch": 2, "from": {"epoch": 1, "step": 0, "novel": 1}}},
        {
            "body": {
                "kind": "commit",
                "snapshot": {"epoch": 1, "step": 1},
                "manifest_digest": "../x",
                "base": None,
            }
        },
        {"body": {"kind": "drop", "snapshots": [], "floor": None}},
        {
            "body": {
                "kind": "drop",
                "snapshots": [{"epoch": 2, "step": 1}, {"epoch": 1, "step": 1}],
                "floor": None,
            }
        },
        {"body": {"kind": "tag", "name": "a\n", "snapshot": {"epoch": 1, "step": 1}}},
        {"body": {"kind": "untag", "name": " "}},
        {"body": {"kind": "stores", "ids": ["0" * 32, "1" * 32], "write_quorum": 1}},
        {"body": {"kind": "stores", "ids": ["0" * 32, "0" * 32], "write_quorum": 2}},
        {"body": {"kind": "stores", "ids": ["0" * 32], "write_quorum": 2}},
    ],
)
def test_a_record_with_a_field_out_of_range_is_refused(fields: dict[str, object]) -> None:
    data = make_record(Open(1, None), job="j", seq=0, epoch=1, write_id="w", prev="").encode()
    with pytest.raises(IntegrityError):
        decode_record(resealed(data, **fields))


def test_the_writer_refuses_what_the_reader_would() -> None:
    with pytest.raises(UsageError, match="not a tag"):
        make_record(Tag("", SnapshotId(1, 1)), job="j", seq=0, epoch=1, write_id="w", prev="")
    with pytest.raises(UsageError, match="too many"):
        drop = Drop(tuple(SnapshotId(1, step) for step in range(10_001)), None)
        make_record(drop, job="j", seq=0, epoch=1, write_id="w", prev="")


def test_a_newer_version_names_both_and_the_remedy() -> None:
    record = make_record(Open(1, None), job="j", seq=0, epoch=1, write_id="w", prev="").encode()
    for decode, data in (
        (decode_record, resealed(record, v=4, novel=1)),
        (Manifest.decode, resealed(make_manifest().encode(), format_version=3, parts="elsewhere")),
        (
            JobRecord.decode,
            resealed(JobRecord(job="j", store_id="0" * 32).encode(), format_version=2),
        ),
    ):
        with pytest.raises(
            FormatVersionError, match=r"found=(2 known=1|3 known=2|4 known=3) upgrade torch-ckpt"
        ):
            decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"world_size": 3},
        {"world_size": 0},
        {"size_bytes": -1},
        {"new_bytes": 2**63},
        {"created_unix_s": None},
        {"created_unix_s": -1.0},
        {"job": "a\x00"},
        {"base": {"epoch": 2, "step": 30}},
        {"snapshot": {"epoch": 2, "step": 31}},
        {"metadata": {"a": {"float": "1.0"}}},
        {"metadata": {"a": [1]}},
        {"metadata": {"a": 2**63}},
        {"parts": []},
    ],
)
def test_a_manifest_with_a_field_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(IntegrityError):
        Manifest.decode(resealed(make_manifest().encode(), **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "parts/../../x"},
        {"key": keys.part_key(SnapshotId(9, 9), WRITER)},
        {"digest": "0" * 31},
        {"size_bytes": 0},
        {"size_bytes": 2**40},
        {"rank": 1},
        {"rank": -1, "ranks": 2},
        {"ranks": 0},
        {"ranks": 2},
        {"ranks": -1},
        {"key": make_manifest().parts[1].key},
    ],
)
def test_a_manifest_with_a_bad_part_reference_is_refused(fields: dict[str, object]) -> None:
    data = make_manifest().encode()
    parts = json.loads(data)["parts"]
    parts[0] |= fields
    with pytest.raises(IntegrityError):
        Manifest.decode(resealed(data, parts=parts))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(-1, 1), st.data())
def test_each_rank_is_in_one_part(counts: list[int], more: int, data: st.DataObject) -> None:
    pair, rank, parts = SnapshotId(2, 30), 0, []
    for ranks in counts:
        key = keys.part_key(pair, keys.writer_name("node", f"{rank:016x}"))
        parts.append(PartRef(key=key, digest="0" * 32, size_bytes=1, rank=rank, ranks=ranks))
        rank += ranks
    found = dataclasses.replace(make_manifest(), world_size=rank, parts=tuple(parts))
    assert Manifest.decode(found.encode()) == found
    harmed = data.draw(st.integers(0, len(parts) - 1))
    parts[harmed] = dataclasses.replace(parts[harmed], ranks=parts[harmed].ranks + more)
    wrong = dataclasses.replace(found, parts=tuple(parts))
    if more:
        with pytest.raises(UsageError, match=r"rank"):
            wrong.encode()


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": [1]},
        {"a": 2**63},
        {"a": "\ud800"},
        {"\ud800": 1},
        {1: 1},
        {"a": "x" * (1 << 20)},
        {"a": 1j},
    ],
)
def test_metadata_that_is_not_flat_and_small_is_a_usage_error(metadata: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="metadata"):
        make_manifest(metadata).encode()  # type: ignore[arg-type]


def test_a_job_record_comes_back_and_a_foreign_grid_is_refused() -> None:
    record = JobRecord(job="run-a", store_id="0" * 32)
    assert JobRecord.decode(record.encode()) == record
    with pytest.raises(FormatVersionError, match="grid that this release"):
        JobRecord.decode(resealed(record.encode(), chunk_bytes=1 << 20))
    with pytest.raises(IntegrityError):
        JobRecord.decode(resealed(record.encode(), store_id="../x"))
    with pytest.raises(UsageError):
        JobRecord(job="", store_id="0" * 32).encode()


def test_membership_epoch_in_an_open_is_another_format_version_and_its_absence_the_old_bytes() -> (
    None
):
    plain = make_record(Open(1, None), job="j", seq=0, epoch=1, write_id="w", prev="")
    assert plain.v == 1 and b"membership" not in plain.encode()
    body = Open(1, None, MembershipEpoch("node-1", 7))
    data = make_record(body, job="j", seq=0, epoch=1, write_id="w", prev="").encode()
    assert decode_record(data).body == body and b'"v":3' in data
    with pytest.raises(IntegrityError, match="format version"):
        decode_record(resealed(data, v=1))
    with pytest.raises(IntegrityError, match="format version"):
        decode_record(resealed(plain.encode(), v=3))
    for other in (2, 4):
        with pytest.raises(FormatVersionError):
            decode_record(resealed(data, v=other))
    for wrong in (MembershipEpoch("", 7), MembershipEpoch("a/b", 7), MembershipEpoch("a", 0)):
        with pytest.raises(UsageError, match="membership epoch"):
            make_record(Open(1, None, wrong), job="j", seq=0, epoch=1, write_id="w", prev="")
