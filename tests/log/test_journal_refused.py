"""A store that refuses writes is told as one, not as one that cannot hold a log."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.probe import CreateOnceProbe, creates_once
from ckpt.errors import (
    CkptError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.log.journal import Journal
from ckpt.testing.crashes import FailingOps
from ckpt.testing.sample import write_sample_store
from ckpt.values import SnapshotId


class Refusing:
    """An object store that is asked whether it creates once, and refuses every put."""

    def __init__(self, inner: MemoryBackend, error: CkptError) -> None:
        self._inner = inner
        self._error = error
        self._creates = CreateOnceProbe(lambda: creates_once(self._refuse, self._refuse), self.url)

    def _refuse(self) -> None:
        raise self._error

    @property
    def url(self) -> str:
        return self._inner.url

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=self._creates(), read_bytes_best=1, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if create_only:
            self._creates.require()
        self._refuse()

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._refuse()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EROFS, StoreDeniedError),
        (errno.EACCES, StoreDeniedError),
        (errno.ENOSPC, StoreFullError),
        (errno.EIO, UnavailableError),
    ],
)
def test_a_folder_that_cannot_be_written_to_says_so(
    tmp_path: Path, number: int, kind: type[CkptError]
) -> None:
    write_sample_store(FileBackend(tmp_path / "store"))
    refusing = FileBackend(tmp_path / "store", ops=FailingOps(number, op="open"))
    journal = Journal.open(refusing)
    assert journal.refresh().newest() is not None, "it is read as ever"
    with pytest.raises(kind, match="store") as raised:
        journal.tag("x", SnapshotId(1, 30))
    assert type(raised.value) is kind and raised.value.exit_code == 11


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(
    "error", [StoreDeniedError("403"), StoreFullError("507"), UnavailableError("503")], ids=repr
)
def test_an_object_store_that_refuses_says_so(error: CkptError, made: bool) -> None:
    inner = MemoryBackend("b")
    if made:
        write_sample_store(inner)
    with pytest.raises(type(error), match=str(error)) as raised:
        Journal.open(Refusing(inner, error), job="sample", create=True).tag("x", SnapshotId(1, 30))
    assert type(raised.value) is type(error) and raised.value.exit_code == 11


def test_a_store_that_overwrites_is_still_refused_as_such() -> None:
    error = UsageError("it knows no such condition")
    with pytest.raises(UsageError, match="does not create a key only once"):
        Journal.open(Refusing(MemoryBackend("b"), error), job="run-a", create=True)
