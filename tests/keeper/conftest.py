"""A keeper for each test; what else the keeper's tests share lies in modules beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for served and others, and for servers.*

from served import POLICY, Served  # noqa: E402

from ckpt.ipc.messages import Policy  # noqa: E402


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
