"""One tracked optimizer: its state by parameter name and its groups, read from the live fields.

``Optimizer.state_dict`` is called only for hooks registered on it, and what they made of it is then
captured: it numbers parameters instead of naming them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from ckpt.capture.leaves import TensorLeaf, escape
from ckpt.capture.modules import TrackedTensor
from ckpt.capture.tensors import UNSHARED, MemoryWatch, Sharing, holders, is_dtensor
from ckpt.errors import UsageError
from ckpt.format.objects import EncodedValue, encode_object


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerParameter:
    """One parameter of an optimizer: its name there, the live tensor, its group, and where it is
    tracked.

    ``name`` is its clean module name; ``<module item>/<clean name>`` if two tracked modules have
    the name; ``group<i>/param<j>`` for a parameter of no tracked module. ``tracked`` is None for
    such a parameter. ``divided``: ranks divide the optimizer's state among themselves, by
    parameters.
    """

    name: str
    tensor: torch.Tensor
    group: int
    tracked: TrackedTensor | None
    divided: bool = False

    @property
    def sharing(self) -> Sharing:
        """Which ranks share this parameter's optimizer state."""
        if self.divided:
            return UNSHARED
        if self.tracked is not None:
            return self.tracked.sharing
        if is_dtensor(self.tensor):
            return Sharing(scalars=holders(self.tensor.device_mesh, None, frozenset(), self.name))
        return UNSHARED


def optimizer_parameters(
    optimizer: Optimizer, tracked: Mapping[int, TrackedTensor]
) -> tuple[OptimizerParameter, ...]:
    """The optimizer's parameters in group order, named. ``tracked`` maps ``id(parameter)`` to where
    it is tracked first.
    """
    flat = [
        (number, index, parameter)
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    ]
    divided = divided_keeper(optimizer) is not None
    uses = Counter(home.fqn for *_, entry in flat if (home := tracked.get(id(entry))) is not None)
    parameters: list[OptimizerParameter] = []
    for number, index, parameter in flat:
        home = tracked.get(id(parameter))
        if home is None:
            name = f"group{number}/param{index}"
        elif uses[home.fqn] > 1:
            name = f"{home.path}/{escape(home.fqn)}"
        else:
            name = escape(home.fqn)
        parameters.append(OptimizerParameter(name, parameter, number, home, divided))
    return tuple(parameters)


def divided_keeper(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer that keeps this rank's share of a ``ZeroRedundancyOptimizer``'s state; None for
    another class. Imports nothing: without the module there are none.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or not isinstance(optimizer, module.ZeroRedundancyOptimizer):
        return None
    keeper: Optimizer = optimizer.optim
    return keeper


def check_optimizer(optimizer: Optimizer, path: str, tracked: Container[int]) -> None:
    """Raise UsageError, naming it, for an optimizer that keeps state in more than its own fields.

    Its state and groups are all that is captured: another optimizer inside it must be among those
    that are ``tracked`` (by ``id``), and its class must not add entries to its ``state_dict``.
    """
    kind = type(optimizer).__qualname__
    if divided_keeper(optimizer) is not None:
        if any(map(optimizer_hooks, [optimizer] * len(HookKind), HookKind)):
            raise UsageError(
                "hooks on an optimizer's state_dict can't be called where ranks divide its state: "
                f"none has all of it. item={path!r} type={kind}; remove them"
            )
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise UsageError(
                f"optimizer is not captured with overlap_with_ddp=True. item={path!r} type={kind}; "
                "pass overlap_with_ddp=False"
            )
        return
    for name, value in vars(optimizer).items():
        if any(
            inner.state is not optimizer.state and id(inner) not in tracked
            for inner in _optimizers_in(value)
        ):
            raise UsageError(
                "optimizer keeps state in another one inside it, which would be left out. "
                f"item={path!r} type={kind} attribute={name!r}; track that one too, in the same "
                "call"
            )
    if type(optimizer).state_dict is Optimizer.state_dict:
        return
    try:
        entries = optimizer.state_dict().keys()
    except Exception as error:
        raise UsageError(
            "optimizer's class has a state_dict of its own, which fails, so that what it keeps is "
            f"unknown. item={path!r} type={kind} error={error!r}; track what it keeps by itself"
        ) from error
    if more := sorted(map(str, entries - {"state", "param_groups"})):
        raise UsageError(
            "optimizer's class adds entries to its state_dict, which would be left out. "
            f"item={path!r} type={kind} entries={more[:ENTRIES_SHOWN_MAX]} in_all={len(more)}; "
            "track what they hold by itself, and an optimizer without them"
        )


ENTRIES_SHOWN_MAX = 3
"""Names of entries that one error lists."""


def _optimizers_in(value: object) -> Iterator[Optimizer]:
    """The optimizers that an attribute holds, by itself or in a list, tuple or dict."""
    match value:
        case Optimizer():
            yield value
        case list() | tuple():
            yield from (one for one in value if isinstance(one, Optimizer))
        case dict():
            yield from (one for one in value.values() if isinstance(one, Optimizer))


class HookKind(Enum):
    """When torch calls what is registered on an optimizer; the value is the attribute that holds
    the hooks.
    """

    BEFORE_SAVE = "_optimizer_state_dict_pre_hooks"
    AFTER_SAVE = "_optimizer_state_dict_post_hooks"
    BEFORE_LOAD = "_optimizer_load_state_dict_pre_hooks"
    AFTER_LOAD = "_optimizer_load_state_dict_post_hooks"


def optimizer_hooks(optimizer: Optimizer, kind: HookKind) -> list[Callable[..., object]]:
    """The hooks of one kind, in the order in which torch calls them."""
    return list(getattr(optimizer, kind.value, {}).values())


@dataclass(frozen=True, slots=True, eq=False)
class RewrittenState:
    """What an optimizer's hooks made of its state dict. ``entries``: those beside state and
    groups.
    """

    state: dict[torch.Tensor, dict[object, object]]
    groups: list[dict[str, object]]
    entries: dict[str, object]


def rewritten_state(optimizer: Optimizer, path: str) -> RewrittenState | None:
    """Call the optimizer's ``state_dict`` if it has hooks for it; None if they only precede it.
    Raises UsageError if what they return is no state dict of this optimizer.
    """
    after = optimizer_hooks(optimizer, HookKind.AFTER_SAVE)
    if not after and not optimizer_hooks(optimizer, HookKind.BEFORE_SAVE):
        return None
    made = Optimizer.state_dict(optimizer)
    if not after:
        return None
    numbers = parameter_numbers(optimizer)
    match made:
        case {"state": dict(state), "param_groups": list(groups), **entries} if [
            group.get("params") for group in groups
        ] == [[numbers[id(one)] for one in group["params"]] for group in optimizer.param_groups]:
            # What is no parameter's stays under its own key, and is refused by the walk.
            keys: dict[object, Any] = {key: key for key in state}
            keys |= {numbers[id(one)]: one for one in _flat(optimizer)}
            return RewrittenState(
                {keys[key]: entry for key, entry in state.items()}, groups, entries
            )
    raise UsageError(
        f"optimizer's state_dict hooks made what is no state dict of it. item={path!r} "
        f"type={type(optimizer).__qualname__}; keep state, param_groups and the params of each "
        "group"
    )


def parameter_numbers(optimizer: Optimizer) -> dict[int, int]:
    """The number of each parameter in the optimizer's ``state_dict``, by the parameter's ``id``."""
    numbers: dict[int, int] = {}
    for number, parameter in enumerate(_flat(optimizer)):
        numbers.setdefault(id(parameter), number)
    return numbers


def _flat(optimizer: Optimizer) -> list[torch.Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


class OptimizerSource:
    """What a plan remembers of one optimizer: names of its parameters, and the identity of all of
    its state.
    """

    def __init__(self, optimizer: Optimizer, path: str) -> None:
        self.optimizer = optimizer
        self.path = path
        self.parameters: tuple[OptimizerParameter, ...] = ()
        self.group_names: tuple[EncodedValue, ...] = ()
        self.encoded_state: EncodedValue | None = None
        self.state_leaves: tuple[TensorLeaf, ...] = ()
        self.boxes: dict[str, list[list[int]]] = {}
        """Offsets and sizes of this rank's piece, for each sharded parameter with plain state."""
        self.rewritten: RewrittenState | None = None
        """What hooks made of the state dict at this capture, if there are such hooks."""
        self._watch = MemoryWatch()
        self._seen: object = None
        self._held: list[object] = []

    @property
    def state(self) -> dict[torch.Tensor, dict[object, object]]:
        """The live state that this rank keeps, by parameter."""
        return (divided_keeper(self.optimizer) or self.optimizer).state

    @property
    def state_to_store(self) -> dict[torch.Tensor, dict[object, object]]:
        """The live state, or what hooks made of it."""
        return self.state if self.rewritten is None else self.rewritten.state

    @property
    def groups_to_store(self) -> list[dict[str, object]]:
        """The live groups, or what hooks made of them."""
        return self.optimizer.param_groups if self.rewritten is None else self.rewritten.groups

    @property
    def kept(self) -> tuple[OptimizerParameter, ...]:
        """The parameters whose state this rank keeps: all, unless ranks divide them."""
        keeper = divided_keeper(self.optimizer)
        if keeper is None:
            return self.parameters
        own = {id(parameter) for group in keeper.param_groups for parameter in group["params"]}
        return tuple(member for member in self.parameters if id(member.tensor) in own)

    @property
    def share(self) -> list[str] | None:
        """The names of ``kept`` if ranks divide the state, else None."""
        if divided_keeper(self.optimizer) is None:
            return None
        return [member.name for member in self.kept]

    def refresh(self, tracked: Mapping[int, TrackedTensor], *, renamed: bool) -> bool:
        """If state or parameters moved, forget what was encoded and read the names anew. Returns
        whether they did.
        """
        if not renamed and self._seen == self._structure() and not self._watch.moved():
            return False
        self.parameters = optimizer_parameters(self.optimizer, tracked)
        self.group_names = tuple(
            EncodedValue(
                encode_object(
                    [parameter.name for parameter in self.parameters if parameter.group == number]
                )
            )
            for number in range(len(self.optimizer.param_groups))
        )
        self.encoded_state = None
        self._watch = MemoryWatch()
        self._held = self._values()
        self._seen = self._structure()
        return True

    def keep_state(
        self, nodes: dict[str, object], live: list[torch.Tensor], leaves: tuple[TensorLeaf, ...]
    ) -> None:
        """Remember a state of tensors only until one of them moves; ``live`` and ``leaves`` are in
        the same order.
        """
        self.encoded_state = EncodedValue(encode_object(nodes))
        self.state_leaves = leaves
        for tensor, leaf in zip(live, leaves, strict=True):
            self._watch.add(tensor, leaf)

    def _structure(self) -> tuple[list[int], list[int], list[int], list[object], list[int]]:
        groups = [group["params"] for group in self.optimizer.param_groups]
        state = self.state_to_store
        entries = list(state.values())
        return (
            list(map(len, groups)),
            list(map(id, chain.from_iterable(groups))),
            list(map(id, state)),
            list(chain.from_iterable(entries)),
            list(map(id, chain.from_iterable(map(dict.values, entries)))),
        )

    def _values(self) -> list[object]:
        # Kept alive so that no id can be reused while it is compared with.
        return [
            *self.state_to_store,
            *chain.from_iterable(map(dict.values, self.state_to_store.values())),
        ]
