"""Objects that a store lists and nothing refers to: counted beside the scrub's way through the keys, never touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckpt.errors import UnavailableError
from ckpt.maintenance.copies_walk import Walk
from ckpt.maintenance.scrub.report import Bench


class Strays:
    """A walk through each store's keys below ``prefix``, behind ``after``. Closing it adds what was met to the tallies."""

    def __init__(self, bench: Bench, prefix: str, *, after: str, numbers: Sequence[int]) -> None:
        self._bench = bench
        self._walks = {number: Walk(bench.stores[number], prefix, after=after) for number in numbers}

    def pass_to(self, key: str) -> None:
        """``key`` is referred to; what lies before it and was not passed yet is not."""
        self._each(lambda walk: walk.take(key))

    def leave(self, folder: str) -> None:
        """Pass over what lies in ``folder`` without counting it: whether it is referred to can't be known."""
        self._each(lambda walk: walk.skip(folder))
        self._each(lambda walk: walk.skip(f"{folder}~", count=False))

    def end(self) -> None:
        """Everything that is left is referred to by nothing."""
        self._each(lambda walk: walk.skip(None))

    def close(self) -> None:
        """Add what was met to the stores' tallies."""
        for number, walk in self._walks.items():
            tally = self._bench.findings.stores[number]
            tally.strays += walk.strays
            tally.stray_bytes += walk.stray_bytes
        self._walks = {}

    def _each(self, act: Callable[[Walk], object]) -> None:
        active = set(self._bench.active)
        for number, walk in self._walks.items():
            if number not in active:
                continue
            try:
                act(walk)
            except UnavailableError as error:
                self._bench.lose(number, str(error))
                active.discard(number)
