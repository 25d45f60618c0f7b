"""Modules by clean name: how parameters, buffers and extra state become what is stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ckpt.capture.leaves import World, clean_fqn, join
from ckpt.capture.modules import EXTRA_STATE, ComputedEntry, ModuleSource
from ckpt.capture.plan import capture
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.objects import (
    Ref,
)
from ckpt.restore.apply.targets import (
    NAMES_SHOWN_MAX,
    Coverage,
    RestoreProblems,
    Selection,
    TensorTargets,
)
from ckpt.restore.apply.values import RestoreStep, ValueMatcher


class ModuleMatcher:
    """Modules by clean name: parameters and buffers are filled in place, extra state goes to
    ``set_extra_state``.
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

    def match(self, source: ModuleSource, node: object, path: str) -> RestoreStep:
        """How the module becomes what ``node`` says."""
        if not isinstance(node, dict):
            raise IntegrityError(f"stored value is no module's. path={path!r}")
        for entry in source.live:
            entry_path = join(path, entry.fqn)
            if self._selection.cover(entry_path) is Coverage.NONE:
                continue
            match node.get(entry.fqn):
                case None:
                    self._problems.missing(entry_path)
                case Ref() as ref:
                    self._targets.into(entry.tensor, ref, entry_path)
                case other:
                    self._problems.add(
                        f"stored value is no tensor. type={type(other).__name__}", entry_path
                    )
        made = self._made(source, node, path)
        known_names = {entry.fqn for entry in source.live} | {
            entry.fqn for entry in source.computed
        }
        for fqn in node:
            if (
                fqn not in known_names
                and self._selection.cover(join(path, fqn)) is not Coverage.NONE
            ):
                self._problems.unexpected(join(path, fqn))

        def put() -> object:
            _put_made(source, [(entry, step()) for entry, step in made])
            return source.module

        return put

    def _made(
        self, source: ModuleSource, node: dict[object, object], path: str
    ) -> list[tuple[ComputedEntry, RestoreStep]]:
        steps: list[tuple[ComputedEntry, RestoreStep]] = []
        for entry in source.computed:
            entry_path = join(path, entry.fqn)
            if self._selection.cover(entry_path) is Coverage.NONE:
                continue
            if entry.fqn not in node:
                self._problems.missing(entry_path)
            else:
                steps.append((entry, self._values.fresh(entry.value, node[entry.fqn], entry_path)))
        return steps


def _put_made(source: ModuleSource, values: list[tuple[ComputedEntry, object]]) -> None:
    extra = _extra_state_owners(source.module)
    others = {entry.key: value for entry, value in values if entry.fqn not in extra}
    for entry, value in values:
        if entry.fqn in extra:
            extra[entry.fqn].set_extra_state(value)
    if others:
        # Made by state-dict hooks: only the module's own loading knows what they mean. Live entries
        # are loaded onto themselves.
        live = {entry.key: entry.tensor for entry in source.live}
        kept = {entry.key: value for entry, value in values if entry.fqn in extra}
        try:
            loaded = source.module.load_state_dict({**live, **kept, **others}, strict=False)
        except RuntimeError as error:
            raise UsageError(
                f"module refuses the entries that its hooks made. path={source.path!r} "
                f"error={error}"
            ) from error
        # A module with a loading of its own may return nothing: then it says that it took all.
        # What it takes no notice of is not lost if the module makes the same again: of its other
        # state (a packed weight's scales), or because a hook read the entry and left it there.
        unexpected = others.keys() & set(getattr(loaded, "unexpected_keys", ()))
        ignored = sorted(_lost(source, {key: others[key] for key in unexpected}))
        if ignored:
            raise UsageError(
                "module takes no notice of entries that its hooks made, so they would be lost. "
                f"path={source.path!r} entries={ignored[:NAMES_SHOWN_MAX]} in_all={len(ignored)}; "
                "give it a hook that loads them, or leave them out of its state_dict"
            )


def _lost(source: ModuleSource, stored: Mapping[str, object]) -> list[str]:
    """The keys of ``stored`` entries that the module does not make again, bit by bit."""
    if not stored:
        return []
    source.rebuild()
    made = {entry.key: entry.value for entry in source.computed}
    return [
        key
        for key, value in stored.items()
        if key not in made or _as_bytes(made[key]) != _as_bytes(value)
    ]


def _as_bytes(value: object) -> tuple[bytes, ...]:
    captured = capture({"entry": {"value": value}}, world=World(0, 1))
    tensors = (
        bytes(leaf.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for leaf in captured.tensors
    )
    return (*(leaf.data for leaf in captured.objects), *tensors)


def _extra_state_owners(module: nn.Module) -> dict[str, nn.Module]:
    return {
        clean_fqn(module, f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE): submodule
        for name, submodule in module.named_modules(remove_duplicate=False)
        if type(submodule).get_extra_state is not nn.Module.get_extra_state
    }
