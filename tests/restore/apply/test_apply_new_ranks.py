"""Ranks that a larger world has more: their generators draw other numbers than those of the old
ranks whose state they took."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from ckpt.capture.leaves import World
from ckpt.capture.plan import capture
from ckpt.capture.streams import RngState, generators_alike, state_of_new_rank
from ckpt.errors import UsageError
from ckpt.restore.apply.apply import apply

Store = Callable[..., object]
Draws = tuple[float, float, float, float]


@pytest.fixture(autouse=True)
def _generators_as_before() -> Iterator[None]:
    state = RngState().state_dict()
    yield
    RngState().load_state_dict(state)


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def draws() -> Draws:
    return torch.rand(()).item(), np.random.rand(), random.random(), random.gauss(0, 1)


def saved(store: Store, *seeds: int) -> object:
    """The snapshot of as many ranks, each with its seed."""
    captures = []
    for rank, seed in enumerate(seeds):
        seeded(seed)
        captures.append(capture({"rng": RngState()}, world=World(rank, len(seeds))))
    return store(*captures)


def drawn(snapshot: object, rank: int, size: int) -> Draws:
    """What a rank of another world draws after the restore."""
    seeded(99)
    apply({"rng": RngState()}, snapshot.index, read=snapshot.read, world=World(rank, size))  # type: ignore
    return draws()


def drawn_by_all(snapshot: object, size: int) -> list[Draws]:
    return [drawn(snapshot, rank, size) for rank in range(size)]


def test_new_ranks_draw_other_numbers_than_all_others_and_old_ranks_stay_exact(
    store: Store,
) -> None:
    found = drawn_by_all(saved(store, 1, 2), 6)
    for numbers in zip(*found, strict=True):
        assert len(set(numbers)) == 6, "each of the four generators"
    for rank, seed in enumerate((1, 2)):
        seeded(seed)
        assert found[rank] == draws()


def test_rank_that_joins_a_single_one_draws_other_numbers(store: Store) -> None:
    first, second = drawn_by_all(saved(store, 1), 2)
    assert not set(first) & set(second)


def test_every_restore_of_one_snapshot_draws_alike(store: Store) -> None:
    snapshot = saved(store, 1, 2)
    assert drawn_by_all(snapshot, 4) == drawn_by_all(snapshot, 4)


def test_ranks_that_drew_alike_in_groups_still_do(store: Store) -> None:
    found = drawn_by_all(saved(store, 1, 1, 2, 2), 8)
    assert [found.index(one) for one in found] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_world_that_drew_alike_as_a_whole_still_does(store: Store) -> None:
    assert len(set(drawn_by_all(saved(store, 1, 1), 4))) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_each_generator_that_all_ranks_had_alike_stays_alike(store: Store, nested: bool) -> None:
    """A usual script seeds torch on all ranks with one number, and nothing else."""

    def items() -> dict[str, object]:
        return {"x": {"a/b": [1, RngState()]} if nested else RngState()}

    captures = []
    for rank in range(2):
        seeded(rank)
        torch.manual_seed(7)
        captures.append(capture(items(), world=World(rank, 2)))
    snapshot = store(*captures)
    found = []
    for rank in range(4):
        seeded(99)
        apply(items(), snapshot.index, read=snapshot.read, world=World(rank, 4))  # type: ignore
        found.append(draws())
    of_torch, *others = [set(numbers) for numbers in zip(*found, strict=True)]
    assert len(of_torch) == 1
    assert [len(one) for one in others] == [4, 4, 4]


def test_cuda_generators_are_alike_if_those_of_the_ranks_own_devices_are() -> None:
    def state(*devices: tuple[int, int]) -> dict[str, object]:
        return {
            **RngState().state_dict(),
            "cuda": [b"".join(one.to_bytes(8, "little") for one in pair) for pair in devices],
        }

    drew, seeded_only = (7, 40), (7, 0)
    ranks = [state(drew, seeded_only), state(seeded_only, drew)]
    assert "cuda" in generators_alike(ranks)
    assert (
        state_of_new_rank(ranks[1], salt=b"1", alike={"cuda"})["cuda"]
        == (state(drew, drew)["cuda"])
    )
    assert "cuda" not in generators_alike([ranks[0], state((7, 40), (8, 44))])
    assert "cuda" not in generators_alike([ranks[0], {}])
    assert generators_alike(ranks[:1]) == frozenset()


def test_generator_of_the_users_own_is_taken_as_it_is(store: Store) -> None:
    """It may be one that all ranks must share, such as a sampler's."""
    captures = [
        capture({"g": torch.Generator().manual_seed(rank)}, world=World(rank, 2))
        for rank in range(2)
    ]
    snapshot = store(*captures)
    live = torch.Generator()
    apply({"g": live}, snapshot.index, read=snapshot.read, world=World(3, 4))  # type: ignore
    assert live.get_state().equal(torch.Generator().manual_seed(1).get_state())


def test_states_of_all_devices_are_folded() -> None:
    state = {**RngState().state_dict(), "cuda": [bytes(range(16)), bytes(16)]}
    one, two = (state_of_new_rank(state, salt=salt)["cuda"] for salt in (b"1", b"2"))
    assert isinstance(one, list) and isinstance(two, list)
    assert [len(data) for data in (*one, *two)] == [16] * 4
    assert one != two and one != state["cuda"]
    assert one[0][8:] == bytes(8), "no number was drawn yet"
    other = {**state, "cuda": [bytes(16), bytes(16)]}
    assert state_of_new_rank(other, salt=b"1")["cuda"] != one


def test_what_is_no_state_of_generators_is_refused() -> None:
    with pytest.raises(UsageError, match="not the state"):
        state_of_new_rank({"torch": b""}, salt=b"1")
