"""What must hold inside a staged index. Pure: the answer is what is wrong, or None."""

from __future__ import annotations

from ckpt.format.part_rules import leaf_problem
from ckpt.values import CHUNK_BYTES, DIGEST_BYTES, DTYPE_BYTES, Leaf, StagedIndex, StagedShard


def index_problem(index: StagedIndex, *, data_bytes: int) -> str | None:
    """What makes ``index`` unfit for a slot whose data area has ``data_bytes``, as ``fact. key=value``, or None."""
    if not (0 <= index.rank < index.world_size):
        return f"rank outside its world. rank={index.rank} world_size={index.world_size}"
    if index.snapshot.epoch < 0 or index.snapshot.step < 0:
        return f"negative epoch or step. snapshot={index.snapshot}"
    checked: set[Leaf] = set()
    for shard in index.shards:
        if shard.leaf not in checked:
            if why := leaf_problem(shard.leaf, world_size=index.world_size, alias=False):
                return why
            checked.add(shard.leaf)
        if why := _shard_problem(shard, data_bytes):
            return f"{why} leaf={shard.leaf.name!r}"
    for alias in index.aliases:
        if why := leaf_problem(alias, world_size=index.world_size, alias=True):
            return why
    return None


def _shard_problem(shard: StagedShard, data_bytes: int) -> str | None:
    box, shape, size = shard.box, shard.leaf.shape, shard.size_bytes
    if not len(box.offsets) == len(box.sizes) == len(shape):
        return f"box of other dimensions than its leaf. box={len(box.sizes)} shape={len(shape)}"
    for offset, length, whole in zip(box.offsets, box.sizes, shape, strict=True):
        if offset < 0 or length < 0 or offset + length > whole:
            return f"box outside its leaf. offset={offset} size={length} whole={whole}"
    if size != box.elements * DTYPE_BYTES[shard.leaf.dtype]:
        return f"size differs from box and dtype. size_bytes={size} elements={box.elements}"
    if shard.offset_bytes < 0 or shard.offset_bytes + size > data_bytes:
        return f"shard outside the data area. offset_bytes={shard.offset_bytes} size_bytes={size}"
    if len(shard.digests) != -(-size // CHUNK_BYTES):
        return f"not one digest a chunk. size_bytes={size} digests={len(shard.digests)}"
    if any(len(digest) != DIGEST_BYTES for digest in shard.digests):
        return "digest of another length."
    return None
