"""Optimizers whose state ranks divide among themselves (``ZeroRedundancyOptimizer``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.capture.leaves import World
from ckpt.capture.plan import capture
from ckpt.errors import UsageError
from ckpt.restore.apply.apply import apply

SIZE = 2
Items = dict[str, object]


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[World]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


def made(seed: float, inner: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Items:
    """A model, and an optimizer of it that has taken a step."""
    torch.manual_seed(int(seed))
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), inner, lr=0.1)
    model(torch.full((1, 3), seed)).square().sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def state_of(items: Items) -> dict[str, list[float]]:
    model, optimizer = items["model"], items["optimizer"]
    states = optimizer.optim.state
    return {
        f"{name} {key}": value.reshape(-1).tolist()
        for name, parameter in model.named_parameters()
        for key, value in states.get(parameter, {}).items()
    }


def saved(store: Callable[..., object]) -> tuple[object, list[dict[str, list[float]]]]:
    captures, states = [], []
    for rank in range(SIZE):
        with rank_of(rank, SIZE) as world:
            items = made(1.0)
            states.append(state_of(items))
            captures.append(capture(items, world=world))
    return store(*captures), states


def test_each_rank_gets_its_own_share_back(store: Callable[..., object]) -> None:
    snapshot, states = saved(store)
    assert states[0] and states[1] and not states[0].keys() & states[1].keys()
    for rank in range(SIZE):
        with rank_of(rank, SIZE) as world:
            items = made(2.0)
            assert state_of(items) != states[rank]
            apply(items, snapshot.index, read=snapshot.read, world=world)
            assert state_of(items) == states[rank]


@pytest.mark.parametrize("size", [1, 3])
def test_share_of_another_world_is_refused_by_name(store: Callable[..., object], size: int) -> None:
    snapshot, _ = saved(store)
    refused = 0
    for rank in range(size):
        with rank_of(rank, size) as world:
            items = made(2.0)
            before = state_of(items)
            try:
                apply(items, snapshot.index, read=snapshot.read, world=world)
            except UsageError as error:
                refused += 1
                assert "is of another rank" in str(error)
                assert "path='optimizer'" in str(error)
                assert state_of(items) == before
    assert refused, "no rank finds all of its share"


def test_another_class_inside_is_refused(store: Callable[..., object]) -> None:
    snapshot, _ = saved(store)
    with (
        rank_of(0, SIZE) as world,
        pytest.raises(UsageError, match=r"live=.*ZeroRedundancyOptimizer\(SGD\)"),
    ):
        apply(made(2.0, torch.optim.SGD), snapshot.index, read=snapshot.read, world=world)


def test_state_that_overlaps_with_gradients_is_refused(store: Callable[..., object]) -> None:
    with rank_of(0, SIZE) as world:
        items = made(1.0)
        items["optimizer"]._overlap_with_ddp = True
        with pytest.raises(UsageError, match="overlap_with_ddp"):
            capture(items, world=world)


def test_hooks_that_would_have_to_see_the_state_of_all_ranks_are_refused() -> None:
    with rank_of(0, SIZE) as world:
        items = made(1.0)
        items["optimizer"].register_load_state_dict_post_hook(lambda optimizer: None)
        with pytest.raises(UsageError, match=r"none has all of it. item='optimizer'"):
            capture(items, world=world)
