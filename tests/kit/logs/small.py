"""A few small stores that may be away, overwrite, and be looked at over the shoulder; and makers of
logs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import (
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.manifest import Manifest, PartRef
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId
from kit.logs.stores import SmallReplicated

T = TypeVar("T")
JOB = "run-a"


class Death(BaseException):
    """The process is killed."""


class Store:
    """A store of this process's memory that may be away, overwrite, and be looked over the shoulder
    at each operation."""

    def __init__(self, name: str, *, once: bool = True, inner: MemoryBackend | None = None) -> None:
        self.inner = inner or MemoryBackend(name)
        self.once = once
        self.up = True
        self.probes = True
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.on_put: Callable[[str], None] = lambda _: None

    @property
    def url(self) -> str:
        return self.inner.url

    def capabilities(self) -> Capabilities:
        return Capabilities(
            create_only=self.once and self.up and self.probes, read_bytes_best=1, concurrency_best=1
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._answer()
        self.on_put(key)
        if create_only and not (self.once and self.probes):
            raise UsageError("not known to create a key only once")
        self.inner.put(key, data, create_only=create_only)
        self.after()

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._answer()
        self.inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        self._answer()
        return self.inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        self._answer()
        return self.inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._answer()
        self.inner.delete(key)

    def close(self) -> None:
        pass

    def _answer(self) -> None:
        self.before()
        if not self.up:
            raise UnavailableError(f"no route. store={self.url}")


def three(**more: bool) -> list[Store]:
    return [Store(f"s{n}", **more) for n in range(3)]


def several(stores: Sequence[Backend], quorum: int = 2) -> SmallReplicated:
    return SmallReplicated(stores, quorum)


def made(stores: Sequence[Backend], quorum: int = 2) -> Journal:
    return Journal.open(several(stores, quorum), job=JOB, create=True)


def commit(journal: Journal, epoch: int, step: int) -> None:
    pair = SnapshotId(epoch, step)
    ref = PartRef(
        key=keys.part_key(pair, keys.writer_name("n", "0" * 16)),
        digest="0" * 32,
        size_bytes=1,
        rank=0,
    )
    found = Manifest(
        job=JOB,
        snapshot=pair,
        world_size=1,
        base=None,
        parts=(ref,),
        size_bytes=1,
        new_bytes=1,
        created_unix_s=0.0,
    )
    journal.commit(found, epoch=epoch)


def wipe(store: Store) -> None:
    store.inner = MemoryBackend(store.inner.url.removeprefix("memory:"))


class Watch:
    """Counts operations at all stores, and does something at one of them."""

    def __init__(
        self, stores: Sequence[Store], at: int, act: Callable[[], None], *, after: bool = False
    ) -> None:
        self.count = 0
        self._at = at
        self._act = act
        for store in stores:
            if after:
                store.after = self._step
            else:
                store.before = self._step

    def _step(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._act()


def calm(stores: Sequence[Store]) -> None:
    for store in stores:
        store.before = store.after = lambda: None
        store.up = True


def operations(make: Callable[[], list[Store]], quorum: int, *, after: bool = False) -> range:
    """The numbers of the operations of one maker."""
    stores = make()
    watch = Watch(stores, -1, lambda: None, after=after)
    made(stores, quorum)
    return range(1, watch.count + 1)


class Disk(MemoryBackend):
    """A store that may be put back to an image of itself; its address says that it outlives its
    process."""

    @property
    def url(self) -> str:
        return super().url.replace("memory:", "disk:")


def image_of(disk: MemoryBackend) -> Disk:
    """The same store, as an image of its disk was taken now."""
    image = Disk(disk.url.partition(":")[2])
    for stat in disk.list(""):
        data = bytearray(stat.size_bytes)
        disk.read_into(stat.key, memoryview(data))
        image.put(stat.key, [data])
    return image
