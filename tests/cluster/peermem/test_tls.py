"""Over TLS both sides show a certificate of the job's own CA, or nothing is said."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import pytest
from kit.peers.certificates import Certificates, Files
from kit.peers.servers import WAIT_S, PeerServers, read, until

from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.store import PeerClientLimits
from ckpt.cluster.tls import check_handshake, client_context, server_context
from ckpt.errors import StoreDeniedError, UnavailableError, UsageError


def serving(files: Files) -> ssl.SSLContext:
    return server_context(certificate=files.certificate, key=files.key, ca=files.ca)


def asking(files: Files, *, ca: Path | None = None) -> ssl.SSLContext:
    return client_context(certificate=files.certificate, key=files.key, ca=ca or files.ca)


def test_bytes_go_both_ways(world: PeerServers, certificates: Certificates) -> None:
    server = world.serve(tls=serving(certificates.one))
    store = world.store(server, tls=asking(certificates.two))
    body = bytes(range(256)) * 20_000
    store.put("a", [body[:5], body[5:1000], body[1000:]])
    assert read(store, "a") == body
    assert store.url.startswith("peers://")


def test_a_rehearsal_says_what_others_would_find(certificates: Certificates) -> None:
    good, away = certificates.one, certificates.misnamed
    assert (
        time.time() < check_handshake(serving(good), asking(good), "127.0.0.1") < time.time() + 7200
    )
    for files, host, word in (
        (certificates.expired, "127.0.0.1", "expired"),
        (away, "127.0.0.1", "not valid for '127.0.0.1'"),
        (good, "other.example", "not valid for 'other.example'"),
        (good, "", "empty"),
    ):
        with pytest.raises(UsageError, match="would refuse") as error:
            check_handshake(serving(files), asking(files), host)
        assert word in str(error.value)
    with pytest.raises(UsageError, match="self-signed"):
        check_handshake(serving(certificates.stranger), asking(certificates.two), "127.0.0.1")


@pytest.mark.parametrize(
    "who",
    [
        "server of another CA",
        "server for another host",
        "client of another CA",
        "client trusts another CA",
    ],
)
def test_another_certificate_is_refused(
    world: PeerServers, certificates: Certificates, who: str
) -> None:
    ours = certificates
    server_files = {
        "server of another CA": ours.stranger,
        "server for another host": ours.misnamed,
    }.get(who, ours.one)
    server = world.serve(tls=serving(server_files))
    client = ours.stranger if who == "client of another CA" else ours.two
    store = world.store(
        server,
        tls=asking(
            client, ca=ours.stranger.ca if who == "client trusts another CA" else ours.one.ca
        ),
    )
    for _ in range(2):
        with pytest.raises(StoreDeniedError):
            store.put("a", [b"x"])
    assert server.memory.stat("a") is None
    good = world.store(world.serve(tls=serving(ours.one)), tls=asking(ours.two))
    good.put("a", [b"x"])


@pytest.mark.slow
def test_clear_text_and_tls_do_not_meet(world: PeerServers, certificates: Certificates) -> None:
    clear, covered = world.serve(), world.serve(tls=serving(certificates.one))
    with pytest.raises((StoreDeniedError, UnavailableError)):
        world.store(
            clear,
            tls=asking(certificates.two),
            limits=PeerClientLimits(connect_s=0.5, crowded_s=0.5),
        ).stat("a")
    with pytest.raises((StoreDeniedError, UnavailableError)):
        world.store(
            covered, limits=PeerClientLimits(timeouts=PeerTimeouts(grace_s=0.5), crowded_s=0.5)
        ).stat("a")
    until(lambda: clear.stats().connections == covered.stats().connections == 0)


def test_a_client_without_a_certificate_is_refused(
    world: PeerServers, certificates: Certificates
) -> None:
    server = world.serve(tls=serving(certificates.one))
    context = ssl.create_default_context(cafile=str(certificates.one.ca))
    with pytest.raises(StoreDeniedError):
        world.store(server, tls=context).stat("a")
    until(lambda: server.stats().refused.get("tls"))
    assert server.stats().served == {}


def test_stop_ends_a_handshake_that_never_comes(
    world: PeerServers, certificates: Certificates
) -> None:
    server = world.serve(tls=serving(certificates.one))
    with socket.create_connection(server.address, WAIT_S) as sock:
        until(lambda: server.stats().connections)
        server.stop()
        assert server.stats().connections == 0
        sock.settimeout(WAIT_S)
        assert sock.recv(1) == b""


def test_stop_ends_a_connection_at_whatever_moment_of_its_first(
    world: PeerServers, certificates: Certificates
) -> None:
    for turn in range(40):
        server = world.serve(tls=serving(certificates.one))
        with socket.create_connection(server.address, WAIT_S):
            if turn % 2:
                until(lambda server=server: server.stats().connections)
            server.stop()
            assert server.stats().connections == 0


def test_files_that_are_no_certificates_are_said(
    certificates: Certificates, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    one, two = certificates.one, certificates.two
    for certificate, key, ca in (
        (one.certificate, two.key, one.ca),
        (empty, one.key, one.ca),
        (one.certificate, one.key, empty),
        (tmp_path / "none", one.key, one.ca),
    ):
        with pytest.raises(UsageError, match="TLS files"):
            server_context(certificate=certificate, key=key, ca=ca)
