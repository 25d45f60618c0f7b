"""Snapshot points are boundaries at which a tracked optimizer stepped."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from ckpt.elastic.boundaries import StepWatch


def _optimizer() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.1)


def test_without_an_optimizer_every_boundary_is_a_point() -> None:
    watch = StepWatch()
    watch.add({"model": nn.Linear(2, 2), "n": 1})
    assert [watch.at_snapshot_point() for _ in range(3)] == [True, True, True]
    assert watch.was_snapshot_point


def test_boundary_is_a_point_once_after_each_step() -> None:
    watch = StepWatch()
    optimizer = _optimizer()
    watch.add({"optimizer": optimizer})
    assert not watch.at_snapshot_point()
    optimizer.step()
    assert watch.at_snapshot_point()
    assert not watch.at_snapshot_point()
    assert not watch.was_snapshot_point
    optimizer.step()
    optimizer.step()
    assert watch.at_snapshot_point()


def test_nested_optimizers_count_and_any_of_several_is_enough() -> None:
    watch = StepWatch()
    optimizers = [_optimizer() for _ in range(3)]
    watch.add({"all": {"g": optimizers[0], "d": [optimizers[1], (optimizers[2],)]}})
    for optimizer in optimizers:
        assert not watch.at_snapshot_point()
        optimizer.step()
        assert watch.at_snapshot_point()


def test_optimizer_added_twice_has_one_hook_and_none_after_the_close() -> None:
    watch = StepWatch()
    optimizer = _optimizer()
    watch.add({"a": optimizer})
    watch.add({"b": optimizer, "c": [optimizer]})
    assert len(optimizer._optimizer_step_post_hooks) == 1
    watch.close()
    assert len(optimizer._optimizer_step_post_hooks) == 0


def test_closed_watch_keeps_no_optimizer_alive() -> None:
    watch = StepWatch()
    optimizer = _optimizer()
    gone = weakref.ref(optimizer)
    watch.add({"optimizer": optimizer})
    watch.close()
    del optimizer
    gc.collect()
    assert gone() is None
