"""Digests of replicas where they are: equal for equal bits, other for any change, whatever the
strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.session import staging
from ckpt.session.staging import content_digests, device_sums, digests_of_replicas
from ckpt.values import DTYPE_BYTES


def digests(*tensors: torch.Tensor) -> list[str]:
    """As on a device, without one: the arithmetic is the same."""
    return content_digests(tensors, on_device=lambda tensor: True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SUM_ELEMENTS", 64)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", [name for name in DTYPE_BYTES if hasattr(torch, name)])
def test_each_dtype_is_digested_by_its_bits(name: str, small: None) -> None:
    dtype = getattr(torch, name)
    size = DTYPE_BYTES[name]
    raw = (torch.arange(200 * size) % 2).to(torch.uint8)
    first, second = raw.clone().view(dtype), raw.clone().view(dtype)
    assert digests(first) == digests(second)
    other = raw.clone()
    other[77 * size] ^= 1
    assert digests(first) != digests(other.view(dtype))
    assert digests(first[1].reshape(())) == digests(second[1:2]) != digests(first)
    assert digests(first[:0]) == digests(second[5:5])


@settings(max_examples=60)
@given(st.integers(1, 700), st.data())
def test_any_flipped_bit_changes_both_sums(count: int, data: st.DataObject) -> None:
    tensor = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int32)
    at = data.draw(st.integers(0, count - 1))
    changed = tensor.clone()
    changed[at] ^= data.draw(st.sampled_from([1, 2, 1 << 15, 1 << 30, -(1 << 31)]))
    one, two = device_sums(tensor), device_sums(changed)
    assert one[0] != two[0] and one[1] != two[1]


@settings(max_examples=60)
@given(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.data())
def test_flipped_signs_do_not_cancel(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.arange(1, 41).to(dtype)
    changed = tensor.clone()
    for at in data.draw(st.sets(st.integers(0, 39), min_size=1, max_size=6)):
        changed[at] = -changed[at]
    assert digests(tensor) != digests(changed)


def test_places_count(small: None) -> None:
    tensor = torch.arange(300)
    moved = tensor.clone()
    moved[[5, 200]] = moved[[200, 5]]
    assert digests(tensor) != digests(moved)
    assert digests(tensor) != digests(tensor.roll(64))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 100), (200, 2), (1, 130), (65,)])
def test_strides_do_not_count(shape: tuple[int, ...], small: None) -> None:
    dense = torch.randn(shape)
    turned = (
        dense.permute(*reversed(range(len(shape))))
        .contiguous()
        .permute(*reversed(range(len(shape))))
    )
    spread = torch.zeros((*shape, 2))
    spread[..., 0] = dense
    assert digests(dense) == digests(turned) == digests(spread[..., 0])


def test_conjugate_view_is_digested_as_its_values() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    assert digests(base.conj()) == digests(base.conj().resolve_conj()) != digests(base)


def test_device_without_memory_gives_the_same_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(300), torch.arange(5), torch.ones(())]
    asked: list[torch.Tensor] = []
    sums = device_sums

    def full(tensor: torch.Tensor, *, elements: int | None = None) -> torch.Tensor:
        asked.append(tensor)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("full")
        return sums(tensor, elements=elements)

    monkeypatch.setattr(staging, "device_sums", full)

    def on_device(tensor: torch.Tensor) -> bool:
        return tensor is not tensors[1]

    found = digests_of_replicas(tensors, on_device=on_device)
    assert len(asked) == 4
    assert found == content_digests(tensors, on_device=on_device)


def test_tensors_of_host_and_device_are_told_apart_by_what_is_asked() -> None:
    host, device = torch.ones(3), torch.ones(3)
    mixed = content_digests([host, device, host], on_device=lambda tensor: tensor is device)
    assert mixed[0] == mixed[2] == content_digests([host])[0]
    assert mixed[1] == digests(device)[0]
