"""Which log a node finds at its stores as it joins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.backends.base import Backend, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import NotFoundError
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import StoreBehind
from ckpt.keeper.uploads import store_log
from ckpt.keeper.uploads.store_log import StoreLog, log_id_of
from ckpt.log.journal import Journal
from ckpt.testing.faults import Fault, FaultyBackend, Harm


class RemembersMissing(FileBackend):
    """A folder of a network file system that was looked at before anything was in it: nothing is
    found under a name until the folder itself is listed."""

    stale = True

    def stat(self, key: str) -> Stat | None:
        return None if self.stale else super().stat(key)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        if self.stale:
            raise NotFoundError(f"no such object. key={key}")
        super().read_into(key, out, offset_bytes=offset_bytes)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        if not prefix:
            self.stale = False
        return iter(()) if self.stale else super().list(prefix, after=after)


def test_log_made_after_a_network_file_system_was_asked_for_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Journal.open(FileBackend(tmp_path / "run"), job="j", create=True)
    monkeypatch.setattr(
        store_log, "open_job_of", lambda spec, emit: RemembersMissing(tmp_path / "run")
    )
    spec = KeeperSpec(job="j", store=str(tmp_path / "run"))
    assert log_id_of(spec, lambda event: None) == made.log_id


@pytest.mark.parametrize("others", [(), ("second", "third")])
@pytest.mark.parametrize("there", [False, True])
def test_store_without_a_log_holds_none_at_the_second_look_too(
    tmp_path: Path, others: tuple[str, ...], there: bool
) -> None:
    folders = [tmp_path / name for name in ("first", *others)]
    for folder in folders if there else ():
        folder.mkdir()
    store, *more = map(str, folders)
    assert log_id_of(KeeperSpec(job="j", store=store, others=tuple(more)), print) is None
    assert [folder.exists() for folder in folders] == [there] * len(folders), "nothing is written"


def test_stores_that_lack_objects_are_known_by_name_and_number() -> None:
    """Three copies that are two must be seen; asking opens no store and waits for none."""
    stores: list[Backend] = [MemoryBackend(str(number)) for number in range(2)]
    away = MemoryBackend("away")
    stores.append(FaultyBackend(away, [Fault(harm=Harm.LOST_REQUEST, op="put", times=None)]))
    several = ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=1)
    log = StoreLog(lambda: several, job="j", named=True, emit=lambda _: None)
    assert log.behind() == ()
    for number in range(3):
        log.backend.put(f"packs/{number}", [b"x"])
    until_s = time.monotonic() + 20.0
    while not (found := log.behind()) or found[0].objects < 3:
        assert time.monotonic() < until_s, found
        threading.Event().wait(0.01)
    assert found == (StoreBehind(store="memory:away", objects=3),)
    log.close()
