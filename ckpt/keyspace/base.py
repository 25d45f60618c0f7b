"""The one thing that membership needs of a service: keys with revisions and leases, and
transactions over them.

The words are etcd's. A revision counts the service's changes; a key knows the revisions that
created and last changed it. Keys of a lease that runs out are deleted, which is a change as well.
Keys here are below the job; a driver adds its prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys from ``start`` up to, not including, ``end``; empty: the one key ``start``.
    ``values``: read those too."""

    start: str
    end: str = ""
    values: bool = True


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it was found. ``created`` and ``changed`` are revisions; ``lease_id`` 0: it needs no
    lease to stay."""

    key: str
    value: bytes
    created: int
    changed: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Holds if the key was last changed at that revision; 0: if it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class NoneOf:
    """Holds if no key of a range exists."""

    keys: Keys


@dataclass(frozen=True, slots=True)
class Exists:
    """Holds if the key exists."""

    key: str


@dataclass(frozen=True, slots=True)
class Equals:
    """Holds if the key exists and has that value."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Leased:
    """Holds if the key exists under that lease."""

    key: str
    lease_id: int


Compare = Unchanged | NoneOf | Exists | Equals | Leased


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key. ``lease_id`` 0: under no lease."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key; one that is not there is no error."""

    key: str


OPS_MAX = 120
"""How many operations one branch may have: etcd takes 128 as it comes."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """If all of ``when`` hold, do ``then`` and read ``reads``; if not, only read ``reads``. One
    revision, all or nothing.

    Each transaction must be harmless when it is done twice, and when it is done late: drivers
    repeat it after silence.
    """

    when: tuple[Compare, ...] = ()
    then: tuple[Put | Delete, ...] = ()
    reads: tuple[Keys, ...] = ()


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """What a transaction did: whether it held, the service's revision, and what each read found, in
    key order.

    ``service``: which of all services answered; 0 where there is only one that it can be.
    """

    succeeded: bool
    revision: int
    found: tuple[tuple[KeyValue, ...], ...]
    service: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease that was given out, and the time that it really lives."""

    lease_id: int
    ttl_s: float


class Keyspace(Protocol):
    """The keys of one job. Safe to be called from several threads.

    Calls raise UnavailableError where no answer came (what was asked may have been done),
    StoreDeniedError where the service refuses, and NotFoundError where a key was to be put under a
    lease that does not exist.
    """

    def transact(self, transaction: Transaction) -> TransactionResult:
        """Do a transaction, linearizably: it sees all that was answered before it was asked for."""
        ...

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        """Make a lease. One that exists under that id, from a try before, is taken as it is."""
        ...

    def renew(self, lease_id: int) -> float:
        """Let a lease live on; how long from now on. 0: it does not exist any more."""
        ...

    def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys; one that is not there is no error."""
        ...

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        """Whether one of the keys changed after revision ``after``, waiting up to ``timeout_s`` for
        it.

        May be true without cause, where it can't be known: look, then wait again.
        """
        ...

    def close(self) -> None:
        """End threads and connections. Leases live on."""
        ...
