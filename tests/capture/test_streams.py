"""The process's generators as one object."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ckpt.capture.streams import RngState
from ckpt.errors import UsageError
from ckpt.format.objects import decode_object, encode_object


def draws() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random(), random.gauss(0, 1)


def test_state_through_the_codec_gives_the_same_draws() -> None:
    random.gauss(0, 1)
    state = encode_object(RngState().state_dict())
    expected = draws()
    draws()
    RngState().load_state_dict(decode_object(state))  # type: ignore[arg-type]
    assert draws() == expected


def test_taking_the_state_draws_nothing_and_starts_no_cuda() -> None:
    RngState().load_state_dict(state := RngState().state_dict())
    first = draws()
    RngState().load_state_dict(state)
    RngState().state_dict()
    assert draws() == first
    assert not torch.cuda.is_initialized()


def test_something_else_is_refused() -> None:
    with pytest.raises(UsageError):
        RngState().load_state_dict({"torch": b""})
