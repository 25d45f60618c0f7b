"""A probe of whether a store creates a key only once.

The store itself is asked, because several stores accept the condition and ignore it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Literal

from ckpt.errors import CkptError, KeyExistsError, NotFoundError, UnavailableError, UsageError

_CANNOT_ASK = (NotImplementedError, TypeError)
"""Errors of client libraries that cannot send such a condition at all."""

CreateOutcome = Literal["created", "taken", "impossible", "unknown"]


class CreateOnceProbe:
    """Probes the store once and remembers the answer, for all threads.

    ``ask`` is called again until it can tell; until then its error, if any, is the reason.
    """

    def __init__(self, ask: Callable[[], bool | None], url: str) -> None:
        self._ask = ask
        self._url = url
        self._answer: bool | None = None
        self._error: UnavailableError | None = None
        self._asking = threading.Lock()

    def __call__(self) -> bool:
        """Whether the store is known to create a key only once."""
        if self._answer is None:
            with self._asking:
                if self._answer is None:
                    self._answer, self._error = self._ask_now()
        return bool(self._answer)

    def _ask_now(self) -> tuple[bool | None, UnavailableError | None]:
        try:
            return self._ask(), None
        except UnavailableError as error:
            return None, error

    def require(self) -> None:
        """Raise UsageError if the store is not known to create a key only once.

        If that could not be learned, the store's error is its cause.
        """
        if not self():
            raise UsageError(
                f"this store does not promise to create a key only once. store={self._url}; "
                "use one that honours conditional puts as the job's first, or grant write "
                "permission for '.probe/'"
            ) from self._error


def creates_once(create: Callable[[], None], remove: Callable[[], None]) -> bool | None:
    """Whether the second creation of one unused key is refused; None if that could not be learned.

    ``create`` creates the key and ``remove`` deletes it; both raise as a backend does. Only a
    refusal *because the key is taken*, after a successful first creation, means yes: a store that
    denies, fails or does not answer says nothing about it: raises its StoreDeniedError,
    StoreFullError or UnavailableError. None means: ask again later. Makes at most three requests. A
    store that refuses to delete keeps four bytes under a name that is never listed.
    """
    errors: list[UnavailableError] = []
    try:
        first = _outcome(create, errors)
        second = _outcome(create, errors) if first == "created" else None
    finally:
        # Also if the first creation raised: its reply may have been lost. A leftover probe object
        # is harmless.
        with contextlib.suppress(CkptError):
            remove()
    answer = interpret_outcomes(first, second)
    if answer is None and errors:
        raise errors[0]
    return answer


def interpret_outcomes(first: CreateOutcome, second: CreateOutcome | None) -> bool | None:
    """The meaning of the outcomes of two creations of the same unused key."""
    match first, second:
        case "created", "taken":
            return True
        case ("created", "created") | ("impossible", None):
            return False
        case _:
            # The key was unused, so a first creation that finds it taken met its own repetition
            # by the client library after a lost reply.
            return None


def _outcome(create: Callable[[], None], errors: list[UnavailableError]) -> CreateOutcome:
    """The outcome of one creation; the error that leaves it unknown is added to ``errors``."""
    try:
        create()
    except KeyExistsError:
        return "taken"
    except UsageError:
        return "impossible"
    except UnavailableError as error:
        cannot = isinstance(error.__cause__, _CANNOT_ASK) or "status=501" in str(error)
        if cannot:
            return "impossible"
        errors.append(error)
        return "unknown"
    except NotFoundError:
        return "unknown"
    return "created"
