"""What the user logs: the latest value of each name, ready to travel with the next snapshot."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from ckpt.errors import UsageError
from ckpt.events import Event, Fact, Tell
from ckpt.session.options import check_metadata

Loggable = float | int | str | bool | torch.Tensor | None


class Metrics:
    """Rank 0 keeps the latest values; the other ranks take part and keep nothing. Thread-safe."""

    def __init__(self, tell: Tell, *, rank: int) -> None:
        self._tell = tell
        self._rank = rank
        self._latest: dict[str, Fact | torch.Tensor] = {}
        self._lock = threading.Lock()

    def log(self, values: Mapping[str, Loggable]) -> None:
        """Note values. A tensor of one element is read at once on the CPU, later elsewhere. UsageError for anything else."""
        noted = {name: _noted(name, value) for name, value in values.items()}
        if self._rank != 0:
            return
        with self._lock:
            self._latest.update(noted)
        ready = {name: value for name, value in noted.items() if not isinstance(value, torch.Tensor)}
        self._tell(Event("log", "logged", ready))

    def facts(self) -> dict[str, Fact]:
        """The latest values as plain ones; waits for the devices that hold some."""
        with self._lock:
            latest = dict(self._latest)
        return {name: _item(value) if isinstance(value, torch.Tensor) else value for name, value in latest.items()}


def _noted(name: str, value: Loggable) -> Fact | torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise UsageError(f"only a tensor of one element can be logged. name={name} shape={tuple(value.shape)}")
        detached = value.detach()
        return _item(detached) if detached.device.type == "cpu" else detached.clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return check_metadata({name: value})[name]
    raise UsageError(
        f"only None, bool, int, float, str and tensors of one element can be logged. name={name} type={type(value).__name__}"
    )


def _item(value: torch.Tensor) -> Fact:
    item = value.item()
    return item if isinstance(item, (bool, int, float)) else str(item)
