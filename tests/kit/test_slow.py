"""The list of slow tests names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_slow_test_is_still_there_and_named_once() -> None:
    names = [line for line in (TESTS / "slow.txt").read_text().splitlines() if not line.startswith("#")]
    assert names == sorted(set(names))
    sources = [*TESTS.rglob("*.py"), *(TESTS.parent / "ckpt" / "testing").rglob("*.py")]
    defined = {name for path in sources for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert set(names) <= defined, set(names) - defined
