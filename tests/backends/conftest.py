"""Real S3 servers and a proxy that spoils requests, for the tests of stores behind URLs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for servers.*
sys.path.insert(0, str(Path(__file__).parent))  # for s3_clients


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("servers.fixtures")


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest) -> str:
    """Each client library in turn."""
    return str(request.param)
