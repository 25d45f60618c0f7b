"""Machines whose wall clock jumps while programs run there; CLOCK_MONOTONIC and CLOCK_BOOTTIME go
on, as they do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib*/faketime/libfaketime.so.1")


def require() -> Path:
    """The library that does it. Skips the test where it isn't installed; in CI that is a
    failure."""
    found = [path for pattern in LIBRARIES for path in Path("/").glob(pattern[1:])]
    if not found:
        text = "libfaketime is not installed (Debian: apt-get install faketime)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(text)
    return found[0]


class Clock:
    """The wall clock of one machine: as far from the true one as its file says. Programs look there
    once a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(0)

    def set(self, ahead_s: int) -> None:
        """Make it so far ahead; negative: behind."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{ahead_s:+d}\n")
        new.replace(self._path)

    def command(self) -> list[str]:
        """What to put before a command that is to have this clock, all that it starts included."""
        return [
            "env",
            f"LD_PRELOAD={require()}",
            f"FAKETIME_TIMESTAMP_FILE={self._path}",
            "FAKETIME_CACHE_DURATION=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "FAKETIME_DISABLE_SHM=1",
            "NO_FAKE_STAT=1",
        ]
