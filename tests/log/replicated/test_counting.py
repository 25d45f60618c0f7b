"""Which stores objects are written to, after a time in which some did not answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from kit.logs.small import Disk, Store, commit, image_of, made
from kit.logs.stores import SmallReplicated

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.backends.checked import read_alone
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UnavailableError
from ckpt.format import keys
from ckpt.format.store import JOB_BYTES_MAX
from ckpt.log.journal import Journal, StoreProof
from ckpt.values import SnapshotId


class Switched:
    """A store that answers nothing while it is ``silent``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.silent = False
        self._inner = MemoryBackend(url)

    def capabilities(self) -> Capabilities:
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._ask().put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._ask().read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._ask().stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._ask().list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._ask().delete(key)

    def close(self) -> None:
        self._inner.close()

    def _ask(self) -> MemoryBackend:
        if self.silent:
            raise UnavailableError(f"the store does not answer. store={self.url}")
        return self._inner


@pytest.fixture
def stores() -> list[Switched]:
    return [Switched(name) for name in "012"]


@pytest.fixture
def several(stores: list[Switched]) -> Iterator[ReplicatedBackend]:
    backend = ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=1)
    yield backend
    backend.close()


@pytest.fixture
def journal(several: ReplicatedBackend) -> Journal:
    log = Journal.open(several, job="job", create=True)
    log.open_epoch(resume=None)
    return log


def test_stores_that_were_silent_when_the_log_was_read_take_objects_as_soon_as_they_answer(
    stores: list[Switched], several: ReplicatedBackend, journal: Journal
) -> None:
    for store in stores[1:]:
        store.silent = True
    assert journal.refresh().short
    for store in stores[1:]:
        store.silent = False
    several.put(
        "packs/x", [b"x"]
    )  # a save writes its packs first, and reads the log when they are there


@pytest.mark.slow
def test_a_store_that_came_back_empty_is_not_counted_because_it_is_silent_next(
    stores: list[Switched], several: ReplicatedBackend, journal: Journal
) -> None:
    stores[2].delete(keys.JOB_KEY)
    journal.refresh()
    stores[2].silent = True
    journal.refresh()
    stores[2].silent, stores[1].silent = False, True
    with pytest.raises(UnavailableError, match="acknowledged=1 needed=2"):
        several.put("packs/x", [b"x"])


@pytest.mark.parametrize("counts", ["from the first look on", "only after it"])
def test_a_store_that_was_exchanged_since_the_first_look_is_told_whatever_reads_the_log(
    counts: str,
    stores: list[Switched],
    several: ReplicatedBackend,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ckpt.log.replicated.PROVE_S", 0.1)

    def mount() -> None:
        stores[2].put(keys.JOB_KEY, [whose])

    whose = read_alone(stores[2], keys.JOB_KEY, bytes_max=JOB_BYTES_MAX)
    proof = StoreProof(several, journal)
    if counts == "only after it":
        stores[2].delete(keys.JOB_KEY)
    proof.begin(1)
    mount()
    journal.refresh()
    stores[1].silent = True
    several.put("packs/x", [b"x"])  # on the first store and on this one
    stores[2].delete(keys.JOB_KEY)
    for _ in range(2):  # nor does a look that failed use up what it found
        journal.refresh()
        with pytest.raises(UnavailableError, match="another one now, or none"):
            proof.finish(1)
    mount()
    journal.refresh()
    with pytest.raises(UnavailableError, match="another one now, or none"):
        proof.finish(1)
    proof.begin(2)
    assert len(proof.finish(2)) == 3


def test_of_several_stores_the_others_tell_what_one_forgot(one_by_one: None) -> None:
    stores = [Store(f"s{n}", inner=Disk(f"s{n}")) for n in range(3)]
    journal = made(stores)
    epoch = journal.open_epoch(resume=None)
    commit(journal, epoch, 1)
    image = image_of(stores[0].inner)
    stores[2].up = False
    commit(journal, epoch, 2)
    stores[2].up = True
    # Two of the three are enough to know what is newest, if none of them forgot.
    stores[0].inner = image
    stores[1].up = False
    assert "rolled back" in Journal.open(SmallReplicated(stores, 2)).refresh().stale_reason
    with pytest.raises(UnavailableError, match="older log"):
        Journal.open(SmallReplicated(stores, 2)).tag("x", SnapshotId(1, 1))
    stores[1].up = True
    late = Journal.open(SmallReplicated(stores, 2))
    late.tag("x", SnapshotId(1, 2))
    assert not late.refresh().stale_reason
