"""A snapshot on its way: staged already, durable later."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from ckpt.errors import CkptError, UnavailableError
from ckpt.values import SnapshotId, SnapshotInfo


class Pending:
    """What ``save_async`` returns: the state is copied, so training may change it; the store's copy is being made.

    One object a save; safe to use from any thread; dropping it loses nothing.
    """

    __slots__ = ("_future", "_snapshot")

    def __init__(self, snapshot: SnapshotId, future: Future[SnapshotInfo]) -> None:
        self._snapshot = snapshot
        self._future = future

    @property
    def step(self) -> int:
        """The step that this snapshot captured."""
        return self._snapshot.step

    @property
    def epoch(self) -> int:
        """The epoch in which it was captured."""
        return self._snapshot.epoch

    def done(self) -> bool:
        """Whether the outcome is known; ``durable`` then returns or raises at once."""
        return self._future.done()

    def durable(self, timeout_s: float | None = None) -> SnapshotInfo:
        """Wait until the snapshot is committed on the store and return its facts.

        Raises what made it fail (StoreFullError, StoreDeniedError, FencedError, ...), and UnavailableError where
        ``timeout_s`` seconds pass first; the save then still goes on and may be waited for again.
        """
        try:
            return self._future.result(timeout_s)
        except CancelledError as error:
            raise self._abandoned() from error
        except FutureTimeoutError as error:
            if self._future.done():  # the save itself failed with a time-out of its own
                raise
            raise UnavailableError(
                f"the snapshot is not durable yet, the save goes on. {self._snapshot} waited_s={timeout_s}"
            ) from error

    @property
    def future(self) -> Future[SnapshotInfo]:
        """The outcome as a future, for waiting on several at once."""
        return self._future

    def failure(self) -> CkptError | None:
        """The error of a save that is settled, or None where it is durable or still in flight."""
        if not self._future.done():
            return None
        if self._future.cancelled():
            return self._abandoned()
        error = self._future.exception()
        return error if isinstance(error, CkptError) else None

    def _abandoned(self) -> CkptError:
        return UnavailableError(
            f"the snapshot was abandoned before it was durable, because an exception ended its session. {self._snapshot}"
        )

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self.failure() else "durable"
        return f"<Pending {self._snapshot}: {state}>"
