"""The page about scale: its tables are what the programs print that it names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gather_sim
import pytest
import scale_model
import scale_sizes

ROOT = Path(__file__).parents[2]

PAGE = (ROOT / "docs" / "dev" / "design" / "019-scale.md").read_text()
SIMULATED = (64, 256)
"""Those that take no time."""


def printed(
    program: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    program.main()  # type: ignore[attr-defined]
    return capsys.readouterr().out.splitlines()


def test_table_of_the_model_is_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in printed(scale_model, monkeypatch, capsys):
        assert line.rstrip() in PAGE.splitlines()


def test_table_of_the_simulation_is_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(gather_sim, monkeypatch, capsys, "--nodes", *map(str, SIMULATED))
    assert len(lines) == 2 + 5 * len(SIMULATED)
    assert [line for line in lines if line not in PAGE.splitlines()] == []


@pytest.mark.slow
def test_sizes_that_the_model_takes_are_those_that_are_measured() -> None:
    sizes = {
        one.what: one.size_bytes
        for one in (*scale_sizes.constant(1), *scale_sizes.growing(1000, 1))
    }
    assert sizes["a node's record"] == scale_model.NODE_BYTES
    assert sizes["a receipt posted: said"] == scale_model.RECEIPT_BYTES
    for what, each, count in (
        ("epoch record: made", scale_model.PLACE_BYTES, 1000),
        ("manifest: made", scale_model.PART_REF_BYTES, 1000),
        ("sources, one word: said", scale_model.SOURCE_BYTES, 1000),
    ):
        assert sizes[what] == pytest.approx(each * count, rel=0.03), what
    costs = gather_sim.Costs()
    assert sizes["what a node holds: said"] == pytest.approx(
        costs.ask_bytes + 5 * costs.holding_bytes, rel=0.03
    )
    assert costs.source_bytes == scale_model.SOURCE_BYTES


def test_files_and_names_that_the_page_names_exist() -> None:
    names = re.findall(r"`((?:keeper|benchmarks|tests)/[\w/]+\.py)`", PAGE)
    assert names
    assert [
        name for name in names if not ((ROOT / name).exists() or (ROOT / "ckpt" / name).exists())
    ] == []
    code = "\n".join(path.read_text() for path in (ROOT / "ckpt").rglob("*.py"))
    for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PAGE):
        assert name in code, name
