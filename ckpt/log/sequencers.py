"""Sequencers: what gives each position of the log to one record.

One store's own create-if-absent, a SQLite file of one machine, or etcd. The latter two serve stores
that do not create a key only once. Several stores that do are their own sequencer (``replicated``).
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.cluster.membership.open import open_keyspace
from ckpt.errors import (
    CkptError,
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

PUT_TRIES_MAX = 5
"""How often the same bytes are put at the same key before ``WriteUnknown`` is returned.

Backends wait and retry beneath this.
"""


@dataclass(frozen=True, slots=True)
class Appended:
    """The position is ours and holds our bytes."""


@dataclass(frozen=True, slots=True)
class KeyTaken:
    """Another writer has the position or key; ``data`` are the bytes there."""

    data: bytes


@dataclass(frozen=True, slots=True)
class WriteUnknown:
    """No answer, or none after a put that may have landed: repeat the same bytes at the same
    key."""

    reason: str


PROBES = "probes/"
"""Prefix of objects that try what a store does. Sweeps delete those of processes that died."""


class Sequencer(Protocol):
    """Gives each position of the log to one record, for good."""

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Make ``data`` the record at ``seq`` unless there is one. Repeating the same call is
        harmless.

        Raises StoreFullError or StoreDeniedError if the store refused before anything can have been
        written.
        """
        ...


class StoreSequencer:
    """One store's create-if-absent, for a store whose capabilities include it."""

    __slots__ = ("_backend",)

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        result = create_once(self._backend, keys.log_key(seq), data, bytes_max=RECORD_BYTES_MAX)
        if isinstance(result, KeyTaken) and result.data == data:
            return Appended()
        return result


def require_create_only(backend: Backend) -> None:
    """Raise UsageError for a store that overwrites: two writers would both believe a position is
    theirs.

    A store that could not be asked says no too. It is asked by a put then, which raises why:
    StoreDeniedError for one that is read-only or forbidden, StoreFullError, UnavailableError. Cost:
    nothing for a store that creates once.
    """
    if backend.capabilities().create_only:
        return
    key = f"{PROBES}{secrets.token_hex(16)}"
    try:
        backend.put(key, [b"ckpt"], create_only=True)
    except UsageError as error:
        if isinstance(cause := error.__cause__, UnavailableError):
            raise type(cause)(
                "cannot write to the store, nor learn whether it creates a key only once. "
                f"store={backend.url} why={cause}"
            ) from cause
        raise UsageError(
            "this store does not create a key only once, so two writers could overwrite each "
            f"other. store={backend.url} use a store that honours create-if-absent"
        ) from error
    with suppress(CkptError):
        backend.delete(key)  # a sweep deletes what stays
    if not backend.capabilities().create_only:
        raise UnavailableError(
            "cannot learn whether this store creates a key only once. "
            f"store={backend.url} repeat later"
        )


def create_once(
    backend: Backend, key: str, data: bytes, *, bytes_max: int
) -> Appended | KeyTaken | WriteUnknown:
    """Put ``data`` at ``key`` unless something is there; after a lost reply the same bytes are put
    again.

    ``KeyTaken`` may hold our own bytes, put by a try whose reply was lost. Raises StoreFullError or
    StoreDeniedError if the first try was refused, because then nothing can have been written.
    """
    reason = "no answer"
    maybe_written = False
    for _ in range(PUT_TRIES_MAX):
        try:
            backend.put(key, [data], create_only=True)
            return Appended()
        except KeyExistsError:
            # The key may hold our own bytes, if the reply to an earlier try was lost. Only reading
            # tells.
            maybe_written = True
        except (StoreFullError, StoreDeniedError):
            if not maybe_written:
                raise
        except UnavailableError as error:
            maybe_written = True
            reason = str(error)
            continue
        try:
            return KeyTaken(read_alone(backend, key, bytes_max=bytes_max))
        except (UnavailableError, NotFoundError) as error:
            reason = str(error)
    return WriteUnknown(reason)


# ---- SQLite: one machine gives out the positions

STATE_VARIABLE = "CKPT_STATE_DIR"
"""Names the folder of the SQLite files; by default ``ckpt`` in the user's state folder."""

BUSY_S = 30.0
"""How long an append waits for those of other processes."""

SQLITE_RECORDS_KEPT = 4096
"""How many of the last records the file keeps; older ones were copied to the stores long ago."""

_PAUSE_S = 0.01

START_UNKNOWN = -1
"""The start of a file whose first position is the first that is asked for."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    log_id TEXT NOT NULL,
    id TEXT NOT NULL,
    start INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS machine (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    id TEXT NOT NULL
);
"""

MOUNTS = Path("/proc/self/mountinfo")
MACHINE_ID = Path("/etc/machine-id")

NETWORK_FILE_SYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "fuse.ceph-fuse", "glusterfs"),
        *("fuse.glusterfs", "lustre", "gpfs", "beegfs", "orangefs", "panfs", "pvfs2", "wekafs"),
        *("fuse.juicefs", "fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.mount-s3"),
        *("fuse.rclone", "fuse.sshfs"),
    }
)
"""Types of file systems that several machines may have mounted: SQLite's locks bind the processes
of one machine only."""


def database_path(log_id: str) -> Path:
    """Where this machine keeps the SQLite file of a log. Raises UsageError for a user without a
    home: another folder by default could be wiped, or be another one for the next process.
    """
    try:
        return state_folder() / f"{log_id}.sqlite3"
    except RuntimeError as error:
        raise UsageError(
            "this user has no home, so there is no folder for the file that gives out the log's "
            f"positions. uid={os.getuid()} set {STATE_VARIABLE} to a folder on a local disk that "
            "stays"
        ) from error


def state_folder() -> Path:
    """Where this user keeps what logs need on this machine. Raises RuntimeError without a home."""
    if folder := os.environ.get(STATE_VARIABLE):
        return Path(folder)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "ckpt"


def file_system_type(mounts: str, path: str) -> str:
    """The type of the file system that holds ``path``, by the text of ``/proc/self/mountinfo``; ""
    if that does not tell.

    ``path`` is absolute and has no links. Of several mounts at one place the last one counts.
    """
    found, found_chars = "", -1
    for line in mounts.splitlines():
        mounted, _, kind = line.partition(" - ")
        fields = mounted.split(" ")
        if len(fields) < 5 or not kind:
            continue
        # Blanks and other special characters are written as octal numbers.
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= found_chars:
            found, found_chars = kind.split(" ")[0], len(place)
    return found


def machine_id() -> str:
    """The id of this machine; "" if its system gives none."""
    return _text_of(MACHINE_ID)


def _text_of(path: Path) -> str:
    """The text of a file of the system; "" if this system has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class SqliteSequencer:
    """One machine's SQLite file that gives out the positions of a log. Thread-safe.

    Each append is one transaction, synced to disk before it is answered, among all processes of the
    machine. The file decides who has a position; the stores decide whether the record counts. It
    holds each record whole, so that the next writer can finish the copies of one that died in
    between. Each call opens the file anew, so forks and moved files do no harm. It refuses a
    network file system, such as a home that several machines share: SQLite's locks bind one
    machine's processes, and two machines would give out a position twice. Where the system has a
    machine id it is recorded, and another machine is refused.
    """

    def __init__(self, path: Path, log_id: str) -> None:
        self._path = path
        self._log_id = log_id

    @property
    def name(self) -> str:
        """What a ``stores`` record calls this file.

        Raises UsageError if this machine has none, UnavailableError if it does not answer.
        """
        try:
            with self._opened() as db:
                return BY_SQLITE + self._about(db)[0]
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the sequencer's file did not answer. file={self._path} why={error} repeat later"
            ) from error

    def make(self, start: int = START_UNKNOWN) -> str:
        """Create the file, which gives out positions from ``start`` on; returns its name.

        A file that exists stays as it is. ``START_UNKNOWN``: from the first position that is asked
        for, by a writer that has read the record that names this file.
        """
        return self._write("INSERT OR IGNORE INTO about VALUES (1, ?, ?, ?)", start)

    def renew(self) -> str:
        """For a take-over: create the file anew under another name, replacing one that exists. Its
        name."""
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
                    if clear:
                        db.execute("DELETE FROM machine")
                    if machine := machine_id():
                        db.execute("INSERT OR IGNORE INTO machine VALUES (1, ?)", (machine,))
                    db.execute(statement, (self._log_id, secrets.token_hex(16), start))
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(
                f"the sequencer's file cannot be made. file={self._path} why={error} set "
                f"{STATE_VARIABLE} to a folder on a local disk"
            ) from error
        return self.name

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Raises UsageError if this machine has no such file, or if the file is behind its log."""
        try:
            with self._opened() as db, _transaction(db):
                _, start = self._about(db)
                row = db.execute(
                    "SELECT seq, data FROM log WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,)
                ).fetchone()
                if row is not None and row[0] == seq:
                    return Appended() if bytes(row[1]) == data else KeyTaken(bytes(row[1]))
                (greatest,) = db.execute("SELECT max(seq) FROM log").fetchone()
                if greatest is not None:
                    following = greatest + 1
                elif start == START_UNKNOWN:
                    following = seq
                else:
                    following = start
                if seq > following:
                    raise UsageError(
                        "the sequencer's file is older than its log: it was restored from a copy, "
                        f"or another machine took over. file={self._path} its_next={following} "
                        f"wanted={seq}; take over with `ckpt stores takeover`"
                    )
                if seq < following:
                    # This writer was paused while thousands of positions were given out.
                    return WriteUnknown(
                        "the position was given out long ago; the log must be read again. "
                        f"seq={seq} next={following}"
                    )
                db.execute("INSERT INTO log VALUES (?, ?)", (seq, data))
                db.execute("DELETE FROM log WHERE seq <= ?", (seq - SQLITE_RECORDS_KEPT,))
        except sqlite3.Error as error:
            # Also after a failed COMMIT the outcome is unknown; the same append again tells.
            return WriteUnknown(
                f"the sequencer's file did not answer. file={self._path} why={error}"
            )
        return Appended()

    def _about(self, db: sqlite3.Connection) -> tuple[str, int]:
        self._require_machine(db)
        row = db.execute("SELECT log_id, id, start FROM about").fetchone()
        if row is None or row[0] != self._log_id:
            its_log = row[0] if row else None
            raise UsageError(
                f"the sequencer's file belongs to another log. file={self._path} its_log={its_log} "
                f"wanted={self._log_id}"
            )
        return row[1], row[2]

    def _require_machine(self, db: sqlite3.Connection) -> None:
        """Raise UsageError if the file was made on another machine."""
        mine = machine_id()
        try:
            row = db.execute("SELECT id FROM machine").fetchone()
        except sqlite3.OperationalError:
            return  # the file is from before machines were recorded
        if mine and row is not None and row[0] != mine:
            raise UsageError(
                "the sequencer's file was made on another machine, which may give out positions of "
                f"this log too. file={self._path} its_machine={row[0]} mine={mine}; run there, or "
                "take over with `ckpt stores takeover`"
            )

    def _require_local(self) -> None:
        """Raise UsageError if several machines may share the file."""
        kind = file_system_type(_text_of(MOUNTS), os.path.realpath(self._path))
        if kind in NETWORK_FILE_SYSTEMS:
            raise UsageError(
                "the sequencer's file would be on a network file system, where several machines "
                f"can give out the same position of the log. file={self._path} type={kind}; set "
                f"{STATE_VARIABLE} to a folder on a local disk (and move an existing file there), "
                f"or name an etcd with {SEQUENCER_VARIABLE}"
            )

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        if not self._path.exists():
            raise UsageError(
                f"this machine does not give out the positions of this log. file={self._path} run "
                "where it is, or take over with "
                "`ckpt stores takeover`"
            )
        with self._connected() as db:
            yield db

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        self._require_local()
        with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as db:
            # An answer that a power cut undoes would give out the same position twice.
            db.execute("PRAGMA synchronous=FULL")
            yield db


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
        time.sleep(_PAUSE_S)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    # Take the write lock now, not at the first write: what is read before must still be true then.
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


# ---- etcd: writers on several machines

SEQUENCER_VARIABLE = "CKPT_SEQUENCER"
"""Names an etcd for programs and commands whose launcher gave them none."""

ETCD_RECORDS_KEPT = 256
"""How many of the last records etcd keeps; older ones were copied to the stores long ago."""

_LOG = "log/"
_END = "log0"
"""After every position: "0" follows "/"."""


def etcd_of_environment() -> EtcdOptions | None:
    """The etcd that this process's environment names, or None. Raises UsageError."""
    if address := os.environ.get(SEQUENCER_VARIABLE):
        return parse_etcd_url(address)
    spec = nodes_from_environment()
    where = keyspace_location(spec) if spec is not None else None
    return where if isinstance(where, EtcdOptions) else None


class EtcdSequencer:
    """etcd gives out the positions of a log, to writers on several machines. Thread-safe.

    Each append is one transaction: it puts the whole record if neither this position nor a later
    one was given out. The transaction need not check the predecessor: the caller brings that to W
    stores first. So an etcd that lost its data continues from the first append, with nothing to
    restore by hand. The epoch inside each record fences its writer, as with every sequencer. Each
    call connects anew, because a connection does not survive a fork.
    """

    def __init__(self, options: EtcdOptions, log_id: str) -> None:
        self._options = options
        self._job = f"log {log_id}"

    @property
    def name(self) -> str:
        """What a ``stores`` record calls this etcd: its cluster id, which restarts and replaced
        members keep.

        Raises UnavailableError.
        """
        with self._opened() as keys:
            return f"{BY_ETCD}{keys.transact(Transaction(reads=(Keys(_LOG),))).service:x}"

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        # The condition covers this position and every later one, up to ``_END``: a writer that was
        # paused for long must not fill a position whose record was deleted here.
        key = f"{_LOG}{seq:020d}"
        drop = (
            (Delete(f"{_LOG}{seq - ETCD_RECORDS_KEPT:020d}"),) if seq >= ETCD_RECORDS_KEPT else ()
        )
        try:
            with self._opened() as keys:
                result = keys.transact(
                    Transaction(
                        (NoneOf(Keys(key, _END)),), (Put(key, data), *drop), (Keys(key), _top(key))
                    )
                )
        except UnavailableError as error:
            return WriteUnknown(str(error))
        (current, later) = result.found
        if result.succeeded:
            return Appended()
        if current:
            return Appended() if current[0].value == data else KeyTaken(current[0].value)
        following = int(later[-1].key.removeprefix(_LOG)) + 1 if later else seq
        return WriteUnknown(
            "the position was given out long ago; the log must be read again. "
            f"seq={seq} next={following}"
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
    """The etcd that a ``stores`` record calls ``name``. Raises UsageError if it is another, or not
    given."""
    options = etcd_of_environment()
    if options is None:
        raise UsageError(
            f"etcd gives out the positions of this log, and its address is not set. "
            f"sequencer={name}; set {SEQUENCER_VARIABLE}=etcd://host:port,host:port, or take over "
            "with `ckpt stores takeover`"
        )
    sequencer = EtcdSequencer(options, log_id)
    if (name_here := sequencer.name) != name:
        raise UsageError(
            f"another etcd gives out the positions of this log. sequencer={name} "
            f"this_one={name_here} endpoints={list(options.endpoints)}; name that one, or take "
            "over with `ckpt stores takeover`"
        )
    return sequencer


def external_sequencer(log_id: str, *, start: int = START_UNKNOWN, renew: bool = False) -> str:
    """The name of a sequencer outside the stores: the environment's etcd, else this machine's file.

    For the ``stores`` record that puts it in charge; the file is created if missing. ``start``: the
    file's first position. ``renew``: for a take-over, void what the file gave out before. Raises
    UsageError; UnavailableError if etcd does not answer or the file cannot be created.
    """
    if (etcd := etcd_of_environment()) is not None:
        return EtcdSequencer(etcd, log_id).name
    file = SqliteSequencer(database_path(log_id), log_id)
    return file.renew() if renew else file.make(start)
