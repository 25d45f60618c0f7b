"""The least of what machine and control groups leave is what counts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ckpt.errors import UsageError
from ckpt.staging.memory import Region, available_bytes, check_available


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def ask(root: Path) -> int | None:
    return available_bytes(proc=root / "proc", cgroup=root / "cg")


def test_machine_alone_says_what_is_available(tmp_path: Path) -> None:
    assert ask(tree(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    7 kB\n"})) == 7168


def test_version_2_group_above_limits_less_what_it_can_drop(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemAvailable: 1000 kB\n",
        "proc/self/cgroup": "0::/pod/box\n",
        "cg/pod/memory.max": "5000\n",
        "cg/pod/memory.current": "4000\n",
        "cg/pod/memory.stat": "anon 1\ninactive_file 1500\n",
        "cg/pod/box/memory.max": "max\n",
        "cg/pod/box/memory.current": "10\n",
    }
    assert ask(tree(tmp_path, files)) == 2500


def test_share_of_each_ones_whole_memory_stays_free(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n",
        "proc/self/cgroup": "0::/box\n",
        "cg/box/memory.max": "900000\n",
        "cg/box/memory.current": "10000\n",
        "cg/box/memory.stat": "inactive_file 0\n",
    }
    root = tree(tmp_path, files)
    assert available_bytes(free_share=0.1, proc=root / "proc", cgroup=root / "cg") == 800_000
    assert available_bytes(free_share=0.5, proc=root / "proc", cgroup=root / "cg") == 0


def test_version_1_group_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "3:cpu:/x\n4:memory:/hidden/box\n",
        "cg/memory/memory.limit_in_bytes": "9000\n",
        "cg/memory/memory.usage_in_bytes": "8000\n",
        "cg/memory/memory.stat": "total_inactive_file 500\n",
    }
    assert ask(tree(tmp_path, files)) == 1500


def test_silent_system_refuses_nothing(tmp_path: Path) -> None:
    assert ask(tmp_path) is None
    check_available(
        10**18, purpose="slots", available=None if available_bytes() is None else 10**19
    )


def test_shortage_names_both_sizes() -> None:
    check_available(10, purpose="3 slots", available=4, freed_bytes=6)
    with pytest.raises(
        UsageError, match=r"not enough memory for 3 slots\. needed_bytes=11 available_bytes=10"
    ):
        check_available(11, purpose="3 slots", available=4, freed_bytes=6)


@pytest.mark.skipif(sys.platform != "linux", reason="seals are of Linux")
def test_shared_memory_can_not_be_shrunk_and_is_in_no_core() -> None:
    region = Region(8192)
    try:
        assert region.fd is not None
        for size in (4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        maps = Path("/proc/self/smaps").read_text()
        start = maps.index(f"{region.address:x}-")
        flags = maps[start:].split("VmFlags:", 1)[1].splitlines()[0]
        assert "dd" in flags.split()
    finally:
        region.close()
