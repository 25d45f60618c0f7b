"""One tracked optimizer: its state by parameter name and its groups, read from the live fields.

``Optimizer.state_dict`` is not called: it numbers parameters instead of naming them, and it fires
the user's hooks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch.optim import Optimizer

from ckpt.capture.leaves import TensorLeaf, escape
from ckpt.capture.modules import TrackedTensor
from ckpt.capture.tensors import UNSHARED, MemoryWatch, Sharing, holders, is_dtensor
from ckpt.format.objects import EncodedValue, encode_object


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerParameter:
    """One parameter of an optimizer: its name there, the live tensor, its group, and where it is
    tracked.

    ``name`` is its clean module name; ``<module item>/<clean name>`` if two tracked modules have
    the name; ``group<i>/param<j>`` for a parameter of no tracked module. ``tracked`` is None for
    such a parameter.
    """

    name: str
    tensor: torch.Tensor
    group: int
    tracked: TrackedTensor | None

    @property
    def sharing(self) -> Sharing:
        """Which ranks share this parameter's optimizer state."""
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
        parameters.append(OptimizerParameter(name, parameter, number, home))
    return tuple(parameters)


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
        self._watch = MemoryWatch()
        self._seen: object = None
        self._held: list[object] = []

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
        state = self.optimizer.state
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
            *self.optimizer.state,
            *chain.from_iterable(map(dict.values, self.optimizer.state.values())),
        ]
