from __future__ import annotations

import pytest
import torch
from gpt_model import GPT, SHAPES, Shape, Windows, learning_rate_factor, read_corpus

SHAPE = Shape(layers=1, heads=2, width=8, context=4, batch=4)


def windows(rank: int = 0, world_size: int = 1, *, length: int = 4 * 10 + 1) -> Windows:
    corpus = torch.arange(length, dtype=torch.uint8)
    return Windows(corpus, SHAPE, rank=rank, world_size=world_size, seed=3)


def dealt(sources: list[Windows], steps: int) -> list[int]:
    """First byte of each window in global order."""
    order = []
    for _ in range(steps):
        firsts = [next(source)[0][:, 0].tolist() for source in sources]
        order += [first for row in zip(*firsts, strict=True) for first in row]
    return order


def test_windows_of_one_pass_cover_the_corpus_once() -> None:
    order = dealt([windows()], 5)
    assert sorted(order[:10]) == list(range(0, 40, 4))
    assert order[:10] != sorted(order[:10])
    assert sorted({*order[10:]}) == sorted(order[10:])


def test_windows_follow_the_same_order_at_any_world_size() -> None:
    alone = dealt([windows()], 6)
    assert dealt([windows(rank, 2) for rank in range(2)], 6) == alone
    assert dealt([windows(rank, 4) for rank in range(4)], 6) == alone


def test_windows_resumed_in_another_world_size_repeat_and_drop_nothing() -> None:
    before = [windows(rank, 4) for rank in range(4)]
    order = dealt(before, 3)
    after = [windows(rank, 2) for rank in range(2)]
    for rank, source in enumerate(after):
        source.load_state_dict(before[rank].state_dict())
    assert order + dealt(after, 3) == dealt([windows()], 6)


def test_windows_restored_to_another_seed_deal_as_the_saved_run() -> None:
    saved = windows()
    next(saved)
    other = Windows(saved.corpus, SHAPE, rank=0, world_size=1, seed=99)
    next(other)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(next(other)[0], next(saved)[0])


def test_windows_targets_are_the_inputs_one_byte_later() -> None:
    inputs, targets = next(windows())
    assert torch.equal(targets, inputs + 1)


def test_windows_of_a_batch_that_does_not_divide_are_refused() -> None:
    with pytest.raises(SystemExit, match="batch=4 ranks=3"):
        windows(0, 3)


def test_windows_of_a_corpus_shorter_than_a_batch_are_refused() -> None:
    with pytest.raises(SystemExit, match="windows=2 batch=4"):
        windows(length=10)


def test_corpus_read_twice_is_equal_and_bounded() -> None:
    first, second = read_corpus(bytes_max=100_000), read_corpus(bytes_max=100_000)
    assert torch.equal(first, second)
    assert len(first) == 100_000


def test_model_fresh_predicts_about_evenly() -> None:
    shape = SHAPES["tiny"]
    torch.manual_seed(0)
    model = GPT(shape).eval()
    data = torch.randint(0, 256, (2, shape.context + 1))
    loss = model(data[:, :-1], data[:, 1:])
    assert 5.4 < loss.item() < 5.8


def test_model_head_shares_the_embedding() -> None:
    model = GPT(SHAPE)
    assert model.head.weight is model.tokens.weight


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, warmup=10, steps=100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)
