"""The runtime folder of a job on one machine, in which its processes find each other.

It is private and has a socket, a lock and a log. A process that is about to start a keeper holds
a shared ``flock`` on the folder, and the keeper holds an exclusive one on the file ``lock``
inside. The kernel releases both when their holder dies, so nothing here depends on a process
number, a clock or a clean exit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from ckpt.errors import UnavailableError, UsageError
from ckpt.format.canonical import prepare_decoders

SOCKET_PATH_BYTES_MAX = 100
"""The kernel accepts 107 bytes; longer paths go through ``/proc/self/fd``."""
BACKLOG = 1024
TMP = Path("/tmp")
TRIES_MAX = 100
"""How often a folder may be removed under a process that is entering it."""

_NAME = re.compile(r"[0-9a-f]{16}")


class JobFolderInfo(msgspec.Struct, frozen=True):
    """``job.json``: whose folder it is, for people and tools. ``pid`` is the keeper's."""

    store: str
    job: str
    pid: int


prepare_decoders(JobFolderInfo)


def runtime_root() -> Path:
    """The folder of this user's jobs on this machine; made if it is missing.

    ``$CKPT_RUNTIME_DIR``, else ``/tmp/ckpt-<uid>``. Only if ``/tmp`` is unusable,
    ``$XDG_RUNTIME_DIR/ckpt``: that one is removed at logout, while jobs still run. If another user
    took the name in ``/tmp`` first, a folder of this machine in the user's home. Raises UsageError
    if others could read or change the folder.
    """
    root = _root_of_environment()
    if not os.environ.get("CKPT_RUNTIME_DIR") and _is_foreign(root):
        root = _root_at_home()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        raise UsageError(
            f"cannot make a folder for sockets. path={root} why={error.strerror}; set "
            "CKPT_RUNTIME_DIR to one on a local disk"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(
            f"the folder for sockets is open to others. path={root} owner={status.st_uid} "
            f"mode={status.st_mode:o} wanted=0700; remove it, or set CKPT_RUNTIME_DIR to a folder "
            "of your own"
        )
    return root


def _root_of_environment() -> Path:
    if chosen := os.environ.get("CKPT_RUNTIME_DIR"):
        return Path(chosen).absolute()
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and not os.access(TMP, os.W_OK | os.X_OK):
        # su and sudo pass on another user's variable, and in containers the folder may not exist.
        with contextlib.suppress(OSError):
            status = Path(session).stat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                return Path(session) / "ckpt"
    return TMP / f"ckpt-{os.getuid()}"


def _is_foreign(root: Path) -> bool:
    """Whether something of another user, or no folder, has the name: anybody may take it first."""
    try:
        status = root.lstat()
    except OSError:
        return False
    return not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid()


def _root_at_home() -> Path:
    """Of this machine alone, since machines may share a home. By the user's entry rather than by
    variables, so that all processes of the user agree.
    """
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as error:  # as in a container that is run as an arbitrary user
        raise UsageError(
            "another user has taken the folder for sockets, and this user has no home. "
            f"uid={os.getuid()}; set CKPT_RUNTIME_DIR to a folder of your own"
        ) from error
    return home / ".local" / "state" / "ckpt" / f"run-{socket.gethostname()}"


@dataclass(frozen=True, slots=True, init=False)
class JobFolder:
    """The folder of one job with one store (an absolute path or URL).

    ``instance``: where several nodes of the job run on this machine, each has a folder of its own
    (``claim_instance``). Making the value creates no folder but the root.
    """

    path: Path

    def __init__(self, store: str, job: str, instance: int = 0) -> None:
        text = f"{store}\0{job}" + (f"\0{instance}" if instance else "")
        name = xxhash.xxh3_64_hexdigest(text.encode(errors="surrogateescape"))
        object.__setattr__(self, "path", runtime_root() / name)

    @classmethod
    def at(cls, path: Path) -> JobFolder:
        """The folder at ``path``."""
        folder = cls.__new__(cls)
        object.__setattr__(folder, "path", path)
        return folder

    @property
    def socket_path(self) -> Path:
        """The socket on which the keeper listens."""
        return self.path / "socket"

    @property
    def lock_path(self) -> Path:
        """The file that the keeper has locked."""
        return self.path / "lock"

    @property
    def log_path(self) -> Path:
        """The keepers' output."""
        return self.path / "keeper.log"

    @property
    def stacks(self) -> Path:
        """The folder for stack dumps of hanging trainers."""
        return self.path / "stacks"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the folder from being swept while the body runs; made if it is missing."""
        for _ in range(TRIES_MAX):
            # mkdir's own check may race with a removal; a file in the folder's place is met below.
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700, exist_ok=True)
            with _opened(self.path) as fd:
                if fd is None:
                    continue
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _same(fd, self.path):  # else it was swept before the lock was taken
                    # On a full disk there will be no stacks to read after a hang.
                    with contextlib.suppress(OSError):
                        self.stacks.mkdir(mode=0o700, exist_ok=True)
                    yield
                    return
        raise UnavailableError(f"another process keeps removing this folder. path={self.path}")

    def try_lock(self, *, name: str = "lock") -> int | None:
        """Lock a file here: a descriptor that holds the lock until closed, or None if it is
        locked.

        ``lock`` is the keeper's. Forked children hold it too. None may also mean that another
        process was just calling ``has_keeper``.
        """
        with self.in_use():
            fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            except BaseException:
                os.close(fd)
                raise
            return fd

    def has_keeper(self) -> bool:
        """Whether a keeper lives here."""
        try:
            fd = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def listen(self) -> socket.socket:
        """Listen in place of a dead keeper. Only for the holder of ``lock``.

        The socket appears under its name only when it listens, so a client never finds one that
        refuses connections.
        """
        fresh = self.path / "socket.new"
        fresh.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(fresh) as address:
                sock.bind(address)
            sock.listen(BACKLOG)
            fresh.replace(self.socket_path)
        except BaseException:
            sock.close()
            raise
        return sock

    def connect(self) -> socket.socket:
        """A connection to the keeper that listens here. Raises UnavailableError if none does."""
        sock = self.try_connect()
        if sock is None:
            raise UnavailableError(
                f"no keeper listens, or it takes no connection. path={self.path}"
            )
        return sock

    def try_connect(self) -> socket.socket | None:
        """Like ``connect``; None if no keeper listens, or it accepts no connection now."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)  # with a full backlog, connect would block
            with _address(self.socket_path) as address:
                sock.connect(address)
            sock.setblocking(True)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            return None
        except BaseException:
            sock.close()
            raise
        return sock

    def write_info(self, store: str, job: str) -> None:
        """Replace ``job.json`` in one step, with this process as the keeper."""
        fresh = self.path / "job.json.new"
        fresh.write_bytes(msgspec.json.encode(JobFolderInfo(store, job, os.getpid())))
        fresh.replace(self.path / "job.json")

    def read_info(self) -> JobFolderInfo | None:
        """The content of ``job.json``; None if it is missing or unreadable."""
        try:
            return msgspec.json.decode((self.path / "job.json").read_bytes(), type=JobFolderInfo)
        except (OSError, msgspec.MsgspecError):
            return None

    def log_tail(self, *, start_bytes: int = 0, limit_bytes: int = 4000) -> str:
        """The last bytes of the keepers' output, no earlier than ``start_bytes`` into the log."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(start_bytes, file.seek(0, os.SEEK_END) - limit_bytes))
                return file.read(limit_bytes).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def keep_log(self) -> Path | None:
        """Copy the end of the keepers' output to where it outlives the folder; None if there is
        nothing to keep, or no room or home for it.

        The copy's first line says whose it is. The newest LOGS_PER_JOB_MAX of a job stay.
        """
        tail = self.log_tail(limit_bytes=LOG_BYTES_MAX)
        if not tail:
            return None
        info = self.read_info() or JobFolderInfo("", "", 0)
        try:
            folder = log_root()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"{self.path.name}-{time.time_ns():020}.log"
            head = msgspec.json.encode(info).decode()
            path.write_text(f"{head}\n{tail}\n", encoding="utf-8", errors="replace")
            path.chmod(0o600)
            for old in sorted(folder.glob(f"{self.path.name}-*.log"))[:-LOGS_PER_JOB_MAX]:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError):
            # A home that is full, foreign or unknown (RuntimeError of expanduser) must keep no
            # folder from being removed.
            return None
        return path

    def remove(self) -> None:
        """Remove the folder and its content; its log is kept (``keep_log``).

        Only for the holder of ``lock``, which is worth nothing afterwards.

        If another process is using the folder to start the next keeper, only the socket is
        removed.
        """
        self.socket_path.unlink(missing_ok=True)
        self.keep_log()
        self._remove(unless=lambda: False)

    def sweep(self) -> bool:
        """Remove the folder unless a keeper lives here or is being started; true if it is gone.

        The log of the keeper that died is kept.
        """
        if self.path.is_dir() and not self.has_keeper():
            self.keep_log()
        return self._remove(unless=self.has_keeper)

    def _remove(self, *, unless: Callable[[], bool]) -> bool:
        with _opened(self.path) as fd:
            if fd is None:
                return True
            if not _alone(fd) or unless():
                return False
            if _same(fd, self.path):
                _remove_tree(self.path)
            return True


@dataclass(frozen=True, slots=True)
class InstanceClaim:
    """The number of one agent among those of a job on this machine, from 0, as long as its process
    holds it."""

    number: int
    _path: Path
    _fd: int

    def release(self) -> None:
        """Give the number up."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


INSTANCES_MAX = 64
"""Nodes of one job on one machine: a trial has a few."""


def claim_instance(job: str) -> InstanceClaim:
    """The lowest number that no living agent of the job has here: an agent that is started again
    finds what its predecessor left. Raises UsageError if there are too many."""
    digest = xxhash.xxh3_64_hexdigest(job.encode(errors="surrogateescape"))
    for number in range(INSTANCES_MAX):
        path = runtime_root() / f"{digest}.agent{number}"
        for _ in range(TRIES_MAX):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            locked = _alone(fd)
            if locked and _same(fd, path):
                return InstanceClaim(number, path, fd)
            os.close(fd)  # taken, or removed by its last holder before it was locked here
            if not locked:
                break
    raise UsageError(
        f"too many agents of one job run on this machine. job={job!r} limit={INSTANCES_MAX}"
    )


# ---- logs of keepers that have ended

LOG_BYTES_MAX = 1 << 20
LOGS_PER_JOB_MAX = 5
"""Kept logs: the end of each, and the newest of each job with one store."""


@dataclass(frozen=True, slots=True)
class KeptLog:
    """The log of a keeper that ended at ``ended_unix_s``. ``text`` begins with its first line."""

    path: Path
    info: JobFolderInfo
    ended_unix_s: float
    text: str


def log_root() -> Path:
    """Where logs outlive the runtime folder: ``$CKPT_STATE_DIR/logs``, else below
    ``$XDG_STATE_HOME``, else ``~/.local/state/ckpt/logs``. Raises RuntimeError if this user has no
    home.
    """
    if chosen := os.environ.get("CKPT_STATE_DIR"):
        return Path(chosen).absolute() / "logs"
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path("~/.local/state").expanduser()) / "ckpt" / "logs"


def kept_logs() -> list[KeptLog]:
    """The logs that were kept, newest first; what is unreadable is left out."""
    found: list[KeptLog] = []
    try:
        root = log_root()
    except RuntimeError:  # without a home none was kept
        return []
    for path in root.glob("*.log"):
        name, _, ended_ns = path.stem.rpartition("-")
        with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
            head, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
            info = msgspec.json.decode(head, type=JobFolderInfo)
            if _NAME.fullmatch(name):
                found.append(KeptLog(path, info, int(ended_ns) / 1e9, text))
    return sorted(found, key=lambda log: log.ended_unix_s, reverse=True)


def list_jobs() -> list[JobFolder]:
    """The folders of all of this user's jobs on this machine, sorted by name.

    Those of dead keepers are included.
    """
    paths = (
        path for path in runtime_root().iterdir() if _NAME.fullmatch(path.name) and path.is_dir()
    )
    return [JobFolder.at(path) for path in sorted(paths)]


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A descriptor of the folder; None if it does not exist."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _alone(fd: int) -> bool:
    """Lock the folder behind ``fd``, unless another process is using it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(fd: int, path: Path) -> bool:
    try:
        current = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), current)


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """What ``bind`` and ``connect`` take for the socket at ``path``.

    Raises FileNotFoundError if its folder is missing.
    """
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield os.fspath(path)
        return
    if not Path("/proc/self/fd").is_dir():
        raise UsageError(
            f"too long for a socket's path. path={path}; set CKPT_RUNTIME_DIR to a shorter one"
        )
    with _opened(path.parent) as fd:
        if fd is None:
            raise FileNotFoundError(path.parent)
        yield f"/proc/self/fd/{fd}/{path.name}"


def _remove_tree(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    folder.rmdir()
