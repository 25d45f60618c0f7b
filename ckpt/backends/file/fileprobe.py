"""What a file system can do, found out by doing it."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.backends.file.filetemps import TEMP_FOLDER, Temp, new_temp
from ckpt.backends.file.syscalls import FileOps
from ckpt.backends.file.writing import set_direct

_LACKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV})


class Create(enum.Enum):
    """How a finished file gets a name, unless somebody has that name."""

    LINK = "link"
    RENAME = "rename"


@dataclass(frozen=True, slots=True)
class Probed:
    """What the folder's file system does: the way to create once (None: there is none), and whether it takes direct I/O."""

    create: Create | None
    direct: bool


def probe(ops: FileOps, root: str) -> Probed:
    """Try links, renames without replacing and direct I/O with a few short-lived names.

    They lie in ``<root>/.tmp`` or, where there is no root yet, in the nearest folder above it, which it will share its file
    system with. Raises OSError where nothing may be written there.
    """
    folder, prefix = root, ".ckpt-"
    while not os.path.isdir(folder):  # noqa: PTH112
        folder = os.path.dirname(folder)  # noqa: PTH120
    if folder == root:
        folder, prefix = f"{root}/{TEMP_FOLDER}", ""
        with contextlib.suppress(FileExistsError):
            ops.mkdir(folder)
    with new_temp(ops, folder, prefix=prefix) as first, new_temp(ops, folder, prefix=prefix) as second:
        return Probed(_way_to_create(ops, first, second), direct=set_direct(first.fd, on=True))


def _way_to_create(ops: FileOps, first: Temp, second: Temp) -> Create | None:
    free = second.path + "-c"
    try:
        for create, act in ((Create.LINK, ops.link), (Create.RENAME, ops.rename_new)):
            refuses_taken = _outcome(act, first.path, second.path) is FileExistsError
            if refuses_taken and _outcome(act, first.path, free) is None:
                return create
        return None
    finally:
        with contextlib.suppress(FileNotFoundError):
            ops.unlink(free)


def _outcome(act: Callable[[str, str], None], source: str, target: str) -> type[OSError] | None:
    """The error class of an act that the file system refuses or lacks; None where it succeeds."""
    try:
        act(source, target)
    except FileExistsError:
        return FileExistsError
    except OSError as error:
        if error.errno not in _LACKS:
            raise
        return OSError
    return None
