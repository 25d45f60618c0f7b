"""The reader without torch, and verification."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import load_index
from ckpt.restore.reader import SnapshotReader, numpy_dtype, size_bytes
from ckpt.restore.verify import VerifyMemo, verify
from ckpt.testing.sample import SampleWriter, damage, sample_state, shard, tensor
from ckpt.values import CHUNK_BYTES, DTYPE_BYTES, Box, SnapshotId


def test_sharded_leaf_is_read_whole_and_by_rows(
    sample: SampleWriter, sample_index: SnapshotIndex
) -> None:
    expected = sample_state(30).weight
    with SnapshotReader(sample.backend, sample_index) as reader:
        assert np.array_equal(reader.read("model/fc.weight").array, expected)
        assert np.array_equal(
            reader.read("model/fc.weight", rows=slice(20, 30)).array, expected[20:30]
        )
        assert np.array_equal(
            reader.read("model/fc.weight", rows=slice(-3, None)).array, expected[-3:]
        )
        assert reader.read("model/fc.weight", rows=slice(5, 5)).array.shape == (0, 32)
        assert (
            reader.read_bytes("model/fc.weight", None, Box((23, 1), (2, 3)))
            == expected[23:25, 1:4].tobytes()
        )


def test_bfloat16_and_its_alias_come_as_bits(
    sample: SampleWriter, sample_index: SnapshotIndex
) -> None:
    with SnapshotReader(sample.backend, sample_index) as reader:
        for name in ("model/embed.weight", "model/head.weight"):
            found = reader.read(name)
            assert found.dtype == "bfloat16"
            assert np.array_equal(found.array, sample_state(30).embed_bits)


def test_ranks_own_leaf_and_object_are_told_apart(
    sample: SampleWriter, sample_index: SnapshotIndex
) -> None:
    with SnapshotReader(sample.backend, sample_index) as reader:
        assert reader.read("noise", rank=1).array.tolist() == [1] * 5
        assert reader.read_object("progress", rank=1) == {
            "step": 30,
            "rank": 1,
            "loss": float("inf"),
            "seen": (1, 2),
        }
        with pytest.raises(NotFoundError, match="held by ranks"):
            reader.read("noise", rank=7)
        with pytest.raises(UsageError, match="not an object"):
            reader.read_object("noise")


@pytest.mark.parametrize("rows", [slice(0, 4, 2), slice(None, None, -1)])
def test_rows_with_a_step_are_refused(
    sample: SampleWriter, sample_index: SnapshotIndex, rows: slice
) -> None:
    with SnapshotReader(sample.backend, sample_index) as reader, pytest.raises(UsageError):
        reader.read("model/fc.weight", rows=rows)


def test_rows_of_a_scalar_are_refused(sample: SampleWriter, sample_index: SnapshotIndex) -> None:
    with SnapshotReader(sample.backend, sample_index) as reader, pytest.raises(UsageError):
        reader.read("optimizer/state/fc.weight/step", rows=slice(0, 1))


def test_every_dtype_has_a_numpy_carrier_of_its_width() -> None:
    for name, width in DTYPE_BYTES.items():
        assert numpy_dtype(name).itemsize == width


def test_stream_gives_all_bytes_in_order_through_a_small_window() -> None:
    backend = MemoryBackend("stream")
    writer = SampleWriter(backend)
    pair = SnapshotId(writer.open_epoch(), 1)
    random = np.random.default_rng(3)
    big = random.integers(0, 255, (3000, 4001), dtype=np.uint8)
    arrays = {f"a{i:02d}": random.standard_normal(i * 1000, dtype=np.float32) for i in range(12)}
    columns = [Box((0, 0), (3000, 1500)), Box((0, 1500), (3000, 2501))]
    small = [tensor(name, value) for name, value in arrays.items()]
    writer.write(pair, [[shard("big", big, columns[0]), *small], [shard("big", big, columns[1])]])
    index = load_index(backend, writer.journal.refresh(), pair)
    leaves = [leaf for leaf in index.leaves() if leaf.name != "a07"]
    got = [bytearray(size_bytes(leaf)) for leaf in leaves]
    with SnapshotReader(backend, index, budget_bytes=1 << 20) as reader:
        for piece in reader.stream(leaves, window_bytes=CHUNK_BYTES):
            assert len(piece.data) <= CHUNK_BYTES
            got[piece.number][piece.offset_bytes : piece.offset_bytes + len(piece.data)] = (
                piece.data
            )
    for leaf, data in zip(leaves, got, strict=True):
        assert data == (big if leaf.name == "big" else arrays[leaf.name]).tobytes()


def test_sound_snapshot_verifies(sample: SampleWriter, sample_index: SnapshotIndex) -> None:
    done: list[int] = []
    report = verify(sample_index, sample.backend, on_progress=done.append)
    assert report.ok
    assert report.objects == 3
    assert sum(done) == report.read_bytes > 0


def test_all_damage_is_reported_not_just_the_first(
    sample: SampleWriter, sample_index: SnapshotIndex
) -> None:
    backend = sample.backend
    weight = sample_index.shards("model/fc.weight", None)
    bias = sample_index.shards("model/fc.bias", None)[0].locations[0]
    damage(backend, weight[0].locations[0].pack, weight[0].locations[0].offset_bytes)
    damage(backend, bias.pack, bias.offset_bytes + 3)
    backend.delete(weight[1].locations[0].pack)
    part = sample_index.manifest.parts[1]
    damage(backend, part.key, 9)

    report = verify(sample_index, backend)

    found = {(one.key, one.offset_bytes): one for one in report.damaged}
    assert found[part.key, 0].what == "mismatch"
    assert found[bias.pack, bias.offset_bytes].leaves == ("model/fc.bias",)
    first, second = weight[0].locations[0], weight[1].locations[0]
    assert found[first.pack, first.offset_bytes].what == "mismatch"
    assert found[second.pack, second.offset_bytes].what == "missing"
    missing = [one for one in report.damaged if one.what == "missing"]
    assert {one.key for one in missing} == {second.pack}
    assert len(report.damaged) == 3 + len(missing)


def test_damage_shared_with_a_snapshot_verified_before_is_reported_again(
    sample: SampleWriter,
) -> None:
    state = sample.journal.refresh()
    indexes = [load_index(sample.backend, state, SnapshotId(1, step)) for step in (20, 30)]
    place = indexes[0].shards("model/fc.bias", None)[0].locations[0]
    damage(sample.backend, place.pack, place.offset_bytes)
    memo: VerifyMemo = {}
    first, second = (verify(index, sample.backend, memo=memo) for index in indexes)
    assert (
        [one.leaves for one in first.damaged]
        == [one.leaves for one in second.damaged]
        == [("model/fc.bias",)]
    )
    assert second.chunks == first.chunks
    assert second.read_bytes < first.read_bytes


def test_damaged_object_does_not_decode(sample: SampleWriter, sample_index: SnapshotIndex) -> None:
    place = sample_index.shards("progress", 0)[0].locations[0]
    damage(sample.backend, place.pack, place.offset_bytes)
    with SnapshotReader(sample.backend, sample_index) as reader, pytest.raises(IntegrityError):
        reader.read_object("progress")


def test_reading_never_imports_torch() -> None:
    rooms = "ckpt.restore.reader, ckpt.restore.verify, ckpt.restore.export.safetensors_files"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
