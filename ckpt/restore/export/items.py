"""An item's structure, as files of other programs can hold it. No torch.

A tracked item is stored as a skeleton with references where its tensors were. Here the references meet their leaves, and
what only ckpt knows (dataclass, enum and named-tuple nodes) becomes plain.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ckpt.errors import IntegrityError
from ckpt.format.index import SnapshotIndex
from ckpt.format.manifest_objects import DataclassNode, EnumNode, Named, NamedTupleNode, Ref
from ckpt.restore.reader import SnapshotReader
from ckpt.restore.rebuild import with_tensors
from ckpt.values import Leaf, LeafKind

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class Item:
    """One tracked item of one rank. ``tree`` holds ``Ref`` nodes; ``leaves`` are what they refer to, by the Ref's name."""

    name: str
    rank: int
    tree: object
    leaves: Mapping[str, Leaf]

    def short(self, leaf: str) -> str:
        """A leaf's name without the item's."""
        return leaf.removeprefix(f"{self.name}/")


def load_item(reader: SnapshotReader, name: str, *, rank: int) -> Item | None:
    """The item as ``rank`` captured it, or None where that rank has nothing of it.

    An item without a skeleton is a dict of its tensors by their short names. Raises IntegrityError where the skeleton is
    damaged or refers to a leaf that is not there.
    """
    index = reader.index
    skeleton = index.leaf(name, None) or index.leaf(name, rank)
    if skeleton is not None and skeleton.kind is LeafKind.OBJECT:
        tree = reader.read_object(name, rank=rank)
        refs: dict[str, Leaf] = {}
        with_tensors(tree, lambda ref: refs.setdefault(ref.leaf, _held(index, name, ref.leaf, rank)))
        return Item(name, rank, tree, refs)
    mine = [
        leaf
        for leaf in index.leaves()
        if leaf.kind is LeafKind.TENSOR and leaf.rank in (None, rank) and leaf.name.split("/", 1)[0] == name
    ]
    if not mine:
        return None
    if len(mine) == 1 and mine[0].name == name:
        return Item(name, rank, Ref(name), {name: mine[0]})
    flat: dict[str, object] = {leaf.name.removeprefix(f"{name}/"): Ref(leaf.name) for leaf in mine}
    return Item(name, rank, flat, {leaf.name: leaf for leaf in mine})


def _held(index: SnapshotIndex, item: str, leaf: str, rank: int) -> Leaf:
    found = index.leaf(leaf, None) or index.leaf(leaf, rank)
    if found is None:
        raise IntegrityError(
            f"an item's structure refers to a leaf that is not there. item={item} leaf={leaf} rank={rank}"
        )
    return found


def indexed_optimizer(tree: object) -> object:
    """An optimizer's state by parameter names turned into torch's own form by index, where that is possible.

    ``{"state": {name: ...}, "param_groups": [{"params": [name, ...], ...}]}`` becomes the same with numbers counted over
    the groups, as ``torch.optim.Optimizer.load_state_dict`` takes it; the names are kept as ``param_names`` in each group.
    Anything else comes back as it is.
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
    return {**tree, "state": state, "param_groups": indexed}


def plain_tree(
    value: object,
    *,
    tensor: Callable[[Ref], object],
    array: Callable[[np.ndarray[tuple[int, ...], np.dtype[np.generic]]], object],
    named: Callable[[Named], object],
) -> object:
    """A skeleton in plain containers: references, arrays and library constants become what the three functions say.

    Dataclass and named-tuple nodes become dicts of their fields, enum members their names, deques lists, frozen sets sets,
    numpy scalars Python numbers.
    """

    def plain(one: object) -> object:
        return plain_tree(one, tensor=tensor, array=array, named=named)

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
            return {name: plain(one) for name, one in value.fields.items()}
        case NamedTupleNode():
            return {name: plain(one) for name, one in zip(value.names, value.values, strict=True)}
        case Counter():
            return Counter({plain(key): count for key, count in value.items()})
        case OrderedDict():
            return OrderedDict((plain(key), plain(one)) for key, one in value.items())
        case dict():
            return {plain(key): plain(one) for key, one in value.items()}
        case list() | deque():
            return [plain(one) for one in value]
        case tuple():
            return tuple(plain(one) for one in value)
        case set() | frozenset():
            return {plain(one) for one in value}
        case _:
            return value


def json_tree(value: object, short: Callable[[str], str]) -> JsonValue:
    """A skeleton as JSON. What JSON lacks is an object with one key that begins with ``$``.

    ``{"$tensor": name}``, ``{"$float": "nan"}``, ``{"$bytes": hex}``, ``{"$complex": [re, im]}``, ``{"$array": ...,
    "dtype": ...}``, ``{"$tuple": [...]}``, ``{"$set": [...]}``, ``{"$named": [kind, text]}``, and ``{"$dict": [[key,
    value], ...]}`` for a dict whose keys are not all text.
    """

    match value:
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {str(key): json_tree(one, short) for key, one in value.items()}
            return {"$dict": [[json_tree(key, short), json_tree(one, short)] for key, one in value.items()]}
        case list() | deque():
            return [json_tree(one, short) for one in value]
        case tuple():
            return {"$tuple": [json_tree(one, short) for one in value]}
        case set() | frozenset():
            return {"$set": [json_tree(one, short) for one in value]}
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


def is_flat(item: Item) -> bool:
    """Whether the item is nothing but a dict of tensors under their own short names."""
    tree = item.tree
    return isinstance(tree, dict) and all(
        isinstance(value, Ref) and key == item.short(value.leaf) for key, value in tree.items()
    )
