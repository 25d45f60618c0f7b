"""Decorated calls inside decorated calls: allowed with stores of their own, refused with the same one.

Two runs of one store would each open an epoch, and the inner would fence the outer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ckpt.errors import UsageError

_OPEN: ContextVar[tuple[str, ...]] = ContextVar("ckpt_open_runs", default=())


@contextmanager
def entered(url: str) -> Iterator[bool]:
    """Hold ``url`` as open while the body runs; gives whether no other run is around.

    Raises UsageError where a run around this one holds it.
    """
    if url in _OPEN.get():
        raise UsageError(
            f"a run inside a run of the same store would fence it. store={url}; give the inner one a store of its own, or pass "
            "the outer Run to the inner function"
        )
    token = _OPEN.set((*_OPEN.get(), url))
    try:
        yield len(_OPEN.get()) == 1
    finally:
        _OPEN.reset(token)
