"""A snapshot's items as files of other libraries: the items, and writing them. No torch.

A tracked item is stored as a skeleton with references in place of tensors. Here the references meet
their leaves, and what only ckpt knows (dataclass, enum and named-tuple nodes) becomes plain.
"""

from __future__ import annotations

import math
import os
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ckpt.errors import (
    IntegrityError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import DataclassNode, EnumNode, Named, NamedTupleNode, Ref, StateNode
from ckpt.restore.fetch import OnProgress
from ckpt.restore.reader import SnapshotReader, item_names, with_tensors
from ckpt.values import Leaf, LeafKind

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class ExportItem:
    """One tracked item of one rank. ``tree`` holds ``Ref`` nodes; ``leaves`` are what they refer
    to, by the Ref's name.
    """

    name: str
    rank: int
    tree: object
    leaves: Mapping[str, Leaf]

    def short(self, leaf: str) -> str:
        """A leaf's name without the item's."""
        return leaf.removeprefix(f"{self.name}/")


def load_item(reader: SnapshotReader, name: str, *, rank: int) -> ExportItem | None:
    """The item as ``rank`` captured it, or None if that rank has nothing of it.

    An item without a skeleton is a dict of its tensors by their short names. Raises IntegrityError
    if the skeleton is damaged or refers to a leaf that does not exist.
    """
    index = reader.index
    skeleton = index.leaf(name, None) or index.leaf(name, rank)
    if skeleton is not None and skeleton.kind is LeafKind.OBJECT:
        tree = reader.read_object(name, rank=rank)
        refs: dict[str, Leaf] = {}
        with_tensors(
            tree, lambda ref: refs.setdefault(ref.leaf, _held(index, name, ref.leaf, rank))
        )
        return ExportItem(name, rank, tree, refs)
    item_leaves = [
        leaf
        for leaf in index.leaves()
        if leaf.kind is LeafKind.TENSOR
        and leaf.rank in (None, rank)
        and leaf.name.split("/", 1)[0] == name
    ]
    if not item_leaves:
        return None
    if len(item_leaves) == 1 and item_leaves[0].name == name:
        return ExportItem(name, rank, Ref(name), {name: item_leaves[0]})
    flat: dict[str, object] = {
        leaf.name.removeprefix(f"{name}/"): Ref(leaf.name) for leaf in item_leaves
    }
    return ExportItem(name, rank, flat, {leaf.name: leaf for leaf in item_leaves})


def _held(index: SnapshotIndex, item: str, leaf: str, rank: int) -> Leaf:
    held_leaf = index.leaf(leaf, None) or index.leaf(leaf, rank)
    if held_leaf is None:
        raise IntegrityError(
            f"an item's structure refers to a leaf that is not there. item={item} leaf={leaf} "
            f"rank={rank}"
        )
    return held_leaf


def indexed_optimizer(tree: object) -> object:
    """An optimizer's state by parameter names turned into torch's own form by index, if that is
    possible.

    ``{"state": {name: ...}, "param_groups": [{"params": [name, ...], ...}]}`` becomes the same with
    numbers counted over the groups, as ``torch.optim.Optimizer.load_state_dict`` takes it; the
    names are kept as ``param_names`` in each group. Anything else is returned as it is.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("state"), dict):
        return tree
    groups = tree.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(name, str) for name in group["params"])
        for group in groups
    ):
        return tree
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) != len(names) or not set(tree["state"]) <= set(numbers):
        return tree
    indexed: list[object] = []
    for group in groups:
        plain = {key: value for key, value in group.items() if key != "params"}
        plain.setdefault("param_names", list(group["params"]))
        indexed.append({**plain, "params": [numbers[name] for name in group["params"]]})
    state = dict(sorted((numbers[name], value) for name, value in tree["state"].items()))
    kept = {key: value for key, value in tree.items() if key != "boxes"}
    return {**kept, "state": state, "param_groups": indexed}


def plain_tree(
    value: object,
    *,
    tensor: Callable[[Ref], object],
    array: Callable[[np.ndarray[tuple[int, ...], np.dtype[np.generic]]], object],
    named: Callable[[Named], object],
) -> object:
    """A skeleton in plain containers: references, arrays and library constants become what the
    three functions give.

    Dataclass and named-tuple nodes become dicts of their fields, enum members their names, deques
    lists, frozen sets sets, numpy scalars Python numbers.
    """

    def plain(item: object) -> object:
        return plain_tree(item, tensor=tensor, array=array, named=named)

    value = value.state if isinstance(value, StateNode) else value
    match value:
        case Ref():
            return tensor(value)
        case Named():
            return named(value)
        case np.ndarray():
            return array(value)
        case np.generic():
            return value.item()
        case EnumNode():
            return value.member
        case DataclassNode():
            return {name: plain(item) for name, item in value.fields.items()}
        case NamedTupleNode():
            return {name: plain(item) for name, item in zip(value.names, value.values, strict=True)}
        case Counter():
            return Counter({plain(key): count for key, count in value.items()})
        case OrderedDict():
            return OrderedDict((plain(key), plain(item)) for key, item in value.items())
        case dict():
            return {plain(key): plain(item) for key, item in value.items()}
        case list() | deque():
            return [plain(item) for item in value]
        case tuple():
            return tuple(plain(item) for item in value)
        case set() | frozenset():
            return {plain(item) for item in value}
        case _:
            return value


def json_tree(value: object, short: Callable[[str], str]) -> JsonValue:
    """A skeleton as JSON. A value that JSON lacks becomes an object with one key that begins with
    ``$``.

    ``{"$tensor": name}``, ``{"$float": "nan"}``, ``{"$bytes": hex}``, ``{"$complex": [re, im]}``,
    ``{"$array": ..., "dtype": ...}``, ``{"$tuple": [...]}``, ``{"$set": [...]}``, ``{"$named":
    [kind, text]}``, and ``{"$dict": [[key, value], ...]}`` for a dict whose keys are not all text.
    """

    match value:
        case StateNode():
            return json_tree(value.state, short)
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {str(key): json_tree(item, short) for key, item in value.items()}
            return {
                "$dict": [
                    [json_tree(key, short), json_tree(item, short)] for key, item in value.items()
                ]
            }
        case list() | deque():
            return [json_tree(item, short) for item in value]
        case tuple():
            return {"$tuple": [json_tree(item, short) for item in value]}
        case set() | frozenset():
            return {"$set": [json_tree(item, short) for item in value]}
        case DataclassNode():
            return {"$dataclass": value.type_name, "fields": json_tree(value.fields, short)}
        case NamedTupleNode():
            fields = dict(zip(value.names, value.values, strict=True))
            return {"$namedtuple": value.type_name, "fields": json_tree(fields, short)}
        case Ref():
            return {"$tensor": short(value.leaf)}
        case np.ndarray():
            return {"$array": json_tree(value.tolist(), short), "dtype": str(value.dtype)}
        case np.generic():
            return json_tree(value.item(), short)
        case _:
            return _json_scalar(value)


def _json_scalar(value: object) -> JsonValue:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": str(value)}
        case complex():
            return {"$complex": [_json_scalar(value.real), _json_scalar(value.imag)]}
        case bytes() | bytearray():
            return {"$bytes": value.hex()}
        case Named():
            return {"$named": [value.kind, value.text]}
        case EnumNode():
            return {"$enum": [value.type_name, value.member]}
        case _:
            return {"$text": str(value)}


def is_flat(item: ExportItem) -> bool:
    """Whether the item is only a dict of tensors under their own short names."""
    tree = item.tree
    return isinstance(tree, dict) and all(
        isinstance(value, Ref) and key == item.short(value.leaf) for key, value in tree.items()
    )


# ---- files: plain ``torch.save`` files, or safetensors, one for each tracked item. Bytes are
# streamed, so that memory stays bounded for any size of snapshot. Everything is written under
# temporary names and synced before the first file gets its own name.

MEMORY_BYTES = 256 << 20
"""What an export may use if its caller gives no limit, beside the process's own size."""

_FULL = frozenset((28, 122))
_DENIED = frozenset((1, 13, 30))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How to stream: the window's length in bytes, and the observer of progress."""

    window_bytes: int
    on_progress: OnProgress | None = None


class ItemWriter(Protocol):
    """One file format: the names of its files, and how to write them."""

    def names(self, item: ExportItem) -> tuple[str, ...]:
        """The files that ``write`` makes for ``item``, without folder."""
        ...

    def write(
        self, item: ExportItem, reader: SnapshotReader, paths: Sequence[Path], stream: StreamOptions
    ) -> None:
        """Make those files at ``paths``, one for each name."""
        ...


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file that was written."""

    path: Path
    item: str
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export: one ``rank``'s state, or with ``all_ranks`` each in a folder of its own.
    ``items`` None is all.
    """

    rank: int = 0
    all_ranks: bool = False
    items: Sequence[str] | None = None
    force: bool = False
    memory_bytes: int = MEMORY_BYTES


def export(
    reader: SnapshotReader,
    folder: Path,
    writer: ItemWriter,
    options: ExportOptions,
    *,
    on_progress: OnProgress | None = None,
) -> tuple[ExportedFile, ...]:
    """Write the items of a snapshot into ``folder``, with ``all_ranks`` each rank's into
    ``rank-N``; returns what was written.

    Nothing appears under its final name before everything is written and synced. Raises UsageError
    if a file exists and ``force`` is off, NotFoundError for an item or rank that the snapshot
    lacks, IntegrityError for damage, and UnavailableError if the folder cannot take the files.
    """
    planned = _plan(reader, folder, writer, options)
    if not options.force:
        for _, paths in planned:
            if taken := next((path for path in paths if os.path.lexists(path)), None):
                raise UsageError(
                    f"a file is in the way. path={taken}; name another folder or pass --force"
                )
    how = StreamOptions(window_bytes=options.memory_bytes // 2, on_progress=on_progress)
    suffix = f".{secrets.token_hex(8)}.tmp"
    temps = {
        path: path.with_name(f".{path.name}{suffix}") for _, paths in planned for path in paths
    }
    with _translated(folder):
        try:
            for item, paths in planned:
                paths[0].parent.mkdir(parents=True, exist_ok=True)
                writer.write(item, reader, [temps[path] for path in paths], how)
                for path in paths:
                    _sync(temps[path])
            for path, temp in temps.items():
                temp.replace(path)
            for parent in {path.parent for path in temps}:
                _sync(parent)
        finally:
            for temp in temps.values():
                temp.unlink(missing_ok=True)
        return tuple(
            ExportedFile(path, item.name, item.rank, path.stat().st_size)
            for item, paths in planned
            for path in paths
        )


def _plan(
    reader: SnapshotReader, folder: Path, writer: ItemWriter, options: ExportOptions
) -> list[tuple[ExportItem, list[Path]]]:
    known_items = item_names(reader.index)
    names = known_items if options.items is None else list(dict.fromkeys(options.items))
    if missing := [name for name in names if name not in known_items]:
        raise NotFoundError(
            f"no such item in the snapshot. item={missing[0]} items={','.join(known_items)}"
        )
    ranks = reader.index.ranks
    if options.rank not in ranks:
        raise NotFoundError(
            f"no such rank in the snapshot. rank={options.rank} ranks=0..{len(ranks) - 1}"
        )
    planned: list[tuple[ExportItem, list[Path]]] = []
    for rank in ranks if options.all_ranks else (options.rank,):
        rank_folder = folder / f"rank-{rank}" if options.all_ranks else folder
        for name in names:
            item = load_item(reader, name, rank=rank)
            if item is not None:
                planned.append((item, [rank_folder / file for file in writer.names(item)]))
    return planned


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        location = f"errno={error.errno} path={error.filename or folder}"
        if error.errno in _FULL:
            raise StoreFullError(
                f"the folder is full. {location}; free space or name another folder"
            ) from error
        if error.errno in _DENIED:
            raise StoreDeniedError(f"the folder may not be written. {location}") from error
        raise UnavailableError(
            f"the folder cannot take the files: {error.strerror}. {location}"
        ) from error
