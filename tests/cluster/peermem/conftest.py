"""Servers on loopback that end with their test, and certificates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.peers.certificates import Certificates, make_certificates
from kit.peers.servers import PeerServers


@pytest.fixture
def world() -> Iterator[PeerServers]:
    """Makes servers and stores, and ends them. No server may have told of a defect."""
    made = PeerServers()
    yield made
    made.close()
    assert made.told == []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A CA, a node's certificate that it signed, and another CA's."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))
