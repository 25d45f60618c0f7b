"""Match live values with stored structure: what goes where. Decides; the returned steps do."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World
from ckpt.capture.loaders import is_iterated, is_loader, load_loader
from ckpt.capture.names import join
from ckpt.capture.streams import RngState
from ckpt.capture.tree import PLAIN, Stateful, Walker, is_stateful, state_of, type_name
from ckpt.errors import IntegrityError
from ckpt.format.manifest_objects import DataclassNode, EnumNode, Named, NamedTupleNode, Ref
from ckpt.restore.apply_select import Cover, Problems, Selection
from ckpt.restore.targets import New, Targets

Step = Callable[[], object]
"""Puts a value in place once all bytes are there, and returns it (the live object itself where that was filled)."""

Matcher = Callable[[nn.Module | Optimizer, object, str], Step]


class _Absent:
    """Stands for a live value that isn't there; fits nothing."""


ABSENT = _Absent()


class Values:
    """Plain containers, tensors and objects with state. ``sources`` matches modules and optimizers."""

    def __init__(self, targets: Targets, selection: Selection, problems: Problems, sources: Matcher) -> None:
        self._targets = targets
        self._selection = selection
        self._problems = problems
        self._sources = sources
        self.late: list[Callable[[], None]] = []
        self.last: list[Callable[[], None]] = []

    def match(self, live: object, node: object, path: str) -> Step:
        """How ``live`` becomes what ``node`` says; kept as it is where it isn't selected."""
        cover = self._selection.cover(path)
        if cover is Cover.NONE:
            return lambda: live
        match live:
            case nn.Module() | Optimizer():
                return self._sources(live, node, path)
            case torch.Tensor() if isinstance(node, Ref):
                return self._targets.into(live, node, path).value
            case dict() if isinstance(node, dict):
                return self._dict(live, node, path)
            case list() if isinstance(node, list):
                return self._list(live, node, path)
            case tuple() if type(live) is tuple and isinstance(node, tuple):
                steps = self._positions(live, node, path)
                return lambda: tuple(step() for step in steps)
            case torch.Generator() if isinstance(node, bytes):
                self.last.append(lambda: _set_generator(live, node))
                return lambda: live
        if dataclasses.is_dataclass(live) and isinstance(node, DataclassNode) and type_name(live) == node.type_name:
            return self._dataclass(live, node, path)
        if is_stateful(live):
            return self._stateful(live, node, path, cover)
        return self.fresh(live, node, path)

    def fresh(self, hint: object, node: object, path: str) -> Step:
        """How ``node`` becomes a new value. ``hint`` is the live value there: it lends types, devices and factories."""
        match node:
            case Ref():
                return self._new_tensor(hint, node, path)
            case dict():
                return self._new_dict(hint, node, path)
            case list() | tuple() | deque():
                parts = list(hint) if isinstance(hint, (list, tuple, deque)) else []
                steps = [self.fresh(_at(parts, i), one, join(path, i)) for i, one in enumerate(node)]
                return lambda: _sequence(node, [step() for step in steps])
            case set() | frozenset():
                hints = list(hint) if isinstance(hint, (set, frozenset)) else []
                made = [self._key(one, hints, path) for one in node]
                return lambda: type(node)(made)
            case Named() | EnumNode():
                value = self._key(node, [hint], path)
                return lambda: value
            case DataclassNode():
                if type_name(hint) != node.type_name:
                    return self._no_type(node.type_name, path)
                return self._dataclass(hint, node, path, anew=True)
            case NamedTupleNode():
                return self._named_tuple(hint, node, path)
            case _:
                return lambda: copy.copy(node)

    def _dict(self, live: dict[object, object], node: dict[object, object], path: str) -> Step:
        by_node = {_key_node(key): key for key in live}
        holds_objects = any(isinstance(one, (nn.Module, Optimizer)) or is_stateful(one) for one in live.values())
        steps: dict[object, Step] = {}
        for key, one in node.items():
            where = join(path, key)
            if key in by_node:
                steps[by_node[key]] = self.match(live[by_node[key]], one, where)
            elif self._selection.cover(where) is Cover.NONE:
                continue
            elif holds_objects and isinstance(one, dict):
                self._problems.unexpected(where)
            else:
                steps[self._key(key, live, path)] = self.fresh(ABSENT, one, where)
        for key in by_node.keys() - node.keys():
            where = join(path, key)
            if self._must_stay(live[by_node[key]], path, where):
                self._problems.missing(where)
                steps[by_node[key]] = _constant(live[by_node[key]])
            elif self._selection.cover(where) is not Cover.ALL:
                steps[by_node[key]] = _constant(live[by_node[key]])

        def put() -> object:
            values = {key: step() for key, step in steps.items()}
            live.clear()
            live.update(values)
            return live

        return put

    def _must_stay(self, value: object, path: str, where: str) -> bool:
        """Whether a live value that the snapshot lacks is named by the user, or holds state: then it can't just go."""
        named_by_user = "/" not in path
        holds = isinstance(value, (nn.Module, Optimizer, torch.Generator)) or is_stateful(value)
        return (named_by_user or holds) and self._selection.cover(where) is not Cover.NONE

    def _list(self, live: list[object], node: list[object], path: str) -> Step:
        steps = self._positions(live, node, path)

        def put() -> object:
            live[:] = [step() for step in steps]
            return live

        return put

    def _positions(self, live: list[object] | tuple[object, ...], node: Iterable[object], path: str) -> list[Step]:
        steps = [self.match(_at(live, i), one, join(path, i)) for i, one in enumerate(node)]
        for i in range(len(steps), len(live)):
            if isinstance(live[i], (nn.Module, Optimizer, torch.Generator)) or is_stateful(live[i]):
                self._problems.missing(join(path, i))
                steps.append(_constant(live[i]))
        return steps

    def _dataclass(self, live: object, node: DataclassNode, path: str, *, anew: bool = False) -> Step:
        anew = anew or bool(getattr(type(live), "__dataclass_params__").frozen)  # noqa: B009 - unknown to type checkers
        known = {one.name for one in dataclasses.fields(live)}  # type: ignore[arg-type]
        steps: dict[str, Step] = {}
        for key, one in node.fields.items():
            where = join(path, key)
            if key not in known:
                self._problems.unexpected(where)
                continue
            before = getattr(live, key, ABSENT)
            steps[key] = self.fresh(before, one, where) if anew else self.match(before, one, where)
        for key in known - node.fields.keys():
            self._problems.missing(join(path, key))

        def put() -> object:
            target = copy.copy(live) if anew else live
            for key, step in steps.items():
                object.__setattr__(target, key, step())
            return target

        return put

    def _named_tuple(self, hint: object, node: NamedTupleNode, path: str) -> Step:
        if type_name(hint) != node.type_name or getattr(hint, "_fields", None) != node.names:
            return self._no_type(node.type_name, path)
        steps = [
            self.match(getattr(hint, name), one, join(path, name))
            for name, one in zip(node.names, node.values, strict=True)
        ]
        make: Callable[[list[object]], object] = type(hint)._make  # type: ignore[attr-defined]
        return lambda: make([step() for step in steps])

    def _stateful(self, live: Stateful, node: object, path: str, cover: Cover) -> Step:
        if cover is Cover.PART:
            self._problems.add("object can only be restored whole.", path, "name the whole object in only=[...]")
            return lambda: live
        if is_loader(live) and is_iterated(live):
            self._problems.add(
                "loader is being iterated, and would go on from where it is.",
                path,
                "restore before iter(), or make a new one",
            )
            return lambda: live
        state = state_of(live)
        if isinstance(state, Mapping) != isinstance(node, dict):
            self._problems.add(f"stored value is no state of this object. type={type_name(live)}", path)
            return lambda: live
        step = self.fresh(state, node, path)
        steps = self.last if isinstance(live, RngState) else self.late
        steps.append(lambda: _load(live, step()))
        return lambda: live

    def _new_tensor(self, hint: object, ref: Ref, path: str) -> Step:
        device = hint.device if isinstance(hint, torch.Tensor) else _device(ref.device)
        return self._targets.fresh(New(self._targets.stored(ref), device), ref, path).value

    def _new_dict(self, hint: object, node: dict[object, object], path: str) -> Step:
        before: Mapping[object, object] = hint if isinstance(hint, dict) else {}
        by_node = {_key_node(key): key for key in before}
        steps = {
            self._key(key, before, path): self.fresh(
                before[by_node[key]] if key in by_node else ABSENT, one, join(path, key)
            )
            for key, one in node.items()
        }

        def make() -> object:
            values = {key: step() for key, step in steps.items()}
            match node:
                case OrderedDict():
                    return OrderedDict(values)
                case Counter():
                    return Counter(values)
            return defaultdict(hint.default_factory, values) if isinstance(hint, defaultdict) else values

        return make

    def _key(self, node: object, hints: Iterable[object], path: str) -> object:
        """A dict key, a set's element or a constant; enum types come from ``hints`` only."""
        match node:
            case Named():
                return _constant_of(node)
            case tuple():
                return tuple(self._key(one, hints, path) for one in node)
            case EnumNode():
                for hint in hints:
                    if isinstance(hint, enum.Enum) and type_name(hint) == node.type_name:
                        if node.member in type(hint).__members__:
                            return type(hint)[node.member]
                        self._problems.add(
                            f"enum has no such member. type={node.type_name} member={node.member!r}", path
                        )
                        return node
                self._no_type(node.type_name, path)
        return node

    def _no_type(self, name: str, path: str) -> Step:
        self._problems.add(
            f"stored value has a type that no live value there has. type={name}",
            path,
            "put such a value there before restoring",
        )
        return lambda: None


def _at(values: list[object] | tuple[object, ...], index: int) -> object:
    return values[index] if index < len(values) else ABSENT


def _constant(value: object) -> Step:
    return lambda: value


def _sequence(node: list[object] | tuple[object, ...] | deque[object], values: list[object]) -> object:
    match node:
        case tuple():
            return tuple(values)
        case deque():
            return deque(values, node.maxlen)
    return values


def _key_node(key: object) -> object:
    return key if type(key) in PLAIN else Walker(World(0, 1), {}, {}).key(key, "")


def _constant_of(node: Named) -> object:
    try:
        return _parse_constant(node)
    except (RuntimeError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"stored constant can't be read. kind={node.kind!r} text={node.text!r} error={error}"
        ) from None


def _parse_constant(node: Named) -> object:
    match node.kind:
        case "torch.Size":
            return torch.Size(int(one) for one in node.text.split(",") if one)
        case "torch.device":
            return torch.device(node.text)
        case "torch.dtype" | "torch.layout" | "torch.memory_format":
            found = getattr(torch, node.text, None)
            return found if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) else node
    return node


def _device(kind: str) -> torch.device:
    """The recorded kind of device where this process has it, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(accelerator.type if accelerator is not None and kind == accelerator.type else "cpu")


def _set_generator(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _load(live: Stateful, state: object) -> None:
    if is_loader(live) and isinstance(state, dict):
        load_loader(live, state)
    else:
        live.load_state_dict(state)  # type: ignore[arg-type]
