"""A sealed slot as a persister takes it.

Apart so that a process that is just starting need not import the persister.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckpt.values import StagedIndex


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSlot:
    """A sealed slot on its way to a store: what it holds, and how to release it.

    ``data`` is a view of the slot's data area. The persister that gets it is its only user and
    releases it; otherwise a stored exception could keep the slot's memory in use. ``release`` is
    called once.
    """

    index: StagedIndex
    data: memoryview
    release: Callable[[], None]
    shared: Mapping[str, tuple[int, str]] | None = None
    """For each group of replicas, how many they are and a digest of what this one holds.

    Replicas must agree on both, or their shares do not fit together. None: not known, because the
    caller has compared them already.
    """
    samples: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """For each group of replicas, by the same key: what a sample of their elements is of, and its
    digest. Replicas whose samples differ have diverged."""
    unchanged: Callable[[], bool] = _always
    """Whether the slot has not been begun again, so that everything read from it is of
    ``index``."""

    def free(self) -> None:
        """Give up the view and the slot."""
        with contextlib.suppress(BufferError):  # a frame of an error still reads it, and ends soon
            self.data.release()
        self.release()
