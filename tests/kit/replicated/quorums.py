"""Every quorum of a number of stores, for exhaustive tests."""

from __future__ import annotations

import itertools

from ckpt.backends.replicated.policy import Quorum


def quorums(stores: int) -> list[Quorum]:
    """All that so many stores can have."""
    counting = [
        frozenset(c) for n in range(1, stores + 1) for c in itertools.combinations(range(stores), n)
    ]
    return [
        Quorum(stores, write, full)
        for write in range(stores // 2 + 1, stores + 1)
        for full in counting
        if len(full) >= write
    ]
