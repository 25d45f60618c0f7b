"""Whether an optimizer stepped since the last snapshot point.

Inside a gradient accumulation the gradients are state too, and nobody stores gradients: a snapshot there would restore
another training. So a boundary counts as a snapshot point only where a tracked optimizer has stepped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepWatch:
    """Counts steps of tracked optimizers by their post-step hooks."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._watched: set[int] = set()
        self._stepped = False
        self.was_point = True
        """Whether the last boundary was a snapshot point."""

    def add(self, items: Mapping[str, object]) -> None:
        """Watch every optimizer among ``items``, nested ones too."""
        for optimizer in _optimizers(items):
            if id(optimizer) not in self._watched:
                self._watched.add(id(optimizer))
                self._handles.append(optimizer.register_step_post_hook(self._on_step))

    def is_point(self) -> bool:
        """Ask once a boundary: whether it is a snapshot point. With no optimizer watched, each one is."""
        self.was_point = self._stepped or not self._watched
        self._stepped = False
        return self.was_point

    @property
    def stepped(self) -> bool:
        """Whether an optimizer stepped since the last boundary."""
        return self._stepped

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_step(self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._stepped = True


def _optimizers(value: object) -> Iterator[Optimizer]:
    match value:
        case Optimizer():
            yield value
        case Mapping():
            for inner in value.values():
                yield from _optimizers(inner)
        case list() | tuple():
            for inner in value:
                yield from _optimizers(inner)
