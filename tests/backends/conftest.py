"""Real S3 servers and a proxy that spoils requests, for the tests of stores behind URLs."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest) -> str:
    """Each client library in turn."""
    return str(request.param)
