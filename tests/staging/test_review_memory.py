"""A region that nobody closed gives its descriptor back when it is dropped."""

import gc
import os

import pytest

from ckpt.staging.memory import Region
from ckpt.values import PAGE_BYTES


def test_a_dropped_region_closes_its_descriptor() -> None:
    region = Region(PAGE_BYTES)
    fd = region.fd
    if fd is None:
        pytest.skip("no descriptors here")
    os.fstat(fd)
    del region
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
