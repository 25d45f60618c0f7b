"""A log that is written only while one's own epoch is the newest: whoever was overtaken drops nothing any more."""

from __future__ import annotations

from collections.abc import Callable

from ckpt.backends.base import Backend
from ckpt.errors import FencedError
from ckpt.format.records import Record
from ckpt.log.access import LogAccess
from ckpt.log.journal import Journal
from ckpt.log.reader import Note
from ckpt.log.sequencer import Claimed, Lost, Unknown
from ckpt.log.state import LogState


def fenced_journal(backend: Backend, epoch: Callable[[], int]) -> Journal:
    """The log of the stores behind ``backend``, for a writer whose epoch is ``epoch()``.

    Each append raises FencedError where a newer epoch is open. It is looked at in the very state that the record follows, and
    a place in the log is given once, so no epoch can be opened between the look and the record. Raises as ``Journal.open``.
    """
    return Journal(Fence(Journal.open(backend).access, epoch), backend.url)


class Fence:
    """A ``LogAccess`` that gives no place to a writer who was overtaken."""

    __slots__ = ("_epoch", "_inner")

    def __init__(self, inner: LogAccess, epoch: Callable[[], int]) -> None:
        self._inner = inner
        self._epoch = epoch

    def claim(self, state: LogState, record: Record) -> Claimed | Lost | Unknown:
        """See LogAccess. Raises FencedError where ``state`` has a newer epoch than the writer's."""
        require_newest(state, self._epoch())
        return self._inner.claim(state, record)

    @property
    def job(self) -> str:
        """See LogAccess."""
        return self._inner.job

    @property
    def log_id(self) -> str:
        """See LogAccess."""
        return self._inner.log_id

    def start(self) -> tuple[LogState, tuple[Note, ...]]:
        """See LogAccess."""
        return self._inner.start()

    def read_on(self, state: LogState) -> LogState:
        """See LogAccess."""
        return self._inner.read_on(state)

    def record_at(self, seq: int) -> bytes:
        """See LogAccess."""
        return self._inner.record_at(seq)

    def require_giver(self, state: LogState) -> None:
        """See LogAccess."""
        self._inner.require_giver(state)

    def finish(self, state: LogState) -> Lost | Unknown | None:
        """See LogAccess."""
        return self._inner.finish(state)

    def put_fold(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """See LogAccess."""
        return self._inner.put_fold(key, data)

    def put_manifest(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """See LogAccess."""
        return self._inner.put_manifest(key, data)


def require_newest(state: LogState, epoch: int) -> None:
    """Raises FencedError where ``state`` has a newer epoch than ``epoch``."""
    if state.epoch > epoch:
        raise FencedError(
            f"a newer epoch is open. writer={epoch} newest={state.epoch} what to keep is its writer's choice"
        )
