"""Restoring live objects in place: decide everything first, then read, then put values in place.

Matching live values with stored structure decides what goes where. It returns steps; only they
change live objects, after all bytes are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World, escape, join
from ckpt.capture.modules import ModuleSource
from ckpt.capture.optimizers import OptimizerSource
from ckpt.capture.plan import CapturePlan
from ckpt.errors import UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import (
    DataclassNode,
    StateNode,
)
from ckpt.restore.apply.modules import ModuleMatcher
from ckpt.restore.apply.optimizers import OptimizerMatcher
from ckpt.restore.apply.targets import (
    Coverage,
    RestoreProblems,
    Selection,
    TensorFill,
    TensorTargets,
    fill_tensors,
)
from ckpt.restore.apply.values import RestoreStep, ValueMatcher
from ckpt.restore.reader import ReadWants, read_object_of_all_ranks, read_objects

FillTensors = Callable[[Sequence[TensorFill]], None]
"""Puts the bytes of every want into its tensor."""


def apply(
    items: Mapping[str, object],
    index: SnapshotIndex,
    *,
    read: ReadWants,
    world: World,
    only: Sequence[str] | None = None,
    missing: Literal["error", "keep"] = "error",
    classes: Literal["same", "any"] = "same",
    fill: FillTensors | None = None,
) -> tuple[str, ...]:
    """Make the live ``items`` what the snapshot says, in their own memory. Items that only the
    snapshot has are ignored.

    Parameters, buffers, optimizer state, tensors and containers keep their identity. What is absent
    live (optimizer state before the first step) is made; optimizer state that the snapshot lacks is
    removed. ``only`` names paths to restore, by whole components (``["model",
    "optimizer/state"]``); everything else is left as it is and not compared. ``missing="keep"``
    lets live things that the snapshot lacks keep their value; their paths are returned.
    ``classes="any"`` loads states of optimizers and objects also into those of another class.
    ``fill`` fills the tensors in place of ``fill_tensors`` with ``read``.

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
    fills = restore.targets.fills()
    if fill is None:
        fill_tensors(fills, read)
    else:
        fill(fills)
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
