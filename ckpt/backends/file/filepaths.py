"""From keys to paths below one root, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ckpt.backends.base import Stat
from ckpt.backends.keys import check_key, check_prefix, is_key
from ckpt.errors import UsageError


def locate(root: str, key: str) -> str:
    """The path of ``key``'s object. Raises UsageError for a bad key and where a symbolic link leads its folder elsewhere.

    Below the root a store has real folders only: a link could lead out of the store, or make two keys one object.
    """
    path = f"{root}/{check_key(key)}"
    folder = os.path.dirname(path)  # noqa: PTH120
    expected = os.path.normpath(os.path.realpath(root) + folder[len(root) :])
    if os.path.realpath(folder) != expected:
        raise UsageError(
            f"a symbolic link leads out of the place where the key belongs. key={key!r} path={folder} "
            f"leads_to={os.path.realpath(folder)}; replace the link by a real folder (or mount that disk there)"
        )
    return path


def folders_up(root: str, path: str) -> list[str]:
    """The folders from that of ``path`` up to and with ``root``, innermost first."""
    folders = []
    folder = path
    while folder != root:
        folder = folder.rpartition("/")[0]
        folders.append(folder)
    return folders


def walk(root: str, prefix: str, after: str) -> Iterator[Stat]:
    """Objects below ``root`` in key order, folder by folder; what vanishes meanwhile is left out. Raises OSError."""
    check_prefix(prefix)
    yield from _walk(root, prefix.rpartition("/")[0], prefix, after)


def _walk(root: str, folder: str, prefix: str, after: str) -> Iterator[Stat]:
    stem = f"{folder}/" if folder else ""
    for name, is_folder in _entries(f"{root}/{folder}" if folder else root):
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


def _entries(path: str) -> list[tuple[str, bool]]:
    """Files and folders (True) in the order of the keys they lead to: a folder sorts as its name with a slash."""
    try:
        with os.scandir(path) as entries:
            found = [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda entry: entry[0] + "/" if entry[1] else entry[0])
