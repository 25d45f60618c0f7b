"""Which sessions of this process write: under one supervisor, one a store, which is one job's whatever name it is given.

A second one would open a newer epoch through the same keeper, over the same slots: the first would be off the line and go on
without knowing it.
"""

from __future__ import annotations

import weakref

from ckpt.errors import UsageError

_open: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def enter(store: str, session: object) -> None:
    """Note that ``session`` writes from now on; again is free. Raises UsageError where another one does that isn't closed."""
    other = _open.setdefault(store, session)
    if other is not session:
        raise UsageError(
            f"a run or Checkpointer of this process writes to this store already, and a second one would cut it off. "
            f"store={store}; call run.save(), close the other one first, or give this one another store"
        )


def leave(store: str, session: object) -> None:
    """``session`` is closed. Nothing where it never wrote."""
    if _open.get(store) is session:
        del _open[store]
