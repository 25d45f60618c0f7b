"""Replicas of one machine read each byte from the store once, and trust nothing but digests."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from ckpt.serve import shared_reads
from ckpt.serve.follower import Follower
from ckpt.serve.shared_reads import SharedReads
from ckpt.session.checkpointer import Checkpointer

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "SHARED_MEMORY", tmp_path)


def made() -> nn.Module:
    return nn.Linear(1500, 1500)


def ranges_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "members"]


def test_what_killed_followers_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Of whichever log; what is in use stays."""
    used = SharedReads("used", folder=tmp_path)
    left = SharedReads("left", folder=tmp_path)
    for name in ("used", "left"):
        (tmp_path / name / "range").write_bytes(b"x")
    assert left._member is not None
    os.close(left._member)  # as the kernel does when its process is killed
    left._member = None
    SharedReads("next", folder=tmp_path).close()
    assert not (tmp_path / "left").exists()
    assert (tmp_path / "used" / "range").exists()
    used.close()


def test_eight_followers_read_what_changed_once(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = made()
    checkpointer = Checkpointer(tmp_path / "store", job="t")
    checkpointer.save({"model": model}, step=1)
    followers = [
        Follower(tmp_path / "store", into=made, share_reads=True, poll_s=0.02) for _ in range(8)
    ]
    try:
        for step in (2, 3):
            for follower in followers:
                follower.wait(step=step - 1, timeout_s=WAIT_S)
            with torch.no_grad():
                nn.init.normal_(model.weight)
            checkpointer.save({"model": model}, step=step)
        for follower in followers:
            served = follower.wait(step=3, timeout_s=WAIT_S).model
            assert torch.equal(served.weight, model.weight)  # type: ignore[union-attr]
        size_bytes = 1500 * 1500 * 4
        read = sum(follower.status().read_bytes for follower in followers)
        assert 3 * size_bytes <= read <= 3.3 * size_bytes
    finally:
        for follower in followers:
            follower.close()
        checkpointer.close()


def test_range_is_read_once_and_given_to_others(tmp_path: Path) -> None:
    reads = SharedReads("log", folder=tmp_path)
    with reads.range("packs/a", 0, 5) as first:
        assert first is not None
        assert not first.read_into(memoryview(bytearray(5)))
        first.keep(memoryview(b"hello"))
    with SharedReads("log", folder=tmp_path).range("packs/a", 0, 5) as second:
        out = bytearray(5)
        assert second is not None
        assert second.read_into(memoryview(out))
    assert out == b"hello"
    with reads.range("packs/a", 1, 5) as other:
        assert other is not None
        assert not other.read_into(memoryview(out)), "another range of the same pack"


def test_process_that_hangs_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "WAIT_S", 0.05)
    reads = SharedReads("log", folder=tmp_path)
    with (
        reads.range("packs/a", 0, 5),
        SharedReads("log", folder=tmp_path).range("packs/a", 0, 5) as waited,
    ):
        assert waited is None


def test_those_who_wait_get_what_the_first_one_read(tmp_path: Path) -> None:
    reads = SharedReads("log", folder=tmp_path)
    got: list[bytes] = []

    def wait() -> None:
        with SharedReads("log", folder=tmp_path).range("packs/a", 0, 5) as waited:
            out = bytearray(5)
            assert waited is not None
            assert waited.read_into(memoryview(out))
            got.append(bytes(out))

    thread = threading.Thread(target=wait)
    with reads.range("packs/a", 0, 5) as first:
        thread.start()
        assert first is not None
        first.keep(memoryview(b"hello"))
    thread.join()
    assert got == [b"hello"]


def test_torn_file_is_not_a_range(tmp_path: Path) -> None:
    reads = SharedReads("log", folder=tmp_path)
    with reads.range("packs/a", 0, 5) as first:
        assert first is not None
        first.keep(memoryview(b"hello"))
    (file,) = ranges_of(tmp_path / "log")
    file.write_bytes(b"hel")
    with reads.range("packs/a", 0, 5) as torn:
        assert torn is not None
        assert not torn.read_into(memoryview(bytearray(5)))


def test_old_ranges_are_removed(tmp_path: Path) -> None:
    reads = SharedReads("log", folder=tmp_path)
    for pack in ("packs/old", "packs/new"):
        with reads.range(pack, 0, 5) as made_range:
            assert made_range is not None
            made_range.keep(memoryview(b"hello"))
            if pack == "packs/old":
                (file,) = ranges_of(tmp_path / "log")
    os.utime(file, (time.time() - 100, time.time() - 100))
    reads.tidy()
    assert len(ranges_of(tmp_path / "log")) == 1


def test_last_one_that_closes_removes_everything(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    first, second = SharedReads("log", folder=folder), SharedReads("log", folder=folder)
    with first.range("packs/a", 0, 5) as kept:
        assert kept is not None
        kept.keep(memoryview(b"hello"))
    first.close()
    first.close()
    assert len(list((folder / "log").iterdir())) == 2
    second.close()
    assert not folder.exists()
    third = SharedReads("log", folder=folder)
    third.close()
    assert not folder.exists()


def test_damage_in_shared_memory_is_read_from_the_store(tmp_path: Path) -> None:
    model = made()
    with Checkpointer(tmp_path / "store", job="t") as checkpointer:
        checkpointer.save({"model": model}, step=1)
    with (
        Follower(tmp_path / "store", into=made, share_reads=True) as first,
        ExitStack() as stack,
    ):
        first.wait(timeout_s=WAIT_S)
        for folder in tmp_path.glob("ckpt-reads-*/*"):
            for file in ranges_of(folder):
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
        follower = stack.enter_context(Follower(tmp_path / "store", into=made, share_reads=True))
        served = follower.wait(timeout_s=WAIT_S).model
        assert torch.equal(served.weight, model.weight)  # type: ignore[union-attr]
        assert not follower.status().refused
