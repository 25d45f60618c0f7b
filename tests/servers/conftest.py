"""Real S3 servers and a proxy that spoils requests, for the tests of themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for servers.*


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("servers.fixtures")
