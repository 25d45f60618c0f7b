"""Real servers for those tests that ask for them; modules whose names begin with ``chaos_`` lie beside their test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # for servers.*


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("servers.fixtures")
