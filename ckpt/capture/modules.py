"""One tracked module: its state-dict entries by clean name, and whether they have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckpt.capture.leaves import TensorLeaf, World, clean_fqn, join
from ckpt.capture.tensors import (
    UNSHARED,
    MemoryWatch,
    Sharing,
    check_can_be_filled,
    check_carries_nothing,
    describe,
    holders,
    is_dtensor,
    layout_text,
    local_of,
    mesh_dims,
    unsupported_reason,
)
from ckpt.errors import UsageError
from ckpt.format.objects import EncodedValue, Ref, encode_object

EXTRA_STATE = "_extra_state"
"""torch's name for the entry that ``Module.get_extra_state`` makes."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveEntry:
    """A parameter or buffer of the module: clean name, key in the raw state dict, the live object,
    and which ranks share it.
    """

    fqn: str
    key: str
    tensor: torch.Tensor
    sharing: Sharing


@dataclass(frozen=True, slots=True, eq=False)
class ComputedEntry:
    """A state-dict entry that is no parameter or buffer: extra state, or what a hook computed."""

    fqn: str
    key: str
    value: object


@dataclass(frozen=True, slots=True)
class TrackedTensor:
    """Where a parameter is tracked: the path of its module's item, its clean name, and which ranks
    share it.
    """

    path: str
    fqn: str
    sharing: Sharing


class ModuleSource:
    """What a plan remembers of one module. Reads its state dict when built, later only what can
    change. Its attributes are one cache of the module, rebuilt together.
    """

    def __init__(self, module: nn.Module, path: str, world: World) -> None:
        self.module = module
        self.path = path
        self.live: tuple[LiveEntry, ...] = ()
        self.leaves: tuple[TensorLeaf, ...] = ()
        self.computed: tuple[ComputedEntry, ...] = ()
        self._world = world
        self._encoded: EncodedValue | None = None
        self._watch = MemoryWatch()
        self.rebuild()

    def refresh(self) -> bool:
        """Read the module anew if anything moved. Returns whether it did."""
        if not self._watch.moved() and self._structure() == self._seen:
            return self.computes and self._read()
        self.rebuild()
        return True

    def rebuild(self) -> None:
        """Read everything anew. Raises UsageError for a tensor that can't be stored, naming its
        leaf.
        """
        self._modules = list(self.module.modules())
        self._refuse()
        self.computes = any(map(_may_compute, self._modules))
        self._read()
        if self.computed and not self.computes:
            # A module of torch's own that makes entries: they change without any memory moving.
            self.computes = True
            self._read()
        self._held, self._seen = self._values(), self._structure()

    def tracked_tensors(self) -> Iterator[tuple[torch.Tensor, TrackedTensor]]:
        """Every live tensor and where it is tracked, in state-dict order; a tied one appears once
        for each name.
        """
        return (
            (entry.tensor, TrackedTensor(self.path, entry.fqn, entry.sharing))
            for entry in self.live
        )

    def encoded(self) -> EncodedValue:
        """The references to all live entries, for a module that has no others."""
        if self._encoded is None:
            self._encoded = EncodedValue(encode_object(self.references()))
        return self._encoded

    def references(self) -> dict[str, Ref]:
        """A ``Ref`` for each live entry, by clean name."""
        return {
            entry.fqn: Ref(leaf.leaf.name, leaf.tensor.device.type, layout_text(entry.tensor))
            for entry, leaf in zip(self.live, self.leaves, strict=True)
        }

    def _read(self) -> bool:
        """Ask the module for its entries. Returns whether its parameters and buffers differ from
        before.
        """
        # keep_vars gives the live objects. The user's own hooks may rely on detached ones (to call
        # numpy() on them), so with such hooks entries are recognised by their memory. torch's own
        # pre-hooks put sharded parameters in place first.
        with torch.no_grad():
            entries = self.module.state_dict(keep_vars=not self.computes)
        live_tensors = {id(tensor): tensor for tensor in _tensors(self._modules)}
        by_place = (
            {_place(tensor): tensor for tensor in live_tensors.values()} if self.computes else {}
        )
        owners = _shared_by_ddp(self._modules)
        dims = mesh_dims(_tensors(self._modules))
        live: list[LiveEntry] = []
        made: list[ComputedEntry] = []
        for key, value in entries.items():
            fqn = clean_fqn(self.module, key)
            tensor = live_tensors.get(id(value))
            if tensor is None and self.computes and isinstance(value, torch.Tensor):
                tensor = by_place.get(_place(value))
            if tensor is not None:
                live.append(
                    LiveEntry(fqn, key, tensor, _sharing(tensor, owners.get(id(tensor)), dims))
                )
            else:
                made.append(ComputedEntry(fqn, key, value))
        self.computed = tuple(made)
        if self._same(live):
            return False
        self.live = tuple(live)
        self.leaves = tuple(
            describe(
                join(self.path, live_entry.fqn),
                live_entry.tensor,
                world=self._world,
                sharing=live_entry.sharing,
            )
            for live_entry in live
        )
        # A module with state-dict entries of its own stores there what its tensors carry.
        stores_more = {id(one) for one in _tensors(list(filter(_may_compute, self._modules)))}
        for live_entry, leaf in zip(live, self.leaves, strict=True):
            check_can_be_filled(leaf)
            if id(live_entry.tensor) not in stores_more:
                check_carries_nothing(join(self.path, live_entry.fqn), live_entry.tensor)
        self._encoded = None
        self._watch = MemoryWatch()
        for entry, leaf in zip(self.live, self.leaves, strict=True):
            self._watch.add(entry.tensor, leaf)
        return True

    def _same(self, live: list[LiveEntry]) -> bool:
        now = [(entry.fqn, id(entry.tensor)) for entry in live]
        return (
            now == [(entry.fqn, id(entry.tensor)) for entry in self.live]
            and not self._watch.moved()
        )

    def _structure(self) -> tuple[list[object], list[int], list[int]]:
        dicts = [
            attributes
            for module in self._modules
            for attributes in (module._parameters, module._buffers, module._modules)
        ]
        hooks = [
            len(module._state_dict_hooks)
            + len(module._state_dict_pre_hooks)
            + len(module._non_persistent_buffers_set)
            for module in self._modules
        ]
        return (
            list(chain.from_iterable(dicts)),
            list(map(id, chain.from_iterable([attributes.values() for attributes in dicts]))),
            hooks,
        )

    def _values(self) -> list[object]:
        # Kept alive so that no id can be reused while it is compared with.
        return [
            value
            for module in self._modules
            for attributes in (module._parameters, module._buffers)
            for value in attributes.values()
        ]

    def _refuse(self) -> None:
        for module in self._modules:
            if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
                raise UsageError(
                    "FullyShardedDataParallel keeps parameters in one flat tensor, which is not "
                    f"captured. item={self.path!r}; "
                    f"shard with torch.distributed.fsdp.fully_shard instead"
                )


def _tensors(modules: list[nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        for attributes in (module._parameters, module._buffers):
            yield from (value for value in attributes.values() if value is not None)


def _place(tensor: torch.Tensor) -> object:
    """A key that two tensors share if and only if they are the same memory read in the same way."""
    if unsupported_reason(tensor) is not None or not (local := local_of(tensor)).numel():
        return id(tensor)
    return (
        local.data_ptr(),
        local.device,
        local.dtype,
        local.shape,
        local.stride(),
        local.is_conj(),
        local.is_neg(),
    )


def _shared_by_ddp(modules: list[nn.Module]) -> dict[int, tuple[int, ...]]:
    """The ranks of the data-parallel group of each parameter that has one, by ``id``."""
    ranks_of: dict[int, tuple[int, ...]] = {}
    for wrapper in modules:
        if isinstance(wrapper, DistributedDataParallel):
            ranks = tuple(sorted(dist.get_process_group_ranks(wrapper.process_group)))
            for name, parameter in wrapper.module.named_parameters(remove_duplicate=False):
                if name not in wrapper.parameters_to_ignore:
                    ranks_of[id(parameter)] = ranks
    return ranks_of


def _sharing(tensor: torch.Tensor, ranks: tuple[int, ...] | None, dims: frozenset[str]) -> Sharing:
    if is_dtensor(tensor):
        if ranks is not None and len(ranks) > 1:
            raise UsageError(
                "distributed tensor under DistributedDataParallel. "
                f"placements={tensor.placements}; use fully_shard over a "
                f"mesh with a replicated dimension instead"
            )
        return Sharing(scalars=holders(tensor.device_mesh, None, dims, "step"), dims=dims)
    return UNSHARED if ranks is None else Sharing(ranks, ranks)


def _may_compute(module: nn.Module) -> bool:
    """Whether the module's state dict can hold more than its parameters and buffers as they are."""
    kind = type(module)
    methods = (kind.state_dict, kind._save_to_state_dict, kind.get_extra_state)
    if (
        any(not _of_torch(method) for method in methods)
        or kind.get_extra_state is not nn.Module.get_extra_state
    ):
        return True
    hooks = chain(module._state_dict_hooks.values(), module._state_dict_pre_hooks.values())
    return any(not _of_torch(hook) for hook in hooks)


def _of_torch(function: Callable[..., object]) -> bool:
    name = getattr(function, "__module__", None) or type(function).__module__
    return name == "torch" or name.startswith("torch.")
