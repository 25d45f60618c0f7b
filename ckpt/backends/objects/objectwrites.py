"""How a whole object gets into a store behind fsspec, by what that store is able to do.

Object stores take a put as one atomic request and decide "create only if absent" themselves. fsspec's memory store
lives in this process. All others (sftp, hdfs, a local folder ...) write under the final name byte by byte, so they get a
temporary name first and a rename after; none of them can create once through fsspec.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Protocol

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ckpt.backends.base import Buffer
from ckpt.backends.objects.fsspec_io import S3_PROTOCOLS, S3Writes

ATOMIC_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
"""Stores in which an object appears whole or not at all, and which decide creation on their side."""


class Writes(Protocol):
    """One way to store an object. ``path`` is fsspec's, without protocol."""

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """Store the concatenation of ``data``, visible whole or not at all."""
        ...

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """The same where there is nothing yet; FileExistsError where there is, NotImplementedError where it cannot tell."""
        ...


def writes_for(fs: fsspec.AbstractFileSystem, temps: str) -> Writes:
    """The way that suits ``fs``. ``temps`` is a folder for temporary names in the same store."""
    protocols = protocols_of(fs)
    if protocols & S3_PROTOCOLS:
        return S3Writes(fs)
    if protocols & ATOMIC_PROTOCOLS:
        return ServerWrites(fs)
    if isinstance(fs, MemoryFileSystem):
        return MemoryWrites(fs)
    return RenameWrites(fs, temps)


class ServerWrites:
    """One put request an object; the server decides whether a key is free."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes."""
        self._fs.pipe_file(path, _join(data))

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes."""
        self._fs.pipe_file(path, _join(data), mode="create")


class MemoryWrites:
    """fsspec's memory store: a dictionary of this process, where one dictionary operation is the atomic step."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        self._fs = fs

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes."""
        self._fs.pipe_file(path, _join(data))

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. The file system's own create looks first and stores then, so two threads could both win."""
        mine = MemoryFile(self._fs, path, _join(data))
        if self._fs.store.setdefault(path, mine) is not mine:
            raise FileExistsError(path)


class RenameWrites:
    """File systems whose files grow under their name: a temporary name first, then a rename."""

    def __init__(self, fs: fsspec.AbstractFileSystem, temps: str) -> None:
        self._fs = fs
        self._temps = temps

    def replace(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes. As durable as the file system's own close and rename."""
        temp = f"{self._temps}/{secrets.token_hex(8)}"
        self._fs.makedirs(self._temps, exist_ok=True)
        try:
            with self._fs.open(temp, "wb") as file:
                for buffer in data:
                    file.write(buffer)
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.mv(temp, path)
        except BaseException:
            if self._fs.exists(temp):
                self._fs.rm_file(temp)
            raise

    def create(self, path: str, data: Sequence[Buffer]) -> None:
        """See Writes: cannot."""
        raise NotImplementedError("a rename through fsspec replaces what is there")


def _join(data: Sequence[Buffer]) -> bytes:
    return data[0] if len(data) == 1 and isinstance(data[0], bytes) else b"".join(data)


def protocols_of(fs: fsspec.AbstractFileSystem) -> frozenset[str]:
    """The URL schemes that ``fs`` answers to."""
    protocol: str | tuple[str, ...] = fs.protocol
    return frozenset((protocol,) if isinstance(protocol, str) else protocol)
