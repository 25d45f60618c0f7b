"""Where the processes of a node find each other: one private folder for each job, with a socket, a
lock and a log.

Who is about to start a keeper holds a shared ``flock`` on the folder, and the keeper an exclusive
one on ``lock`` inside. The kernel lets go of both when their holder dies, so nothing here depends
on a process number, a clock or a clean end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from ckpt.errors import UnavailableError, UsageError
from ckpt.format.canonical import prepare_decoders

SOCKET_PATH_BYTES_MAX = 100
"""The kernel takes 107 bytes; longer paths go through ``/proc/self/fd``."""
BACKLOG = 1024
TMP = Path("/tmp")
TRIES_MAX = 100
"""How often a folder may vanish under a process that is entering it."""

_NAME = re.compile(r"[0-9a-f]{16}")


class JobFolderInfo(msgspec.Struct, frozen=True):
    """``job.json``: whose folder it is, for people and tools. ``pid`` is the keeper's."""

    store: str
    job: str
    pid: int


prepare_decoders(JobFolderInfo)


def runtime_root() -> Path:
    """The folder of this user's jobs on this machine, made where it is missing.

    ``$CKPT_RUNTIME_DIR``, else ``/tmp/ckpt-<uid>``, else, where ``/tmp`` can't be used,
    ``$XDG_RUNTIME_DIR/ckpt``: that one is removed at logout, under the jobs that still run. Raises
    UsageError where others could read or change it.
    """
    root = _root_of_environment()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise UsageError(
            f"cannot make a folder for sockets. path={root} why={error.strerror}; set "
            "CKPT_RUNTIME_DIR to one on a local disk"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(
            f"the folder for sockets is open to others. path={root} owner={found.st_uid} "
            f"mode={found.st_mode:o} "
            "wanted=0700; remove it, or set CKPT_RUNTIME_DIR to a folder of your own"
        )
    return root


def _root_of_environment() -> Path:
    if chosen := os.environ.get("CKPT_RUNTIME_DIR"):
        return Path(chosen).absolute()
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and not os.access(TMP, os.W_OK | os.X_OK):
        # su and sudo hand on somebody else's folder, containers one that isn't there.
        with contextlib.suppress(OSError):
            found = Path(session).stat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                return Path(session) / "ckpt"
    return TMP / f"ckpt-{os.getuid()}"


@dataclass(frozen=True, slots=True, init=False)
class JobFolder:
    """The folder of one job with one store (an absolute path or URL). Making the value makes no
    folder but the root."""

    path: Path

    def __init__(self, store: str, job: str) -> None:
        name = xxhash.xxh3_64_hexdigest(f"{store}\0{job}".encode(errors="surrogateescape"))
        object.__setattr__(self, "path", runtime_root() / name)

    @classmethod
    def at(cls, path: Path) -> JobFolder:
        """The folder at ``path``."""
        folder = cls.__new__(cls)
        object.__setattr__(folder, "path", path)
        return folder

    @property
    def socket_path(self) -> Path:
        """Where the keeper listens."""
        return self.path / "socket"

    @property
    def lock_path(self) -> Path:
        """The file that the keeper has locked."""
        return self.path / "lock"

    @property
    def log_path(self) -> Path:
        """What keepers print."""
        return self.path / "keeper.log"

    @property
    def stacks(self) -> Path:
        """The folder for stack dumps of trainers that hang."""
        return self.path / "stacks"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the folder where it is missing; nobody sweeps it meanwhile."""
        for _ in range(TRIES_MAX):
            with contextlib.suppress(
                FileExistsError
            ):  # swept between two looks; a file in its place is found below
                self.path.mkdir(mode=0o700, exist_ok=True)
            with _opened(self.path) as fd:
                if fd is None:
                    continue
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _same(fd, self.path):
                    with contextlib.suppress(
                        OSError
                    ):  # a full disk, say: then there are no stacks to read after a hang
                        self.stacks.mkdir(mode=0o700, exist_ok=True)
                    yield
                    return
        raise UnavailableError(f"somebody keeps removing this folder. path={self.path}")

    def try_lock(self, *, name: str = "lock") -> int | None:
        """Become the only holder of a lock file here: a descriptor that holds it until closed, or
        None where another does.

        ``lock`` is the keeper's. Children that are forked hold it too. None may also mean that
        somebody looked with ``locked``.
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
        """Listen, in the place of a keeper that is dead. Only for who holds ``lock``.

        The socket appears under its name when it is ready, so nobody ever meets one that refuses.
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
        """A connection to the keeper that listens here. Raises UnavailableError where none does."""
        sock = self.try_connect()
        if sock is None:
            raise UnavailableError(
                f"no keeper listens, or it takes no connection. path={self.path}"
            )
        return sock

    def try_connect(self) -> socket.socket | None:
        """As ``connect``; None where no keeper listens, or one does that takes no connection
        now."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)  # a full backlog answers at once
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
        """Write ``job.json``, as one change, with this process as the keeper."""
        fresh = self.path / "job.json.new"
        fresh.write_bytes(msgspec.json.encode(JobFolderInfo(store, job, os.getpid())))
        fresh.replace(self.path / "job.json")

    def read_info(self) -> JobFolderInfo | None:
        """What ``job.json`` says; None where there is none that can be read."""
        try:
            return msgspec.json.decode((self.path / "job.json").read_bytes(), type=JobFolderInfo)
        except (OSError, msgspec.MsgspecError):
            return None

    def log_tail(self, *, start_bytes: int = 0, limit_bytes: int = 4000) -> str:
        """The end of what keepers printed, from ``start_bytes`` of the log on."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(start_bytes, file.seek(0, os.SEEK_END) - limit_bytes))
                return file.read(limit_bytes).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def remove(self) -> None:
        """Remove the folder and all in it. Only for who holds ``lock``; the lock counts for nothing
        after that.

        Where somebody has entered to start the next keeper, only the socket goes: the folder is
        theirs.
        """
        self.socket_path.unlink(missing_ok=True)
        self._remove(unless=lambda: False)

    def sweep(self) -> bool:
        """Remove the folder unless a keeper lives here or somebody is starting one; says whether it
        is gone."""
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


def list_jobs() -> list[JobFolder]:
    """The folders of all jobs of this user on this machine, of dead keepers too; sorted by name."""
    found = (
        path for path in runtime_root().iterdir() if _NAME.fullmatch(path.name) and path.is_dir()
    )
    return [JobFolder.at(path) for path in sorted(found)]


def sweep_dead() -> list[JobFolder]:
    """Remove the folders in which no keeper lives and nobody starts one, and return them."""
    return [folder for folder in list_jobs() if folder.sweep()]


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A descriptor of the folder; None where it isn't there."""
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
    """Lock the folder behind ``fd``, unless somebody has entered it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(fd: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """What ``bind`` and ``connect`` take for the socket at ``path``. Raises FileNotFoundError where
    its folder isn't there."""
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
