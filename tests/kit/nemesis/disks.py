"""Disks of stores that stall, fill and come back: a small file system for each, of which everything
is real."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE_BYTES = 256 << 20
PROGRAMS = {"mkfs.ext4": "e2fsprogs", "mount": "mount", "fsfreeze": "util-linux"}
BALLAST = "ballast"
"""The file that fills a store; no key of a store."""


def require() -> None:
    """Skips the test where file systems can't be made; where CI runs as root, a missing program is
    a failure."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(
                f"{program} is not installed (Debian: apt-get install {package})"
            )
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")


class Disk:
    """The file system of one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._timer: threading.Timer | None = None

    def stall(self, last_s: float) -> None:
        """Whatever is written to it waits, and can't even be killed, for so long or until
        ``resume``. It ends by itself: who waits for a killed process would wait for ever."""
        subprocess.run(["fsfreeze", "--freeze", str(self.folder)], check=True)
        self._timer = threading.Timer(last_s, self._thaw)
        self._timer.start()

    def resume(self) -> None:
        """It writes again, if it did not already."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
            self._thaw()

    def _thaw(self) -> None:
        # One that is not frozen is no failure: the timer was first.
        subprocess.run(
            ["fsfreeze", "--unfreeze", str(self.folder)], check=False, stderr=subprocess.DEVNULL
        )

    def fill(self) -> None:
        """No byte is left on it."""
        with (self.folder / BALLAST).open("wb", buffering=0) as ballast:
            for block_bytes in (1 << 20, 4 << 10):
                with contextlib.suppress(OSError):  # no space left
                    while True:
                        ballast.write(bytes(block_bytes))

    def free(self) -> None:
        """There is room again."""
        (self.folder / BALLAST).unlink(missing_ok=True)


@contextmanager
def disk(folder: Path, image: Path) -> Iterator[Disk]:
    """A file system at ``folder``, which is made, in the file ``image``."""
    folder.mkdir(parents=True)
    with image.open("wb") as made:
        made.truncate(SIZE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(folder)], check=True)
    # Else the folder is no empty store.
    (folder / "lost+found").rmdir()
    mounted = Disk(folder)
    try:
        yield mounted
    finally:
        mounted.resume()
        # Lazily: a program that is only now ending may still have a file open there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
