"""Plain values, containers, tensors and objects with state: how each becomes what is stored, in
place where it can.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World, join
from ckpt.capture.streams import (
    RngState,
    generators_alike,
    is_iterated,
    is_loader,
    restore_loader,
    state_of_new_rank,
)
from ckpt.capture.tree import PLAIN, Stateful, Walker, class_name, is_stateful, state_of, type_name
from ckpt.errors import IntegrityError
from ckpt.events import log_warning
from ckpt.format.objects import (
    DataclassNode,
    EnumNode,
    Named,
    NamedTupleNode,
    Ref,
    StateNode,
    encode_object,
)
from ckpt.restore.apply.targets import (
    Coverage,
    NewTensor,
    RestoreProblems,
    Selection,
    TensorTargets,
)

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
        if before is node:
            return False
        return encode_object(self._by_value(before)) != encode_object(self._by_value(node))

    def _by_value(self, node: object) -> object:
        """A stored value with what its tensors hold instead of their names."""
        match node:
            case Ref():
                return Named("tensor", self._targets.content(node))
            case StateNode():
                return StateNode(node.class_name, self._by_value(node.state))
            case dict():
                return {key: self._by_value(part) for key, part in node.items()}
            case deque():
                return deque(map(self._by_value, node), node.maxlen)
            case list() | tuple():
                return type(node)(map(self._by_value, node))
            case DataclassNode():
                fields = {key: self._by_value(part) for key, part in node.fields.items()}
                return DataclassNode(node.type_name, fields)
            case NamedTupleNode():
                values = tuple(map(self._by_value, node.values))
                return NamedTupleNode(node.type_name, node.names, values)
        return node

    def _untied(self, live: object, node: object, path: str) -> RestoreStep:
        # Another one can be made of a plain value; of what is filled in place or loads itself, not.
        if "/" not in path or not _is_plain(live):
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
        if isinstance(live, torch.amp.GradScaler) and not self._scaler_fits(live, node, path):
            return lambda: live
        step = self.fresh(state, node, path)
        if isinstance(live, RngState):
            salt = self._targets.salt_of_new_rank()
            alike = frozenset() if salt is None else generators_alike(self._old_states(path))
            self.last.append(lambda: _set_generators(live, step(), salt, alike))
        else:
            self.late.append(lambda: _load(live, step()))
        return lambda: live

    def _scaler_fits(self, live: torch.amp.GradScaler, node: object, path: str) -> bool:
        """Whether the stored state is one that the scaler takes. A disabled one stores nothing, and
        ignores what it is given."""
        if live.is_enabled() and not node:
            # torch refuses it, because its scale would begin anew.
            self._problems.missing(path)
            return False
        if not live.is_enabled() and node:
            self.last.append(
                lambda: log_warning(
                    "the stored state of a GradScaler is not taken, because the live one is "
                    f"disabled: its scale is gone with the next snapshot. path={path!r}; enable "
                    "it to go on with the stored scale"
                )
            )
            return False
        return True

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


def _is_plain(value: object) -> bool:
    """Whether a live value holds neither tensors nor objects with state."""
    match value:
        case torch.Tensor() | torch.Generator() | nn.Module() | Optimizer():
            return False
        case dict():
            return all(map(_is_plain, value.values()))
        case list() | tuple() | deque():
            return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, one.name)) for one in dataclasses.fields(value))
    return not is_stateful(value)


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


def _load(live: Stateful, state: object) -> None:
    if is_loader(live) and isinstance(state, dict):
        restore_loader(live, state)
    else:
        live.load_state_dict(state)  # type: ignore[arg-type]
