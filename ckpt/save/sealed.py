"""A sealed slot on its way to a store. No more imports than a process that is just starting can
bear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpt.values import StagedIndex


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSlot:
    """A sealed slot as a persister takes it: what it holds, and how to let go of it (called once).

    ``data`` is a view of the data area for the persister alone, which releases it: an error that is
    kept somewhere would keep the slot's memory otherwise.
    """

    index: StagedIndex
    data: memoryview
    release: Callable[[], None]
    shared: Mapping[str, tuple[int, str]] | None = None
    """What replicas must agree on for their shares to fit together: how many they are, and a digest
    of what they hold. None: not known, so that whoever hands the slots in has made sure of it."""
    unchanged: Callable[[], bool] = _always
    """Whether nobody has begun to write to it: then all that was read of it before is what
    ``index`` tells of."""

    def free(self) -> None:
        """Give up the view and the slot."""
        with contextlib.suppress(BufferError):  # a frame of an error still reads it, and ends soon
            self.data.release()
        self.release()
