"""Names are resolved beside the thread that asks, once, and again where that led nowhere."""

from __future__ import annotations

import socket
import threading

import pytest

from ckpt.cluster.mesh.addresses import NameResolver, SocketAddress, resolve_name

WAIT_S = 30.0
HERE = SocketAddress(socket.AF_INET, ("127.0.0.1", 7))


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("10.0.0.7:80", SocketAddress(socket.AF_INET, ("10.0.0.7", 80))),
        ("[fd00::7]:80", SocketAddress(socket.AF_INET6, ("fd00::7", 80))),
    ],
)
def test_addresses_are_known_at_once_and_nobody_is_asked(
    address: str, place: SocketAddress
) -> None:
    def never(host: str, port: int) -> SocketAddress:
        raise AssertionError(host)

    places = NameResolver(lambda: None, never)
    assert places.resolve(address) == place


def test_name_is_asked_for_once_beside_whoever_asks_and_kept_until_it_is_forgotten() -> None:
    calls: list[str] = []
    may_answer, found = threading.Event(), threading.Event()

    def ask(host: str, port: int) -> SocketAddress:
        calls.append(host)
        assert may_answer.wait(WAIT_S)
        return HERE

    places = NameResolver(found.set, ask)
    assert places.resolve("pod-0.train:7") is None
    assert places.resolve("pod-0.train:7") is None
    may_answer.set()
    assert found.wait(WAIT_S)
    assert places.resolve("pod-0.train:7") == HERE
    assert places.resolve("pod-0.train:7") == HERE
    assert calls == ["pod-0.train"]
    found.clear()
    places.forget("pod-0.train:7")
    assert places.resolve("pod-0.train:7") is None
    assert found.wait(WAIT_S)
    assert places.resolve("pod-0.train:7") == HERE
    assert calls == ["pod-0.train"] * 2


def test_name_that_nobody_knows_is_told_once_and_asked_for_again() -> None:
    found = threading.Event()
    fails = [socket.gaierror("nobody knows it"), UnicodeError("no name")]

    def ask(host: str, port: int) -> SocketAddress:
        if fails:
            raise fails.pop(0)
        return HERE

    places = NameResolver(found.set, ask)
    for error in (socket.gaierror, UnicodeError):
        assert places.resolve("pod-0:7") is None
        assert found.wait(WAIT_S)
        found.clear()
        with pytest.raises(error):
            places.resolve("pod-0:7")
    assert places.resolve("pod-0:7") is None
    assert found.wait(WAIT_S)
    assert places.resolve("pod-0:7") == HERE


def test_what_is_no_address_is_said_so() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        NameResolver(lambda: None).resolve("pod-0")


def test_names_are_looked_for_where_nodes_with_names_listen() -> None:
    assert resolve_name("localhost", 7) == SocketAddress(socket.AF_INET, ("127.0.0.1", 7))


def test_only_what_is_wanted_is_remembered_and_asked_before_anybody_calls() -> None:
    calls: list[str] = []
    found = threading.Event()

    def ask(host: str, port: int) -> SocketAddress:
        calls.append(host)
        return HERE

    places = NameResolver(found.set, ask)
    places.keep_only({"pod-0:7", "10.0.0.7:7", "nowhere"})
    assert found.wait(WAIT_S)
    assert places.resolve("pod-0:7") == HERE
    places.keep_only({"pod-1:7"})
    found.clear()
    assert places.resolve("pod-0:7") is None
    assert found.wait(WAIT_S)
    assert sorted(calls) == ["pod-0", "pod-0", "pod-1"]
