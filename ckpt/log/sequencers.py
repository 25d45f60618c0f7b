"""One machine's own file that gives out the places of a log, for stores that don't create a key
only once.

SQLite makes each claim one transaction, synced to disk before it is answered, among all processes
of the machine. The file is the truth about who has a place, the stores are where the record counts:
it holds each record whole, so that whoever comes after a writer that died in between can finish the
copies. Not for a network file system, where SQLite's locks can't be relied on.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.cluster.membership.open import open_keyspace
from ckpt.errors import (
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.records import BY_ETCD, BY_SQLITE, RECORD_BYTES_MAX
from ckpt.ipc.cluster_spec import nodes_from_environment
from ckpt.keyspace.address import EtcdOptions, keyspace_location, parse_etcd_url
from ckpt.keyspace.base import Delete, Keys, Keyspace, NoneOf, Put, Transaction

# Who gives out the places in the log. One question, three answers; several stores come to stand
# behind the same seam.

PUT_TRIES_MAX = 5
"""How often the same bytes are put at the same key before silence is reported; backends wait and
retry beneath this."""


@dataclass(frozen=True, slots=True)
class Appended:
    """The place is ours and holds our bytes."""


@dataclass(frozen=True, slots=True)
class KeyTaken:
    """The place is another's; ``data`` are the bytes that are there."""

    data: bytes


@dataclass(frozen=True, slots=True)
class WriteUnknown:
    """No answer, or none after a put that may have landed: repeat the same bytes at the same
    place."""

    reason: str


class Sequencer(Protocol):
    """Gives each place in the log to one record, for good."""

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Make ``data`` the record at ``seq`` unless there is one. Repeating the same call is
        harmless.

        Raises StoreFullError or StoreDeniedError where the store refused before anything can have
        landed.
        """
        ...


class StoreSequencer:
    """One store's own create-if-absent, for a store whose capabilities say that it has it."""

    __slots__ = ("_backend",)

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See Sequencer."""
        found = create_once(self._backend, keys.log_key(seq), data, bytes_max=RECORD_BYTES_MAX)
        if isinstance(found, KeyTaken) and found.data == data:
            return Appended()
        return found


def require_create_only(backend: Backend) -> None:
    """Raises UsageError for a store that can't give out places: two writers would both believe that
    one is theirs."""
    if not backend.capabilities().create_only:
        raise UsageError(
            "this store does not create a key only once, so two writers could overwrite each "
            "other. "
            f"store={backend.url} use a store that honours create-if-absent"
        )


def create_once(
    backend: Backend, key: str, data: bytes, *, bytes_max: int
) -> Appended | KeyTaken | WriteUnknown:
    """Put ``data`` at ``key`` unless something is there; a lost reply is answered by putting the
    same bytes again.

    ``Lost`` may hold our own bytes, put by a try whose reply was lost. Raises StoreFullError or
    StoreDeniedError where the first try was refused, for then nothing can have landed.
    """
    why = "no answer"
    doubt = False
    for _ in range(PUT_TRIES_MAX):
        try:
            backend.put(key, [data], create_only=True)
            return Appended()
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
            return KeyTaken(read_alone(backend, key, bytes_max=bytes_max))
        except (UnavailableError, NotFoundError) as error:
            why = str(error)
    return WriteUnknown(why)


STATE_VARIABLE = "CKPT_STATE_DIR"
"""Names the folder of these files; by default ``ckpt`` in the user's state folder."""

BUSY_S = 30.0
"""How long a claim waits for other processes' claims."""

SQLITE_RECORDS_KEPT = 4096
"""How many of the last records are kept; older ones are on their stores for long."""

_PAUSE_S = 0.01

START_UNKNOWN = -1
"""Where a file begins whose first place is known only when it is claimed."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (
    one INTEGER PRIMARY KEY CHECK (one = 1), log_id TEXT NOT NULL, id TEXT NOT NULL, start INTEGER NOT NULL
);
"""


def database_path(log_id: str) -> Path:
    """Where this machine keeps the file for a log."""
    folder = os.environ.get(STATE_VARIABLE)
    if not folder:
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        folder = str(Path(state).expanduser() / "ckpt")
    return Path(folder) / f"{log_id}.sqlite3"


class SqliteSequencer:
    """See Sequencer. Thread-safe; each claim opens the file anew, so that forks and moved files
    harm nothing."""

    def __init__(self, path: Path, log_id: str) -> None:
        self._path = path
        self._log_id = log_id

    @property
    def name(self) -> str:
        """What a ``stores`` record calls this file. Raises UsageError where this machine has none,
        UnavailableError."""
        try:
            with self._opened() as db:
                return BY_SQLITE + self._about(db)[0]
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the file that gives out places in the log did not answer. file={self._path} "
                f"why={error} repeat later"
            ) from error

    def make(self, start: int = START_UNKNOWN) -> str:
        """Make the file, which gives out places from ``start`` on; its name. One that exists stays
        as it is.

        ``START_UNKNOWN``: from whichever is claimed first, by who has read the record that puts
        this file in charge.
        """
        return self._write("INSERT OR IGNORE INTO about VALUES (1, ?, ?, ?)", start)

    def renew(self) -> str:
        """Make the file anew, under another name, where one may be: for a take-over. Its name."""
        return self._write(
            "INSERT OR REPLACE INTO about VALUES (1, ?, ?, ?)", START_UNKNOWN, clear=True
        )

    def _write(self, statement: str, start: int, *, clear: bool = False) -> str:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._connected() as db:
                _keep_wal(db)
                db.executescript(_SCHEMA)
                with _transaction(db):
                    if clear:
                        db.execute("DELETE FROM log")
                    db.execute(statement, (self._log_id, secrets.token_hex(16), start))
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(
                f"the file that gives out places in the log can't be made. file={self._path} "
                f"why={error} set "
                f"{STATE_VARIABLE} to a folder on a local disk"
            ) from error
        return self.name

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See Sequencer. Raises UsageError where this machine has no such file, or it is behind its
        log."""
        try:
            with self._opened() as db, _transaction(db):
                _, start = self._about(db)
                last = db.execute(
                    "SELECT seq, data FROM log WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,)
                ).fetchone()
                if last is not None and last[0] == seq:
                    return Appended() if bytes(last[1]) == data else KeyTaken(bytes(last[1]))
                (top,) = db.execute("SELECT max(seq) FROM log").fetchone()
                following = top + 1 if top is not None else seq if start == START_UNKNOWN else start
                if seq > following:
                    raise UsageError(
                        "the file that gives out places is older than its log: it was brought "
                        "back from a copy, or another "
                        f"machine took over. file={self._path} its_next={following} wanted={seq}; "
                        "take over with "
                        "`ckpt stores takeover`"
                    )
                if seq < following:
                    # This writer slept while thousands of places were given out.
                    return WriteUnknown(
                        f"the place was given out long ago; the log is to be read again. seq={seq} "
                        f"next={following}"
                    )
                db.execute("INSERT INTO log VALUES (?, ?)", (seq, data))
                db.execute("DELETE FROM log WHERE seq <= ?", (seq - SQLITE_RECORDS_KEPT,))
        except sqlite3.Error as error:
            # Also after a failed commit nobody knows: the same claim again tells.
            return WriteUnknown(
                f"the file that gives out places did not answer. file={self._path} why={error}"
            )
        return Appended()

    def _about(self, db: sqlite3.Connection) -> tuple[str, int]:
        row = db.execute("SELECT log_id, id, start FROM about").fetchone()
        if row is None or row[0] != self._log_id:
            found = row[0] if row else None
            raise UsageError(
                f"the file gives out places of another log. file={self._path} its_log={found} "
                f"wanted={self._log_id}"
            )
        return row[1], row[2]

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        if not self._path.exists():
            raise UsageError(
                f"this machine does not give out the places of this log. file={self._path} run "
                "where it is, or take over with "
                "`ckpt stores takeover`"
            )
        with self._connected() as db:
            yield db

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=FULL")
            yield db


def _keep_wal(db: sqlite3.Connection) -> None:
    """Let the file have a write-ahead log, from now on. Here SQLite does not wait for other
    processes by itself."""
    until_s = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until_s:
                raise
        time.sleep(_PAUSE_S)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


# etcd as what gives out the places of a log, for stores that don't create a key only once and a
# job of several machines.
#
# One transaction a claim: it puts the whole record, if neither this place nor a later one was
# given out. That the place before is nobody's to change any more is the claimer's to know
# (``several`` brings the last record to W stores first), so the transaction need not ask for it;
# and an etcd that lost its data goes on from the first claim: nothing there has to be filled by
# hand. The epoch inside each record fences its writer, as with everything that gives out places.

SEQUENCER_VARIABLE = "CKPT_SEQUENCER"
"""Names an etcd for programs and commands that no launcher of nodes told of one."""

ETCD_RECORDS_KEPT = 256
"""How many of the last records are kept; older ones are on their stores for long."""

_LOG = "log/"
_END = "log0"
"""Behind every place: "0" follows "/"."""


def etcd_of_environment() -> EtcdOptions | None:
    """The etcd that this process's environment names, or None. Raises UsageError."""
    if address := os.environ.get(SEQUENCER_VARIABLE):
        return parse_etcd_url(address)
    spec = nodes_from_environment()
    where = keyspace_location(spec) if spec is not None else None
    return where if isinstance(where, EtcdOptions) else None


class EtcdSequencer:
    """See Sequencer. Each call connects anew, for a connection does not outlive a fork;
    thread-safe."""

    def __init__(self, options: EtcdOptions, log_id: str) -> None:
        self._options = options
        self._job = f"log {log_id}"

    @property
    def name(self) -> str:
        """What a ``stores`` record calls this etcd: the id of its cluster, which survives all but
        its making. Unavailable."""
        with self._opened() as keys:
            return f"{BY_ETCD}{keys.transact(Transaction(reads=(Keys(_LOG),))).service:x}"

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See Sequencer."""
        key = f"{_LOG}{seq:020d}"
        drop = (
            (Delete(f"{_LOG}{seq - ETCD_RECORDS_KEPT:020d}"),) if seq >= ETCD_RECORDS_KEPT else ()
        )
        try:
            with self._opened() as keys:
                done = keys.transact(
                    Transaction(
                        (NoneOf(Keys(key, _END)),), (Put(key, data), *drop), (Keys(key), _top(key))
                    )
                )
        except UnavailableError as error:
            return WriteUnknown(str(error))
        (mine, later) = done.found
        if done.succeeded:
            return Appended()
        if mine:
            return Appended() if mine[0].value == data else KeyTaken(mine[0].value)
        nexts = int(later[-1].key.removeprefix(_LOG)) + 1 if later else seq
        return WriteUnknown(
            f"the place was given out long ago; the log is to be read again. seq={seq} next={nexts}"
        )

    @contextmanager
    def _opened(self) -> Iterator[Keyspace]:
        keys = open_keyspace(self._options, self._job)
        try:
            yield keys
        finally:
            keys.close()


def _top(key: str) -> Keys:
    return Keys(key, _END, values=False)


def require_etcd(log_id: str, name: str) -> EtcdSequencer:
    """The etcd that gives out a log's places, which ``name`` calls it. Raises UsageError where it
    is another, or none."""
    options = etcd_of_environment()
    if options is None:
        raise UsageError(
            "etcd gives out the places of this log, and nobody said where it is. "
            f"sequencer={name}; set "
            f"{SEQUENCER_VARIABLE}=etcd://host:port,host:port, or take over with `ckpt stores "
            "takeover`"
        )
    found = EtcdSequencer(options, log_id)
    if (here := found.name) != name:
        raise UsageError(
            f"another etcd gives out the places of this log. sequencer={name} this_one={here} "
            f"endpoints={list(options.endpoints)}; name that one, or take over with `ckpt stores "
            "takeover`"
        )
    return found


# Who gives out a log's places where its stores can't: the etcd that this process was told of, or
# a file of this machine.


def external_sequencer(log_id: str, *, start: int = START_UNKNOWN, renew: bool = False) -> str:
    """Its name, for the ``stores`` record that puts it in charge; a file is made where there is
    none.

    ``start``: the file's first place. ``renew``: whatever the file gave out before counts no more,
    for a take-over. Raises UsageError, and UnavailableError where etcd does not answer or the file
    can't be made.
    """
    if (etcd := etcd_of_environment()) is not None:
        return EtcdSequencer(etcd, log_id).name
    file = SqliteSequencer(database_path(log_id), log_id)
    return file.renew() if renew else file.make(start)
