"""What is saved: many small tensors and a few large ones, of which each save changes some. Told
apart by every byte."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

SMALL = 30
LARGE = 3
SMALL_BYTES_MAX = 2048
LARGE_BYTES_MAX = 400_000
HUGE_BYTES = 4_600_000
"""More than one chunk."""

DTYPES = (torch.float32, torch.int64, torch.bfloat16, torch.uint8)

Sizes = tuple[int, ...]
Content = tuple[int, ...]
"""The version of each tensor."""

State = dict[str, object]


def draw_sizes(dice: random.Random) -> Sizes:
    """How many bytes each tensor has: multiples of eight."""
    sizes = [8 * dice.randint(1, SMALL_BYTES_MAX // 8) for _ in range(SMALL)]
    sizes += [8 * dice.randint(SMALL_BYTES_MAX // 8, LARGE_BYTES_MAX // 8) for _ in range(LARGE)]
    if dice.random() < 0.25:
        sizes[-1] = HUGE_BYTES
    return tuple(sizes)


def changed(content: Content, version: int, dice: random.Random) -> Content:
    """Some tensors in a version that none had before."""
    places = set(dice.sample(range(len(content)), dice.randint(1, max(1, len(content) // 4))))
    return tuple(version if place in places else old for place, old in enumerate(content))


def state_of(sizes: Sizes, content: Content | None) -> State:
    """Fresh objects that hold ``content``; with None they hold nothing of any."""
    tensors = {
        f"t{place:02d}": _tensor(size, place, None if content is None else content[place])
        for place, size in enumerate(sizes)
    }
    return {
        "model": tensors,
        "progress": {"versions": [0] * len(sizes) if content is None else list(content)},
    }


def held_by(sizes: Sizes, state: State, contents: Sequence[Content]) -> Content | None:
    """Which of ``contents`` it is that ``state`` holds to the last bit; None for none of them."""
    return next(
        (content for content in contents if _bytes(state) == _bytes(state_of(sizes, content))), None
    )


def _tensor(size: int, place: int, version: int | None) -> torch.Tensor:
    data = bytearray(size) if version is None else bytearray(_data(size, place, version))
    return torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[place % len(DTYPES)])


@lru_cache(maxsize=256)
def _data(size: int, place: int, version: int) -> bytes:
    return np.random.default_rng((place, version)).bytes(size)


def _bytes(state: State) -> tuple[object, ...]:
    tensors, progress = state["model"], state["progress"]
    assert isinstance(tensors, dict)
    return (*(one.view(torch.uint8).numpy().tobytes() for one in tensors.values()), progress)
