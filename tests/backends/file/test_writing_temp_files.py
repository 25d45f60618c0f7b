from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.backends.file.syscalls import REAL_OPS
from ckpt.backends.file.writing import FOREIGN_IDLE_S, boot_mark, new_temp_file, sweep


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def abandoned(folder: Path, mark: str, idle_s: float = 0) -> Path:
    path = folder / f"{mark}-0123456789abcdef"
    path.write_bytes(b"half")
    os.utime(path, times=(path.stat().st_atime, path.stat().st_mtime - idle_s))
    return path


def test_live_writers_file_is_spared_and_gone_when_done(tmp_path: Path) -> None:
    with new_temp_file(REAL_OPS, str(tmp_path)) as temp:
        assert sweep(REAL_OPS, str(tmp_path)) == 0
        assert Path(temp.path).exists()
    assert left(tmp_path) == []


def test_dead_writers_file_is_swept_at_once_on_its_own_machine(tmp_path: Path) -> None:
    script = (
        "import os, sys; from ckpt.backends.file.writing import _create; from "
        "ckpt.backends.file.syscalls import REAL_OPS;"
        f"_create(REAL_OPS, {str(tmp_path)!r}, ''); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert len(left(tmp_path)) == 1
    assert sweep(REAL_OPS, str(tmp_path)) == 1
    assert left(tmp_path) == []


def test_file_of_another_machine_is_swept_only_when_long_idle(tmp_path: Path) -> None:
    abandoned(tmp_path, "ffffffff", FOREIGN_IDLE_S - 60)
    assert sweep(REAL_OPS, str(tmp_path)) == 0
    abandoned(tmp_path, "ffffffff", FOREIGN_IDLE_S + 60)
    assert sweep(REAL_OPS, str(tmp_path)) == 1
    assert left(tmp_path) == []


def test_folder_in_the_temps_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"{boot_mark()}-folder").mkdir()
    (tmp_path / f"{boot_mark()}-link").symlink_to("/etc/passwd")
    abandoned(tmp_path, boot_mark())
    assert sweep(REAL_OPS, str(tmp_path)) == 1
    assert len(left(tmp_path)) == 2


def test_missing_folder_has_nothing_to_sweep(tmp_path: Path) -> None:
    assert sweep(REAL_OPS, str(tmp_path / "none")) == 0


def test_failing_block_removes_its_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_temp_file(REAL_OPS, str(tmp_path)):
        raise RuntimeError
    assert left(tmp_path) == []


def test_writer_whose_file_is_swept_before_it_locks_takes_another(tmp_path: Path) -> None:
    class Robbed(type(REAL_OPS)):  # type: ignore[misc]
        robbed = 0

        def open(self, path: str, flags: int) -> int:
            fd: int = super().open(path, flags)
            if self.robbed < 2:
                self.robbed += 1
                Path(path).unlink()
            return fd

    with new_temp_file(Robbed(), str(tmp_path)) as temp:
        assert Path(temp.path).exists()
