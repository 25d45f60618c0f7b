"""A keyspace in memory, for one process: the same words, its own clock, and a log of all that was
written."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable

from ckpt.errors import NotFoundError, UnavailableError
from ckpt.keyspace.base import (
    Compare,
    Delete,
    Equals,
    Exists,
    Grant,
    Keys,
    KeyValue,
    Leased,
    NoneOf,
    Put,
    Transaction,
    TransactionResult,
    Unchanged,
)


class MemoryServer:
    """What all keyspaces of one service share. ``clock``: the service's own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.revision = 1
        self.keys: dict[str, KeyValue] = {}
        self.sorted: list[str] = []
        self.leases: dict[int, tuple[float, float]] = {}
        self.changes: list[tuple[int, str]] = []
        self.lock = threading.RLock()
        self.on_put: Callable[[Put], None] = lambda put: None

    def transact(self, transaction: Transaction) -> TransactionResult:
        with self.lock:
            self.expire()
            held = all(self._holds(compare) for compare in transaction.when)
            if held and transaction.then:
                for op in transaction.then:
                    if isinstance(op, Put) and op.lease_id and op.lease_id not in self.leases:
                        raise NotFoundError(f"no such lease. lease_id={op.lease_id}")
                self.revision += 1
                for op in transaction.then:
                    self._apply(op)
            return TransactionResult(
                held, self.revision, tuple(tuple(self._read(keys)) for keys in transaction.reads)
            )

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        with self.lock:
            self.expire()
            ttl_s = self.leases.setdefault(lease_id, (ttl_s, self.clock() + ttl_s))[0]
            return Grant(lease_id, ttl_s)

    def renew(self, lease_id: int) -> float:
        with self.lock:
            self.expire()
            if lease_id not in self.leases:
                return 0.0
            ttl_s, _ = self.leases[lease_id]
            self.leases[lease_id] = (ttl_s, self.clock() + ttl_s)
            return ttl_s

    def revoke(self, lease_id: int) -> None:
        with self.lock:
            self.expire()
            self._end(lease_id)

    def backup(self) -> tuple[int, dict[str, KeyValue], dict[int, tuple[float, float]]]:
        """All that ``restore`` needs."""
        with self.lock:
            return self.revision, dict(self.keys), dict(self.leases)

    def restore(
        self, backup: tuple[int, dict[str, KeyValue], dict[int, tuple[float, float]]]
    ) -> None:
        """Go back to a backup, revisions too; leases begin anew, as etcd's do."""
        with self.lock:
            self.revision, keys, leases = backup
            self.keys, self.sorted = dict(keys), sorted(keys)
            self.leases = {
                lease_id: (ttl_s, self.clock() + ttl_s) for lease_id, (ttl_s, _) in leases.items()
            }
            self.changes = [change for change in self.changes if change[0] <= self.revision]

    def expire(self) -> None:
        now_s = self.clock()
        for lease_id in [
            lease_id for lease_id, (_, end_s) in self.leases.items() if end_s <= now_s
        ]:
            self._end(lease_id)

    def changed(self, ranges: tuple[Keys, ...], after: int) -> bool:
        with self.lock:
            self.expire()
            return any(
                revision > after and any(_within(key, keys) for keys in ranges)
                for revision, key in self.changes
            )

    def _end(self, lease_id: int) -> None:
        self.leases.pop(lease_id, None)
        gone = [one.key for one in self.keys.values() if one.lease_id == lease_id]
        if gone:
            self.revision += 1
        for key in gone:
            self._apply(Delete(key))

    def _apply(self, op: Put | Delete) -> None:
        self.changes.append((self.revision, op.key))
        match op:
            case Put(key, value, lease_id):
                created = self.keys[key].created if key in self.keys else self.revision
                if key not in self.keys:
                    bisect.insort(self.sorted, key)
                self.keys[key] = KeyValue(key, value, created, self.revision, lease_id)
                self.on_put(op)
            case Delete(key):
                if self.keys.pop(key, None) is not None:
                    self.sorted.remove(key)

    def _read(self, keys: Keys) -> list[KeyValue]:
        if not keys.end:
            found = [self.keys[keys.start]] if keys.start in self.keys else []
        else:
            first, end = (bisect.bisect_left(self.sorted, key) for key in (keys.start, keys.end))
            found = [self.keys[key] for key in self.sorted[first:end]]
        if keys.values:
            return found
        return [KeyValue(one.key, b"", one.created, one.changed, one.lease_id) for one in found]

    def _holds(self, compare: Compare) -> bool:
        match compare:
            case Unchanged(key, revision):
                return (self.keys[key].changed if key in self.keys else 0) == revision
            case NoneOf(keys):
                return not self._read(keys)
            case Exists(key):
                return key in self.keys
            case Equals(key, value):
                return key in self.keys and self.keys[key].value == value
            case Leased(key, lease_id):
                return key in self.keys and self.keys[key].lease_id == lease_id


def _within(key: str, keys: Keys) -> bool:
    return keys.start <= key < keys.end if keys.end else key == keys.start


class MemoryKeyspace:
    """See Keyspace."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server
        self._closed = False

    def transact(self, transaction: Transaction) -> TransactionResult:
        self._check()
        return self._server.transact(transaction)

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        self._check()
        return self._server.grant(lease_id, ttl_s)

    def renew(self, lease_id: int) -> float:
        self._check()
        return self._server.renew(lease_id)

    def revoke(self, lease_id: int) -> None:
        self._check()
        self._server.revoke(lease_id)

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        while not self._server.changed(ranges, after):
            if time.monotonic() >= until_s or self._closed:
                return False
            time.sleep(0.005)
        return True

    def close(self) -> None:
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise UnavailableError("closed")
