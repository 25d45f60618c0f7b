"""Restoring live objects in place: decide everything first, then read, then put values in place.

Matching live values with stored structure decides what goes where. It returns steps; only they
change live objects, after all bytes are there.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World, clean_fqn, escape, join
from ckpt.capture.modules import EXTRA_STATE, ComputedEntry, ModuleSource
from ckpt.capture.optimizers import OptimizerParameter, OptimizerSource
from ckpt.capture.plan import CapturePlan, capture
from ckpt.capture.streams import (
    RngState,
    generators_alike,
    is_iterated,
    is_loader,
    restore_loader,
    state_of_new_rank,
)
from ckpt.capture.tensors import is_dtensor, is_expanded
from ckpt.capture.tree import PLAIN, Stateful, Walker, class_name, is_stateful, state_of, type_name
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import (
    DataclassNode,
    EnumNode,
    Named,
    NamedTupleNode,
    Ref,
    StateNode,
    encode_object,
)
from ckpt.restore.reader import ReadWants, read_object_of_all_ranks, read_objects
from ckpt.restore.targets import (
    Coverage,
    NewTensor,
    RestoreProblems,
    Selection,
    TensorTargets,
    fill_tensors,
)
from ckpt.values import Box

RestoreStep = Callable[[], object]
"""Puts a value in place once all bytes are there, and returns it (the live object itself if that
was filled).
"""

SourceMatch = Callable[[nn.Module | Optimizer, object, str], RestoreStep]


class _NoLiveValue:
    """Stands for a live value that does not exist; fits nothing."""


ABSENT = _NoLiveValue()


class ValueMatcher:
    """Plain containers, tensors and objects with state. ``sources`` matches modules and
    optimizers.
    """

    def __init__(
        self,
        targets: TensorTargets,
        selection: Selection,
        problems: RestoreProblems,
        sources: SourceMatch,
        *,
        old_states: Callable[[str], Sequence[object]],
        any_class: bool = False,
    ) -> None:
        self._old_states = old_states
        self._any_class = any_class
        self._targets = targets
        self._selection = selection
        self._problems = problems
        self._sources = sources
        self._matched: dict[int, tuple[object, object]] = {}
        self.late: list[Callable[[], None]] = []
        self.last: list[Callable[[], None]] = []

    def match(self, live: object, node: object, path: str) -> RestoreStep:
        """How ``live`` becomes what ``node`` says; unchanged if it is not selected."""
        cover = self._selection.cover(path)
        if cover is Coverage.NONE:
            return lambda: live
        if isinstance(node, StateNode):
            self._check_class(live, node, path)
            node = node.state
        if cover is Coverage.ALL and self._is_other_than_before(live, node):
            return self._untied(live, node, path)
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
            case deque() | set() | bytearray() | np.ndarray() if _fits_in_place(live, node):
                made = self.fresh(live, node, path)
                return lambda: _filled(live, made())
            case torch.Generator() if isinstance(node, bytes):
                self.last.append(lambda: _set_generator(live, node))
                return lambda: live
        if (
            dataclasses.is_dataclass(live)
            and isinstance(node, DataclassNode)
            and type_name(live) == node.type_name
        ):
            return self._dataclass(live, node, path)
        if is_stateful(live):
            return self._stateful(live, node, path, cover)
        return self.fresh(live, node, path)

    def fresh(self, hint: object, node: object, path: str) -> RestoreStep:
        """How ``node`` becomes a new value. ``hint`` is the live value in its place: it gives
        types, devices and factories.
        """
        match node:
            case StateNode():
                return self.fresh(hint, node.state, path)
            case Ref():
                return self._new_tensor(hint, node, path)
            case dict():
                return self._new_dict(hint, node, path)
            case list() | tuple() | deque():
                parts = list(hint) if isinstance(hint, (list, tuple, deque)) else []
                steps = [
                    self.fresh(_at(parts, i), part, join(path, i)) for i, part in enumerate(node)
                ]
                return lambda: _sequence(node, [step() for step in steps])
            case set() | frozenset():
                hints = list(hint) if isinstance(hint, (set, frozenset)) else []
                made = [self._key(part, hints, path) for part in node]
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

    def _is_other_than_before(self, live: object, node: object) -> bool:
        """Whether a container or array lies in several places now, and was stored as two that
        differ: a program may begin with one initial value for both, and then replace it in each.
        """
        if type(live) not in _UNTIED:
            return False
        _, before = self._matched.setdefault(id(live), (live, node))
        if before is node or not (_holds_no_tensor(before) and _holds_no_tensor(node)):
            return False
        return encode_object(before) != encode_object(node)

    def _untied(self, live: object, node: object, path: str) -> RestoreStep:
        if "/" not in path:
            self._problems.add(
                "one live object, but stored as two that differ.", path, "give each its own"
            )
            return lambda: live
        return self.fresh(live, node, path)

    def _check_class(self, live: object, node: StateNode, path: str) -> None:
        """State of another class may load without an error and mean something else. A class that
        only moved to another module is the same.
        """
        kept_state = isinstance(live, (nn.Module, Optimizer)) or is_stateful(live)
        own = class_name(live)
        if (
            self._any_class
            or not kept_state
            or own.split(":")[1:] == node.class_name.split(":")[1:]
        ):
            return
        self._problems.add(
            f"state is of another class. stored={node.class_name} live={own}",
            path,
            'use the class that it was saved from, or pass classes="any" if this is meant',
        )

    def _dict(
        self, live: dict[object, object], node: dict[object, object], path: str
    ) -> RestoreStep:
        by_node = {_key_node(key): key for key in live}
        holds_objects = any(
            isinstance(value, (nn.Module, Optimizer)) or is_stateful(value)
            for value in live.values()
        )
        steps: dict[object, RestoreStep] = {}
        for key, value in node.items():
            item_path = join(path, key)
            if key in by_node:
                steps[by_node[key]] = self.match(live[by_node[key]], value, item_path)
            elif self._selection.cover(item_path) is Coverage.NONE:
                continue
            elif isinstance(value, StateNode) or (holds_objects and isinstance(value, dict)):
                self._problems.unexpected(item_path)
            else:
                steps[self._key(key, live, path)] = self.fresh(ABSENT, value, item_path)
        for key in by_node.keys() - node.keys():
            item_path = join(path, key)
            if self._must_stay(live[by_node[key]], path, item_path):
                self._problems.missing(item_path)
                steps[by_node[key]] = _constant(live[by_node[key]])
            elif self._selection.cover(item_path) is not Coverage.ALL:
                steps[by_node[key]] = _constant(live[by_node[key]])

        def put() -> object:
            values = {key: step() for key, step in steps.items()}
            live.clear()
            live.update(values)
            return live

        return put

    def _must_stay(self, value: object, path: str, item_path: str) -> bool:
        """Whether a live value that the snapshot lacks may not be removed: the user named it, or it
        holds state.
        """
        named_by_user = "/" not in path
        holds = isinstance(value, (nn.Module, Optimizer, torch.Generator)) or is_stateful(value)
        return (named_by_user or holds) and self._selection.cover(item_path) is not Coverage.NONE

    def _list(self, live: list[object], node: list[object], path: str) -> RestoreStep:
        steps = self._positions(live, node, path)

        def put() -> object:
            live[:] = [step() for step in steps]
            return live

        return put

    def _positions(
        self, live: list[object] | tuple[object, ...], node: Iterable[object], path: str
    ) -> list[RestoreStep]:
        steps = [self.match(_at(live, i), item, join(path, i)) for i, item in enumerate(node)]
        for i in range(len(steps), len(live)):
            if isinstance(live[i], (nn.Module, Optimizer, torch.Generator)) or is_stateful(live[i]):
                self._problems.missing(join(path, i))
                steps.append(_constant(live[i]))
        return steps

    def _dataclass(
        self, live: object, node: DataclassNode, path: str, *, anew: bool = False
    ) -> RestoreStep:
        anew = anew or bool(getattr(type(live), "__dataclass_params__").frozen)  # noqa: B009 - unknown to type checkers
        field_names = {value.name for value in dataclasses.fields(live)}  # type: ignore[arg-type]
        steps: dict[str, RestoreStep] = {}
        for key, value in node.fields.items():
            field_path = join(path, key)
            if key not in field_names:
                self._problems.unexpected(field_path)
                continue
            before = getattr(live, key, ABSENT)
            steps[key] = (
                self.fresh(before, value, field_path)
                if anew
                else self.match(before, value, field_path)
            )
        for key in field_names - node.fields.keys():
            self._problems.missing(join(path, key))

        def put() -> object:
            target = copy.copy(live) if anew else live
            for key, step in steps.items():
                object.__setattr__(target, key, step())
            return target

        return put

    def _named_tuple(self, hint: object, node: NamedTupleNode, path: str) -> RestoreStep:
        if type_name(hint) != node.type_name or getattr(hint, "_fields", None) != node.names:
            return self._no_type(node.type_name, path)
        steps = [
            self.match(getattr(hint, name), value, join(path, name))
            for name, value in zip(node.names, node.values, strict=True)
        ]
        make: Callable[[list[object]], object] = type(hint)._make  # type: ignore[attr-defined]
        return lambda: make([step() for step in steps])

    def _stateful(self, live: Stateful, node: object, path: str, cover: Coverage) -> RestoreStep:
        if cover is Coverage.PART:
            self._problems.add(
                "object can only be restored whole.", path, "name the whole object in only=[...]"
            )
            return lambda: live
        if is_loader(live) and is_iterated(live):
            self._problems.add(
                "loader is being iterated, and would continue at its current position.",
                path,
                "restore before iter(), or make a new one",
            )
            return lambda: live
        state = state_of(live)
        if isinstance(state, Mapping) != isinstance(node, dict):
            self._problems.add(
                f"stored value is no state of this object. type={type_name(live)}", path
            )
            return lambda: live
        step = self.fresh(state, node, path)
        if isinstance(live, RngState):
            salt = self._targets.salt_of_new_rank()
            alike = frozenset() if salt is None else generators_alike(self._old_states(path))
            self.last.append(lambda: _set_generators(live, step(), salt, alike))
        else:
            self.late.append(lambda: _load(live, step()))
        return lambda: live

    def _new_tensor(self, hint: object, ref: Ref, path: str) -> RestoreStep:
        device = hint.device if isinstance(hint, torch.Tensor) else _device(ref.device)
        return self._targets.fresh(NewTensor(self._targets.stored(ref), device), ref, path).value

    def _new_dict(self, hint: object, node: dict[object, object], path: str) -> RestoreStep:
        before: Mapping[object, object] = hint if isinstance(hint, dict) else {}
        by_node = {_key_node(key): key for key in before}
        steps = {
            self._key(key, before, path): self.fresh(
                before[by_node[key]] if key in by_node else ABSENT, value, join(path, key)
            )
            for key, value in node.items()
        }

        def make() -> object:
            values = {key: step() for key, step in steps.items()}
            match node:
                case OrderedDict():
                    return OrderedDict(values)
                case Counter():
                    return Counter(values)
            return (
                defaultdict(hint.default_factory, values)
                if isinstance(hint, defaultdict)
                else values
            )

        return make

    def _key(self, node: object, hints: Iterable[object], path: str) -> object:
        """A dict key, a set's element or a constant; enum types come from ``hints`` only."""
        match node:
            case Named():
                return _constant_of(node)
            case tuple():
                return tuple(self._key(part, hints, path) for part in node)
            case EnumNode():
                for hint in hints:
                    if isinstance(hint, enum.Enum) and type_name(hint) == node.type_name:
                        if node.member in type(hint).__members__:
                            return type(hint)[node.member]
                        self._problems.add(
                            f"enum has no such member. type={node.type_name} "
                            f"member={node.member!r}",
                            path,
                        )
                        return node
                self._no_type(node.type_name, path)
        return node

    def _no_type(self, name: str, path: str) -> RestoreStep:
        self._problems.add(
            f"stored value has a type that no live value there has. type={name}",
            path,
            "put such a value there before restoring",
        )
        return lambda: None


def _at(values: list[object] | tuple[object, ...], index: int) -> object:
    return values[index] if index < len(values) else ABSENT


_UNTIED = (dict, OrderedDict, Counter, defaultdict, list, deque, set, bytearray, np.ndarray)
"""Types of which ``fresh`` makes another one that is the same."""


def _holds_no_tensor(node: object) -> bool:
    """Whether a stored value is only plain ones: two of them can be compared as they are."""
    match node:
        case Ref() | StateNode():
            return False
        case dict():
            return all(map(_holds_no_tensor, node.values()))
        case list() | tuple() | deque():
            return all(map(_holds_no_tensor, node))
        case DataclassNode():
            return all(map(_holds_no_tensor, node.fields.values()))
        case NamedTupleNode():
            return all(map(_holds_no_tensor, node.values))
    return True


_Plain = deque[object] | set[object] | bytearray | np.ndarray


def _fits_in_place(live: object, node: object) -> bool:
    """Whether a plain container or array can take a stored value: others in the program may hold
    it too, as they hold tensors.
    """
    if type(live) is not type(node):
        return False
    match live, node:
        case np.ndarray(), np.ndarray():
            return (live.dtype, live.shape) == (node.dtype, node.shape) and live.flags.writeable
        case deque(), deque():
            return live.maxlen == node.maxlen
    return True


def _filled(live: _Plain, value: object) -> object:
    match live, value:
        case np.ndarray(), np.ndarray():
            np.copyto(live, value)
        case bytearray(), bytearray():
            live[:] = value
        case deque(), deque():
            live.clear()
            live.extend(value)
        case set(), set():
            live.clear()
            live.update(value)
    return live


def _constant(value: object) -> RestoreStep:
    return lambda: value


def _sequence(
    node: list[object] | tuple[object, ...] | deque[object], values: list[object]
) -> object:
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
            return torch.Size(int(size) for size in node.text.split(",") if size)
        case "torch.device":
            return torch.device(node.text)
        case "torch.dtype" | "torch.layout" | "torch.memory_format":
            constant = getattr(torch, node.text, None)
            return (
                constant
                if isinstance(constant, (torch.dtype, torch.layout, torch.memory_format))
                else node
            )
    return node


def _device(kind: str) -> torch.device:
    """The recorded kind of device if this process has it, else the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return torch.device(
        accelerator.type if accelerator is not None and kind == accelerator.type else "cpu"
    )


def _set_generator(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _set_generators(
    live: RngState, state: object, salt: bytes | None, alike: frozenset[str]
) -> None:
    assert isinstance(state, dict), "a state of another kind is a difference"
    live.load_state_dict(
        state if salt is None else state_of_new_rank(state, salt=salt, alike=alike)
    )


def _node_at(node: object, path: str) -> object:
    """What an item's skeleton has at ``path``, or None."""
    place, _, rest = path.partition("/")
    while rest or isinstance(node, StateNode):
        match node:
            case StateNode():
                node = node.state
                continue
            case dict():
                parts = {join(place, key): part for key, part in node.items()}
            case list() | tuple():
                parts = {join(place, number): part for number, part in enumerate(node)}
            case DataclassNode():
                parts = {join(place, key): part for key, part in node.fields.items()}
            case _:
                return None
        component, _, rest = rest.partition("/")
        place = f"{place}/{component}"
        node = parts.get(place)
    return node


def _load(live: Stateful, state: object) -> None:
    if is_loader(live) and isinstance(state, dict):
        restore_loader(live, state)
    else:
        live.load_state_dict(state)  # type: ignore[arg-type]


class ModuleMatcher:
    """Modules by clean name: parameters and buffers are filled in place, extra state goes to
    ``set_extra_state``.
    """

    def __init__(
        self,
        targets: TensorTargets,
        selection: Selection,
        problems: RestoreProblems,
        values: ValueMatcher,
    ) -> None:
        self._targets = targets
        self._selection = selection
        self._problems = problems
        self._values = values

    def match(self, source: ModuleSource, node: object, path: str) -> RestoreStep:
        """How the module becomes what ``node`` says."""
        if not isinstance(node, dict):
            raise IntegrityError(f"stored value is no module's. path={path!r}")
        for entry in source.live:
            entry_path = join(path, entry.fqn)
            if self._selection.cover(entry_path) is Coverage.NONE:
                continue
            match node.get(entry.fqn):
                case None:
                    self._problems.missing(entry_path)
                case Ref() as ref:
                    self._targets.into(entry.tensor, ref, entry_path)
                case other:
                    self._problems.add(
                        f"stored value is no tensor. type={type(other).__name__}", entry_path
                    )
        made = self._made(source, node, path)
        known_names = {entry.fqn for entry in source.live} | {
            entry.fqn for entry in source.computed
        }
        for fqn in node:
            if (
                fqn not in known_names
                and self._selection.cover(join(path, fqn)) is not Coverage.NONE
            ):
                self._problems.unexpected(join(path, fqn))

        def put() -> object:
            _put_made(source, [(entry, step()) for entry, step in made])
            return source.module

        return put

    def _made(
        self, source: ModuleSource, node: dict[object, object], path: str
    ) -> list[tuple[ComputedEntry, RestoreStep]]:
        steps: list[tuple[ComputedEntry, RestoreStep]] = []
        for entry in source.computed:
            entry_path = join(path, entry.fqn)
            if self._selection.cover(entry_path) is Coverage.NONE:
                continue
            if entry.fqn not in node:
                self._problems.missing(entry_path)
            else:
                steps.append((entry, self._values.fresh(entry.value, node[entry.fqn], entry_path)))
        return steps


def _put_made(source: ModuleSource, values: list[tuple[ComputedEntry, object]]) -> None:
    extra = _extra_state_owners(source.module)
    others = {entry.key: value for entry, value in values if entry.fqn not in extra}
    for entry, value in values:
        if entry.fqn in extra:
            extra[entry.fqn].set_extra_state(value)
    if others:
        # Made by state-dict hooks: only the module's own loading knows what they mean. Live entries
        # are loaded onto themselves.
        live = {entry.key: entry.tensor for entry in source.live}
        kept = {entry.key: value for entry, value in values if entry.fqn in extra}
        try:
            loaded = source.module.load_state_dict({**live, **kept, **others}, strict=False)
        except RuntimeError as error:
            raise UsageError(
                f"module refuses the entries that its hooks made. path={source.path!r} "
                f"error={error}"
            ) from error
        # A module with a loading of its own may return nothing: then it says that it took all.
        # What it takes no notice of is not lost if the module makes the same again: of its other
        # state (a packed weight's scales), or because a hook read the entry and left it there.
        unexpected = others.keys() & set(getattr(loaded, "unexpected_keys", ()))
        ignored = sorted(_lost(source, {key: others[key] for key in unexpected}))
        if ignored:
            raise UsageError(
                "module takes no notice of entries that its hooks made, so they would be lost. "
                f"path={source.path!r} entries={ignored[:NAMES_SHOWN_MAX]} in_all={len(ignored)}; "
                "give it a hook that loads them, or leave them out of its state_dict"
            )


def _lost(source: ModuleSource, stored: Mapping[str, object]) -> list[str]:
    """The keys of ``stored`` entries that the module does not make again, bit by bit."""
    if not stored:
        return []
    source.rebuild()
    made = {entry.key: entry.value for entry in source.computed}
    return [
        key
        for key, value in stored.items()
        if key not in made or _as_bytes(made[key]) != _as_bytes(value)
    ]


def _as_bytes(value: object) -> tuple[bytes, ...]:
    captured = capture({"entry": {"value": value}}, world=World(0, 1))
    tensors = (
        bytes(leaf.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for leaf in captured.tensors
    )
    return (*(leaf.data for leaf in captured.objects), *tensors)


def _extra_state_owners(module: nn.Module) -> dict[str, nn.Module]:
    return {
        clean_fqn(module, f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE): submodule
        for name, submodule in module.named_modules(remove_duplicate=False)
        if type(submodule).get_extra_state is not nn.Module.get_extra_state
    }


NAMES_SHOWN_MAX = 3
"""Parameter names that one difference lists."""


class OptimizerMatcher:
    """Optimizers by parameter name: hyper-parameters are set, state is filled in place, made or
    removed.
    """

    def __init__(
        self,
        targets: TensorTargets,
        selection: Selection,
        problems: RestoreProblems,
        values: ValueMatcher,
    ) -> None:
        self._targets = targets
        self._selection = selection
        self._problems = problems
        self._values = values

    def match(self, source: OptimizerSource, node: object, path: str) -> RestoreStep:
        """How the optimizer becomes what ``node`` says."""
        state, groups = _parts(node, path)
        stored = {name for group in groups for name in _names(group, path)}
        steps: list[RestoreStep] = []
        self._check_order(source, groups, path)
        if self._selection.cover(f"{path}/param_groups") is not Coverage.NONE:
            steps += self._groups(source, groups, path)
        if self._selection.cover(f"{path}/state") is not Coverage.NONE:
            boxes = _boxes(node, path)
            flags = {name: _on_device(group) for group in groups for name in _names(group, path)}
            kept = self._of_this_share(source, node, path)
            for member in kept:
                state_path = f"{path}/state/{member.name}"
                if self._selection.cover(state_path) is Coverage.NONE:
                    continue
                if member.name not in stored:
                    self._problems.missing(state_path)
                else:
                    self._check_pieces(source, member, state.get(member.name), boxes, state_path)
                    steps.append(
                        self._state(
                            source,
                            member,
                            state.get(member.name),
                            state_path,
                            step_on_device=flags[member.name],
                        )
                    )
            for name in state.keys() - {member.name for member in source.parameters}:
                if self._selection.cover(f"{path}/state/{name}") is not Coverage.NONE:
                    self._problems.unexpected(f"{path}/state/{name}")

        def put() -> object:
            for step in steps:
                step()
            return source.optimizer

        return put

    def _check_order(
        self, source: OptimizerSource, groups: Sequence[Mapping[object, object]], path: str
    ) -> None:
        """LBFGS keeps its state for all parameters in a row, under the name of the first."""
        if not isinstance(source.optimizer, torch.optim.LBFGS):
            return
        stored = [name for group in groups for name in _names(group, path)]
        live = [member.name for member in source.parameters]
        if stored != live and sorted(stored) == sorted(live):
            self._problems.add(
                "optimizer's parameters are in another order, in which its state lies in a row. "
                f"stored={stored[:NAMES_SHOWN_MAX]} live={live[:NAMES_SHOWN_MAX]}",
                path,
                "give them in the order that they were saved in",
            )

    def _of_this_share(
        self, source: OptimizerSource, node: object, path: str
    ) -> list[OptimizerParameter]:
        """The parameters whose state this rank keeps and the snapshot's rank kept; others are a
        difference. Where ranks divide an optimizer's state, each has that of some parameters only.
        """
        share = _share(node, path)
        if share is None:
            return list(source.kept)
        elsewhere = [
            member.name
            for member in source.kept
            if member.name not in share
            and self._selection.cover(f"{path}/state/{member.name}") is not Coverage.NONE
        ]
        if elsewhere:
            self._problems.add(
                "optimizer's state of some parameters is of another rank, for ranks divide it "
                f"otherwise now. parameters={elsewhere[:NAMES_SHOWN_MAX]} "
                f"in_all={len(elsewhere)}",
                path,
                "restore with as many ranks and the same parameters as it was saved with, or leave "
                "it out with only=[...]",
            )
        return [member for member in source.kept if member.name in share]

    def _check_pieces(
        self,
        source: OptimizerSource,
        member: OptimizerParameter,
        node: object,
        boxes: Mapping[str, Box],
        state_path: str,
    ) -> None:
        """Plain state beside a sharded parameter is of one piece of it, and fits no other."""
        live = source.state.get(member.tensor, {})
        laid_out = {key for key, value in live.items() if is_dtensor(value)}
        for key, entry in node.items() if isinstance(node, dict) else ():
            if key in laid_out:
                continue
            for path, ref in _references(entry, join(state_path, key)):
                leaf = self._targets.stored(ref)
                if ref.placements or not leaf.shape:
                    continue
                piece = self._targets.piece_of(member.tensor, state_path)
                before = Box.whole(tuple(member.tensor.shape))
                if leaf.rank is None:
                    fits = piece == before or before.sizes == leaf.shape
                elif member.name in boxes:
                    before = boxes[member.name]
                    fits = piece == before
                else:  # not sharded then, or written before pieces were recorded
                    whole = before.sizes == leaf.shape  # laid out as the parameter is
                    same_world = self._targets.in_world_of_same_size
                    fits = not is_dtensor(member.tensor) or whole or same_world
                if not fits and not self._targets.is_one_number(leaf):
                    self._problems.add(
                        "optimizer's state is of another piece of its parameter. "
                        f"stored_piece={before} live_piece={piece}",
                        path,
                        "restore into the layout that it was saved in, or leave it out with "
                        "only=[...]",
                    )

    def _groups(
        self, source: OptimizerSource, groups: list[dict[object, object]], path: str
    ) -> list[RestoreStep]:
        live = source.optimizer.param_groups
        if len(live) != len(groups):
            self._problems.add(
                f"numbers of parameter groups differ. stored={len(groups)} live={len(live)}",
                f"{path}/param_groups",
                f'restore only=["{path}/state"] to keep the live groups',
            )
            return []
        steps: list[RestoreStep] = []
        for number, (group, node) in enumerate(zip(live, groups, strict=True)):
            group_path = f"{path}/param_groups/{number}"
            live_names = {value.name for value in source.parameters if value.group == number}
            stored_names = set(_names(node, path))
            if live_names != stored_names:
                self._problems.add(
                    "parameters of a group differ. "
                    f"only_live={sorted(live_names - stored_names)[:NAMES_SHOWN_MAX]} "
                    f"only_stored={sorted(stored_names - live_names)[:NAMES_SHOWN_MAX]}",
                    group_path,
                    f'restore only=["{path}/state"] to keep the live groups',
                )
            for key, value in node.items():
                if isinstance(key, str) and key != "params":
                    steps.append(self._hyper(group, key, value, join(group_path, key)))
        return steps

    def _hyper(
        self, group: dict[str, object], key: str, node: object, value_path: str
    ) -> RestoreStep:
        if self._selection.cover(value_path) is Coverage.NONE:
            return lambda: None
        step = self._values.match(group.get(key), node, value_path)

        def put() -> object:
            group[key] = step()
            return group

        return put

    def _state(
        self,
        source: OptimizerSource,
        member: OptimizerParameter,
        node: object,
        state_path: str,
        *,
        step_on_device: bool,
    ) -> RestoreStep:
        state = source.state
        if node is None:
            return lambda: state.pop(member.tensor, None)
        if not isinstance(node, dict):
            raise IntegrityError(f"optimizer's stored state is no dict. path={state_path!r}")
        before = state.get(member.tensor, {})
        steps = {
            key: self._entry(
                member,
                before.get(key),
                key,
                value,
                join(state_path, key),
                on_device=key == "step" and step_on_device,
            )
            for key, value in node.items()
        }

        def put() -> object:
            values = {key: step() for key, step in steps.items()}
            entry = state.setdefault(member.tensor, {})
            entry.clear()
            entry.update(values)
            return entry

        return put

    def _entry(
        self,
        member: OptimizerParameter,
        live: object,
        key: object,
        node: object,
        value_path: str,
        *,
        on_device: bool,
    ) -> RestoreStep:
        if not isinstance(node, Ref):
            return self._values.fresh(live, node, value_path)
        leaf = self._targets.stored(node)
        parameter = member.tensor
        device = parameter.device if on_device or node.device != "cpu" else torch.device("cpu")
        if isinstance(live, torch.Tensor) and live.device == device and not is_expanded(live):
            fits = tuple(live.shape) == leaf.shape and str(live.dtype) == f"torch.{leaf.dtype}"
            if fits or (leaf.shape and live.shape == parameter.shape):
                return self._targets.into(live, node, value_path).value
        like = parameter if leaf.shape and leaf.shape == tuple(parameter.shape) else None
        placements = ""
        if (
            like is None
            and is_dtensor(parameter)
            and node.placements.count(",") + 1 == parameter.device_mesh.ndim
        ):
            # Smaller than the parameter but on the same kind of mesh (a factored second moment).
            like, placements = (parameter, node.placements) if node.placements else (None, "")
        return self._targets.fresh(
            NewTensor(leaf, device, like, placements), node, value_path
        ).value


def _parts(node: object, path: str) -> tuple[Mapping[object, object], list[dict[object, object]]]:
    match node:
        case {"state": dict(state), "param_groups": list(groups)} if all(
            isinstance(group, dict) for group in groups
        ):
            return state, groups
    raise IntegrityError(f"stored value is no optimizer's. path={path!r}")


def _names(group: Mapping[object, object], path: str) -> list[str]:
    names = group.get("params")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise IntegrityError(f"stored group names no parameters. path={path!r}")
    return names


def _share(node: object, path: str) -> frozenset[str] | None:
    """The parameters whose state the snapshot's rank kept; None for all."""
    match node:
        case {"share": list(names)} if all(isinstance(name, str) for name in names):
            return frozenset(names)
        case {"share": _}:
            raise IntegrityError(f"stored share names no parameters. path={path!r}")
    return None


def _references(node: object, path: str) -> Iterator[tuple[str, Ref]]:
    """The references to tensors in one value of an optimizer's state, with their paths."""
    match node:
        case Ref():
            yield path, node
        case dict():
            for key, value in node.items():
                yield from _references(value, join(path, key))
        case list() | tuple():
            for index, value in enumerate(node):
                yield from _references(value, join(path, index))


def _boxes(node: object, path: str) -> dict[str, Box]:
    """The pieces of sharded parameters whose state is plain, by name."""
    match node:
        case {"boxes": dict(stored)}:
            pass
        case _:
            return {}
    boxes: dict[str, Box] = {}
    for name, piece in stored.items():
        match name, piece:
            case str(), [list(offsets), list(sizes)] if all(
                isinstance(number, int) for number in (*offsets, *sizes)
            ):
                boxes[name] = Box(tuple(offsets), tuple(sizes))
            case _:
                raise IntegrityError(f"stored piece can't be read. path={path!r} name={name!r}")
    return boxes


def _on_device(group: Mapping[object, object]) -> bool:
    """Whether torch keeps ``step`` on the parameter's device rather than on the CPU."""
    return bool(group.get("capturable") or group.get("fused"))


def apply(
    items: Mapping[str, object],
    index: SnapshotIndex,
    *,
    read: ReadWants,
    world: World,
    only: Sequence[str] | None = None,
    missing: Literal["error", "keep"] = "error",
    classes: Literal["same", "any"] = "same",
) -> tuple[str, ...]:
    """Make the live ``items`` what the snapshot says, in their own memory. Items that only the
    snapshot has are ignored.

    Parameters, buffers, optimizer state, tensors and containers keep their identity. What is absent
    live (optimizer state before the first step) is made; optimizer state that the snapshot lacks is
    removed. ``only`` names paths to restore, by whole components (``["model",
    "optimizer/state"]``); everything else is left as it is and not compared. ``missing="keep"``
    lets live things that the snapshot lacks keep their value; their paths are returned.
    ``classes="any"`` loads states of optimizers and objects also into those of another class.

    All differences (missing, unexpected, shapes, dtypes, ties, groups) are found before a byte of
    live memory is written, and raised as one UsageError. Errors of ``read`` pass through; live
    objects may then hold a part of the snapshot: apply another one before using them. In a world of
    another size this rank takes the per-rank leaves of old rank ``rank % old size``; optimizer
    state of another piece of its parameter is a difference.
    """
    if missing not in ("error", "keep"):
        raise UsageError(f'unknown value for missing. missing={missing!r}; pass "error" or "keep"')
    if classes not in ("same", "any"):
        raise UsageError(f'unknown value for classes. classes={classes!r}; pass "same" or "any"')
    if isinstance(only, str):
        raise UsageError(f"only is one text. only={only!r}; pass a list of paths")
    selection = Selection(only)
    problems = RestoreProblems(keep_missing=missing == "keep")
    restore = _RestoreDecision(
        CapturePlan(items, world), index, selection, problems, read=read, any_class=classes == "any"
    )
    steps = restore.decide()
    fill_tensors(restore.targets.fills(), read)
    for step in [*steps, *restore.values.late, *restore.values.last]:
        step()
    return tuple(problems.kept)


class _RestoreDecision:
    """The deciding half of one restore."""

    def __init__(
        self,
        plan: CapturePlan,
        index: SnapshotIndex,
        selection: Selection,
        problems: RestoreProblems,
        *,
        read: ReadWants,
        any_class: bool,
    ) -> None:
        self._read = read
        self._plan = plan
        self._index = index
        self._selection = selection
        self._problems = problems
        self.targets = TensorTargets(index, plan.world, problems)
        self.values = ValueMatcher(
            self.targets,
            selection,
            problems,
            self._source,
            old_states=self._old_states,
            any_class=any_class,
        )
        self._modules = ModuleMatcher(self.targets, selection, problems, self.values)
        self._optimizers = OptimizerMatcher(self.targets, selection, problems, self.values)

    def decide(self) -> list[RestoreStep]:
        """The steps to take once all bytes are there. Raises UsageError that lists every
        difference.
        """
        rank = self._plan.world.rank
        live = {escape(name): item for name, item in self._plan.items.items()}
        names = {
            name: item
            for name, item in live.items()
            if self._selection.cover(name) is not Coverage.NONE
        }
        stored = read_objects(self._index, list(names), rank=rank, read=self._read)
        steps: list[RestoreStep] = []
        for name, item in names.items():
            if name in stored:
                steps.append(self.values.match(item, stored[name], name))
            else:
                self._problems.missing(name)
        for path in self._selection.unused():
            self._problems.add("nothing has this path.", path, "correct only=[...]")
        self.targets.check_ties()
        self._problems.check()
        return steps

    def _old_states(self, path: str) -> list[object]:
        """The stored values at ``path`` of each rank of the snapshot. One read of the item."""
        item = path.partition("/")[0]
        nodes = read_object_of_all_ranks(self._index, item, read=self._read)
        return [_node_at(node, path) for node in nodes]

    def _source(self, live: nn.Module | Optimizer, node: object, path: str) -> RestoreStep:
        match self._plan.sources().get(id(live)):
            case ModuleSource() as source:
                return self._modules.match(source, node, path)
            case OptimizerSource() as source:
                return self._optimizers.match(source, node, path)
        raise UsageError(
            f"module or optimizer where none is looked for. path={path!r}; track it in a dict, "
            "list or tuple"
        )
