"""A slot becomes packs and a part from which every byte can be had again, or an error and nothing
recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, StoreFullError, UsageError
from ckpt.format.canonical import digest, digest_hex
from ckpt.format.codec import decode_chunk
from ckpt.format.part import decode_part
from ckpt.save.chunks import NO_COMPRESSION, Compression
from ckpt.save.packs import Persisted, PersistLimits, pack_numbers_max, persist, put_part
from ckpt.values import (
    CHUNK_BYTES,
    PAGE_BYTES,
    Box,
    ChunkLocation,
    Codec,
    Digest,
    Leaf,
    LeafKind,
    SnapshotId,
    StagedIndex,
    StagedShard,
)

WRITER = "node-0123456789abcdef"
SMALL = PersistLimits(pack_bytes_max=5 << 20)


def slot(arrays: Mapping[str, np.ndarray], *, step: int = 0) -> tuple[StagedIndex, memoryview]:
    """What staging would leave: each array on a page, digests on the chunk grid."""
    body = bytearray()
    shards = []
    for name, array in arrays.items():
        raw = array.tobytes()
        leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype=str(array.dtype), shape=array.shape)
        digests = tuple(
            digest(raw[at : at + CHUNK_BYTES]) for at in range(0, len(raw), CHUNK_BYTES)
        )
        shards.append(
            StagedShard(
                leaf=leaf,
                box=Box.whole(array.shape),
                offset_bytes=len(body),
                size_bytes=len(raw),
                digests=digests,
            )
        )
        body += raw + bytes(-len(raw) % PAGE_BYTES)
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=tuple(shards))
    return index, memoryview(body)


def random(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, size).astype(np.float32)


def save(
    backend: Backend,
    staged: tuple[StagedIndex, memoryview],
    *,
    known: Mapping[Digest, ChunkLocation] | None = None,
    compression: Compression = NO_COMPRESSION,
    limits: PersistLimits = SMALL,
    start: int = 0,
) -> Persisted:
    index, data = staged
    return persist(
        index,
        data,
        stored_chunks=known or {},
        backend=backend,
        writer=WRITER,
        pack_start=start,
        compression=compression,
        limits=limits,
    )


def read_back(backend: Backend, done: Persisted, staged: tuple[StagedIndex, memoryview]) -> None:
    """Fails unless the stored part leads to exactly the staged bytes."""
    ref = put_part([done.part], backend=backend, writer=WRITER)
    body = bytearray(ref.size_bytes)
    backend.read_into(ref.key, memoryview(body))
    assert digest_hex(bytes(body)) == ref.digest
    part = decode_part(bytes(body))
    assert part == done.part
    index, data = staged
    assert part.snapshot == index.snapshot
    for shard, stored in zip(index.shards, part.shards, strict=True):
        raw = bytearray()
        for place in stored.locations:
            kept, out = bytearray(place.stored_bytes), bytearray(place.raw_bytes)
            backend.read_into(place.pack, memoryview(kept), offset_bytes=place.offset_bytes)
            decode_chunk(kept, place, memoryview(out))
            raw += out
        assert raw == data[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]


STATE = {
    "model/a": random(1, 3 * CHUNK_BYTES // 4 + 77),
    "model/b": random(2, 10),
    "model/zeros": np.zeros(2 * CHUNK_BYTES // 4, dtype=np.float32),
    "model/empty": np.zeros((0, 3), dtype=np.float32),
    "model/bytes": np.arange(200, dtype=np.uint8),
}


@pytest.mark.parametrize("mode", ["off", "on"])
def test_memory_store_gives_every_byte_back(mode: str) -> None:
    backend = MemoryBackend(f"persist-{mode}")
    staged = slot(STATE)
    done = save(backend, staged, compression=Compression("on") if mode == "on" else NO_COMPRESSION)
    read_back(backend, done, staged)
    codecs = {place.codec for place in done.locations.values()}
    assert codecs == {Codec.RAW} if mode == "off" else Codec.PLANES_ZSTD in codecs
    assert done.packs == len({place.pack for place in done.locations.values()}) > 1


def test_file_store_gives_every_byte_back(tmp_path: Path) -> None:
    backend = FileBackend(str(tmp_path))
    staged = slot(STATE)
    read_back(backend, save(backend, staged), staged)
    backend.close()


def test_equal_chunks_are_stored_once_and_known_ones_not_at_all() -> None:
    backend = MemoryBackend("persist-dedup")
    first = save(backend, slot(STATE))
    raw = sum(array.nbytes for array in STATE.values())
    assert first.new_bytes == raw - CHUNK_BYTES
    changed = {**STATE, "model/b": random(3, 10)}
    staged = slot(changed, step=1)
    second = save(backend, staged, known=first.locations, start=first.packs)
    assert second.new_bytes == 40
    assert second.packs == 1
    read_back(backend, second, staged)
    third = save(backend, slot(changed, step=2), known=second.locations, start=9)
    assert (third.new_bytes, third.packs) == (0, 0)
    assert third.locations == second.locations


def test_staged_byte_that_changed_is_found_before_it_is_written() -> None:
    backend = MemoryBackend("persist-verify")
    index, data = slot(STATE)
    data[CHUNK_BYTES + 5] ^= 1
    with pytest.raises(IntegrityError, match=r"leaf=model/a .*epoch 1 step 0.*not recorded"):
        save(backend, (index, data), limits=PersistLimits())
    assert list(backend.list("")) == []


def test_data_area_that_is_too_short_is_refused() -> None:
    index, data = slot(STATE)
    with pytest.raises(UsageError, match="shorter"):
        save(MemoryBackend("persist-short"), (index, data[:PAGE_BYTES]))


class Slow:
    """A store with a link of a given speed and room for some packs: its clock is what persist
    measures."""

    def __init__(self, inner: Backend, *, packs_max: int = 10**9, local: bool = False) -> None:
        self._inner = inner
        self._packs_max = packs_max
        self._local = local
        self.put_keys: list[str] = []

    @property
    def url(self) -> str:
        return self._inner.url

    def capabilities(self) -> Capabilities:
        return Capabilities(
            create_only=True, read_bytes_best=1 << 20, concurrency_best=2, direct_io=self._local
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self.put_keys.append(key)
        if len(self.put_keys) > self._packs_max:
            raise StoreFullError(f"no space left. key={key}")
        self._inner.put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()


def test_full_store_fails_with_key_and_writes_no_part() -> None:
    inner = MemoryBackend("persist-full")
    backend = Slow(inner, packs_max=1)
    with pytest.raises(StoreFullError, match=r"key=packs/.*not recorded, older ones stand"):
        save(backend, slot(STATE))
    assert all(stat.key.startswith("packs/") for stat in inner.list(""))


def test_store_that_fills_at_the_part_fails() -> None:
    backend = Slow(MemoryBackend("persist-part"), packs_max=1)
    done = save(backend, slot({"b": random(1, 5)}))
    with pytest.raises(StoreFullError, match=r"key=parts/.*part of ranks 0 to 0.*not recorded"):
        put_part([done.part], backend=backend, writer=WRITER)


def test_auto_compresses_for_a_slow_link_and_never_for_a_local_disk() -> None:
    staged = slot(STATE)
    slow = Compression("auto", link_bytes_per_s=1e6)
    done = save(Slow(MemoryBackend("persist-slow")), staged, compression=slow)
    assert Codec.PLANES_ZSTD in {place.codec for place in done.locations.values()}
    done = save(Slow(MemoryBackend("persist-local"), local=True), staged, compression=slow)
    assert {place.codec for place in done.locations.values()} == {Codec.RAW}


def test_auto_measures_an_unknown_link_with_its_first_pack() -> None:
    done = save(
        Slow(MemoryBackend("persist-measure")), slot(STATE), compression=Compression("auto")
    )
    assert done.link_bytes_per_s is not None
    first = min(place.pack for place in done.locations.values())
    assert {place.codec for place in done.locations.values() if place.pack == first} == {Codec.RAW}


def test_pack_numbers_stay_below_the_stated_bound() -> None:
    index, data = slot({f"w{i}": random(i, 5000) for i in range(40)} | STATE)
    for compression in (NO_COMPRESSION, Compression("on"), Compression("auto")):
        backend = MemoryBackend(f"persist-bound-{compression.mode}")
        done = save(backend, (index, data), compression=compression, limits=PersistLimits())
        assert done.packs <= pack_numbers_max(index)
