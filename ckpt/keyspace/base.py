"""The interface of a keyspace: keys with revisions and leases, and transactions over them. Pure.

The terms are etcd's. A revision counts the service's changes; a key knows the revisions that
created and last changed it. When a lease expires its keys are deleted, which is a change too. Key
names are relative to the job; each implementation adds its prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys from ``start`` up to but not including ``end``; empty ``end``: the single key
    ``start``.

    ``values``: whether their values are read too.
    """

    start: str
    end: str = ""
    values: bool = True


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key and its value. ``created`` and ``changed`` are revisions; ``lease_id`` 0: under no
    lease."""

    key: str
    value: bytes
    created: int
    changed: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Holds if the key was last changed at that revision; revision 0: if it does not exist."""

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
    """Delete a key; a missing one is no error."""

    key: str


OPS_MAX = 120
"""How many operations one branch may have: etcd's default limit is 128."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """If all of ``when`` hold, do ``then``; in both cases do ``reads``. One revision, all or
    nothing.

    Each transaction must be harmless if done twice or late: implementations repeat it after
    silence.
    """

    when: tuple[Compare, ...] = ()
    then: tuple[Put | Delete, ...] = ()
    reads: tuple[Keys, ...] = ()


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """Whether the transaction's conditions held, the service's revision, and each read in key
    order.

    ``service``: the id of the cluster that answered; 0 if there can be only one.
    """

    succeeded: bool
    revision: int
    found: tuple[tuple[KeyValue, ...], ...]
    service: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease that was granted, and its actual time to live."""

    lease_id: int
    ttl_s: float


class Keyspace(Protocol):
    """The keys of one job. Thread-safe.

    Calls raise UnavailableError if no answer came (the operation may have been done),
    StoreDeniedError if the service refuses, and NotFoundError if a key was put under a lease that
    does not exist.
    """

    def transact(self, transaction: Transaction) -> TransactionResult:
        """Do a transaction, linearizably: it sees everything that was answered before the call."""
        ...

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        """Create a lease. One that exists under that id, from an earlier try, is kept as it is."""
        ...

    def renew(self, lease_id: int) -> float:
        """Extend a lease; returns its time to live from now. 0: it does not exist any more."""
        ...

    def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys; a missing one is no error."""
        ...

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        """Whether one of the keys changed after revision ``after``; waits for it up to
        ``timeout_s``.

        May return true without a change, if that cannot be known: read, then wait again.
        """
        ...

    def close(self) -> None:
        """End threads and connections. Leases stay."""
        ...
