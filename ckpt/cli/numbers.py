"""Readable numbers for dtypes that numpy lacks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckpt.restore.reader import LeafValues

Array = NDArray[np.generic]

_FLOAT8 = {"float8_e4m3fn": (4, 3, 7), "float8_e5m2": (5, 2, 15)}
"""Exponent bits, mantissa bits, bias of the 8-bit floats that are spelled out; others are shown as
bits."""


def readable(values: LeafValues) -> Array:
    """The values as numpy numbers: bfloat16 as float32, the usual 8-bit floats as float32, others
    as they are stored."""
    if values.dtype == "bfloat16":
        bits: NDArray[np.uint32] = np.left_shift(values.array.astype(np.uint32), np.uint32(16))
        floats: NDArray[np.float32] = bits.view(np.float32)
        return floats
    if values.dtype in _FLOAT8:
        return np.take(_float8_table(values.dtype), values.array.astype(np.intp))
    return values.array


def is_numeric(dtype: str) -> bool:
    """Whether ``readable`` gives numbers that can be subtracted."""
    return (
        dtype == "bfloat16"
        or dtype in _FLOAT8
        or dtype in ("float64", "float32", "float16")
        or "int" in dtype
    )


def _float8_table(dtype: str) -> NDArray[np.float32]:
    exponent_bits, mantissa_bits, bias = _FLOAT8[dtype]
    bits = np.arange(256)
    sign = np.where(bits >> 7, -1.0, 1.0)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (bits & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = sign * (1 + mantissa) * 2.0 ** (exponent - bias)
    small = sign * mantissa * 2.0 ** (1 - bias)
    table = np.where(exponent == 0, small, normal)
    top = (1 << exponent_bits) - 1
    if dtype == "float8_e5m2":
        table = np.where(exponent == top, np.where(mantissa == 0, sign * np.inf, np.nan), table)
    else:
        table = np.where((bits & 0x7F) == 0x7F, np.nan, table)
    return table.astype(np.float32)
