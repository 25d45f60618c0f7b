"""Medians and the table of ``recovery.py --nodes``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH_MIN = 130


@dataclass(frozen=True, slots=True)
class Lost:
    """One loss. ``new_s``: seconds from the kill to the first step that was new; None: it never
    came. ``first_s``: to the first step at all. ``redone``: completed steps that had to be done
    again; ``world``: ranks afterwards.
    """

    new_s: float | None
    first_s: float | None
    redone: int | None
    world: int
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.new_s is None:
            return "never came back"
        return f"new step after {self.new_s:.2f} s, {self.redone} steps redone, {self.world} ranks"


def summary(losses: Sequence[Lost]) -> dict[str, Any]:
    """Medians, all samples, and how many never came back."""
    back = [loss for loss in losses if loss.new_s is not None]
    medians = {
        name: statistics.median(getattr(loss, name) for loss in back)
        for name in ("new_s", "first_s", "redone")
        if back
    }
    return {
        "medians": medians,
        "never": len(losses) - len(back),
        "samples": [asdict(loss) for loss in losses],
    }


def print_table(document: Mapping[str, Any]) -> None:
    plan, contestants = document["plan"], document["contestants"]
    table = Table(
        title=f"SIGKILL of one agent and all below it; seconds, medians; {plan['mib']} MiB a rank, a durable checkpoint "
        f"every {plan['every']} steps of at least {plan['step_s']} s",
        caption="  ".join(f"{name} {value}" for name, value in document["machine"].items()),
    )
    table.add_column("", no_wrap=True)
    for title in (
        "nodes",
        "to the next new step",
        "of ours",
        "to the first step",
        "steps redone",
        "ranks",
        "samples",
    ):
        table.add_column(title, justify="right")
    table.add_column("never", justify="right")
    base = next((one["medians"]["new_s"] for one in contestants.values() if one["medians"]), None)
    for name, one in contestants.items():
        medians, never = one["medians"], one["never"]
        counts = [str(len(one["samples"])), str(never) if never else ""]
        style = "bold" if name.startswith("ckpt") else None
        if not medians:
            table.add_row(name, one["nodes"], "never", "-", "-", "-", "-", *counts, style=style)
            continue
        worlds = "/".join(
            sorted({str(loss["world"]) for loss in one["samples"] if loss["new_s"] is not None})
        )
        table.add_row(
            name,
            one["nodes"],
            f"{medians['new_s']:.2f}",
            f"{medians['new_s'] / base:.1f}x" if base else "-",
            f"{medians['first_s']:.2f}",
            f"{medians['redone']:.0f}",
            worlds,
            *counts,
            style=style,
        )
    Console(width=max(Console().width, WIDTH_MIN)).print(table)
