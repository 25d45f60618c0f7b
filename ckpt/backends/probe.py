"""Whether a store creates a key only once: asked of the store itself, since several take the
condition and ignore it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Literal

from ckpt.errors import CkptError, KeyExistsError, NotFoundError, UnavailableError, UsageError

_CANNOT_ASK = (NotImplementedError, TypeError)
"""What client libraries raise that cannot put such a condition at all."""

CreateOutcome = Literal["created", "taken", "impossible", "unknown"]


class CreateOnceProbe:
    """Asks once and remembers, for all threads; ``ask`` is asked again as long as it cannot
    tell."""

    def __init__(self, ask: Callable[[], bool | None], url: str) -> None:
        self._ask = ask
        self._url = url
        self._known: bool | None = None
        self._asking = threading.Lock()

    def __call__(self) -> bool:
        """Whether the store is known to create a key only once."""
        if self._known is None:
            with self._asking:
                if self._known is None:
                    self._known = self._ask()
        return bool(self._known)

    def require(self) -> None:
        """Raise UsageError where it is not."""
        if not self():
            raise UsageError(
                f"this store does not promise to create a key only once. store={self._url}; "
                "use one that honours conditional puts as the job's first, or grant write "
                "permission for '.probe/'"
            )


def creates_once(create: Callable[[], None], remove: Callable[[], None]) -> bool | None:
    """Whether the second creation of one unused key is refused; None (ask again later) where that
    could not be learned.

    ``create`` creates that key, ``remove`` deletes it; both raise as a backend does. Only a refusal
    *because the key is taken*, after a first creation that succeeded, means yes: a store that
    denies, fails or does not answer tells nothing. At most three requests. A store that refuses to
    delete keeps four bytes below a name that is never listed.
    """
    try:
        first = _outcome(create)
        second = _outcome(create) if first == "created" else None
    finally:
        # Also where the first creation raised: its reply may have been lost. What remains does no
        # harm.
        with contextlib.suppress(CkptError):
            remove()
    return interpret_outcomes(first, second)


def interpret_outcomes(first: CreateOutcome, second: CreateOutcome | None) -> bool | None:
    """What the outcomes of two creations of the same unused key say. Pure."""
    match first, second:
        case "created", "taken":
            return True
        case ("created", "created") | ("impossible", None):
            return False
        case _:
            # A first creation that finds the key taken met its own repetition after a lost reply.
            return None


def _outcome(create: Callable[[], None]) -> CreateOutcome:
    try:
        create()
    except KeyExistsError:
        return "taken"
    except UsageError:
        return "impossible"
    except UnavailableError as error:
        cannot = isinstance(error.__cause__, _CANNOT_ASK) or "status=501" in str(error)
        return "impossible" if cannot else "unknown"
    except NotFoundError:
        return "unknown"
    return "created"
