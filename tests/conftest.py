"""What holds for all tests: no test touches the user's keepers, and most run without any.

Tests of one room run in place and make their snapshots durable themselves, as a process without
keeper does: they look at that process's own work. Those that show the whole (FULL) run as a user's
program does. No test depends on the signals that whoever started pytest ignored, and no property on
how fast a busy machine is.
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
FULL = (
    "scenarios/nodes",
    "scenarios/one_node",
    "examples",
    "docs",
    "keeper",
    "ipc",
    "elastic/supervised",
)

WHOLE = ("scenarios", "elastic", "examples", "integrations", "docs", "keeper")
"""Folders whose slow tests start whole programs: half a minute each, most of it spent waiting."""

SLOW_IN_CONTRACT = frozenset(
    {
        "test_create_only_has_one_winner_among_threads",
        "test_large_object_of_odd_buffers_is_whole",
        "test_list_is_in_code_point_order_from_prefix_and_after",
        "test_list_of_many_objects_is_complete",
        "test_object_deleted_during_list_does_not_break_it",
        "test_odd_keys_are_kept_as_they_are",
        "test_reader_never_sees_half_an_object",
        "test_store_serves_many_threads_at_once",
    }
)

settings.register_profile("ckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckpt")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and every process of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What modules of tests hold stays to the end, and a look for garbage that goes through it
    takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Servers and keyspaces that any test may ask for; each starts when the first test does."""
    for plugin in ("kit.servers.fixtures", "kit.membership.fixtures"):
        config.pluginmanager.import_plugin(plugin)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A module that knows the switch to long campaigns, SOAK, has one: ``-m soak`` picks these.

    Slow tests of the contract are marked here, since the kit that users get knows no such mark.

    Several processes begin with the files that take longest, so that none of them works alone at
    the end."""
    for item in items:
        if getattr(item, "originalname", None) in SLOW_IN_CONTRACT:
            item.add_marker(pytest.mark.slow)
        if hasattr(getattr(item, "module", None), "SOAK"):
            item.add_marker(pytest.mark.soak)
    if hasattr(config, "workerinput"):
        first = {item.path for item in items if _starts_programs(item)}
        items.sort(key=lambda item: item.path not in first)


def _starts_programs(item: pytest.Item) -> bool:
    folder = item.path.relative_to(ROOT).parts[0]
    return folder in WHOLE and item.get_closest_marker("slow") is not None


@pytest.fixture(autouse=True)
def _keepers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.pop(
        NODES_VARIABLE, None
    )  # a launcher's, left behind by a test of launchers in this process
    patch = request.getfixturevalue("monkeypatch")
    patch.setenv("CKPT_RUNTIME_DIR", str(tmp_path_factory.getbasetemp() / "keepers"))
    patch.setenv("CKPT_STATE_DIR", str(tmp_path_factory.getbasetemp() / "state"))
    folder = request.path.parent.relative_to(ROOT).as_posix()
    if not folder.startswith(FULL):
        patch.setenv("CKPT_KEEPER", "off")
        patch.setenv("CKPT_IN_PLACE", "1")
