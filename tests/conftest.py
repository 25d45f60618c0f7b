"""What holds for all tests: no test touches the user's keepers, and most run without any.

Tests of one room run in place and make their snapshots durable themselves, as a process without keeper does: they look at
that process's own work. Those that show the whole (FULL) run as a user's program does.
No test depends on the signals that whoever started pytest ignored, and no property on how fast a busy machine is.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ckpt.ipc.cluster_spec import NODES_VARIABLE

ROOT = Path(__file__).parent
FULL = ("e2e", "examples", "docs", "keeper", "link", "elastic/supervised")

settings.register_profile("ckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckpt")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and every process of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What modules of tests hold stays to the end, and a look for garbage that goes through it takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module that knows the switch to long campaigns, SOAK, has one: ``-m soak`` picks these. ``slow.txt`` adds slow ones."""
    slow = frozenset((ROOT / "slow.txt").read_text().splitlines())
    for item in items:
        if getattr(item, "originalname", None) in slow:
            item.add_marker(pytest.mark.slow)
        if hasattr(getattr(item, "module", None), "SOAK"):
            item.add_marker(pytest.mark.soak)


@pytest.fixture(autouse=True)
def _keepers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.pop(NODES_VARIABLE, None)  # a launcher's, left behind by a test of launchers in this process
    patch = request.getfixturevalue("monkeypatch")
    patch.setenv("CKPT_RUNTIME_DIR", str(tmp_path_factory.getbasetemp() / "keepers"))
    folder = request.path.parent.relative_to(ROOT).as_posix()
    if not folder.startswith(FULL):
        patch.setenv("CKPT_KEEPER", "off")
        patch.setenv("CKPT_IN_PLACE", "1")
