"""Restore live objects in place: first decide everything, then read, then put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World
from ckpt.capture.modules import ModuleSource
from ckpt.capture.names import escape
from ckpt.capture.optimizers import OptimizerSource
from ckpt.capture.plan import CapturePlan
from ckpt.errors import UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.restore.apply_fill import fill
from ckpt.restore.apply_modules import Modules
from ckpt.restore.apply_optimizer import Optimizers
from ckpt.restore.apply_select import Cover, Problems, Selection
from ckpt.restore.apply_values import Step, Values
from ckpt.restore.rebuild import Read, read_objects
from ckpt.restore.targets import Targets


def apply(
    items: Mapping[str, object],
    index: SnapshotIndex,
    *,
    read: Read,
    world: World,
    only: Sequence[str] | None = None,
    missing: Literal["error", "keep"] = "error",
) -> tuple[str, ...]:
    """Make the live ``items`` what the snapshot says, in their own memory. Items that only the snapshot has are left alone.

    Parameters, buffers, optimizer state, tensors and containers keep their identity; what is absent live (optimizer state
    before the first step) is made, optimizer state that the snapshot lacks is removed. ``only`` names paths to restore, by
    whole components (``["model", "optimizer/state"]``); everything else is left as it is and not compared.
    ``missing="keep"`` lets live things that the snapshot lacks keep their value; their paths are returned.

    All differences (missing, unexpected, shapes, dtypes, ties, groups) are found before a byte of live memory is written
    and raised as one UsageError. Errors of ``read`` pass through; live objects may then hold a part of the snapshot: apply
    another one before using them. In a world of another size this rank takes the per-rank leaves of old rank
    ``rank % old size``.
    """
    if missing not in ("error", "keep"):
        raise UsageError(f'unknown value for missing. missing={missing!r}; pass "error" or "keep"')
    if isinstance(only, str):
        raise UsageError(f"only is one text. only={only!r}; pass a list of paths")
    selection = Selection(only)
    problems = Problems(keep_missing=missing == "keep")
    restore = _Restore(CapturePlan(items, world), index, selection, problems)
    steps = restore.decide(read)
    fill(restore.targets.fills(), read)
    for step in [*steps, *restore.values.late, *restore.values.last]:
        step()
    return tuple(problems.kept)


class _Restore:
    """The deciding half of one restore."""

    def __init__(self, plan: CapturePlan, index: SnapshotIndex, selection: Selection, problems: Problems) -> None:
        self._plan = plan
        self._index = index
        self._selection = selection
        self._problems = problems
        self.targets = Targets(index, plan.world, problems)
        self.values = Values(self.targets, selection, problems, self._source)
        self._modules = Modules(self.targets, selection, problems, self.values)
        self._optimizers = Optimizers(self.targets, selection, problems, self.values)

    def decide(self, read: Read) -> list[Step]:
        """The steps to take once all bytes are there. Raises UsageError that lists every difference."""
        rank = self._plan.world.rank
        live = {escape(name): item for name, item in self._plan.items.items()}
        names = {name: item for name, item in live.items() if self._selection.cover(name) is not Cover.NONE}
        stored = read_objects(self._index, list(names), rank=rank, read=read)
        steps: list[Step] = []
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

    def _source(self, live: nn.Module | Optimizer, node: object, path: str) -> Step:
        match self._plan.sources().get(id(live)):
            case ModuleSource() as source:
                return self._modules.match(source, node, path)
            case OptimizerSource() as source:
                return self._optimizers.match(source, node, path)
        raise UsageError(
            f"module or optimizer where none is looked for. path={path!r}; track it in a dict, list or tuple"
        )
