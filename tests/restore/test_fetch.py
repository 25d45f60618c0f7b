"""Fetching: right bytes or an error that names what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import load_index
from ckpt.restore.fetch import Fetcher, fetch, threads_best
from ckpt.restore.plan import Want, plan_reads
from ckpt.save.chunks import Compression
from ckpt.testing.sample import Piece, SampleWriter, damage, shard, tensor
from ckpt.values import CHUNK_BYTES, Box, SnapshotId

ROWS = 3 * 1024


def write(
    backend, pieces: list[list[Piece]], *, compression: Compression | None = None
) -> SnapshotIndex:
    writer = SampleWriter(backend, compression=compression or Compression("off"))
    pair = SnapshotId(writer.open_epoch(), 1)
    writer.write(pair, pieces)
    return load_index(backend, writer.journal.refresh(), pair)


@pytest.fixture(scope="module")
def big() -> np.ndarray:
    """12 MiB: three chunks and a bit of each shard's fourth."""
    return np.random.default_rng(0).integers(0, 1 << 32, (ROWS, 1100), dtype=np.uint32)


@pytest.fixture(scope="module", params=["raw", "packed"])
def stored(request: pytest.FixtureRequest, big: np.ndarray) -> tuple[MemoryBackend, SnapshotIndex]:
    backend = MemoryBackend("big")
    low, high = Box((0, 0), (1000, 1100)), Box((1000, 0), (ROWS - 1000, 1100))
    pieces = [[shard("w", big // 7, low)], [shard("w", big // 7, high)]]
    mode = "off" if request.param == "raw" else "on"
    return backend, write(backend, pieces, compression=Compression(mode))


@pytest.mark.parametrize(
    "box", [Box((0, 0), (ROWS, 1100)), Box((900, 0), (300, 1100)), Box((10, 500), (2500, 33))]
)
@pytest.mark.parametrize("coalesce", [0, CHUNK_BYTES * 3])
def test_any_box_arrives_whole(stored, big: np.ndarray, box: Box, coalesce: int) -> None:
    backend, index = stored
    plan = plan_reads(index, [Want("w", None, box)], coalesce_bytes=coalesce)
    out = np.zeros(box.sizes, np.uint32)
    done: list[int] = []
    fetch(backend, plan, [out], threads=3, budget_bytes=64 << 20, on_progress=done.append)
    inside = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    assert np.array_equal(out, big[inside] // 7)
    assert sum(done) == sum(
        chunk.location.raw_bytes for read in plan.reads for chunk in read.chunks
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dtype=st.sampled_from(["f2", "f8", "c16", "u1"]),
)
def test_small_leaves_of_any_width_arrive_whole(rows: tuple[int, int], dtype: str) -> None:
    values = np.random.default_rng(1).integers(0, 200, (40, 7)).astype(dtype)
    backend = MemoryBackend("small")
    index = write(backend, [[tensor("a", values), tensor("b", values[:3].copy())]])
    low, high = sorted(rows)
    box = Box((low, 2), (high - low, 4))
    plan = plan_reads(
        index, [Want("a", None, box), Want("b", None, Box.whole((3, 7)))], coalesce_bytes=1 << 20
    )
    out = [np.zeros(box.sizes, dtype), np.zeros((3, 7), dtype)]
    fetch(backend, plan, out, budget_bytes=1 << 20)
    assert np.array_equal(out[0], values[low:high, 2:6])
    assert np.array_equal(out[1], values[:3])


def test_chunk_shared_by_leaves_is_read_once_and_reaches_both(big: np.ndarray) -> None:
    backend = MemoryBackend("twins")
    index = write(backend, [[tensor("a", big), tensor("b", big.copy())]])
    plan = plan_reads(index, [Want(n, None, Box.whole(big.shape)) for n in "ab"], coalesce_bytes=0)
    out = [np.zeros_like(big), np.zeros_like(big)]
    fetch(backend, plan, out)
    assert plan.read_bytes == big.nbytes
    assert np.array_equal(out[0], big)
    assert np.array_equal(out[1], big)


def test_flipped_bit_is_refused_and_named(big: np.ndarray) -> None:
    backend = MemoryBackend("bad")
    index = write(backend, [[tensor("model/w", big)]])
    place = index.shards("model/w", None)[0].locations[1]
    damage(backend, place.pack, place.offset_bytes + 77)
    plan = plan_reads(
        index,
        [Want("model/w", None, Box.whole(big.shape))],
        coalesce_bytes=0,
        snapshot="epoch 1 step 1",
    )
    with pytest.raises(IntegrityError) as caught:
        fetch(backend, plan, [np.zeros_like(big)], threads=2)
    text = str(caught.value)
    for part in (
        f"pack={place.pack}",
        f"offset_bytes={place.offset_bytes}",
        "leaf=model/w",
        "snapshot=epoch 1 step 1",
    ):
        assert part in text


def test_missing_pack_is_damage_with_its_cause(big: np.ndarray) -> None:
    backend = MemoryBackend("gone")
    index = write(backend, [[tensor("w", big)]])
    backend.delete(index.shards("w", None)[0].locations[0].pack)
    plan = plan_reads(index, [Want("w", None, Box.whole(big.shape))], coalesce_bytes=0)
    with pytest.raises(IntegrityError, match="a pack is missing") as caught:
        fetch(backend, plan, [np.zeros_like(big)])
    assert isinstance(caught.value.__cause__, NotFoundError)


def test_short_pack_is_damage_with_its_cause(big: np.ndarray) -> None:
    backend = MemoryBackend("short")
    index = write(backend, [[tensor("w", big)]])
    place = index.shards("w", None)[0].locations[-1]
    body = bytearray(place.offset_bytes + 5)
    backend.read_into(place.pack, memoryview(body))
    backend.delete(place.pack)
    backend.put(place.pack, [bytes(body)])
    plan = plan_reads(index, [Want("w", None, Box.whole(big.shape))], coalesce_bytes=0)
    with pytest.raises(IntegrityError, match="ends too early") as caught:
        fetch(backend, plan, [np.zeros_like(big)])
    assert isinstance(caught.value.__cause__, IntegrityError)


class SilentBackend(MemoryBackend):
    """Answers no read of a pack."""

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        if key.startswith("packs/"):
            raise UnavailableError(f"no answer. key={key}")
        super().read_into(key, out, offset_bytes=offset_bytes)


def test_silent_store_is_not_called_damage(big: np.ndarray) -> None:
    backend = SilentBackend("silent")
    index = write(backend, [[tensor("w", big)]])
    plan = plan_reads(index, [Want("w", None, Box.whole(big.shape))], coalesce_bytes=0)
    with pytest.raises(UnavailableError):
        fetch(backend, plan, [np.zeros_like(big)])


class BadSectorBackend(MemoryBackend):
    """The disk cannot read some packs."""

    bad: tuple[str, ...] = ()

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        if key in self.bad:
            raise UnavailableError(f"the disk failed. key={key}") from OSError(errno.EIO, "sector")
        super().read_into(key, out, offset_bytes=offset_bytes)


def test_bad_sector_is_read_from_another_place_of_the_same_bytes(big: np.ndarray) -> None:
    backend = BadSectorBackend("sectors")
    index = write(backend, [[tensor("w", big)]])
    places = index.shards("w", None)[0].locations
    copy = "packs/copy/x.pack"
    body = bytearray(places[-1].offset_bytes + places[-1].stored_bytes)
    backend.read_into(places[0].pack, memoryview(body))
    backend.put(copy, [body])
    elsewhere = dict(zip(index.shards("w", None)[0].digests, places, strict=True))
    plan = plan_reads(index, [Want("w", None, Box.whole(big.shape))], coalesce_bytes=0)
    backend.bad = (places[0].pack,)
    out = np.zeros_like(big)
    with Fetcher(
        backend, places_of=lambda digest: [dataclasses.replace(elsewhere[digest], pack=copy)]
    ) as fetcher:
        fetcher.fetch(plan, [out])
        assert np.array_equal(out, big)
        assert len(fetcher.read_elsewhere) == len(places)
        backend.bad = (places[0].pack, copy)
        with pytest.raises(UnavailableError, match="the disk failed"):
            fetcher.fetch(plan, [out])


class GatedBackend(MemoryBackend):
    """Fails one read while another is in flight, and notes what of the others has ended."""

    def __init__(self) -> None:
        super().__init__("gated")
        self.gate = threading.Event()
        self.inside = threading.Semaphore(0)
        self.begun: list[int] = []
        self.ended: list[int] = []

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        if key.startswith("packs/") and offset_bytes == 0:
            assert self.inside.acquire(timeout=20)
            self.gate.set()
            raise UnavailableError("no answer")
        if key.startswith("packs/"):
            self.begun.append(offset_bytes)
            self.inside.release()
            assert self.gate.wait(timeout=20)
            time.sleep(0.1)  # slower than the error, which must wait for it
            super().read_into(key, out, offset_bytes=offset_bytes)
            self.ended.append(offset_bytes)
            return
        super().read_into(key, out, offset_bytes=offset_bytes)


def test_no_worker_is_left_running_after_an_error(big: np.ndarray) -> None:
    backend = GatedBackend()
    index = write(backend, [[tensor("w", big)]])
    plan = plan_reads(index, [Want("w", None, Box.whole(big.shape))], coalesce_bytes=0)
    with Fetcher(backend, threads=2) as fetcher:
        with pytest.raises(UnavailableError):
            fetcher.fetch(plan, [np.zeros_like(big)])
        # The other worker may begin one more before it sees the error. At the return, while the
        # fetcher still lives, all have ended: the memory is the caller's again.
        assert backend.begun
        assert sorted(backend.ended) == sorted(backend.begun)


def test_small_budget_still_reads(stored, big: np.ndarray) -> None:
    backend, index = stored
    plan = plan_reads(index, [Want("w", None, Box((0, 1), (ROWS, 5)))], coalesce_bytes=0)
    out = np.zeros((ROWS, 5), np.uint32)
    fetch(backend, plan, [out], threads=8, budget_bytes=1)
    assert np.array_equal(out, big[:, 1:6] // 7)


@pytest.mark.parametrize("out", [np.zeros(3, np.uint8), np.zeros((8, 2), np.uint8)[:, 0]])
def test_output_that_cannot_hold_the_bytes_is_refused(out: np.ndarray) -> None:
    backend = MemoryBackend("m")
    index = write(backend, [[tensor("w", np.zeros(8, np.uint8))]])
    plan = plan_reads(index, [Want("w", None, Box.whole((8,)))], coalesce_bytes=0)
    with pytest.raises(UsageError):
        fetch(backend, plan, [out])
    with pytest.raises(UsageError):
        fetch(backend, plan, [])
    with pytest.raises(UsageError):
        fetch(backend, plan, [memoryview(bytes(8))])


def test_files_are_read_into_plain_memory(tmp_path, big: np.ndarray) -> None:
    backend = FileBackend(tmp_path / "store")
    index = write(backend, [[tensor("w", big), tensor("none", np.zeros((0, 4), np.float32))]])
    wants = [Want("w", None, Box.whole(big.shape)), Want("none", None, Box.whole((0, 4)))]
    plan = plan_reads(index, wants, coalesce_bytes=backend.capabilities().read_bytes_best)
    out = bytearray(big.nbytes)
    fetch(backend, plan, [memoryview(out), np.zeros((0, 4), np.float32)])
    assert bytes(out) == big.tobytes()
    assert 1 <= threads_best(backend) <= 64
