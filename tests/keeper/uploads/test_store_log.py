"""Which log a node finds at its stores as it joins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.backends.base import Stat
from ckpt.backends.file.store import FileBackend
from ckpt.errors import NotFoundError
from ckpt.ipc.client import KeeperSpec
from ckpt.keeper.uploads import store_log
from ckpt.keeper.uploads.store_log import log_id_of
from ckpt.log.journal import Journal


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
