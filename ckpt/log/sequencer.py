"""Who gives out the places in the log. One question, three answers; several stores come to stand behind the same seam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import KeyExistsError, NotFoundError, StoreDeniedError, StoreFullError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX

CLAIM_TRIES_MAX = 5
"""How often the same bytes are put at the same key before silence is reported; backends wait and retry beneath this."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The place is ours and holds our bytes."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The place is another's; ``data`` are the bytes that are there."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer, or none after a put that may have landed: repeat the same bytes at the same place."""

    why: str


class Sequencer(Protocol):
    """Gives each place in the log to one record, for good."""

    def claim(self, seq: int, data: bytes) -> Claimed | Lost | Unknown:
        """Make ``data`` the record at ``seq`` unless there is one. Repeating the same call is harmless.

        Raises StoreFullError or StoreDeniedError where the store refused before anything can have landed.
        """
        ...


class StoreSequencer:
    """One store's own create-if-absent, for a store whose capabilities say that it has it."""

    __slots__ = ("_backend",)

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def claim(self, seq: int, data: bytes) -> Claimed | Lost | Unknown:
        """See Sequencer."""
        found = create_once(self._backend, keys.log_key(seq), data, bytes_max=RECORD_BYTES_MAX)
        if isinstance(found, Lost) and found.data == data:
            return Claimed()
        return found


def require_create_only(backend: Backend) -> None:
    """Raises UsageError for a store that can't give out places: two writers would both believe that one is theirs."""
    if not backend.capabilities().create_only:
        raise UsageError(
            f"this store does not create a key only once, so two writers could overwrite each other. "
            f"store={backend.url} use a store that honours create-if-absent"
        )


def create_once(backend: Backend, key: str, data: bytes, *, bytes_max: int) -> Claimed | Lost | Unknown:
    """Put ``data`` at ``key`` unless something is there; a lost reply is answered by putting the same bytes again.

    ``Lost`` may hold our own bytes, put by a try whose reply was lost. Raises StoreFullError or StoreDeniedError where the
    first try was refused, for then nothing can have landed.
    """
    why = "no answer"
    doubt = False
    for _ in range(CLAIM_TRIES_MAX):
        try:
            backend.put(key, [data], create_only=True)
            return Claimed()
        except KeyExistsError:
            # Even after a lost reply the holder is only known by reading.
            doubt = True
        except (StoreFullError, StoreDeniedError):
            if not doubt:
                raise
        except UnavailableError as error:
            doubt = True
            why = str(error)
            continue
        try:
            return Lost(read_alone(backend, key, bytes_max=bytes_max))
        except (UnavailableError, NotFoundError) as error:
            why = str(error)
    return Unknown(why)
