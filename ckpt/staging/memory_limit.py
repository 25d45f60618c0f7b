"""How much memory this process may still take, by the machine and by its control groups. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ckpt.errors import UsageError


def available_bytes(*, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken without swapping or being killed, or None where the system doesn't say.

    The least of the kernel's MemAvailable and what each control group above this process (v1 or v2) has left, page cache
    that can be dropped not counted as used.
    """
    found = [left for left in (_machine(proc), *_groups(proc, cgroup)) if left is not None]
    return min(found, default=None)


def check_available(needed_bytes: int, *, what: str, freed_bytes: int = 0, available: int | None = None) -> None:
    """Raise UsageError where ``needed_bytes`` exceed what is available and what is about to be freed.

    ``available`` replaces asking the system.
    """
    left = available_bytes() if available is None else available
    if left is not None and needed_bytes > left + freed_bytes:
        raise UsageError(
            f"not enough memory for {what}. needed_bytes={needed_bytes} available_bytes={left + freed_bytes} "
            "use fewer slots, shard the state over more ranks, or raise the memory limit"
        )


def _machine(proc: Path) -> int | None:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(proc: Path, root: Path) -> Iterator[int | None]:
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for folder in _upwards(root, path):
                yield _left(folder, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for folder in _upwards(root / "memory", path):
                yield _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it; a group whose folder isn't visible from in here yields what is."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None:
        return None
    droppable = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == cache:
            droppable = int(value)
    return max(0, most - max(0, used - droppable))


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "max").strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # another system, another mount: then this source doesn't say
        return []
