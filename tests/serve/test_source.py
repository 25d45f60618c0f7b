"""A value that is no number is found wherever it lies, in every type that has one."""

from __future__ import annotations

import pytest
import torch

from ckpt.serve.source import _has_nan

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 500, 1022])
def test_nan_is_found(dtype: torch.dtype, place: int) -> None:
    values = torch.linspace(-5.0, 5.0, 1023)
    assert not _has_nan(values.to(dtype).reshape(11, 93))
    values[place] = float("nan")
    assert _has_nan(values.to(dtype).reshape(11, 93))
    assert _has_nan(values.to(dtype).reshape(11, 93).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_infinity_is_a_number(dtype: torch.dtype) -> None:
    assert not _has_nan(torch.tensor([0.0, float("inf"), -float("inf")]).to(dtype))


def test_nan_beside_infinity_and_in_an_imaginary_part_is_found() -> None:
    assert _has_nan(torch.tensor([float("inf"), float("nan")]))
    assert _has_nan(torch.tensor([complex(1.0, float("nan"))]))


def test_what_can_have_none_has_none() -> None:
    assert not _has_nan(torch.zeros(3, dtype=torch.int64))
    assert not _has_nan(torch.zeros(0))
    assert not _has_nan(torch.ones(2, dtype=torch.bool))
