"""Match a live module with its stored entries."""

from __future__ import annotations

from torch import nn

from ckpt.capture.modules import EXTRA_STATE, MadeEntry, ModuleSource
from ckpt.capture.names import clean_fqn, join
from ckpt.errors import IntegrityError, UsageError
from ckpt.format.manifest_objects import Ref
from ckpt.restore.apply_select import Cover, Problems, Selection
from ckpt.restore.apply_values import Step, Values
from ckpt.restore.targets import Targets


class Modules:
    """Modules by clean name: parameters and buffers filled in place, extra state handed to ``set_extra_state``."""

    def __init__(self, targets: Targets, selection: Selection, problems: Problems, values: Values) -> None:
        self._targets = targets
        self._selection = selection
        self._problems = problems
        self._values = values

    def match(self, source: ModuleSource, node: object, path: str) -> Step:
        """How the module becomes what ``node`` says."""
        if not isinstance(node, dict):
            raise IntegrityError(f"stored value is no module's. path={path!r}")
        for entry in source.live:
            where = join(path, entry.fqn)
            if self._selection.cover(where) is Cover.NONE:
                continue
            match node.get(entry.fqn):
                case None:
                    self._problems.missing(where)
                case Ref() as ref:
                    self._targets.into(entry.tensor, ref, where)
                case other:
                    self._problems.add(f"stored value is no tensor. type={type(other).__name__}", where)
        made = self._made(source, node, path)
        known = {entry.fqn for entry in source.live} | {entry.fqn for entry in source.made}
        for fqn in node:
            if fqn not in known and self._selection.cover(join(path, fqn)) is not Cover.NONE:
                self._problems.unexpected(join(path, fqn))

        def put() -> object:
            _put_made(source, [(entry, step()) for entry, step in made])
            return source.module

        return put

    def _made(self, source: ModuleSource, node: dict[object, object], path: str) -> list[tuple[MadeEntry, Step]]:
        found: list[tuple[MadeEntry, Step]] = []
        for entry in source.made:
            where = join(path, entry.fqn)
            if self._selection.cover(where) is Cover.NONE:
                continue
            if entry.fqn not in node:
                self._problems.missing(where)
            else:
                found.append((entry, self._values.fresh(entry.value, node[entry.fqn], where)))
        return found


def _put_made(source: ModuleSource, values: list[tuple[MadeEntry, object]]) -> None:
    extra = _extra_state_owners(source.module)
    others = {entry.key: value for entry, value in values if entry.fqn not in extra}
    for entry, value in values:
        if entry.fqn in extra:
            extra[entry.fqn].set_extra_state(value)
    if others:
        # Made by state-dict hooks: only the module's own loading knows what they mean. Live entries load onto themselves.
        live = {entry.key: entry.tensor for entry in source.live}
        kept = {entry.key: value for entry, value in values if entry.fqn in extra}
        try:
            source.module.load_state_dict({**live, **kept, **others}, strict=False)
        except RuntimeError as error:
            raise UsageError(
                f"module refuses the entries that its hooks made. path={source.path!r} error={error}"
            ) from error


def _extra_state_owners(module: nn.Module) -> dict[str, nn.Module]:
    return {
        clean_fqn(module, f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE): one
        for name, one in module.named_modules(remove_duplicate=False)
        if type(one).get_extra_state is not nn.Module.get_extra_state
    }
