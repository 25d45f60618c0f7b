"""A peer's memory keeps the contract of every store; in the clear, with the slower MAC, and over
TLS."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.peers.certificates import Certificates
from kit.peers.servers import PeerServers

from ckpt.backends.base import Backend
from ckpt.backends.replicated.buffers import borrower_of
from ckpt.cluster.peermem import body_mac
from ckpt.cluster.peermem import client as connection
from ckpt.cluster.peermem.store import PeerClientLimits
from ckpt.cluster.tls import client_context, server_context
from ckpt.testing.contract import BackendContract, Opener


class TestPeer(BackendContract):
    @pytest.fixture(autouse=True)
    def _world(self, world: PeerServers) -> None:
        self.world = world

    def opener(self, folder: Path) -> Opener:
        server = self.world.serve()
        return lambda: self.world.store(server)


class TestPeerInParallel(TestPeer):
    """Every read of more than a few bytes goes in several streams."""

    def opener(self, folder: Path) -> Opener:
        server = self.world.serve()
        return lambda: self.world.store(server, limits=PeerClientLimits(stream_bytes_min=100))


class TestPeerWithoutCryptography(TestPeer):
    @pytest.fixture(autouse=True)
    def _hmac_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "known_macs", lambda: (body_mac.HMAC,))


class TestPeerOverTls(TestPeer):
    @pytest.fixture(autouse=True)
    def _certificates(self, certificates: Certificates) -> None:
        self.certificates = certificates

    def opener(self, folder: Path) -> Opener:
        one, two = self.certificates.one, self.certificates.two
        server = self.world.serve(
            tls=server_context(certificate=one.certificate, key=one.key, ca=one.ca)
        )
        tls = client_context(certificate=two.certificate, key=two.key, ca=two.ca)
        return lambda: self.world.store(server, tls=tls)


def test_it_is_a_backend_that_can_be_lent_memory(world: PeerServers) -> None:
    store = world.store(world.serve())
    typed: Backend = store
    assert borrower_of(typed) is store
    assert typed.url.startswith("peer://127.0.0.1:")
