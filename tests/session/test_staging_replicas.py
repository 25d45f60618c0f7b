"""Replicas that differ, and state that one rank alone can't capture, stop every rank at once. Ranks
are threads."""

from __future__ import annotations

import pytest
import torch

from ckpt.capture.leaves import TensorLeaf
from ckpt.errors import UnavailableError, UsageError
from ckpt.session.staging import compare_replicas
from ckpt.values import Box, Leaf, LeafKind


def _leaf(name: str, value: float, replicas: tuple[int, ...]) -> TensorLeaf:
    leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype="float32", shape=(4,))
    return TensorLeaf(leaf, Box.whole((4,)), torch.full((4,), value), replicas)


def test_equal_replicas_pass_and_differing_ones_are_named(make_channels, run_ranks) -> None:
    channels = make_channels(3)
    everyone = (0, 1, 2)
    assert (
        run_ranks(3, lambda r: compare_replicas(channels[r], [_leaf("w", 1.0, everyone)], n=1))
        == [None] * 3
    )

    def call(rank: int) -> None:
        leaves = [_leaf("same", 1.0, everyone), _leaf("w", float(rank == 2), everyone)]
        compare_replicas(channels[rank], leaves, n=2)

    outcomes = run_ranks(3, call)
    assert outcomes[:2] == [None, None]
    assert isinstance(outcomes[2], UsageError)
    assert r"leaves=w (ranks 0 and 2);" in str(outcomes[2])


def test_bits_are_compared_not_values(make_channels, run_ranks) -> None:
    channels = make_channels(2)
    zeros = (0.0, -0.0)
    outcomes = run_ranks(
        2, lambda r: compare_replicas(channels[r], [_leaf("w", zeros[r], (0, 1))], n=1)
    )
    assert isinstance(outcomes[1], UsageError)
    nan = run_ranks(
        2, lambda r: compare_replicas(channels[r], [_leaf("w", float("nan"), (0, 1))], n=2)
    )
    assert nan == [None, None]


@pytest.mark.parametrize("refusing", [0, 1, 2])
def test_error_of_one_rank_while_preparing_is_raised_on_all(job, run_ranks, refusing: int) -> None:
    ranks = job.ranks(3)

    def call(rank: int) -> None:
        item = object() if rank == refusing else torch.ones(3)
        ranks[rank].saving.prepare({"x": {"v": item}})

    outcomes = run_ranks(3, call)
    assert all(isinstance(error, UsageError) for error in outcomes), outcomes
    assert all("x/v" in str(error) for error in outcomes)
    assert (
        run_ranks(3, lambda r: ranks[r].saving.prepare({"x": {"v": torch.ones(3)}})) == [None] * 3
    )
    infos = run_ranks(3, lambda r: ranks[r].save({"x": {"v": torch.ones(3)}}, 1).durable(20))
    assert infos[0] == infos[1] == infos[2]
    run_ranks(3, lambda r: ranks[r].saving.finish())


@pytest.mark.parametrize("differing", [0, 1])
def test_replicas_that_differ_while_preparing_are_an_error_on_all(
    job, run_ranks, monkeypatch, differing: int
) -> None:
    ranks = job.ranks(2)

    def prepare(rank: int) -> None:
        saving = ranks[rank].saving
        monkeypatch.setattr(
            saving._stager,
            "prepare",
            lambda items: saving._compare([_leaf("w", float(rank == differing), (0, 1))]),
        )
        saving.prepare({})

    outcomes = run_ranks(2, prepare)
    assert all(isinstance(error, UsageError) for error in outcomes), outcomes
    assert all("replicas differ" in str(error) for error in outcomes)


def test_unforeseen_error_of_one_rank_while_preparing_frees_the_others(job, run_ranks) -> None:
    class Lost:
        def state_dict(self) -> dict[str, object]:
            raise RuntimeError("device lost")

        def load_state_dict(self, state: dict[str, object]) -> None:
            raise RuntimeError("device lost")

    ranks = job.ranks(2)

    def call(rank: int) -> str:
        try:
            ranks[rank].saving.prepare({"x": Lost() if rank == 0 else {"v": 1}})
        except RuntimeError:
            return "raised as it was"
        return "passed"

    outcomes = run_ranks(2, call)
    assert outcomes[0] == "raised as it was"
    assert isinstance(outcomes[1], UnavailableError)
    assert "device lost" in str(outcomes[1])
