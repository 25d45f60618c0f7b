"""A store in a folder: a local disk, or a network file system mounted here."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import stat as modes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.backends.base import Buffer, Capabilities, Stat, check_key, check_prefix, is_key
from ckpt.backends.file.syscalls import REAL_OPS, FileOps, error_from_os, translate_os_errors
from ckpt.backends.file.writing import (
    TEMP_FOLDER,
    TempFile,
    new_temp_file,
    set_direct,
    sweep,
    write_all,
)
from ckpt.errors import (
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    UnavailableError,
    UsageError,
)
from ckpt.format.keys import JOB_KEY

# ---- Paths: from keys to paths below one root, and back.


def locate(root: str, key: str) -> str:
    """The path of ``key``'s object.

    Raises UsageError for an invalid key, and if a symbolic link leads its folder elsewhere. Below
    the root a store has real folders only: a link could lead out of the store, or make two keys one
    object.
    """
    path = f"{root}/{check_key(key)}"
    folder = os.path.dirname(path)  # noqa: PTH120
    expected = os.path.normpath(os.path.realpath(root) + folder[len(root) :])
    if os.path.realpath(folder) != expected:
        raise UsageError(
            f"a symbolic link leads out of the key's folder. key={key!r} path={folder} "
            f"leads_to={os.path.realpath(folder)}; replace the link by a real folder (or mount "
            "that disk there)"
        )
    return path


def parent_folders(root: str, path: str) -> list[str]:
    """The folders from that of ``path`` up to and including ``root``, innermost first."""
    folders = []
    folder = path
    while folder != root:
        folder = folder.rpartition("/")[0]
        folders.append(folder)
    return folders


def walk(root: str, prefix: str, after: str) -> Iterator[Stat]:
    """The objects below ``root`` in key order, folder by folder. Raises OSError.

    Objects that vanish during the walk are left out.
    """
    check_prefix(prefix)
    yield from _walk(root, prefix.rpartition("/")[0], prefix, after)


def _walk(root: str, folder: str, prefix: str, after: str) -> Iterator[Stat]:
    stem = f"{folder}/" if folder else ""
    first = after[len(stem) :].partition("/")[0] if after.startswith(stem) else ""
    for name, is_folder in _entries(f"{root}/{folder}" if folder else root, first):
        key = stem + name
        if is_folder:
            below = key + "/"
            matches = below.startswith(prefix) or prefix.startswith(below)
            if matches and (below > after or after.startswith(below)):
                yield from _walk(root, key, prefix, after)
        elif key.startswith(prefix) and key > after and is_key(key):
            try:
                facts = os.stat(f"{root}/{key}", follow_symlinks=False)  # noqa: PTH116
            except FileNotFoundError:
                continue
            yield Stat(key, facts.st_size, facts.st_mtime)


def _entries(path: str, first: str) -> list[tuple[str, bool]]:
    """Files and folders (True) in the order of their keys.

    A folder sorts as its name with a slash, because its keys do. Names below ``first`` may be left
    out: a listing that goes on where an earlier one ended passes over most of a large folder, and
    looking at each entry costs more than comparing its name.
    """
    try:
        with os.scandir(path) as entries:
            names = [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                # A folder "a" holds keys above "a!", so a name that begins ``first`` stays.
                if (entry.name >= first or first.startswith(entry.name))
                and (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False))
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names, key=lambda entry: entry[0] + "/" if entry[1] else entry[0])


# ---- Probe: what the folder's file system can do, found out by trying.

_LACKS = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV}
)
"""Errors by which file systems say that they lack links, exclusive renames or direct I/O."""


class CreateMethod(enum.Enum):
    """How a finished file gets a name that must not exist yet."""

    LINK = "link"
    RENAME = "rename"


@dataclass(frozen=True, slots=True)
class FileSystemSupport:
    """What the folder's file system supports.

    ``create_method``: how to create a name only once; None if it cannot. ``direct_io``: whether it
    takes direct writes.
    """

    create_method: CreateMethod | None
    direct_io: bool


def probe_file_system(ops: FileOps, root: str) -> FileSystemSupport:
    """Try links, exclusive renames and direct I/O with a few short-lived names.

    They are made in ``<root>/.tmp``. If the root does not exist yet, they are made in the nearest
    existing folder above it, which will share its file system. Raises OSError if that folder is not
    writable.
    """
    folder, prefix = root, ".ckpt-"
    while not os.path.isdir(folder):  # noqa: PTH112
        folder = os.path.dirname(folder)  # noqa: PTH120
    if folder == root:
        folder, prefix = f"{root}/{TEMP_FOLDER}", ""
        with contextlib.suppress(FileExistsError):
            ops.mkdir(folder)
    with (
        new_temp_file(ops, folder, prefix=prefix) as first,
        new_temp_file(ops, folder, prefix=prefix) as second,
    ):
        return FileSystemSupport(
            _find_create_method(ops, first, second), direct_io=set_direct(first.fd, on=True)
        )


def _find_create_method(ops: FileOps, first: TempFile, second: TempFile) -> CreateMethod | None:
    free = second.path + "-c"
    try:
        for create, act in ((CreateMethod.LINK, ops.link), (CreateMethod.RENAME, ops.rename_new)):
            refuses_taken = _outcome(act, first.path, second.path) is FileExistsError
            if refuses_taken and _outcome(act, first.path, free) is None:
                return create
        return None
    finally:
        with contextlib.suppress(FileNotFoundError):
            ops.unlink(free)


def _outcome(act: Callable[[str, str], None], source: str, target: str) -> type[OSError] | None:
    """The error class of a call that the file system refuses or lacks; None if it succeeds."""
    try:
        act(source, target)
    except FileExistsError:
        return FileExistsError
    except OSError as error:
        if error.errno not in _LACKS:
            raise
        return OSError
    return None


READ_BYTES_BEST = 512 << 10
"""Opening a file costs some ten microseconds, as reading a tenth of this does. Joining more ranges
would cost a copy instead.
"""

CONCURRENCY_BEST = max(2, min(8, os.cpu_count() or 2))
"""Reads or writes in flight that fill a disk or a mount. Beyond the cores that copy, more of them
only wait for each other.
"""

_TRIES_MAX = 16
"""How often a put makes the key's folder anew when concurrent deletes prune it."""
_IOV_BYTES_MAX = 1 << 30
"""Bytes per read call; Linux moves at most 2 GiB at once."""


class FileBackend:
    """A store in the folder ``root`` of a file system. Thread-safe.

    An object is written to ``<root>/.tmp``, synced, and only then given its name: no reader sees
    half of it, and an object that has a name has its bytes on disk. When ``put`` returns, the name
    is on disk too. Objects of 1 MiB and more in page-aligned memory go past the page cache if the
    file system allows it (``direct_io``). The first put of each backend makes the folder and sweeps
    what dead writers left in ``.tmp``. A delete is not synced: a power cut may undo it.

    Once the store's ``ckpt.json`` was read or written here, objects are put only into that very
    folder: device and inode are remembered. A disk that is unmounted leaves its mount point, a bare
    folder that would take objects as the store did. A folder that took the place of the store is
    neither written to nor made anew until a ``ckpt.json`` was read there; whose that is, the log
    decides. Puts raise UnavailableError meanwhile.

    Keeps no files open.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, ops: FileOps = REAL_OPS, direct_io: bool = True
    ) -> None:
        self._root = os.path.abspath(os.path.expanduser(os.fspath(root)))  # noqa: PTH100, PTH111
        self._ops = ops
        self._direct_io = direct_io
        self._swept = False
        self._probed: FileSystemSupport | None = None
        self._home: tuple[int, int] | None = None
        """Device and inode of the folder in which ``ckpt.json`` was last seen."""

    @property
    def url(self) -> str:
        """The folder's absolute path."""
        return self._root

    def capabilities(self) -> Capabilities:
        """Tries two names in the folder once.

        In a folder that is not writable ``create_only`` is False, and the next call tries again.
        """
        try:
            probed = self._probe()
        except (StoreDeniedError, UnavailableError):
            probed = FileSystemSupport(None, direct_io=False)
        return Capabilities(
            create_only=probed.create_method is not None,
            read_bytes_best=READ_BYTES_BEST,
            concurrency_best=CONCURRENCY_BEST,
            direct_io=probed.direct_io and self._direct_io,
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Costs two to four syncs; copies only what is not page-aligned, through at most 8 MiB."""
        self._put(key, data, lambda: None, create_only=create_only)

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        still_lent: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        """As ``put``, with memory that its owner may take back and change meanwhile.

        ``still_lent`` is called when all bytes are written and before the object gets its name. Its
        error is raised, with nothing stored.
        """
        self._put(key, data, still_lent, create_only=create_only)

    def _put(
        self, key: str, data: Sequence[Buffer], still_lent: Callable[[], None], *, create_only: bool
    ) -> None:
        path = locate(self._root, key)
        self._require_home(key)
        pieces = [memoryview(buffer).cast("B") for buffer in data]
        create = self._probe().create_method if create_only else None
        if create_only and create is None:
            raise UsageError(
                "this file system can neither link nor rename without replacing, so it cannot "
                f"create a key only once. store={self._root}; use another store as the job's first"
            )
        with translate_os_errors("put", path):
            self._prepare()
            with new_temp_file(self._ops, f"{self._root}/{TEMP_FOLDER}") as temp:
                write_all(self._ops, temp.fd, pieces, direct=self._direct_io)
                # The order is the promise: bytes on disk before the name exists, and the name on
                # disk before put() returns.
                self._ops.fsync(temp.fd)
                # After the last read of the caller's memory, before the name: bytes that a hung put
                # read too late stay in the temporary file.
                still_lent()
                try:
                    self._give_name(temp, path, create)
                except FileExistsError as error:
                    # The caller may build on the existing object, so its name must be on disk too.
                    self._sync_names(path)
                    raise _taken(path, key, error) from error
                self._sync_names(path)
        # Again after the name: the folder may have been exchanged while the bytes were written.
        self._require_home(key)
        if key == JOB_KEY:
            self._home = _identity(self._root)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """Reads through the page cache straight into ``out``."""
        path = locate(self._root, key)
        if offset_bytes < 0:
            raise UsageError(
                f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
            )
        with translate_os_errors("read", path):
            home = _identity(self._root) if key == JOB_KEY else None
            fd = self._open_object(path, key)
            try:
                filled_bytes = _read_fully(fd, out.cast("B"), offset_bytes)
            finally:
                os.close(fd)
        if filled_bytes < len(out):
            raise IntegrityError(
                f"the object ends too early. path={path} offset_bytes={offset_bytes} "
                f"wanted_bytes={len(out)} got_bytes={filled_bytes}; read another copy"
            )
        if home is not None and home == _identity(self._root):
            self._home = home

    def stat(self, key: str) -> Stat | None:
        path = locate(self._root, key)
        with translate_os_errors("stat", path):
            try:
                facts = os.stat(path, follow_symlinks=False)  # noqa: PTH116
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Stat(key, facts.st_size, facts.st_mtime) if modes.S_ISREG(facts.st_mode) else None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """Reads one folder at a time; leaves out symbolic links and files whose name is not a
        key."""
        with translate_os_errors("list", self._root):
            yield from walk(self._root, prefix, after)

    def delete(self, key: str) -> None:
        """Folders that become empty are removed too."""
        path = locate(self._root, key)
        with translate_os_errors("delete", path):
            try:
                if modes.S_ISDIR(os.stat(path, follow_symlinks=False).st_mode):  # noqa: PTH116
                    return
                self._ops.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            for folder in parent_folders(self._root, path)[:-1]:
                try:
                    self._ops.rmdir(folder)
                except OSError:
                    # Not empty, or not ours to remove. An empty folder does no harm.
                    return

    def close(self) -> None:
        """No handles are held open."""

    def _require_home(self, key: str) -> None:
        """Raise UnavailableError if another folder, or none, is where ``ckpt.json`` was seen.

        ``ckpt.json`` itself may be put into another folder: that makes it a store.
        """
        if self._home is None or key == JOB_KEY or _identity(self._root) == self._home:
            return
        raise UnavailableError(
            f"another folder, or none, is in the place of the store. store={self._root} key={key}; "
            "mount the store or move it back, then repeat"
        )

    def _probe(self) -> FileSystemSupport:
        if self._probed is None:
            with translate_os_errors("probe", self._root):
                self._probed = probe_file_system(self._ops, self._root)
        return self._probed

    def _prepare(self) -> None:
        """Make the root and ``.tmp`` if they are missing.

        The first call also sweeps and syncs the root's own name.
        """
        temps = f"{self._root}/{TEMP_FOLDER}"
        if not Path(temps).is_dir():
            _make_folders(self._ops, self._root)
            _make_folder(self._ops, temps)
        if not self._swept:
            # Another process may have made the root a moment ago and not yet synced its name.
            _sync_where_allowed(self._ops, os.path.dirname(self._root))  # noqa: PTH120
            sweep(self._ops, temps)
            self._swept = True

    def _give_name(self, temp: TempFile, path: str, create: CreateMethod | None) -> None:
        """Make the synced file visible as ``path``.

        Without ``create`` it replaces an existing object; with it raises FileExistsError.
        """
        for _ in range(_TRIES_MAX):
            try:
                for folder in reversed(parent_folders(self._root, path)[:-1]):
                    _make_folder(self._ops, folder)
                match create:
                    case None:
                        self._ops.rename(temp.path, path)
                    case CreateMethod.LINK:
                        self._link(temp, path)
                    case CreateMethod.RENAME:
                        self._ops.rename_new(temp.path, path)
            except FileNotFoundError:
                # A concurrent delete may prune the folder between making it and naming the object
                # in it. A temporary file without a name was swept by mistake: then the put fails.
                if os.fstat(temp.fd).st_nlink == 0:
                    raise
                continue
            return
        raise OSError(errno.EBUSY, "the key's folder vanishes as soon as it is made", path)

    def _link(self, temp: TempFile, path: str) -> None:
        try:
            self._ops.link(temp.path, path)
        except FileExistsError:
            # A network file system may repeat a link after a lost reply, and then find our own.
            if not _same_file(temp.fd, path):
                raise

    def _sync_names(self, path: str) -> None:
        """Make the object's name durable, and the name of each folder above it.

        Always up to the root, not only for folders made here: another process may have made one and
        not yet synced it. Syncing an unchanged folder costs microseconds.
        """
        for folder in parent_folders(self._root, path):
            # A missing folder was pruned by a delete of this very object.
            with contextlib.suppress(FileNotFoundError):
                self._ops.fsync_directory(folder)

    def _open_object(self, path: str, key: str) -> int:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"no such object. key={key} store={self._root}; list the store's keys"
            ) from error
        if not modes.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotFoundError(
                f"not an object but a folder or device. key={key} store={self._root}; list the "
                "store's keys"
            )
        return fd


def _taken(path: str, key: str, error: FileExistsError) -> KeyExistsError | UsageError:
    if Path(path).is_dir():
        fault = error_from_os(OSError(errno.EISDIR, "is a folder"), doing="put", where=path)
        return fault if isinstance(fault, UsageError) else KeyExistsError(str(error))
    return KeyExistsError(
        f"the key is taken. key={key} path={path}; read it to learn whose bytes it holds"
    )


def _same_file(fd: int, path: str) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)  # noqa: PTH116
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), named)


def _read_fully(fd: int, out: memoryview, offset_bytes: int) -> int:
    """Read until ``out`` is full or the file ends; returns the bytes read."""
    filled_bytes = 0
    while filled_bytes < len(out):
        read = os.preadv(
            fd, [out[filled_bytes : filled_bytes + _IOV_BYTES_MAX]], offset_bytes + filled_bytes
        )
        if read == 0:
            break
        filled_bytes += read
    return filled_bytes


def _identity(root: str) -> tuple[int, int] | None:
    """Device and inode of the folder ``root``; None if it holds no ``ckpt.json``.

    The inode alone does not tell: that of a deleted folder may be given to the next one made.
    """
    try:
        facts = os.stat(root)  # noqa: PTH116
        os.stat(f"{root}/{JOB_KEY}")  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts.st_dev, facts.st_ino


def _make_folders(ops: FileOps, path: str) -> None:
    """Make ``path`` and missing folders above it, each name durable before the next is made."""
    missing = []
    while not Path(path).is_dir():
        missing.append(path)
        path = os.path.dirname(path)  # noqa: PTH120
    for folder in reversed(missing):
        _make_folder(ops, folder)
        ops.fsync_directory(os.path.dirname(folder))  # noqa: PTH120


def _make_folder(ops: FileOps, path: str) -> None:
    if Path(path).is_dir():
        return
    try:
        ops.mkdir(path)
    except FileExistsError:
        if not Path(path).is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "a file is in the place of a folder", path
            ) from None


def _sync_where_allowed(ops: FileOps, path: str) -> None:
    try:
        ops.fsync_directory(path)
    except OSError as error:
        # A folder that we may not sync is one that we could not have made the root in.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL):
            raise
