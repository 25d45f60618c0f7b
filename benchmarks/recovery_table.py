"""Medians and the table of ``recovery.py``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recovery_job import PHASES, Recovery
from rich.console import Console
from rich.table import Table

TITLES = {
    "noticed": "noticed, all ended",
    "started": "started",
    "imported": "imports",
    "built": "build",
    "grouped": "rendezvous",
    "restored": "restore",
    "first": "first step",
}
WIDTH_MIN = 150


def summary(found: Sequence[Recovery | None]) -> dict[str, Any]:
    """Medians by name, all samples, and how many jobs hung."""
    samples = [one for one in found if one is not None]
    medians: dict[str, float] = {}
    if samples:
        medians = {
            name: statistics.median(one.phases_s[name] for one in samples) for name in PHASES
        }
        medians["first_s"] = statistics.median(one.first_s for one in samples)
        medians["new_s"] = statistics.median(one.new_s for one in samples)
        medians["lost"] = statistics.median(one.lost for one in samples)
    return {
        "medians": medians,
        "hung": len(found) - len(samples),
        "samples": [asdict(one) for one in samples],
    }


def print_table(document: Mapping[str, Any]) -> None:
    plan = document["plan"]
    table = Table(
        title=f"SIGKILL of one of two ranks; seconds, medians; a durable checkpoint every {plan['every']} steps; "
        f"a step takes at least {plan['step_s']} s, building {plan['build_s']:.0f} s more than its "
        "own time",
        caption="  ".join(f"{name} {value}" for name, value in document["machine"].items()),
    )
    table.add_column("a rank", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title in (
        "to the next new step",
        "steps redone",
        *(TITLES[name] for name in PHASES),
        "redoing",
        "hung",
    ):
        table.add_column(title, justify="right")
    for mib, of_name in document["sizes_mib"].items():
        base = of_name.get("ckpt", {}).get("medians", {}).get("new_s")
        for name, one in of_name.items():
            table.add_row(
                f"{mib} MiB",
                name,
                *cells(one, base),
                style="bold" if name.startswith("ckpt") else None,
            )
        table.add_section()
    console = Console(width=max(Console().width, WIDTH_MIN))
    console.print(table)


def cells(one: Mapping[str, Any], base: float | None) -> list[str]:
    medians = one["medians"]
    hung = str(one["hung"]) if one["hung"] else ""
    if not medians:
        return ["-"] * (len(PHASES) + 3) + [hung]
    new = f"{medians['new_s']:.2f}"
    if base is not None and medians["new_s"] != base:
        new += f" ({medians['new_s'] / base:.1f}x)"
    phases = [f"{medians[name]:.3f}" for name in PHASES]
    return [
        new,
        f"{medians['lost']:.0f}",
        *phases,
        f"{medians['new_s'] - medians['first_s']:.3f}",
        hung,
    ]
