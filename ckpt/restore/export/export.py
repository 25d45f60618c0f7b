"""Write a snapshot as files that other programs read: plain ``torch.save`` files, or safetensors.

One file for each tracked item. Bytes are streamed, so that memory stays bounded whatever the snapshot's size. Everything is
written under temporary names and synced before the first file gets its own name.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckpt.errors import NotFoundError, StoreDeniedError, StoreFullError, UnavailableError, UsageError
from ckpt.restore.export.items import Item, load_item
from ckpt.restore.fetch import Progress
from ckpt.restore.reader import SnapshotReader
from ckpt.restore.rebuild import item_names

MEMORY_BYTES = 256 << 20
"""What an export may use when its caller names no limit, beside the process's own size."""

_FULL = frozenset((28, 122))
_DENIED = frozenset((1, 13, 30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How to stream: the window's length in bytes, and whom to tell of progress."""

    window_bytes: int
    on_progress: Progress | None = None


class ItemWriter(Protocol):
    """One file format: what it names files, and how it writes them."""

    def names(self, item: Item) -> tuple[str, ...]:
        """The files that ``write`` makes for ``item``, without folder."""
        ...

    def write(self, item: Item, reader: SnapshotReader, paths: Sequence[Path], how: Streaming) -> None:
        """Make those files at ``paths``, one for each name."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """One file that was written."""

    path: Path
    item: str
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export: one ``rank``'s state, or with ``all_ranks`` each in a folder of its own. ``items`` None is all."""

    rank: int = 0
    all_ranks: bool = False
    items: Sequence[str] | None = None
    force: bool = False
    memory_bytes: int = MEMORY_BYTES


def export(
    reader: SnapshotReader,
    folder: Path,
    writer: ItemWriter,
    options: ExportOptions,
    *,
    on_progress: Progress | None = None,
) -> tuple[Exported, ...]:
    """Write the items of a snapshot into ``folder``, with ``all_ranks`` each rank's into ``rank-N``; returns what was written.

    Nothing appears under its final name before everything is written and synced. Raises UsageError where a file exists
    and ``force`` is off, NotFoundError for an item or rank that the snapshot lacks, IntegrityError for damage, and
    UnavailableError where the folder cannot take the files.
    """
    planned = _plan(reader, folder, writer, options)
    if not options.force:
        for _, paths in planned:
            if taken := next((path for path in paths if os.path.lexists(path)), None):
                raise UsageError(f"a file is in the way. path={taken}; name another folder or pass --force")
    how = Streaming(window_bytes=options.memory_bytes // 2, on_progress=on_progress)
    suffix = f".{secrets.token_hex(8)}.tmp"
    temps = {path: path.with_name(f".{path.name}{suffix}") for _, paths in planned for path in paths}
    with _translated(folder):
        try:
            for item, paths in planned:
                paths[0].parent.mkdir(parents=True, exist_ok=True)
                writer.write(item, reader, [temps[path] for path in paths], how)
                for path in paths:
                    _sync(temps[path])
            for path, temp in temps.items():
                temp.replace(path)
            for parent in {path.parent for path in temps}:
                _sync(parent)
        finally:
            for temp in temps.values():
                temp.unlink(missing_ok=True)
        return tuple(
            Exported(path, item.name, item.rank, path.stat().st_size) for item, paths in planned for path in paths
        )


def _plan(
    reader: SnapshotReader, folder: Path, writer: ItemWriter, options: ExportOptions
) -> list[tuple[Item, list[Path]]]:
    known = item_names(reader.index)
    wanted = known if options.items is None else list(dict.fromkeys(options.items))
    if missing := [name for name in wanted if name not in known]:
        raise NotFoundError(f"no such item in the snapshot. item={missing[0]} items={','.join(known)}")
    ranks = reader.index.ranks
    if options.rank not in ranks:
        raise NotFoundError(f"no such rank in the snapshot. rank={options.rank} ranks=0..{len(ranks) - 1}")
    planned: list[tuple[Item, list[Path]]] = []
    for rank in ranks if options.all_ranks else (options.rank,):
        place = folder / f"rank-{rank}" if options.all_ranks else folder
        for name in wanted:
            item = load_item(reader, name, rank=rank)
            if item is not None:
                planned.append((item, [place / file for file in writer.names(item)]))
    return planned


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"errno={error.errno} path={error.filename or folder}"
        if error.errno in _FULL:
            raise StoreFullError(f"the folder is full. {where}; free space or name another folder") from error
        if error.errno in _DENIED:
            raise StoreDeniedError(f"the folder may not be written. {where}") from error
        raise UnavailableError(f"the folder cannot take the files: {error.strerror}. {where}") from error
