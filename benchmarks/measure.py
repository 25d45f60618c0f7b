"""How time, memory and page cache are measured. Imports no torch, so that the orchestrator can use
it too."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

READ_BYTES = 8 << 20
SAMPLE_S = 0.01

TOUCH = """
import mmap, sys, tempfile
size, folder = int(sys.argv[1]), sys.argv[2]
memory = mmap.mmap(-1, 2 * size)
memory.madvise(23)  # MADV_POPULATE_WRITE
memory.close()
block = bytes(4 << 20)
with tempfile.TemporaryFile(dir=folder) as file:
    for _ in range(0, size + size // 2, len(block)):
        file.write(block)
"""


def warm_memory(size_bytes: int, *, scratch: Path) -> None:
    """Make the machine hold free pages for two copies of ``size_bytes`` that cost nothing to get.

    A virtual machine gives free pages back to its host, and the first touch of a page that the host
    must find again costs several times more than any checkpointing does. So a child touches that
    much memory and exits. The page cache takes its pages from other lists than programs do: without
    a file written as well (in ``scratch``, without a name, gone before the kernel starts to write
    it out), whoever saves through the page cache takes up to twice as long. The child is spawned: a
    forked one would write-protect the parent's pages and slow the parent's next writes down.
    """
    command = [sys.executable, "-S", "-E", "-c", TOUCH, str(size_bytes), str(scratch)]
    subprocess.run(command, check=True, close_fds=True)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def evict(folder: Path) -> None:
    """Drop every file below from the page cache. The files must be synced already."""
    for path in files_below(folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_through(folder: Path) -> None:
    """Read every file below once, so that the page cache holds it."""
    buffer = bytearray(READ_BYTES)
    for path in files_below(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def stored_bytes(folder: Path) -> int:
    """Disk space that everything below takes."""
    return sum(path.stat().st_blocks * 512 for path in files_below(folder))


def family(mark: str) -> list[int]:
    """Processes whose environment holds ``mark``: a contestant with all its children, daemons in
    sessions of their own included, which no walk of parent ids would find."""
    needle, members = mark.encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and needle in (entry / "environ").read_bytes():
                members.append(int(entry.name))
    return members


def memory_bytes(mark: str) -> int:
    """Anonymous and shared memory that a family holds, each page counted once; file cache is not
    counted.

    Shared memory is what the processes map or what they hold through descriptors (a memfd that
    nobody maps at the moment is memory too), whichever is more.
    """
    anonymous_kib = shared_kib = 0
    held: dict[tuple[int, int], int] = {}
    for pid in family(mark):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                match line.split():
                    case ["Pss_Anon:", kib, _]:
                        anonymous_kib += int(kib)
                    case ["Pss_Shmem:", kib, _]:
                        shared_kib += int(kib)
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(handle.readlink()).startswith(("/memfd:", "/dev/shm/")):
                        stat = handle.stat()
                        held[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return (anonymous_kib << 10) + max(shared_kib << 10, sum(held.values()))


@contextlib.contextmanager
def watched_memory(mark: str) -> Iterator[list[int]]:
    """Sample ``memory_bytes`` while the block runs; the list holds the peak when it is over."""
    peak = [memory_bytes(mark)]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            peak[0] = max(peak[0], memory_bytes(mark))

    thread = threading.Thread(target=sample, name="memory-sampler")
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
