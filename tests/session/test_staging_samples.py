"""Replicas that diverge after they were compared: each durable snapshot digests another hundredth of
them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.capture.owners import LeafShares, ReplicatedBox
from ckpt.session import staging
from ckpt.session.staging import SAMPLE_SHARE, SAMPLE_TENSORS_MAX, ReplicaSampler, Stager
from ckpt.values import Box, Leaf, LeafKind, SnapshotId


def leaf(name: str, tensor: torch.Tensor, replicas: tuple[int, ...] = (0, 1)) -> TensorLeaf:
    shape = tuple(tensor.shape)
    recorded = Leaf(name=name, kind=LeafKind.TENSOR, dtype="float32", shape=shape)
    return TensorLeaf(recorded, Box.whole(shape), tensor, replicas)


def state() -> list[TensorLeaf]:
    torch.manual_seed(1)
    return [
        leaf("m/weight", torch.randn(60, 50)),
        leaf("m/bias", torch.randn(700)),
        leaf("own", torch.randn(3), replicas=(0,)),
        leaf("m/turned", torch.randn(40, 30).t()),
    ]


def sample(leaves: Sequence[TensorLeaf], number: int) -> tuple[str, str] | None:
    found = ReplicaSampler(leaves).samples(number)
    assert len(found) <= 1, "one group"
    return next(iter(found.values()), None)


def test_one_changed_element_is_found_while_numbers_come_by_all_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "SAMPLE_BYTES_MIN", 16)
    count = 2 * SAMPLE_SHARE
    changed = state()
    changed[0].tensor[31, 7] += 1.0
    first = 12_345
    numbers = range(first, first + count)
    different = [number for number in numbers if sample(state(), number) != sample(changed, number)]
    assert len(different) == 1
    one, other = sample(state(), different[0]), sample(changed, different[0])
    assert one is not None and other is not None
    assert one[0] == other[0] == f"m/weight [part {different[0] % count + 1} of {count}]"


def test_small_group_is_looked_at_whole_each_time() -> None:
    changed = state()
    changed[1].tensor[699] += 1.0
    assert all(sample(state(), number) != sample(changed, number) for number in range(3))
    one = sample(state(), 7)
    assert one is not None and one[0] == "m/weight to m/turned [part 1 of 1]"


def test_equal_replicas_have_equal_samples_and_nothing_is_taken_of_what_a_rank_has_alone() -> None:
    assert ReplicaSampler(state()).samples(5) == ReplicaSampler(state()).samples(5)
    assert ReplicaSampler([leaf("own", torch.ones(500), (1,))]).samples(5) == {}


def test_each_group_of_replicas_has_a_sample_of_its_own() -> None:
    leaves = [leaf("a", torch.ones(5000)), leaf("b", torch.ones(5000), replicas=(0, 2))]
    assert len(ReplicaSampler(leaves).samples(5)) == 2


def test_sample_of_many_small_tensors_digests_few_and_comes_by_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Optimizers keep one number for each parameter."""
    narrowed: list[str] = []
    digested: list[int] = []
    narrow, digest = staging._narrowed, staging.content_digests

    def counted(leaf: TensorLeaf, box: Box) -> torch.Tensor:
        narrowed.append(leaf.leaf.name)
        return narrow(leaf, box)

    def digests(pieces: Sequence[torch.Tensor], **options: int) -> list[str]:
        digested.append(len(pieces))
        return digest(pieces, **options)

    monkeypatch.setattr(staging, "_narrowed", counted)
    monkeypatch.setattr(staging, "content_digests", digests)
    names = [f"o/{number}/step" for number in range(1000)]
    sampler = ReplicaSampler([leaf(name, torch.ones(())) for name in names])
    labels = set()
    for number in range(10**9, 10**9 + 32):
        before = len(narrowed)
        ((label, _),) = sampler.samples(number).values()
        labels.add(label)
        assert 0 < len(narrowed) - before <= SAMPLE_TENSORS_MAX
    assert sorted(narrowed) == sorted(names)
    assert len(labels) == 32 and set(digested) == {1}


def test_change_of_one_of_many_small_tensors_beside_large_ones_is_found() -> None:
    tensors = [torch.ones(200_000 if number % 9 == 0 else number % 5) for number in range(90)]
    sampler = ReplicaSampler([leaf(str(n), tensor) for n, tensor in enumerate(tensors)])
    before = [sampler.samples(number) for number in range(40)]
    tensors[47][1] = 2.0
    assert len({str(one) for one in before}) < 40, "all parts were come by"
    after = [sampler.samples(number) for number in range(40)]
    different = {str(one) for one, other in zip(before, after, strict=True) if one != other}
    assert len(different) == 1


def staging_rank(items: dict[str, object], said: list[str]) -> Stager:
    stager = Stager(
        World(0, 2),
        slots=1,
        threads=1,
        compare_replicas=lambda leaves: None,
        on_unsampled=said.append,
    )
    stager.prepare(items)
    stager._sampler = ReplicaSampler(
        [leaf(f"w{number}", torch.ones(1000)) for number in range(4000)]
    )
    return stager


def staged_samples(stager: Stager, items: dict[str, object], step: int) -> dict[str, object]:
    staged = stager.stage(items, SnapshotId(1, step), metadata={}, wait_s=0.0, sample=True)
    staged.release()
    return dict(staged.samples)


def test_rank_that_missed_a_snapshot_samples_the_same_as_the_others_afterwards() -> None:
    items: dict[str, object] = {"d": {"n": 1}}
    one, other = staging_rank(items, []), staging_rank(items, [])
    staged_samples(one, items, 10)
    found = [staged_samples(one, items, step) for step in range(100, 3000, 100)]
    assert found == [staged_samples(other, items, step) for step in range(100, 3000, 100)]
    assert len({str(one) for one in found}) > 20, "steps of a round interval come by all shares"
    one.close()
    other.close()


def test_full_device_leaves_the_sample_out_and_the_snapshot_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    items: dict[str, object] = {"d": {"n": 1}}
    stager = staging_rank(items, said)

    def full(tensor: torch.Tensor, *, elements: int | None = None) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "content_digests", full)
        assert [staged_samples(stager, items, step) for step in (1, 2)] == [{}, {}]
    assert len(said) == 1 and "epoch 1 step 1" in said[0]
    assert staged_samples(stager, items, 3)
    stager.close()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.integers(1, 60))
def test_shares_are_disjoint_cover_everything_and_keep_the_budget(
    lengths: list[int], count: int
) -> None:
    leaves = [ReplicatedBox(Box((0,), (length,)), 4, (0, 1)) for length in lengths]
    seen = [0] * len(leaves)
    shares = LeafShares(leaves)
    for number in range(count):
        taken = shares.boxes(number, count)
        for share in taken:
            assert share.box.offsets[0] == seen[share.index], "in order, without a gap"
            seen[share.index] += share.box.sizes[0]
        elements = sum(share.box.sizes[0] for share in taken)
        assert elements <= sum(lengths) / count * 1.01 + 2
    assert seen == lengths
