"""One machine's own file that gives out the places of a log, for stores that don't create a key only once.

SQLite makes each claim one transaction, synced to disk before it is answered, among all processes of the machine. The file is
the truth about who has a place, the stores are where the record counts: it holds each record whole, so that whoever comes after
a writer that died in between can finish the copies. Not for a network file system, where SQLite's locks can't be relied on.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ckpt.errors import UnavailableError, UsageError
from ckpt.format.records import BY_SQLITE
from ckpt.log.sequencer import Claimed, Lost, Unknown

STATE_VARIABLE = "CKPT_STATE_DIR"
"""Names the folder of these files; by default ``ckpt`` in the user's state folder."""

BUSY_S = 30.0
"""How long a claim waits for other processes' claims."""

KEPT = 4096
"""How many of the last records are kept; older ones are on their stores for long."""

_PAUSE_S = 0.01

ANYWHERE = -1
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
    """See Sequencer. Thread-safe; each claim opens the file anew, so that forks and moved files harm nothing."""

    def __init__(self, path: Path, log_id: str) -> None:
        self._path = path
        self._log_id = log_id

    @property
    def name(self) -> str:
        """What a ``stores`` record calls this file. Raises UsageError where this machine has none, UnavailableError."""
        try:
            with self._opened() as db:
                return BY_SQLITE + self._about(db)[0]
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the file that gives out places in the log did not answer. file={self._path} why={error} repeat later"
            ) from error

    def make(self, start: int = ANYWHERE) -> str:
        """Make the file, which gives out places from ``start`` on; its name. One that exists stays as it is.

        ``ANYWHERE``: from whichever is claimed first, by who has read the record that puts this file in charge.
        """
        return self._write("INSERT OR IGNORE INTO about VALUES (1, ?, ?, ?)", start)

    def renew(self) -> str:
        """Make the file anew, under another name, where one may be: for a take-over. Its name."""
        return self._write("INSERT OR REPLACE INTO about VALUES (1, ?, ?, ?)", ANYWHERE, clear=True)

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
                f"the file that gives out places in the log can't be made. file={self._path} why={error} set "
                f"{STATE_VARIABLE} to a folder on a local disk"
            ) from error
        return self.name

    def claim(self, seq: int, data: bytes) -> Claimed | Lost | Unknown:
        """See Sequencer. Raises UsageError where this machine has no such file, or it is behind its log."""
        try:
            with self._opened() as db, _transaction(db):
                _, start = self._about(db)
                last = db.execute("SELECT seq, data FROM log WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,)).fetchone()
                if last is not None and last[0] == seq:
                    return Claimed() if bytes(last[1]) == data else Lost(bytes(last[1]))
                (top,) = db.execute("SELECT max(seq) FROM log").fetchone()
                following = top + 1 if top is not None else seq if start == ANYWHERE else start
                if seq > following:
                    raise UsageError(
                        f"the file that gives out places is older than its log: it was brought back from a copy, or another "
                        f"machine took over. file={self._path} its_next={following} wanted={seq}; take over with "
                        "`ckpt stores takeover`"
                    )
                if seq < following:
                    # This writer slept while thousands of places were given out.
                    return Unknown(
                        f"the place was given out long ago; the log is to be read again. seq={seq} next={following}"
                    )
                db.execute("INSERT INTO log VALUES (?, ?)", (seq, data))
                db.execute("DELETE FROM log WHERE seq <= ?", (seq - KEPT,))
        except sqlite3.Error as error:
            # Also after a failed commit nobody knows: the same claim again tells.
            return Unknown(f"the file that gives out places did not answer. file={self._path} why={error}")
        return Claimed()

    def _about(self, db: sqlite3.Connection) -> tuple[str, int]:
        row = db.execute("SELECT log_id, id, start FROM about").fetchone()
        if row is None or row[0] != self._log_id:
            found = row[0] if row else None
            raise UsageError(
                f"the file gives out places of another log. file={self._path} its_log={found} wanted={self._log_id}"
            )
        return row[1], row[2]

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        if not self._path.exists():
            raise UsageError(
                f"this machine does not give out the places of this log. file={self._path} run where it is, or take over with "
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
    """Let the file have a write-ahead log, from now on. Here SQLite does not wait for other processes by itself."""
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
