"""Optimizers by parameter name: how hyper-parameters and state become what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ckpt.capture.leaves import join
from ckpt.capture.optimizers import (
    HookKind,
    OptimizerParameter,
    OptimizerSource,
    optimizer_hooks,
    parameter_numbers,
)
from ckpt.capture.tensors import is_dtensor, is_expanded
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.objects import Ref
from ckpt.restore.apply.targets import (
    NAMES_SHOWN_MAX,
    Coverage,
    NewTensor,
    RestoreProblems,
    Selection,
    TensorTargets,
)
from ckpt.restore.apply.values import ABSENT, RestoreStep, ValueMatcher
from ckpt.values import Box


@dataclass(frozen=True, slots=True, eq=False)
class _OptimizerDraft:
    """Where state and groups are put: the live ones, or new ones that hooks see first."""

    state: dict[torch.Tensor, dict[object, object]]
    groups: list[dict[str, object]]
    in_memory_of_live: bool

    @classmethod
    def in_place(cls, source: OptimizerSource) -> _OptimizerDraft:
        return cls(source.state, source.optimizer.param_groups, in_memory_of_live=True)

    @classmethod
    def anew(cls, source: OptimizerSource) -> _OptimizerDraft:
        state = {parameter: dict(entry) for parameter, entry in source.state.items()}
        groups: list[dict[str, object]] = [{} for _ in source.optimizer.param_groups]
        return cls(state, groups, in_memory_of_live=False)


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
        """How the optimizer becomes what ``node`` says, and its hooks are called."""
        state, groups = _parts(node, path)
        entries = _hook_entries(node, path)
        hooked = bool(optimizer_hooks(source.optimizer, HookKind.BEFORE_LOAD))
        self._check_hooks(entries, path, hooked=hooked)
        draft = _OptimizerDraft.anew(source) if hooked else _OptimizerDraft.in_place(source)
        steps: list[RestoreStep] = []
        self._check_order(source, groups, path)
        if self._selection.cover(f"{path}/param_groups") is not Coverage.NONE:
            steps += self._groups(source, draft, groups, path)
        if self._selection.cover(f"{path}/state") is not Coverage.NONE:
            steps += self._states(source, draft, node, state, groups, path)
        more = self._values.fresh(ABSENT, entries, f"{path}/entries") if hooked else dict

        def put() -> object:
            for step in steps:
                step()
            if hooked:
                _load_through_hooks(source, draft, more())
            for hook in optimizer_hooks(source.optimizer, HookKind.AFTER_LOAD):
                hook(source.optimizer)
            return source.optimizer

        return put

    def _check_hooks(self, entries: Mapping[object, object], path: str, *, hooked: bool) -> None:
        """What hooks made only hooks can load; what they are given is the whole."""
        if hooked and self._selection.cover(path) is not Coverage.ALL:
            self._problems.add(
                "optimizer with hooks before loading can only be restored whole.",
                path,
                "name the whole optimizer in only=[...], or remove the hooks",
            )
        if entries and not hooked and self._selection.cover(path) is Coverage.ALL:
            self._problems.add(
                "entries that hooks made of the optimizer's state_dict would be lost. "
                f"entries={sorted(map(str, entries))[:NAMES_SHOWN_MAX]} in_all={len(entries)}",
                path,
                "register the hook that loads them (register_load_state_dict_pre_hook) before "
                "restoring",
            )

    def _states(
        self,
        source: OptimizerSource,
        draft: _OptimizerDraft,
        node: object,
        state: Mapping[object, object],
        groups: Sequence[Mapping[object, object]],
        path: str,
    ) -> list[RestoreStep]:
        steps: list[RestoreStep] = []
        boxes = _boxes(node, path)
        flags = {name: _on_device(group) for group in groups for name in _names(group, path)}
        for member in self._of_this_share(source, node, path):
            state_path = f"{path}/state/{member.name}"
            if self._selection.cover(state_path) is Coverage.NONE:
                continue
            if member.name not in flags:
                self._problems.missing(state_path)
                continue
            stored = state.get(member.name)
            self._check_pieces(source, member, stored, boxes, state_path)
            steps.append(
                self._state(draft, member, stored, state_path, step_on_device=flags[member.name])
            )
        for name in state.keys() - {member.name for member in source.parameters}:
            if self._selection.cover(f"{path}/state/{name}") is not Coverage.NONE:
                self._problems.unexpected(f"{path}/state/{name}")
        return steps

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
        self,
        source: OptimizerSource,
        draft: _OptimizerDraft,
        groups: list[dict[object, object]],
        path: str,
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
                    into = draft.groups[number]
                    steps.append(self._hyper(group, into, key, value, join(group_path, key)))
        return steps

    def _hyper(
        self,
        live: dict[str, object],
        into: dict[str, object],
        key: str,
        node: object,
        value_path: str,
    ) -> RestoreStep:
        if self._selection.cover(value_path) is Coverage.NONE:
            return lambda: None
        made = self._values.match if into is live else self._values.fresh
        step = made(live.get(key), node, value_path)

        def put() -> object:
            into[key] = step()
            return into

        return put

    def _state(
        self,
        draft: _OptimizerDraft,
        member: OptimizerParameter,
        node: object,
        state_path: str,
        *,
        step_on_device: bool,
    ) -> RestoreStep:
        state = draft.state
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
                in_place=draft.in_memory_of_live,
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
        in_place: bool,
    ) -> RestoreStep:
        if not isinstance(node, Ref):
            return self._values.fresh(live, node, value_path)
        leaf = self._targets.stored(node)
        parameter = member.tensor
        device = parameter.device if on_device or node.device != "cpu" else torch.device("cpu")
        if (
            in_place
            and isinstance(live, torch.Tensor)
            and live.device == device
            and not is_expanded(live)
        ):
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


def _load_through_hooks(source: OptimizerSource, draft: _OptimizerDraft, entries: object) -> None:
    """Give the hooks the state dict that torch would give them, the optimizer still being as it
    was, and load what they make of it.
    """
    optimizer = source.optimizer
    numbers = parameter_numbers(optimizer)
    live = [group["params"] for group in optimizer.param_groups]
    made: dict[str, object] = {
        "state": {numbers[id(parameter)]: entry for parameter, entry in draft.state.items()},
        "param_groups": [
            {**group, "params": [numbers[id(parameter)] for parameter in parameters]}
            for group, parameters in zip(draft.groups, live, strict=True)
        ],
    }
    assert isinstance(entries, dict), "checked when the structure was read"
    made |= entries
    kept = {id(value): value for entry in draft.state.values() for value in entry.values()}
    for hook in optimizer_hooks(optimizer, HookKind.BEFORE_LOAD):
        returned = hook(optimizer, made)
        if isinstance(returned, dict):
            made = returned
    match made:
        case {"state": dict(state), "param_groups": list(groups)} if [
            len(group.get("params", ())) for group in groups
        ] == list(map(len, live)):
            pass
        case _:
            raise UsageError(
                "optimizer's hooks before loading made what is no state dict of it. "
                f"item={source.path!r}; keep state, param_groups and the params of each group"
            )
    loaded: dict[torch.Tensor, dict[object, object]] = {}
    for group, parameters in zip(groups, live, strict=True):
        for number, parameter in zip(group["params"], parameters, strict=True):
            if number in state:
                loaded[parameter] = {
                    key: value
                    if id(value) in kept
                    else _as_torch_loads(value, key, parameter, on_device=_on_device(group))
                    for key, value in state[number].items()
                }
    source.state.clear()
    source.state.update(loaded)
    for into, group, before in zip(optimizer.param_groups, groups, draft.groups, strict=True):
        for key in before.keys() - group.keys():
            into.pop(key, None)
        into.update({key: value for key, value in group.items() if key != "params"})


def _as_torch_loads(
    value: object, key: object, parameter: torch.Tensor, *, on_device: bool
) -> object:
    """What a hook put into a parameter's state, on the device and in the dtype that torch's loading
    gives it.
    """
    match value:
        case torch.Tensor() if key == "step":
            return value.to(dtype=torch.float32, device=parameter.device) if on_device else value
        case torch.Tensor() if parameter.is_floating_point():
            return value.to(dtype=parameter.dtype, device=parameter.device)
        case torch.Tensor():
            return value.to(device=parameter.device)
        case dict():
            return {
                name: _as_torch_loads(part, name, parameter, on_device=on_device)
                for name, part in value.items()
            }
    return value


def _hook_entries(node: object, path: str) -> dict[object, object]:
    """What hooks put into the state dict beside state and groups."""
    match node:
        case {"entries": dict(entries)}:
            return entries
        case {"entries": _}:
            raise IntegrityError(f"stored entries of an optimizer are no dict. path={path!r}")
    return {}


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
