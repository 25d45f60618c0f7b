"""When nodes may speak in the clear, what their certificates must be, and lines over TLS."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.mesh_nodes import Node, acquaint
from kit.servers.certificates import Authority, Files

from ckpt.cluster.mesh.connections import TlsStream
from ckpt.cluster.mesh.messages import MeshPost
from ckpt.cluster.tls import (
    TlsContexts,
    check_network,
    check_tls,
    job_tls,
    peer_endpoint,
    serving_endpoint,
)
from ckpt.errors import CkptError, StoreDeniedError, UsageError
from ckpt.ipc.cluster_spec import NodesSpec

HERE = "127.0.0.1"
AWAY = "10.1.2.3"


def spec(files: Files | None = None, **more: object) -> NodesSpec:
    known = {
        "where": "/f",
        "job": "j",
        "nodes_min": 1,
        "nodes_max": 2,
        **(files.spec() if files else {}),
    }
    return NodesSpec(**{**known, **more})  # type: ignore[arg-type]


def tls(files: Files) -> TlsContexts:
    found = job_tls(spec(files))
    assert found is not None
    return found


# ---- what is said before anything starts


def test_beyond_loopback_it_is_tls_or_a_word(authority: Authority) -> None:
    check_network(spec(), HERE)
    check_network(spec(), "localhost")
    check_network(spec(plaintext=True), AWAY)
    check_network(spec(authority.sign("away", AWAY)), AWAY)
    with pytest.raises(UsageError, match="--plaintext") as error:
        check_network(spec(), AWAY)
    assert "read the weights" in str(error.value) and AWAY in str(error.value)
    with pytest.raises(UsageError, match="not loopback"):
        serving_endpoint(spec(), AWAY)


def test_both_or_some_of_it_is_refused(authority: Authority) -> None:
    files = authority.sign("one")
    with pytest.raises(UsageError, match="exclude each other"):
        check_tls(spec(files, plaintext=True), HERE)
    for left_out in ("tls_cert", "tls_key", "tls_ca"):
        with pytest.raises(UsageError, match="three files"):
            job_tls(spec(files, **{left_out: ""}))
    assert job_tls(spec()) is None
    assert check_tls(spec(), AWAY) is None


def test_good_certificate_says_until_when(authority: Authority) -> None:
    ends_s = check_tls(spec(authority.sign("valid", AWAY, HERE)), AWAY)
    assert ends_s is not None
    assert 86_400 < ends_s - time.time() <= 2 * 86_400


def test_wildcard_names_the_hosts_one_step_below_it(authority: Authority) -> None:
    files = spec(authority.sign("wildcard", "*.train.ckpt.svc"))
    for host in ("train-0.train.ckpt.svc", "train-node-0-12.train.ckpt.svc"):
        assert check_tls(files, host) is not None
    for host in (
        "train-0.other.ckpt.svc",
        "a.train-0.train.ckpt.svc",
        "train.ckpt.svc",
        "train-0",
        AWAY,
    ):
        with pytest.raises(UsageError, match="would refuse") as error:
            check_tls(files, host)
        assert host in str(error.value)


def test_whoever_lends_shows_it_and_whoever_reads_checks_the_host(authority: Authority) -> None:
    files = spec(authority.sign("lender", AWAY))
    assert serving_endpoint(files, AWAY).tls is not None
    reached = peer_endpoint(files, f"{AWAY}:7")
    assert reached.tls is not None and reached.tls.check_hostname
    assert peer_endpoint(spec(), f"{HERE}:7").tls is None


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_ca"])
def test_file_that_is_missing_is_named(authority: Authority, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="can't be read") as error:
        job_tls(spec(authority.sign("whole"), **{name: str(tmp_path / "nowhere")}))
    assert str(tmp_path / "nowhere") in str(error.value)
    assert {"tls_cert": "certificate", "tls_key": "key", "tls_ca": "CA"}[name] in str(error.value)


def test_key_of_another_certificate_or_with_a_password_is_refused(authority: Authority) -> None:
    one, other = authority.sign("first"), authority.sign("second")
    with pytest.raises(UsageError, match="the key belongs to the certificate"):
        job_tls(spec(one, tls_key=str(other.key)))
    with pytest.raises(UsageError, match="encrypted"):
        job_tls(spec(authority.encrypt(one, "secret")))


def test_certificate_that_others_would_refuse_is_refused_here(
    authority: Authority, stranger: Authority
) -> None:
    files = authority.sign("here")
    for wrong, word in (
        (spec(files, host=AWAY), "not valid for '10.1.2.3'"),
        (spec(files, tls_ca=str(stranger.file)), "local issuer"),
        (spec(authority.sign("server-only", usage="serverAuth")), "purpose"),
        (spec(authority.sign("client-only", usage="clientAuth")), "purpose"),
    ):
        with pytest.raises(UsageError, match="would refuse") as error:
            check_tls(wrong, wrong.host or HERE)
        assert word in str(error.value)


# ---- lines


@pytest.mark.slow
def test_lines_over_tls_carry_words_of_any_length(
    node: Callable[..., Node], authority: Authority
) -> None:
    nodes = [node(name, tls=tls(authority.sign(f"line-{name}"))) for name in ("a", "b", "c")]
    acquaint(*nodes)
    large = MeshPost(room="1", key="large", value=bytes(range(256)) * 40_000)
    words = [large, *(MeshPost(room="1", key=str(n), value=bytes(n)) for n in range(100)), large]
    for word in words:
        assert nodes[2].lines.send("a", word)
        assert nodes[0].lines.send("b", word)
    nodes[0].wait(lambda: len(nodes[0].words) == len(words), "all words")
    nodes[1].wait(lambda: len(nodes[1].words) == len(words), "all words")
    assert nodes[0].words == [("c", word) for word in words]
    assert nodes[1].words == [("a", word) for word in words]
    assert [one.events for one in nodes] == [[], [], []]


@pytest.mark.parametrize(
    ("who", "dials"),
    [
        ("of another CA", True),
        ("of another CA", False),
        ("without any", True),
        ("without any", False),
        ("that names another host", False),  # nobody looks where a call comes from
    ],
)
def test_node_with_a_certificate_like_that_never_comes_up(
    node: Callable[..., Node], authority: Authority, stranger: Authority, who: str, dials: bool
) -> None:
    """Also where it knows the secret. ``dials``: it calls, or is called."""
    bad = {
        "of another CA": lambda: tls(stranger.sign(f"bad-{dials}")),
        "that names another host": lambda: tls(authority.sign(f"misnamed-{dials}", "127.9.9.9")),
        "without any": lambda: None,
    }[who]()
    names = ("b", "a") if dials else ("a", "b")  # the smaller name dials
    good = node(names[0], tls=tls(authority.sign(f"good-{dials}-{len(who)}")))
    other = node(names[1], tls=bad)
    addresses = {good.name: good.address, other.name: other.address}
    good.lines.set_targets(addresses)
    other.lines.set_targets(addresses)
    if bad is None:
        who_tells = good if dials else other  # whoever was called
        who_tells.wait(lambda: who_tells.events, "the alarm")
    else:
        good.wait(lambda: good.events, "the alarm")
        other.wait(lambda: other.events, "the alarm at the other end")
    told = [*good.events, *other.events]
    assert {event.kind for event in told} == {"line-refused"}
    assert all("TLS" in event.text and event.alarm for event in told)
    assert good.ups == other.ups == []


# ---- without sockets


def ends(authority: Authority, name: str) -> tuple[TlsStream, TlsStream]:
    one = tls(authority.sign(name))
    return TlsStream(one, server_hostname=HERE), TlsStream(one, server_hostname=None)


def carry(source: TlsStream, target: TlsStream, said: bytes, piece: int) -> bytes:
    """What arrives of ``said``, and of what the source owes by now, in pieces."""
    data = source.data_to_send(said)
    return b"".join(target.receive_data(data[at : at + piece]) for at in range(0, len(data), piece))


@pytest.mark.slow
@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_bytes_come_in_order_however_they_are_cut(authority: Authority, piece: int) -> None:
    dialler, listener = ends(authority, f"cut-{piece}")
    text = bytes(range(256)) * 300
    got, back = bytearray(), bytearray()
    got += carry(dialler, listener, text[:5], piece)  # said before the handshake is over
    for _ in range(4):
        back += carry(listener, dialler, text[:9], piece)
        got += carry(dialler, listener, text[5:], piece)
    assert got == text[:5] + text[5:] * 4
    assert back == text[:9] * 4


@pytest.fixture(scope="module")
def one(authority: Authority) -> TlsContexts:
    return tls(authority.sign("noise"))


@pytest.mark.slow
@settings(max_examples=200)
@given(pieces=st.lists(st.binary(max_size=300), min_size=1, max_size=6), flip=st.integers(0, 4000))
def test_noise_raises_only_our_errors(one: TlsContexts, pieces: list[bytes], flip: int) -> None:
    for sheath in (TlsStream(one, server_hostname=None), TlsStream(one, server_hostname=HERE)):
        try:
            for piece in pieces:
                assert sheath.receive_data(piece) == b""
            sheath.data_to_send(b"said")
        except CkptError as error:
            assert isinstance(error, StoreDeniedError)
    dialler, listener = TlsStream(one, server_hostname=HERE), TlsStream(one, server_hostname=None)
    try:
        for turn in range(3):
            data = bytearray(dialler.data_to_send(b""))
            if data and turn == flip % 3:
                data[flip % len(data)] ^= 1
            assert listener.receive_data(bytes(data)) == b""
            dialler.receive_data(listener.data_to_send(b""))
    except CkptError as error:
        assert isinstance(error, StoreDeniedError)
