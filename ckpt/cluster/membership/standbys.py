"""Which standby keeps which nodes' state as well, so that it has it when it takes a place. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def standby_copies(placed: Iterable[str], standbys: Iterable[str]) -> Mapping[str, str]:
    """For each node that holds ranks the standby that keeps its state; nothing where there are none.

    In turn, so that each standby keeps as many as any other, or one more. These copies come on top of the mirrors: a standby
    that has no room for all keeps what it can, and nobody waits for it.
    """
    ready = sorted(standbys)
    return {node: ready[at % len(ready)] for at, node in enumerate(sorted(placed))} if ready else {}
