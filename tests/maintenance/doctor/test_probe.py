"""Examinations of real stores, and of stores that misbehave."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kit.damage import flip, replicate, without_second_copies
from kit.scrub_nobody import AsNobody
from kit.servers.s3 import S3Server

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.open import open_backend
from ckpt.format import keys
from ckpt.maintenance.doctor.findings import StoreFindings, assess
from ckpt.maintenance.doctor.probe import SMALL_OPERATIONS, ExaminedStore, examine
from ckpt.testing.crashes import run_in_child
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm

LARGE = 1 << 20


def examined(*stores: Backend, again: bool = False) -> list[StoreFindings]:
    return examine(
        [ExaminedStore(store, (lambda store=store: store) if again else None) for store in stores],
        large_bytes=LARGE,
    )


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_well_store_is_found_well_and_left_as_it_was(kind: str, tmp_path: Path) -> None:
    store: Backend = FileBackend(tmp_path / "new") if kind == "folder" else MemoryBackend("m")
    [found] = examined(store, again=True)
    assert found.failures == {}
    assert found.create_only
    assert found.read_back_right
    assert found.list_after_put
    assert found.list_after_delete
    assert found.other_client
    assert found.leftovers == ()
    assert {name: took.count for name, took in found.latency.items()} == dict.fromkeys(
        ("put", "read", "stat", "delete", "list"), SMALL_OPERATIONS
    )
    assert found.up_bytes_per_s
    assert found.down_bytes_per_s
    assert found.skew_s is not None
    assert (found.free_bytes is not None) == (kind == "folder")
    assert list(store.list("")) == []
    assert assess([found]).exit_code == 0


@pytest.mark.slow
def test_what_a_store_holds_is_told(lone: Path, members: Path, tmp_path: Path) -> None:
    alone = replicate(lone, tmp_path / "lone", None)
    [found] = examined(alone)
    assert (found.content.kind, found.content.job, found.content.snapshots) == (
        "store",
        "sample",
        3,
    )
    assert (found.content.newest, found.content.next_seq, found.content.members) == (
        "epoch 1 step 30",
        5,
        (),
    )
    several = examined(*(replicate(members / str(n), tmp_path / str(n), None) for n in range(3)))
    assert [found.content.store_id for found in several] == list(several[0].content.members)
    assert assess(several).ok
    without_second_copies(alone)
    flip(alone.url, keys.log_key(2), 9)
    assert "seq=2" in examined(alone)[0].content.hole
    (Path(alone.url) / keys.JOB_KEY).unlink()
    assert examined(alone)[0].content.kind == "headless"
    shutil.rmtree(Path(alone.url) / "log")
    assert examined(alone)[0].content.kind == "foreign"
    assert list(alone.list("probe/")) == []


@pytest.mark.slow
def test_two_addresses_of_one_place_are_found_out(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    stores = [
        FileBackend(tmp_path / "real"),
        FileBackend(tmp_path / "link"),
        FileBackend(tmp_path / "other"),
    ]
    found = examined(*stores)
    assert [one.same_as for one in found] == [(1,), (0,), ()]
    assert assess(found).exit_code == 2
    assert list(stores[0].list("")) == []


def test_read_only_store_is_readable_and_can_not_be_written_to(lone: Path, tmp_path: Path) -> None:
    inner = replicate(lone, tmp_path / "s", None)
    [found] = examined(FaultyBackend(inner, [Fault(harm=Harm.READ_ONLY, times=None)]))
    assert "put" in found.failures
    assert found.content.snapshots == 3
    judged = assess([found])
    assert judged.exit_code == 11
    assert "denied" in {one.code for one in judged.advice}


@pytest.mark.slow
def test_folder_that_may_not_be_written_to_is_told_by_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with tempfile.TemporaryDirectory(
        dir="/tmp"
    ) as made:  # pytest's own folders can't be entered by others
        folder = Path(made) / "theirs"
        folder.mkdir(mode=0o555)
        Path(made).chmod(0o755)
        assert run_in_child(AsNobody(("--json", "doctor", str(folder)), str(out))) == 11
        told = json.loads(out.read_text())
        assert {one["code"] for one in told["advice"] if one["level"] == "bad"} == {"denied"}
        assert "put" in told["stores"][0]["failures"]
        assert list(folder.iterdir()) == []


def test_store_that_is_away_is_told(tmp_path: Path) -> None:
    away = FaultyBackend(FileBackend(tmp_path), [Fault(harm=Harm.LOST_REQUEST, times=None)])
    [found] = examined(away)
    assert not found.reached
    assert assess([found]).exit_code == 11


@pytest.mark.parametrize("harm", [Harm.LOST_REQUEST, Harm.LOST_REPLY, Harm.DENIED])
@pytest.mark.parametrize("op", ["put", "read_into", "stat", "list", "delete"])
@pytest.mark.parametrize("skip", [0, 3, 20])
def test_probe_objects_are_removed_or_named_whatever_fails(harm: Harm, op: str, skip: int) -> None:
    inner = MemoryBackend("m")
    store = FaultyBackend(inner, [Fault(harm=harm, op=op, skip=skip, times=2)])
    [found] = examined(store)
    assert {stat.key for stat in inner.list("")} <= set(found.leftovers)
    assert store.struck


def test_bytes_that_come_back_changed_are_found_out() -> None:
    store = FaultyBackend(
        MemoryBackend("m"), [Fault(harm=Harm.FLIPPED, op="read_into", key="probe/", times=None)]
    )
    [found] = examined(store)
    assert found.read_back_right is False
    assert assess([found]).exit_code == 20


def test_listing_that_lags_is_found_out() -> None:
    class Lagging(CountingBackend):
        """Lists what was there a while ago: nothing."""

        def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
            return iter(())

    [found] = examined(Lagging(MemoryBackend("m")))
    assert found.list_after_put is False
    assert assess([found]).exit_code == 2


def test_store_that_overwrites_can_be_a_replica_only() -> None:
    class Overwriting(MemoryBackend):
        """Says that it creates once, and doesn't: asked, not assumed."""

        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), create_only=False)

        def put(self, key: str, data: list[Buffer], *, create_only: bool = False) -> None:
            super().put(key, data)

    [found] = examined(Overwriting("m"))
    assert found.create_only is False
    texts = " ".join(one.text for one in assess([found, *examined(MemoryBackend("o"))]).advice)
    assert "can be the sequencer: no" in texts


@pytest.mark.slow
def test_s3_server_is_examined(moto_server: S3Server) -> None:
    bucket = moto_server.bucket()
    options = bucket.options
    store = open_backend(bucket.url, options)
    try:
        [found] = examine(
            [ExaminedStore(store, lambda: open_backend(bucket.url, options))], large_bytes=LARGE
        )
    finally:
        store.close()
    assert found.failures == {}
    assert found.create_only
    assert found.other_client
    assert found.leftovers == ()
    assert assess([found]).exit_code == 0
