"""Match a live optimizer with its stored groups and state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ckpt.capture.meshes import is_dtensor
from ckpt.capture.names import join
from ckpt.capture.optimizers import Member, OptimizerSource
from ckpt.errors import IntegrityError
from ckpt.format.manifest_objects import Ref
from ckpt.restore.apply_select import Cover, Problems, Selection
from ckpt.restore.apply_values import Step, Values
from ckpt.restore.targets import New, Targets

NAMES_SHOWN_MAX = 3
"""How many parameter names one difference lists."""


class Optimizers:
    """Optimizers by parameter name: hyper-parameters set, state filled in place, made or removed."""

    def __init__(self, targets: Targets, selection: Selection, problems: Problems, values: Values) -> None:
        self._targets = targets
        self._selection = selection
        self._problems = problems
        self._values = values

    def match(self, source: OptimizerSource, node: object, path: str) -> Step:
        """How the optimizer becomes what ``node`` says."""
        state, groups = _parts(node, path)
        stored = {name for group in groups for name in _names(group, path)}
        steps: list[Step] = []
        if self._selection.cover(f"{path}/param_groups") is not Cover.NONE:
            steps += self._groups(source, groups, path)
        if self._selection.cover(f"{path}/state") is not Cover.NONE:
            flags = {name: _on_device(group) for group in groups for name in _names(group, path)}
            for member in source.members:
                where = f"{path}/state/{member.name}"
                if self._selection.cover(where) is Cover.NONE:
                    continue
                if member.name not in stored:
                    self._problems.missing(where)
                else:
                    steps.append(
                        self._state(source, member, state.get(member.name), where, step_on_device=flags[member.name])
                    )
            for name in state.keys() - {member.name for member in source.members}:
                if self._selection.cover(f"{path}/state/{name}") is not Cover.NONE:
                    self._problems.unexpected(f"{path}/state/{name}")

        def put() -> object:
            for step in steps:
                step()
            return source.optimizer

        return put

    def _groups(self, source: OptimizerSource, groups: list[dict[object, object]], path: str) -> list[Step]:
        live = source.optimizer.param_groups
        if len(live) != len(groups):
            self._problems.add(
                f"numbers of parameter groups differ. stored={len(groups)} live={len(live)}",
                f"{path}/param_groups",
                f'restore only=["{path}/state"] to keep the live groups',
            )
            return []
        steps: list[Step] = []
        for number, (group, node) in enumerate(zip(live, groups, strict=True)):
            where = f"{path}/param_groups/{number}"
            mine = {one.name for one in source.members if one.group == number}
            theirs = set(_names(node, path))
            if mine != theirs:
                self._problems.add(
                    f"parameters of a group differ. only_live={sorted(mine - theirs)[:NAMES_SHOWN_MAX]} "
                    f"only_stored={sorted(theirs - mine)[:NAMES_SHOWN_MAX]}",
                    where,
                    f'restore only=["{path}/state"] to keep the live groups',
                )
            for key, one in node.items():
                if isinstance(key, str) and key != "params":
                    steps.append(self._hyper(group, key, one, join(where, key)))
        return steps

    def _hyper(self, group: dict[str, object], key: str, node: object, where: str) -> Step:
        if self._selection.cover(where) is Cover.NONE:
            return lambda: None
        step = self._values.match(group.get(key), node, where)

        def put() -> object:
            group[key] = step()
            return group

        return put

    def _state(
        self, source: OptimizerSource, member: Member, node: object, where: str, *, step_on_device: bool
    ) -> Step:
        state: dict[torch.Tensor, dict[object, object]] = source.optimizer.state
        if node is None:
            return lambda: state.pop(member.tensor, None)
        if not isinstance(node, dict):
            raise IntegrityError(f"optimizer's stored state is no dict. path={where!r}")
        before = state.get(member.tensor, {})
        steps = {
            key: self._entry(
                member, before.get(key), key, one, join(where, key), on_device=key == "step" and step_on_device
            )
            for key, one in node.items()
        }

        def put() -> object:
            values = {key: step() for key, step in steps.items()}
            entry = state.setdefault(member.tensor, {})
            entry.clear()
            entry.update(values)
            return entry

        return put

    def _entry(self, member: Member, live: object, key: object, node: object, where: str, *, on_device: bool) -> Step:
        if not isinstance(node, Ref):
            return self._values.fresh(live, node, where)
        leaf = self._targets.stored(node)
        parameter = member.tensor
        device = parameter.device if on_device or node.device != "cpu" else torch.device("cpu")
        if isinstance(live, torch.Tensor) and live.device == device:
            fits = tuple(live.shape) == leaf.shape and str(live.dtype) == f"torch.{leaf.dtype}"
            if fits or (leaf.shape and live.shape == parameter.shape):
                return self._targets.into(live, node, where).value
        like = parameter if leaf.shape and leaf.shape == tuple(parameter.shape) else None
        placements = ""
        if like is None and is_dtensor(parameter) and node.placements.count(",") + 1 == parameter.device_mesh.ndim:
            # Smaller than the parameter but laid over the same kind of mesh (a factored second moment).
            like, placements = (parameter, node.placements) if node.placements else (None, "")
        return self._targets.fresh(New(leaf, device, like, placements), node, where).value


def _parts(node: object, path: str) -> tuple[Mapping[object, object], list[dict[object, object]]]:
    match node:
        case {"state": dict(state), "param_groups": list(groups)} if all(isinstance(one, dict) for one in groups):
            return state, groups
    raise IntegrityError(f"stored value is no optimizer's. path={path!r}")


def _names(group: Mapping[object, object], path: str) -> list[str]:
    names = group.get("params")
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise IntegrityError(f"stored group names no parameters. path={path!r}")
    return names


def _on_device(group: Mapping[object, object]) -> bool:
    """Whether torch keeps ``step`` beside the parameter rather than on the CPU."""
    return bool(group.get("capturable") or group.get("fused"))
