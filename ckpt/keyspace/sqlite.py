"""A keyspace in a SQLite file of one machine: its nodes are processes there, and no service runs.

SQLite serialises the transactions of all processes of the machine. A lease is a time on the
machine's boot clock together with the id of that boot; the next process to call deletes expired
ones. Not for a network file system, where SQLite's locks are unreliable.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from ckpt.errors import NotFoundError, UnavailableError, UsageError
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

BUSY_S = 10.0
"""How long a transaction waits for those of other processes."""
LOCK_POLL_S = 0.001
"""How often it tries to get the write lock."""
WAIT_POLL_S = 0.02
"""How often ``wait`` reads the file."""
CHANGES_KEPT = 1024
"""How many changes are kept, for ``wait`` to tell which keys they concern."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (
    one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL
);
INSERT OR IGNORE INTO about VALUES (1, 1);
CREATE TABLE IF NOT EXISTS leases (
    id INTEGER PRIMARY KEY, boot TEXT NOT NULL, ttl_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS keys (
    key TEXT PRIMARY KEY, value BLOB NOT NULL,
    created INTEGER NOT NULL, changed INTEGER NOT NULL, lease INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys_by_lease ON keys (lease);
CREATE TABLE IF NOT EXISTS changes (revision INTEGER NOT NULL, key TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS changes_by_revision ON changes (revision);
"""


def _boot_ns() -> int:
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError as error:
        raise UsageError(
            "leases in a file need to know which boot they belong to, and this system does not "
            f"tell. file={_BOOT_ID} use etcd"
        ) from error


class SqliteKeyspace:
    """The keys of one job in one file. Opens the file for each call, so forks do no harm.

    ``clock_ns`` is the time since boot, ``boot`` names the boot; both are parameters for tests.
    """

    def __init__(
        self, path: Path, *, clock_ns: Callable[[], int] = _boot_ns, boot: str | None = None
    ) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._boot = boot or _boot()
        self._closed = threading.Event()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._connected() as db:
                _keep_wal(db)
                with _transaction(db):
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(
                f"the keyspace file cannot be made. file={path} why={error}"
            ) from error

    def transact(self, transaction: Transaction) -> TransactionResult:
        with self._changing(
            sync=any(isinstance(op, Put) and not op.lease_id for op in transaction.then)
        ) as db:
            succeeded = all(_holds(db, compare) for compare in transaction.when)
            revision = _revision(db)
            if succeeded and transaction.then:  # as in etcd, reads alone make no revision
                revision += 1
                for op in transaction.then:
                    _apply(db, op, revision)
                _advance(db, revision)
            results = tuple(tuple(_read(db, keys)) for keys in transaction.reads)
        return TransactionResult(succeeded, revision, results)

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        ttl_ns = int(ttl_s * 1e9)
        with self._changing() as db:
            db.execute(
                "INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?)",
                (lease_id, self._boot, ttl_ns, self._clock_ns() + ttl_ns),
            )
            (ttl_ns,) = db.execute("SELECT ttl_ns FROM leases WHERE id = ?", (lease_id,)).fetchone()
        return Grant(lease_id, ttl_ns / 1e9)

    def renew(self, lease_id: int) -> float:
        with self._changing() as db:
            row = db.execute("SELECT ttl_ns FROM leases WHERE id = ?", (lease_id,)).fetchone()
            if row is None:
                return 0.0
            db.execute(
                "UPDATE leases SET end_ns = ? WHERE id = ?", (self._clock_ns() + row[0], lease_id)
            )
        return float(row[0]) / 1e9

    def revoke(self, lease_id: int) -> None:
        with self._changing() as db:
            _end(db, [lease_id])

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        changed = partial(_changed, ranges=ranges, after=after)
        with self._translated(), self._connected() as db:
            while True:
                if self._overdue(db):
                    with _transaction(db):
                        self._expire(db)
                if changed(db):
                    return True
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self._closed.wait(min(WAIT_POLL_S, left_s)):
                    return False

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def _changing(self, *, sync: bool = False) -> Iterator[sqlite3.Connection]:
        with self._translated(), self._connected() as db:
            # After a power cut all leases are void, so their keys need no sync. Epochs and records
            # must survive.
            db.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
            with _transaction(db):
                self._expire(db)
                yield db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed.is_set():
            raise UnavailableError(f"the keyspace was closed. file={self._path}")
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the keyspace file did not answer. file={self._path} why={error}"
            ) from error

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as db:
            yield db

    def _overdue(self, db: sqlite3.Connection) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM leases WHERE boot != ? OR end_ns <= ?)"
        return bool(db.execute(query, (self._boot, self._clock_ns())).fetchone()[0])

    def _expire(self, db: sqlite3.Connection) -> None:
        query = "SELECT id FROM leases WHERE boot != ? OR end_ns <= ?"
        _end(db, [row[0] for row in db.execute(query, (self._boot, self._clock_ns()))])


def _end(db: sqlite3.Connection, leases: list[int]) -> None:
    revision = _revision(db)
    keys = [
        row[0]
        for lease in leases
        for row in db.execute("SELECT key FROM keys WHERE lease = ?", (lease,))
    ]
    for key in keys:
        _apply(db, Delete(key), revision + 1)
    db.executemany("DELETE FROM leases WHERE id = ?", [(lease,) for lease in leases])
    if keys:
        _advance(db, revision + 1)


def _revision(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT revision FROM about").fetchone()[0])


def _advance(db: sqlite3.Connection, revision: int) -> None:
    db.execute("UPDATE about SET revision = ?", (revision,))
    db.execute("DELETE FROM changes WHERE revision <= ?", (revision - CHANGES_KEPT,))


def _where(keys: Keys) -> tuple[str, tuple[str, ...]]:
    return (
        ("key >= ? AND key < ?", (keys.start, keys.end)) if keys.end else ("key = ?", (keys.start,))
    )


def _read(db: sqlite3.Connection, keys: Keys) -> Iterator[KeyValue]:
    where, names = _where(keys)
    for key, value, created, changed, lease in db.execute(
        f"SELECT key, value, created, changed, lease FROM keys WHERE {where} ORDER BY key", names
    ):
        yield KeyValue(key, bytes(value) if keys.values else b"", created, changed, lease)


def _holds(db: sqlite3.Connection, compare: Compare) -> bool:
    current = next(
        _read(db, compare.keys if isinstance(compare, NoneOf) else Keys(compare.key)), None
    )
    match compare:
        case Unchanged(_, revision):
            return (current.changed if current else 0) == revision
        case NoneOf():
            return current is None
        case Exists():
            return current is not None
        case Equals(_, value):
            return current is not None and current.value == value
        case Leased(_, lease_id):
            return current is not None and current.lease_id == lease_id


def _apply(db: sqlite3.Connection, op: Put | Delete, revision: int) -> None:
    match op:
        case Put(key, value, lease_id):
            if (
                lease_id
                and not db.execute("SELECT 1 FROM leases WHERE id = ?", (lease_id,)).fetchone()
            ):
                raise NotFoundError(f"no such lease. lease_id={lease_id} join anew")
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                "value = excluded.value, changed = excluded.changed, lease = excluded.lease",
                (key, value, revision, revision, lease_id),
            )
        case Delete(key):
            if not db.execute("DELETE FROM keys WHERE key = ?", (key,)).rowcount:
                return
    db.execute("INSERT INTO changes VALUES (?, ?)", (revision, op.key))


def _changed(db: sqlite3.Connection, *, ranges: tuple[Keys, ...], after: int) -> bool:
    """Whether a change after that revision is in one of the ranges, or may be."""
    revision = _revision(db)
    # A revision that the file has not reached is of an older file at this path; changes from before
    # ``CHANGES_KEPT`` are forgotten.
    if after > revision or after < revision - CHANGES_KEPT:
        return True
    for keys in ranges:
        where, names = _where(keys)
        query = f"SELECT 1 FROM changes WHERE revision > ? AND {where} LIMIT 1"
        if db.execute(query, (after, *names)).fetchone():
            return True
    return False


def _keep_wal(db: sqlite3.Connection) -> None:
    """Give the file a write-ahead log. Here SQLite itself does not wait for other processes."""
    until_s = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until_s:
                raise
        time.sleep(WAIT_POLL_S)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    _begin(db)
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _begin(db: sqlite3.Connection) -> None:
    """Get the write lock.

    SQLite's own wait polls ever more rarely, so a keepalive would lose against busy writers.
    """
    until_s = time.monotonic() + BUSY_S
    db.execute("PRAGMA busy_timeout=0")
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until_s:
                raise
        time.sleep(LOCK_POLL_S)
    db.execute(f"PRAGMA busy_timeout={int(BUSY_S * 1000)}")
