"""The plan of a capture: built once from what is tracked, checked each time, rebuilt if something
moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ckpt.capture.leaves import Capture, ObjectLeaf, TensorLeaf, World, escape
from ckpt.capture.modules import ModuleSource, TrackedTensor
from ckpt.capture.optimizers import OptimizerSource, check_optimizer, rewritten_state
from ckpt.capture.tensors import with_aliases, with_bits_resolved
from ckpt.capture.tree import LeafMemo, Walker, is_stateful, unsupported, visit
from ckpt.errors import UsageError
from ckpt.format.objects import encode_object
from ckpt.values import Leaf, LeafKind


class CapturePlan:
    """Names and memory of everything in ``items``, kept up to date. Holds the items; not
    thread-safe.

    Raises UsageError for an item that could not be restored in place. Building costs about 10 us a
    tensor; see ``capture``.
    """

    def __init__(self, items: Mapping[str, object], world: World) -> None:
        for name, item in items.items():
            _check_item(name, item)
        self.items = dict(items)
        self.world = world
        self._sources: dict[int, ModuleSource | OptimizerSource] = {}
        self._homes: dict[int, TrackedTensor] = {}
        self._memo: LeafMemo = {}
        self._raw: list[TensorLeaf] = []
        self._tensors: tuple[TensorLeaf, ...] = ()
        self._lazy = False
        self.refresh()

    def refresh(self) -> bool:
        """Compare structure and addresses of all modules and optimizers with the live ones; read
        anew what moved.

        Returns whether anything did. About 0.4 us a tensor.
        """
        tracked: list[tuple[nn.Module | Optimizer, str]] = []
        for name, item in self.items.items():
            visit(item, escape(name), lambda value, path: tracked.append((value, path)))
        known = {id(live) for live, _ in tracked}
        for live, path in tracked:
            # Before it is remembered: what is refused is refused each time.
            if isinstance(live, Optimizer) and id(live) not in self._sources:
                check_optimizer(live, path, known)
        sources_before, self._sources = self._sources, {}
        renamed = [
            self._refresh_module(live, path, sources_before)
            for live, path in tracked
            if isinstance(live, nn.Module)
        ]
        gone = any(
            isinstance(live, ModuleSource) and key not in self._sources
            for key, live in sources_before.items()
        )
        moved = any(renamed) or gone
        if moved:
            self._homes = {}
            for source in self._sources.values():
                for tensor, home in (
                    source.tracked_tensors() if isinstance(source, ModuleSource) else ()
                ):
                    self._homes.setdefault(id(tensor), home)
        optimizers_moved = [
            self._refresh_optimizer(live, path, sources_before, renamed=moved)
            for live, path in tracked
            if isinstance(live, Optimizer)
        ]
        return moved or any(optimizers_moved)

    def capture(self) -> Capture:
        """What is tracked, now. Calls ``state_dict`` of everything that is not a module, an
        optimizer or a plain container, and of optimizers with hooks for it.

        Draws no random number, changes nothing that training sees, copies no tensor (except lazily
        conjugated ones); hooks of the user's own may. Costs the check, the encoding of what is not
        a tensor, and those ``state_dict`` calls.
        """
        for source in self._sources.values():
            if isinstance(source, OptimizerSource):
                source.rewritten = rewritten_state(source.optimizer, source.path)
        self.refresh()
        return self._walk()

    def sources(self) -> Mapping[int, ModuleSource | OptimizerSource]:
        """The modules and optimizers in ``items``, by ``id``."""
        return self._sources

    def _walk(self) -> Capture:
        walker = Walker(self.world, self._sources, self._memo)
        nodes = [self._object(walker, name, item) for name, item in self.items.items()]
        objects = tuple(leaf for leaf in nodes if leaf is not None)
        raw = walker.tensors
        if list(map(id, raw)) != list(map(id, self._raw)):
            self._raw = raw
            self._tensors = with_aliases(raw)
            self._lazy = any(leaf.tensor.is_conj() or leaf.tensor.is_neg() for leaf in raw)
            names = {leaf.leaf.name for leaf in raw}
            if len(names) != len(raw):
                raise UsageError(f"two tensors have one name. names={_twice(raw)}; rename a key")
            self._memo = {name: entry for name, entry in self._memo.items() if name in names}
        tensors = tuple(map(with_bits_resolved, self._tensors)) if self._lazy else self._tensors
        return Capture(tensors, objects)

    def _object(self, walker: Walker, name: str, item: object) -> ObjectLeaf | None:
        """The item's structure. A tensor has none beside itself: its leaf has the item's name, and
        no two leaves may share a name.
        """
        node = walker.node(item, escape(name))
        if isinstance(item, torch.Tensor):
            return None
        data = encode_object(node)
        leaf = Leaf(
            name=escape(name),
            kind=LeafKind.OBJECT,
            dtype="uint8",
            shape=(len(data),),
            rank=self.world.rank,
        )
        return ObjectLeaf(leaf, data)

    def _refresh_module(
        self, module: nn.Module, path: str, sources_before: Mapping[int, object]
    ) -> bool:
        source = sources_before.get(id(module))
        if id(module) in self._sources:
            raise UsageError(f"module is tracked twice. second={path!r}; track it once")
        if isinstance(source, ModuleSource) and source.path == path:
            self._sources[id(module)] = source
            return source.refresh()
        self._sources[id(module)] = ModuleSource(module, path, self.world)
        return True

    def _refresh_optimizer(
        self,
        optimizer: Optimizer,
        path: str,
        sources_before: Mapping[int, object],
        *,
        renamed: bool,
    ) -> bool:
        if id(optimizer) in self._sources:
            raise UsageError(f"optimizer is tracked twice. second={path!r}; track it once")
        source = sources_before.get(id(optimizer))
        if not (isinstance(source, OptimizerSource) and source.path == path):
            source = OptimizerSource(optimizer, path)
        self._sources[id(optimizer)] = source
        return source.refresh(self._homes, renamed=renamed)


def capture(items: Mapping[str, object], *, world: World) -> Capture:
    """Capture once, without a plan to keep. See ``CapturePlan.capture``."""
    return CapturePlan(items, world).capture()


def _check_item(name: str, item: object) -> None:
    if not name:
        raise UsageError("item has an empty name; give it one")
    if isinstance(item, (torch.Tensor, torch.Generator, dict, list)) or is_stateful(item):
        return
    if isinstance(item, DataLoader):
        raise unsupported(item, name)
    raise UsageError(
        f"item can't be restored in place. item={name!r} "
        f"type={type(item).__module__}.{type(item).__qualname__}; put it in a "
        f"dict, or give the object state_dict() and load_state_dict()"
    )


def _twice(leaves: list[TensorLeaf]) -> list[str]:
    return [
        name for name, count in Counter(leaf.leaf.name for leaf in leaves).items() if count > 1
    ][:3]
