from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends.file.syscalls import RealOps
from ckpt.backends.file.writing import (
    DIRECT_BYTES_MIN,
    WRITE_BYTES_MAX,
    memory_address,
    set_direct,
    write_all,
)
from ckpt.testing.contract import aligned_memory, buffer
from ckpt.values import PAGE_BYTES


class Spy(RealOps):
    """The real calls, remembered: bytes of each write and whether it was a direct one; takes at
    most ``most`` bytes each."""

    def __init__(self, most: int | None = None, refuse: bool = False) -> None:
        self.writes: list[tuple[int, bool]] = []
        self.addresses: list[int] = []
        self._most = most
        self._refuse = refuse

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        direct = is_direct(fd)
        if direct and self._refuse:
            raise OSError(errno.EINVAL, "no direct I/O")
        if self._most is not None:
            buffers = [buffers[0][: self._most]]
        taken = super().write(fd, buffers, offset_bytes)
        self.writes.append((taken, direct))
        self.addresses += [memory_address(piece) for piece in buffers]
        return taken


def is_direct(fd: int) -> bool:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
    return bool(flags & os.O_DIRECT)


def write(path: Path, pieces: Sequence[memoryview], ops: RealOps, *, direct: bool = True) -> bytes:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(ops, fd, pieces, direct=direct)
        os.fsync(fd)
    finally:
        os.close(fd)
    return path.read_bytes()


@pytest.fixture
def takes_direct(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    took = set_direct(fd, on=True)
    os.close(fd)
    if not took:
        pytest.skip(f"the file system of {tmp_path} takes no direct I/O")


@pytest.mark.usefixtures("takes_direct")
def test_aligned_memory_goes_down_uncopied_in_large_direct_writes(tmp_path: Path) -> None:
    ops = Spy()
    data = aligned_memory(2 * WRITE_BYTES_MAX + 3 * PAGE_BYTES)
    # A stretch of three pages is too short for a write of its own: it is copied, and still written
    # directly.
    assert write(tmp_path / "a", [data], ops) == bytes(data)
    assert ops.writes == [(WRITE_BYTES_MAX, True), (WRITE_BYTES_MAX, True), (3 * PAGE_BYTES, True)]
    assert ops.addresses[:2] == [memory_address(data), memory_address(data) + WRITE_BYTES_MAX]


@pytest.mark.usefixtures("takes_direct")
def test_several_aligned_buffers_share_one_system_call(tmp_path: Path) -> None:
    ops = Spy()
    data = [buffer(4 << 20, aligned=True, fill=i) for i in range(4)]
    assert write(tmp_path / "a", data, ops) == b"".join(data)
    assert ops.writes == [(16 << 20, True)]


@pytest.mark.usefixtures("takes_direct")
def test_tail_shorter_than_a_page_is_written_through_the_cache(tmp_path: Path) -> None:
    ops = Spy()
    data = [buffer(2 << 20, aligned=True, seed=1), memoryview(b"the end")]
    assert write(tmp_path / "a", data, ops) == b"".join(data)
    assert ops.writes == [(2 << 20, True), (7, False)]


@pytest.mark.usefixtures("takes_direct")
def test_unaligned_memory_goes_through_the_bounce_buffer_directly(tmp_path: Path) -> None:
    ops = Spy()
    data = buffer(20 << 20, aligned=False, seed=2)
    assert write(tmp_path / "a", [data], ops) == bytes(data)
    assert [size for size, direct in ops.writes if direct] == [8 << 20, 8 << 20, 4 << 20]
    assert all(address % PAGE_BYTES == 0 for address in ops.addresses)


@pytest.mark.usefixtures("takes_direct")
def test_memory_that_becomes_aligned_after_a_header_goes_down_uncopied(tmp_path: Path) -> None:
    ops = Spy()
    memory = aligned_memory((2 << 20) + PAGE_BYTES)
    memory[:] = buffer(len(memory), aligned=True, seed=3)
    data = [memoryview(bytes(100)), memory[100:]]
    assert write(tmp_path / "a", data, ops) == b"".join(data)
    assert ops.addresses[1] == memory_address(memory) + PAGE_BYTES
    assert ops.writes == [(PAGE_BYTES, True), (2 << 20, True)]


def test_small_object_is_one_buffered_write(tmp_path: Path) -> None:
    ops = Spy()
    assert write(tmp_path / "a", [memoryview(b"x")] * 300, ops) == b"x" * 300
    assert ops.writes == [(300, False)]


def test_refused_direct_write_falls_back_to_the_cache(tmp_path: Path) -> None:
    ops = Spy(refuse=True)
    data = [buffer(DIRECT_BYTES_MIN, aligned=True, seed=4), buffer(5000, aligned=False, seed=5)]
    assert write(tmp_path / "a", data, ops) == b"".join(data)
    assert not any(direct for _, direct in ops.writes)


def test_short_writes_are_continued(tmp_path: Path) -> None:
    ops = Spy(most=300_001)
    data = [buffer(DIRECT_BYTES_MIN, aligned=True, seed=6), buffer(50_000, aligned=False, seed=7)]
    assert write(tmp_path / "a", data, ops) == b"".join(data)


def test_missing_preallocation_is_done_without(tmp_path: Path) -> None:
    class Lacking(RealOps):
        def preallocate(self, fd: int, size_bytes: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

    data = buffer(DIRECT_BYTES_MIN + 1, aligned=True, seed=8)
    assert write(tmp_path / "a", [data], Lacking()) == bytes(data)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [0, 1, 100, 4095, 4096, 4097, 65536, 262144, 262145, 1 << 20, (1 << 20) + 4096]
            ),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_any_mixture_of_buffers_is_written_whole(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, bool]]
) -> None:
    data = [buffer(size, aligned=aligned, seed=i) for i, (size, aligned) in enumerate(shapes)]
    assert write(tmp_path_factory.getbasetemp() / "mixture", data, RealOps()) == b"".join(data)
