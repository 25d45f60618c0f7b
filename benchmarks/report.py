"""Medians, the table and the facts about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = "ckpt"

CONTESTANTS: Mapping[str, str] = {
    OURS: "ours:Ours",
    "torch.save": "rivals_files:TorchSave",
    "safetensors": "rivals_files:Safetensors",
    "dcp-1-thread": "rivals_dcp:Dcp",
    "dcp-2-threads": "rivals_dcp:Dcp2",
    "dcp-async": "rivals_dcp:DcpAsync",
    "dcp-async-tuned": "rivals_dcp:DcpAsyncTuned",
    "dcp-async-process": "rivals_dcp:DcpProcess",
    "torchsnapshot": "rivals_torchsnapshot:Take",
    "torchsnapshot-async": "rivals_torchsnapshot:AsyncTake",
}

WIDTH_MIN = 170

UNREST_MAX = 1.25
"""How far the pace of undisturbed training may stray from its median before the table says that
others were at work."""

Fact = Mapping[str, float]


@dataclass
class Measured:
    """All that the processes of one contestant reported."""

    first: list[Fact] = field(default_factory=list)
    saves: list[Fact] = field(default_factory=list)
    loads: dict[str, list[float]] = field(default_factory=dict)
    extra_bytes: list[int] = field(default_factory=list)
    size_bytes: int = 0
    tensors: int = 0
    wrong: bool = False
    absent: str | None = None


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def summary(measured: Measured) -> dict[str, object]:
    """Medians by name, and every sample that they were taken from. Seconds and bytes."""
    medians: dict[str, float | None] = {}
    for name in ("lost_s", "blocked_s", "slowdown_s", "fsync_s", "total_s", "stored_bytes"):
        medians[name] = median([save[name] for save in measured.saves])
    for name in ("blocked_s", "total_s"):
        medians[f"first_{name}"] = median([save[name] for save in measured.first])
    for name in ("warm", "cold"):
        medians[f"{name}_load_s"] = median(measured.loads.get(name, []))
    medians["extra_bytes"] = median(measured.extra_bytes)
    return {
        "absent": measured.absent,
        "size_bytes": measured.size_bytes,
        "tensors": measured.tensors,
        "medians": medians,
        "samples": {"first": measured.first, "saves": measured.saves, "loads": measured.loads},
    }


def machine() -> dict[str, str]:
    """What the figures depend on."""
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    versions = {}
    for name in ("torch", "safetensors", "torchsnapshot", "torch-ckpt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": f"{cpu[0].partition(': ')[2] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{memory_kib / (1 << 20):.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
        "commit": commit.stdout.strip(),
    }


def print_table(results: Mapping[str, Measured], facts: Mapping[str, str]) -> None:
    rows = {name: summary(measured)["medians"] for name, measured in results.items()}
    ours = rows.get(OURS, {})
    one = next((measured for measured in results.values() if measured.size_bytes), Measured())
    table = Table(
        title=f"{one.size_bytes / (1 << 20):.0f} MiB in {one.tensors} tensors; seconds, medians; (times ckpt's figure)",
        caption="  ".join(f"{name} {value}" for name, value in facts.items()),
    )
    table.add_column("", no_wrap=True)
    for title in (
        "training lost",
        "= blocked",
        "+ slow-down",
        "durable after",
        "first blocked",
        "load warm",
        "load cold",
    ):
        table.add_column(title, justify="right")
    for title in ("memory MiB", "stored MiB"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        if results[name].absent is not None:
            table.add_row(name, "[dim]absent")
            continue
        cells = [ratio(row, ours, "lost_s"), blocked(row), seconds(row["slowdown_s"])]
        cells += [ratio(row, ours, "total_s"), seconds(row["first_blocked_s"])]
        cells += [ratio(row, ours, "warm_load_s"), ratio(row, ours, "cold_load_s")]
        cells += [mebibytes(row["extra_bytes"]), mebibytes(row["stored_bytes"])]
        table.add_row(name, *cells, style="bold" if name == OURS else None)
    console = Console(width=max(Console().width, WIDTH_MIN))
    console.print(table)
    for name, measured in results.items():
        if measured.absent is not None:
            console.print(f"{name} is absent: {measured.absent}")
    paces = [save["step_s"] for measured in results.values() for save in measured.saves]
    if paces and max(paces) > UNREST_MAX * statistics.median(paces):
        worst = max(paces) / statistics.median(paces)
        console.print(
            f"the machine was not quiet: one undisturbed training step took {worst:.1f} times the "
            "usual"
        )


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def blocked(row: Mapping[str, float | None]) -> str:
    """The wait, and how much of it was the fsync that the benchmark had to add."""
    return seconds(row["blocked_s"]) + (f" ({row['fsync_s']:.2f} fsync)" if row["fsync_s"] else "")


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / (1 << 20):.0f}"


def ratio(row: Mapping[str, float | None], ours: Mapping[str, float | None], name: str) -> str:
    value, base = row[name], ours.get(name)
    if value is None or base is None or row is ours:
        return seconds(value)
    return f"{value:.3f} ({value / base:.1f}x)" if base > 0 else seconds(value)
