"""A keeper for each test; what else the keeper's tests share lies in modules beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.keepers.served import POLICY, Served

from ckpt.ipc.messages import Policy


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Makes keepers that end after the test, whatever they wait for."""
    made: list[Served] = []

    def make(policy: Policy = POLICY) -> Served:
        made.append(Served(tmp_path, policy))
        return made[-1]

    yield make
    for one in made:
        one.finish()
