"""Tests of this folder need a real CUDA device; elsewhere they are skipped, and say why."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _device() -> None:
    if torch.version.cuda is None and torch.version.hip is None:
        pytest.skip(f"this torch is built without CUDA. torch={torch.__version__}")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    torch.cuda.init()
