"""Live values to skeletons: plain structure with ``Ref`` nodes in place of tensors."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ckpt.capture.leaves import TensorLeaf, World, join
from ckpt.capture.modules import ModuleSource
from ckpt.capture.optimizers import OptimizerSource, divided_keeper
from ckpt.capture.streams import is_loader, loader_state
from ckpt.capture.tensors import (
    UNSHARED,
    Sharing,
    check_can_be_filled,
    check_carries_nothing,
    describe,
    is_dtensor,
    layout_text,
    same_memory,
)
from ckpt.errors import UsageError
from ckpt.format.objects import (
    DEPTH_MAX,
    DataclassNode,
    EnumNode,
    Named,
    NamedTupleNode,
    Ref,
    StateNode,
)

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, np.ndarray})
"""Types that the codec takes as they are."""

SEQUENCES = (list, tuple, set, frozenset, deque)
MAPPINGS = (dict, OrderedDict, Counter, defaultdict)


@runtime_checkable
class Stateful(Protocol):
    """What an object needs to be tracked."""

    def state_dict(self) -> dict[str, object]:
        """Its state: plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, object]) -> object:
        """Restore a state."""
        ...


LeafMemo = dict[str, tuple[torch.Tensor, TensorLeaf]]
"""Tensors by leaf name as they were last described, so that unchanged ones are not
described again.
"""


class Walker:
    """One pass over the tracked items. ``tensors`` collects the leaves in order."""

    def __init__(
        self, world: World, sources: Mapping[int, ModuleSource | OptimizerSource], memo: LeafMemo
    ) -> None:
        self.tensors: list[TensorLeaf] = []
        self._world = world
        self._sources = sources
        self._memo = memo
        self._depth = 0
        self._made_anew = 0

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Inside, values are those that a restore makes anew rather than fills."""
        self._made_anew += 1
        try:
            yield
        finally:
            self._made_anew -= 1

    def node(self, value: object, path: str, sharing: Sharing = UNSHARED) -> object:
        """The skeleton of ``value`` at ``path``. Raises UsageError naming the path of what can't be
        stored.
        """
        if type(value) in PLAIN or isinstance(value, np.generic):
            return value
        if self._depth > DEPTH_MAX:
            raise UsageError(
                f"value is nested too deep, or contains itself. path={path!r} "
                f"levels_max={DEPTH_MAX}"
            )
        self._depth += 1
        skeleton = self._composite(value, path, sharing)
        self._depth -= 1
        return skeleton

    def _composite(self, value: object, path: str, sharing: Sharing) -> object:
        match value:
            case torch.Tensor():
                return self._tensor(value, path, sharing)
            case nn.Module() | Optimizer():
                return self._source(value, path)
            case dict() if type(value) in MAPPINGS:
                return self._mapping(value, path, sharing)
            case torch.Size():
                return Named("torch.Size", ",".join(map(str, value)))
            case tuple() if hasattr(value, "_fields"):
                parts = tuple(
                    self.node(part, join(path, key), sharing)
                    for key, part in zip(value._fields, value, strict=True)
                )
                return NamedTupleNode(type_name(value), tuple(value._fields), parts)
            case set() | frozenset() if type(value) in SEQUENCES:
                return type(value)(self.key(part, path) for part in value)
            case list() | tuple() | deque() if type(value) in SEQUENCES:
                made = [
                    self.node(part, join(path, index), sharing) for index, part in enumerate(value)
                ]
                return deque(made, value.maxlen) if isinstance(value, deque) else type(value)(made)
            case torch.Generator():
                return value.get_state().numpy().tobytes()
            case enum.Enum() if value.name in type(value).__members__:
                return EnumNode(type_name(value), value.name)
        if (constant := torch_constant(value)) is not None:
            return constant
        if is_stateful(value):
            return self._stateful(value, path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
            frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
            with self._replaced() if frozen else nullcontext():
                return DataclassNode(
                    type_name(value),
                    {
                        key: self.node(part, join(path, key), sharing)
                        for key, part in fields.items()
                    },
                )
        raise unsupported(value, path)

    def _tensor(self, tensor: torch.Tensor, path: str, sharing: Sharing) -> Ref:
        before = self._memo.get(path)
        if before is not None and before[0] is tensor and same_memory(tensor, before[1]):
            leaf = before[1]
        else:
            leaf = describe(path, tensor, world=self._world, sharing=sharing)
            check_carries_nothing(path, tensor)
            if not self._made_anew:
                check_can_be_filled(leaf)
            self._memo[path] = (tensor, leaf)
        self.tensors.append(leaf)
        return Ref(path, tensor.device.type, layout_text(tensor))

    def _mapping(self, value: dict[object, object], path: str, sharing: Sharing) -> object:
        pairs = {
            self.key(key, path): self.node(item, join(path, key), sharing)
            for key, item in value.items()
        }
        match value:
            case OrderedDict():
                return OrderedDict(pairs)
            case Counter():
                return Counter(pairs)
            case _:
                return pairs

    def key(self, key: object, path: str) -> object:
        """The node of a dict's key or a set's element."""
        if type(key) in PLAIN or isinstance(key, np.generic):
            return key
        node = self.node(key, join(path, key))
        if isinstance(node, (Ref, DataclassNode, NamedTupleNode, StateNode)):
            raise UsageError(
                f"key or set element can't be stored. path={path!r} type={type(key).__qualname__}; "
                "use text or numbers"
            )
        return node

    def _source(self, value: nn.Module | Optimizer, path: str) -> object:
        match self._sources.get(id(value)):
            case ModuleSource(path=first) | OptimizerSource(path=first) if first != path:
                raise UsageError(
                    f"object is tracked twice. first={first!r} second={path!r}; track it once"
                )
            case ModuleSource() as source:
                return self._module(source)
            case OptimizerSource() as source:
                return self._optimizer(source)
        raise UsageError(
            f"module or optimizer where none is looked for. path={path!r}; track it in a dict, "
            "list or tuple"
        )

    def _module(self, source: ModuleSource) -> object:
        self.tensors.extend(source.leaves)
        if not source.computed:
            return source.encoded()
        with self._replaced():
            made = {
                entry.fqn: self.node(entry.value, join(source.path, entry.fqn))
                for entry in source.computed
            }
        return {**source.references(), **made}

    def _optimizer(self, source: OptimizerSource) -> object:
        state = self._optimizer_state(source)
        node: dict[str, object] = {"state": state, "param_groups": self._groups(source)}
        if source.boxes:
            node["boxes"] = source.boxes
        if source.rewritten is not None and source.rewritten.entries:
            path = f"{source.path}/entries"
            with self._replaced():
                node["entries"] = {
                    key: self.node(value, join(path, key))
                    for key, value in source.rewritten.entries.items()
                }
        if (share := source.share) is not None:
            node["share"] = share
        return StateNode(class_name(source.optimizer), node)

    def _optimizer_state(self, source: OptimizerSource) -> object:
        if source.encoded_state is not None:
            self.tensors.extend(source.state_leaves)
            return source.encoded_state
        state = source.state_to_store
        nodes: dict[str, object] = {}
        source.boxes = {}
        live: list[object] = []
        start = len(self.tensors)
        for member in source.parameters:
            # Not state[...]: that would make an entry if there is none.
            entry = state.get(member.tensor)
            if entry is not None:
                path = f"{source.path}/state/{member.name}"
                with self._replaced():
                    nodes[member.name] = {
                        key: self.node(value, join(path, key), member.sharing)
                        for key, value in entry.items()
                    }
                live.extend(entry.values())
                if is_dtensor(member.tensor) and any(map(_is_own_piece, entry.values())):
                    box = describe(
                        path, member.tensor, world=self._world, sharing=member.sharing
                    ).box
                    source.boxes[member.name] = [list(box.offsets), list(box.sizes)]
        if strange := [key for key in state if not isinstance(key, torch.Tensor)]:
            raise UsageError(
                f"optimizer keeps state for what is no parameter. path={source.path!r} "
                f"keys={strange[:3]}"
            )
        tensors = [value for value in live if isinstance(value, torch.Tensor)]
        if len(tensors) == len(live):
            source.keep_state(nodes, tensors, tuple(self.tensors[start:]))
        return nodes

    def _groups(self, source: OptimizerSource) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = []
        for number, group in enumerate(source.groups_to_store):
            path = f"{source.path}/param_groups/{number}"
            kept = {
                key: value
                for key, value in group.items()
                if key != "params" and not is_function(value)
            }
            nodes = {key: self.node(value, join(path, key)) for key, value in kept.items()}
            groups.append({**nodes, "params": source.group_names[number]})
        return groups

    def _stateful(self, value: Stateful, path: str) -> object:
        state: object = state_of(value)
        if isinstance(state, Mapping):
            kept = {key: one for key, one in state.items() if not _left_alone(value, key, one)}
            state = _without_functions(kept) if isinstance(value, LRScheduler) else kept
        with self._replaced():
            return StateNode(class_name(value), self.node(state, path))


def _is_own_piece(value: object) -> bool:
    """Whether a value beside a sharded parameter can only be of this rank's piece of it."""
    match value:
        case torch.Tensor():
            return not is_dtensor(value) and value.dim() > 0
        case dict():
            return any(map(_is_own_piece, value.values()))
        case list() | tuple():
            return any(map(_is_own_piece, value))
    return False


def type_name(value: object) -> str:
    """The qualified name of a value's type, as nodes record it."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def class_name(value: object) -> str:
    """Whose state a ``StateNode`` holds: ``module:Class``. Of schedulers that hold others, and of
    an optimizer that divides another's state, also the inner classes: what their states mean
    depends on them.
    """
    kind = type(value)
    inner = getattr(value, "_schedulers", None) if isinstance(value, LRScheduler) else None
    if isinstance(value, Optimizer) and (keeper := divided_keeper(value)) is not None:
        inner = [keeper]
    names = ", ".join(class_name(one).partition(":")[2] for one in inner or ())
    return f"{kind.__module__}:{kind.__qualname__}" + (f"({names})" if names else "")


def torch_constant(value: object) -> Named | None:
    """A constant of torch by name, or None."""
    match value:
        case torch.dtype() | torch.layout() | torch.memory_format():
            return Named(f"torch.{type(value).__name__}", str(value).removeprefix("torch."))
        case torch.device():
            return Named("torch.device", str(value))
    return None


def is_function(value: object) -> bool:
    """Whether it is code rather than state."""
    return (
        callable(value)
        and not isinstance(value, type)
        and not is_stateful(value)
        and not dataclasses.is_dataclass(value)
    )


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether it is an object (not a class) with ``state_dict`` and ``load_state_dict``."""
    return isinstance(value, Stateful) and not isinstance(value, type)


def state_of(value: Stateful) -> object:
    """The result of ``state_dict``; a loader that is not iterated yet is not opened for it."""
    return loader_state(value) if is_loader(value) else value.state_dict()


def _left_alone(owner: object, key: object, value: object) -> bool:
    """Whether an entry is code that the live object has anyway."""
    return is_function(value) and isinstance(key, str) and hasattr(owner, key)


def _without_functions(value: object) -> object:
    """The states of schedulers inside schedulers, without the code in them."""
    match value:
        case dict() if type(value) is dict:
            return {
                key: _without_functions(item)
                for key, item in value.items()
                if not is_function(item)
            }
        case list() if type(value) is list:
            return [_without_functions(item) for item in value]
        case _:
            return value


def unsupported(value: object, path: str) -> UsageError:
    """The error for a value that can't be stored."""
    kind = type_name(value)
    if isinstance(value, DataLoader):
        return UsageError(
            f"plain DataLoader has no state to keep. path={path!r}; use torchdata's "
            "StatefulDataLoader instead"
        )
    return UsageError(
        f"value of an unsupported type. path={path!r} type={kind}; track a tensor or a plain value "
        "instead, or give the object "
        f"state_dict() and load_state_dict()"
    )


Visitor = Callable[[nn.Module | Optimizer, str], None]


def visit(value: object, path: str, visitor: Visitor, depth: int = DEPTH_MAX) -> None:
    """Call ``visitor`` with each module and optimizer inside dicts, lists and tuples, and
    its path.
    """
    match value:
        case nn.Module() | Optimizer():
            visitor(value, path)
        case dict() if depth:
            for key, item in value.items():
                visit(item, join(path, key), visitor, depth - 1)
        case list() | tuple() if depth:
            for index, item in enumerate(value):
                visit(item, join(path, index), visitor, depth - 1)
