"""A stored item's structure without its live objects, for reading and listing. Torch-free."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from ckpt.errors import IntegrityError, NotFoundError
from ckpt.format.index import SnapshotIndex
from ckpt.format.manifest_objects import DataclassNode, NamedTupleNode, Ref, decode_object
from ckpt.restore.plan import Want
from ckpt.values import Box, Leaf, LeafKind

T = TypeVar("T")

Read = Callable[[Sequence[Want], Sequence[memoryview]], None]
"""Fills each output with its want's elements in C order; raises IntegrityError where bytes differ from their digest."""


def rank_of(index: SnapshotIndex, rank: int) -> int:
    """The old rank whose leaves a rank takes: its own number modulo the size of the world that was captured."""
    return rank % index.manifest.world_size


def find(index: SnapshotIndex, name: str, rank: int) -> Leaf | None:
    """The leaf that all ranks share, else the one that ``rank`` takes, else None."""
    return index.leaf(name, None) or index.leaf(name, rank_of(index, rank))


def item_names(index: SnapshotIndex) -> list[str]:
    """The tracked items of a snapshot, as their leaves' names begin."""
    return list(dict.fromkeys(leaf.name.split("/", 1)[0] for leaf in index.leaves()))


def read_objects(index: SnapshotIndex, names: Sequence[str], *, rank: int, read: Read) -> dict[str, object]:
    """The skeletons of those items that the snapshot has, in one read. An item that is a tensor has its Ref as skeleton.

    Raises IntegrityError where bytes are not what was written.
    """
    found = {name: leaf for name in names if (leaf := find(index, name, rank)) is not None}
    leaves = {name: leaf for name, leaf in found.items() if leaf.kind is not LeafKind.TENSOR}
    for name, leaf in leaves.items():
        if len(leaf.shape) != 1:
            raise IntegrityError(f"item's structure is not an object. item={name!r} leaf={leaf}")
    buffers = {name: bytearray(leaf.shape[0]) for name, leaf in leaves.items()}
    wants = [Want(name, leaf.rank, Box.whole(leaf.shape)) for name, leaf in leaves.items()]
    read(wants, [memoryview(one) for one in buffers.values()])
    return {name: decode_object(buffers[name]) if name in buffers else Ref(name) for name in found}


def rebuild(index: SnapshotIndex, name: str, *, read: Read, tensors: Callable[[Ref], T], rank: int = 0) -> object:
    """The item's value in plain Python, each tensor replaced by what ``tensors`` gives for it.

    ``name`` is the item's escaped name. Instances of user classes stay nodes; nothing is imported. Raises NotFoundError
    where there is no such item.
    """
    found = read_objects(index, [name], rank=rank, read=read)
    if name not in found:
        raise NotFoundError(f"snapshot has no such item. item={name!r} items={item_names(index)}")
    return with_tensors(found[name], tensors)


def with_tensors(node: object, tensors: Callable[[Ref], T]) -> object:
    """The skeleton with each ``Ref`` replaced, containers made anew."""
    match node:
        case Ref():
            return tensors(node)
        case dict():
            pairs = {key: with_tensors(one, tensors) for key, one in node.items()}
            if isinstance(node, Counter):
                return Counter(pairs)
            return OrderedDict(pairs) if isinstance(node, OrderedDict) else pairs
        case deque():
            return deque((with_tensors(one, tensors) for one in node), node.maxlen)
        case list():
            return [with_tensors(one, tensors) for one in node]
        case tuple():
            return tuple(with_tensors(one, tensors) for one in node)
        case DataclassNode():
            return DataclassNode(node.type_name, {key: with_tensors(one, tensors) for key, one in node.fields.items()})
        case NamedTupleNode():
            return NamedTupleNode(node.type_name, node.names, tuple(with_tensors(one, tensors) for one in node.values))
        case _:
            return node
