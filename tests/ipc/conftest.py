"""A look at whether any descriptor is left open."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def no_descriptor_is_left_open() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what other tests hold is not looked through again: a second for each test
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
