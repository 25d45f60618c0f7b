"""What every contestant implements, and the training state that all of them save."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import nn

LAYERS = 12
"""With 6 matrices and norms a layer and 4 tensors around them: 76 parameters, 304 tensors with
Adam's state."""

SHIFT = 4099
"""Elements between the starts of two gradients: prime, so that no block grid makes them meet
again."""


@dataclass(frozen=True, slots=True)
class Saving:
    """A save whose caller may go on. ``durable`` is done when the bytes are on the disk, or carries
    the error.

    ``fsync_s`` is the part of the caller's wait that was spent on fsync calls of the benchmark's
    own.
    """

    durable: Future[None]
    fsync_s: float = 0.0


class Contestant(Protocol):
    """One way to save and load. Made in a fresh process; methods are called from the training
    thread."""

    def __init__(self, state: State, folder: Path) -> None: ...

    def save(self, step: int) -> Saving:
        """Save the live state; return as soon as the caller may change it."""

    def load(self, step: int) -> None:
        """Load what ``save(step)`` saved into the live tensors, in place."""

    def forget(self, step: int) -> None:
        """Make room; never timed."""

    def close(self) -> None: ...


class Blocks(nn.Module):
    """Parameters shaped like a GPT's. Never run forward: only its state counts."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(std=0.02))

        self.tokens, self.places = weight(8 * width, width), weight(1024, width)
        self.norm, self.bias = weight(width), weight(width)
        self.layers = nn.ModuleList(
            nn.ParameterDict(
                {
                    "attention": weight(3 * width, width),
                    "projection": weight(width, width),
                    "feed_in": weight(4 * width, width),
                    "feed_out": weight(width, 4 * width),
                    "norm_in": weight(width),
                    "norm_out": weight(width),
                }
            )
            for _ in range(LAYERS)
        )


def width_of(size_bytes: int) -> int:
    """The greatest width, a multiple of 16, whose weights and Adam moments (12 bytes a parameter)
    fit in the size."""
    width = 16
    while (
        12 * (width + 16) * ((12 * LAYERS + 8) * (width + 16) + 1024 + 2 + 2 * LAYERS) <= size_bytes
    ):
        width += 16
    return width


class State:
    """A model with its Adam state, about ``size_mib`` large, and a step that really changes every
    tensor."""

    def __init__(self, *, size_mib: int) -> None:
        torch.manual_seed(0)
        self.model = Blocks(width_of(size_mib << 20))
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        # All gradients are views of one block, which drives the step without costing the memory of
        # real ones. Each view starts elsewhere: equal gradients would give equal moments, and who
        # recognises equal bytes would store them once.
        largest = max(parameter.numel() for parameter in parameters)
        block = torch.empty(largest + SHIFT * len(parameters)).normal_()
        for number, parameter in enumerate(parameters):
            parameter.grad = block[SHIFT * number :][: parameter.numel()].view_as(parameter)
        self.optimizer.step()
        self.tensors: dict[str, torch.Tensor] = {
            f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()
        }
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                self.tensors[f"optimizer.{name}.{key}"] = value

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def step(self) -> None:
        """One optimizer step: every tensor is other bytes afterwards, so nobody gets by with what
        is stored."""
        self.optimizer.step()

    def wipe(self) -> None:
        """Overwrite all tensors in place, so that a load has something to prove."""
        for tensor in self.tensors.values():
            tensor.fill_(-1.0)

    def digest(self) -> str:
        digest = xxhash.xxh3_128()
        for tensor in self.tensors.values():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def sync_tree(folder: Path) -> float:
    """Fsync every file and folder below; returns the seconds it took."""
    begin_s = time.perf_counter()
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return time.perf_counter() - begin_s


def finished() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
