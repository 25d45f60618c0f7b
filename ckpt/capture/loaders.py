"""torchdata's ``StatefulDataLoader``: found by name, so that torchdata is never imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeGuard

import torch

from ckpt.errors import UsageError

UNOPENED = "unopened_sampler_generator"
"""The only key in the state of a loader that nobody has iterated: its sampler's generator state, or None."""


class Loader(Protocol):
    """What is used of a loader."""

    sampler: object
    next_iter_state: dict[str, object] | None

    def state_dict(self) -> dict[str, object]:
        """Its place; opens the loader if need be."""
        ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go to a place at the next ``iter``."""
        ...


def is_loader(value: object) -> TypeGuard[Loader]:
    """Whether it is torchdata's loader."""
    return any(
        base.__name__ == "StatefulDataLoader" and base.__module__.startswith("torchdata.")
        for base in type(value).__mro__
    )


def loader_state(loader: Loader) -> dict[str, object]:
    """The loader's place. One that nobody has iterated is not opened for it: that would draw random numbers."""
    if getattr(loader, "_iterator", None) is not None:
        return loader.state_dict()
    if loader.next_iter_state is not None:
        return loader.next_iter_state
    generator = getattr(loader.sampler, "generator", None)
    return {UNOPENED: generator.get_state().numpy().tobytes() if isinstance(generator, torch.Generator) else None}


def is_iterated(loader: Loader) -> bool:
    """Whether somebody holds an iterator in the middle of an epoch: it would keep the old place, whatever is loaded."""
    iterator = getattr(loader, "_iterator", None)
    return not (iterator is None or iterator._finished or getattr(loader, "_initial_iter_for_state_dict", False))


def load_loader(loader: Loader, state: Mapping[str, object]) -> None:
    """Put back what ``loader_state`` gave."""
    if UNOPENED not in state:
        loader.load_state_dict(dict(state))
        return
    loader.load_state_dict({})
    loader.next_iter_state = None
    generator = getattr(loader.sampler, "generator", None)
    match state[UNOPENED], generator:
        case bytes(data), torch.Generator():
            generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        case None, None:
            pass
        case _:
            raise UsageError(
                f"loader shuffles differently now. sampler={type(loader.sampler).__qualname__}; make it as it was"
            )
