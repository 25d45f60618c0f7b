"""A small real store, written through the packages that training uses, for tests of store readers.

Needs no torch.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckpt.backends.base import Backend
from ckpt.errors import NotFoundError
from ckpt.format.canonical import digest
from ckpt.format.keys import writer_name
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.objects import Ref, encode_object
from ckpt.log.journal import Journal
from ckpt.save.chunks import NO_COMPRESSION, Compression
from ckpt.save.packs import persist, put_part
from ckpt.values import (
    CHUNK_BYTES,
    PAGE_BYTES,
    Box,
    ChunkLocation,
    Digest,
    Leaf,
    LeafKind,
    SnapshotId,
    SnapshotInfo,
    StagedIndex,
    StagedShard,
)

Array = NDArray[np.generic]

CREATED_UNIX_S = 1_700_000_000.0
"""The creation time in sample snapshots, the same in every run."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's box of a leaf, and its values. ``data`` is None for an alias."""

    leaf: Leaf
    box: Box
    data: Array | None


@dataclass(slots=True)
class SampleWriter:
    """Writes snapshots of made-up state into a store, one after another, as a job would."""

    backend: Backend
    job: str = "sample"
    compression: Compression = NO_COMPRESSION
    _journal: Journal | None = None
    _known: dict[Digest, ChunkLocation] = field(default_factory=dict)
    _base: SnapshotId | None = None
    _writes: int = 0

    @property
    def journal(self) -> Journal:
        """The store's log. The store is made on first use."""
        if self._journal is None:
            self._journal = Journal.open(self.backend, job=self.job, create=True)
        return self._journal

    def open_epoch(self, *, resume: SnapshotId | None = None) -> int:
        """Open an epoch; returns its number."""
        return self.journal.open_epoch(resume=resume)

    def write(
        self,
        snapshot: SnapshotId,
        ranks: Sequence[Sequence[Piece]],
        *,
        metadata: Mapping[str, float | int | str | bool | None] | None = None,
    ) -> SnapshotInfo:
        """Persist each rank's pieces and commit them as ``snapshot``. An epoch must be open."""
        refs: list[PartRef] = []
        new_bytes = size_bytes = 0
        known: dict[Digest, ChunkLocation] = {}
        for rank, pieces in enumerate(ranks):
            staged, data = stage(snapshot, pieces, rank=rank, world_size=len(ranks))
            self._writes += 1
            writer = writer_name("sample", f"{self._writes:016x}")
            done = persist(
                staged,
                data,
                stored_chunks={**self._known, **known},
                backend=self.backend,
                writer=writer,
                pack_start=0,
                compression=self.compression,
            )
            refs.append(put_part([done.part], backend=self.backend, writer=writer))
            known.update(done.locations)
            new_bytes += done.new_bytes
            size_bytes += sum(shard.size_bytes for shard in staged.shards)
        manifest = Manifest(
            job=self.job,
            snapshot=snapshot,
            world_size=len(ranks),
            parts=tuple(refs),
            size_bytes=size_bytes,
            new_bytes=new_bytes,
            created_unix_s=CREATED_UNIX_S + snapshot.step,
            base=self._base,
            metadata=metadata or {},
        )
        info = self.journal.commit(manifest, epoch=self.journal.refresh().epoch)
        self._known, self._base = known, snapshot
        return info


def stage(
    snapshot: SnapshotId, pieces: Sequence[Piece], *, rank: int, world_size: int
) -> tuple[StagedIndex, memoryview]:
    """Pieces in page-aligned memory, with the index that a slot would hold."""
    shards: list[StagedShard] = []
    at = 0
    placed: list[tuple[int, bytes]] = []
    for piece in pieces:
        if piece.data is None:
            continue
        raw = np.ascontiguousarray(piece.data).tobytes()
        digests = tuple(digest(raw[i : i + CHUNK_BYTES]) for i in range(0, len(raw), CHUNK_BYTES))
        shards.append(
            StagedShard(
                leaf=piece.leaf,
                box=piece.box,
                offset_bytes=at,
                size_bytes=len(raw),
                digests=digests,
            )
        )
        placed.append((at, raw))
        at += -(-len(raw) // PAGE_BYTES) * PAGE_BYTES
    data = memoryview(mmap.mmap(-1, max(at, PAGE_BYTES)))
    for offset, raw in placed:
        data[offset : offset + len(raw)] = raw
    aliases = tuple(piece.leaf for piece in pieces if piece.data is None)
    index = StagedIndex(
        snapshot=snapshot,
        rank=rank,
        world_size=world_size,
        shards=tuple(shards),
        aliases=aliases,
        metadata={},
    )
    return index, data


def tensor(name: str, data: Array, *, dtype: str | None = None, rank: int | None = None) -> Piece:
    """A whole tensor held by one rank. ``dtype`` is torch's name if numpy has no such type."""
    leaf = Leaf(
        name=name, kind=LeafKind.TENSOR, dtype=dtype or str(data.dtype), shape=data.shape, rank=rank
    )
    return Piece(leaf, Box.whole(data.shape), data)


def shard(name: str, whole: Array, box: Box, *, dtype: str | None = None) -> Piece:
    """The part of a shared tensor inside ``box``."""
    leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype or str(whole.dtype), shape=whole.shape)
    inside = tuple(slice(low, low + size) for low, size in zip(box.offsets, box.sizes, strict=True))
    return Piece(leaf, box, whole[inside])


def alias(name: str, of: Piece) -> Piece:
    """A second name for a piece's memory."""
    leaf = Leaf(
        name=name,
        kind=of.leaf.kind,
        dtype=of.leaf.dtype,
        shape=of.leaf.shape,
        rank=of.leaf.rank,
        alias_of=of.leaf.name,
    )
    return Piece(leaf, of.box, None)


def skeleton(name: str, value: object, *, rank: int) -> Piece:
    """An item's structure, encoded as by capture."""
    data = np.frombuffer(encode_object(value), np.uint8)
    leaf = Leaf(name=name, kind=LeafKind.OBJECT, dtype="uint8", shape=data.shape, rank=rank)
    return Piece(leaf, Box.whole(data.shape), data)


@dataclass(frozen=True, slots=True)
class SampleState:
    """The values of the sample state at one step, by the leaf's short name."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    embed_bits: NDArray[np.uint16]
    momentum: NDArray[np.float32]


def sample_state(step: int) -> SampleState:
    """The sample state's tensors at ``step``; the bias never changes."""
    random = np.random.default_rng(step)
    return SampleState(
        weight=random.standard_normal((48, 32), dtype=np.float32),
        bias=np.arange(48, dtype=np.float32),
        embed_bits=(
            random.standard_normal((10, 16), dtype=np.float32).view(np.uint32) >> 16
        ).astype(np.uint16),
        momentum=random.standard_normal((48, 32), dtype=np.float32),
    )


def sample_ranks(step: int) -> list[list[Piece]]:
    """The sample state of a job of two ranks.

    A sharded weight, a tied embedding, an optimizer, and objects of each rank.
    """
    state = sample_state(step)
    ranks: list[list[Piece]] = []
    for rank in (0, 1):
        rows = Box((24 * rank, 0), (24, 32))
        pieces = [
            shard("model/fc.weight", state.weight, rows),
            shard("optimizer/state/fc.weight/exp_avg", state.momentum, rows),
            tensor("optimizer/state/fc.weight/step", np.array(step, np.float32), rank=rank),
            tensor("noise", np.full(5, rank, np.int64), rank=rank),
            skeleton("model", _model_tree(), rank=rank),
            skeleton("optimizer", _optimizer_tree(), rank=rank),
            skeleton(
                "progress",
                {"step": step, "rank": rank, "loss": float("inf"), "seen": (1, 2)},
                rank=rank,
            ),
        ]
        if rank == 0:
            embed = tensor("model/embed.weight", state.embed_bits, dtype="bfloat16")
            pieces += [
                tensor("model/fc.bias", state.bias),
                embed,
                alias("model/head.weight", embed),
            ]
        ranks.append(pieces)
    return ranks


def write_sample_store(backend: Backend, *, steps: Sequence[int] = (10, 20, 30)) -> SampleWriter:
    """Fill an empty store with one epoch of snapshots of the sample state.

    The second snapshot is tagged ``best``.
    """
    writer = SampleWriter(backend)
    epoch = writer.open_epoch()
    for step in steps:
        writer.write(
            SnapshotId(epoch, step),
            sample_ranks(step),
            metadata={"loss": 1 / step, "note": "sample"},
        )
    if len(steps) > 1:
        writer.journal.tag("best", SnapshotId(epoch, steps[1]))
    return writer


def damage(backend: Backend, key: str, offset_bytes: int) -> None:
    """Flip one bit of a stored object, as a bad disk would.

    Raises NotFoundError if there is no such object.
    """
    stat = backend.stat(key)
    if stat is None:
        raise NotFoundError(f"no such object. key={key}")
    data = bytearray(stat.size_bytes)
    backend.read_into(key, memoryview(data))
    data[offset_bytes] ^= 0x10
    backend.delete(key)
    backend.put(key, [bytes(data)])


def _model_tree() -> dict[str, object]:
    return {
        name: Ref(f"model/{name}")
        for name in ("embed.weight", "fc.weight", "fc.bias", "head.weight")
    }


def _optimizer_tree() -> dict[str, object]:
    return {
        "state": {
            "fc.weight": {
                "step": Ref("optimizer/state/fc.weight/step"),
                "exp_avg": Ref("optimizer/state/fc.weight/exp_avg"),
            }
        },
        "param_groups": [
            {"lr": 0.1, "betas": (0.9, 0.99), "params": ["embed.weight", "fc.weight", "fc.bias"]}
        ],
    }
