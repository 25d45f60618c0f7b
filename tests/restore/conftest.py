"""A sample store for every test of this room."""

from __future__ import annotations

import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import load_index
from ckpt.testing.sample import SampleWriter, write_sample_store
from ckpt.values import SnapshotId


@pytest.fixture
def sample() -> SampleWriter:
    """Steps 10, 20, 30 of epoch 1, two ranks, in memory."""
    return write_sample_store(MemoryBackend("sample"))


@pytest.fixture
def sample_index(sample: SampleWriter) -> SnapshotIndex:
    """The index of step 30."""
    return load_index(sample.backend, sample.journal.refresh(), SnapshotId(1, 30))
