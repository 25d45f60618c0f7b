"""What a watch makes of the words of a stream. Streams themselves are tested against real etcd."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import pytest
from etcd3 import etcdrpc

from ckpt.errors import UnavailableError
from ckpt.keyspace.address import EtcdOptions
from ckpt.keyspace.base import Keys
from ckpt.keyspace.etcd import BEHIND_MAX, EtcdClient, EtcdWatch


class NoCalls(EtcdClient):
    """Nobody to listen to."""

    def client(self, number: int) -> object:  # type: ignore[override]
        raise UnavailableError("nobody")


@pytest.fixture
def watch() -> Iterator[EtcdWatch]:
    """Of all after revision 100."""
    made = EtcdWatch(
        NoCalls(EtcdOptions(endpoints=("h:1",))), "/ckpt/j/", (Keys("a"),), after=100, beat_s=1.0
    )
    yield made
    made.close()


def said(revision: int, *events: int, **more: object) -> etcdrpc.WatchResponse:
    response = etcdrpc.WatchResponse(header=etcdrpc.ResponseHeader(revision=revision), **more)
    for changed in events:
        response.events.add().kv.mod_revision = changed
    return response


def test_an_event_wakes_who_looked_before_it_and_nobody_else(watch: EtcdWatch) -> None:
    assert watch.heard(said(105, 103, 104))
    assert watch.wait(103, timeout_s=0)
    assert not watch.wait(104, timeout_s=0)
    assert watch.first == 105


def test_who_looked_before_the_watch_began_is_told_to_look(watch: EtcdWatch) -> None:
    assert watch.wait(99, timeout_s=0)
    assert not watch.wait(100, timeout_s=0)


def test_progress_wakes_nobody(watch: EtcdWatch) -> None:
    assert watch.heard(said(500))
    assert not watch.wait(100, timeout_s=0)
    assert watch.first == 101


def test_forgotten_changes_wake_all_and_the_watch_begins_behind_them(watch: EtcdWatch) -> None:
    assert not watch.heard(said(500, compact_revision=400, canceled=True))
    assert watch.wait(100, timeout_s=0)
    assert watch.first == 401


def test_a_member_that_lags_is_waited_for_and_a_new_cluster_is_noticed(watch: EtcdWatch) -> None:
    for _ in range(BEHIND_MAX - 1):
        assert watch.heard(said(90))
    assert watch.heard(said(101, 101))
    for _ in range(BEHIND_MAX - 1):
        assert watch.heard(said(7))
    assert not watch.heard(said(7))
    assert watch.first == 8
    assert watch.wait(6, timeout_s=0)
    assert not watch.wait(7, timeout_s=0)


def test_a_cancelled_watch_begins_anew(watch: EtcdWatch) -> None:
    assert not watch.heard(said(101, canceled=True))
    assert not watch.wait(100, timeout_s=0)


class Streams:
    """In the place of etcd's watches: streams that live, say nothing, and note what they are
    asked."""

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._ended = threading.Event()

    def Watch(self, requests: Iterator[etcdrpc.WatchRequest], **_: object) -> Streams:  # noqa: N802  grpc's name
        OPENED.append(self._channel)
        threading.Thread(target=lambda: list(requests), daemon=True).start()
        return self

    def __iter__(self) -> Iterator[etcdrpc.WatchResponse]:
        while not self._ended.wait(0.01):
            yield said(101)  # it lives, and nothing changes
        raise grpc.RpcError

    def cancel(self) -> None:
        self._ended.set()


OPENED: list[str] = []


class TwoEndpoints(EtcdClient):
    """Clients that are only told apart."""

    def client(self, number: int) -> object:  # type: ignore[override]
        return SimpleNamespace(channel=f"endpoint {number}", call_credentials=None, metadata=None)


@pytest.mark.slow
def test_watch_follows_where_calls_go_though_its_stream_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(etcdrpc, "WatchStub", Streams)
    OPENED.clear()
    calls = TwoEndpoints(EtcdOptions(endpoints=("h:1", "h:2")))
    made = EtcdWatch(calls, "/ckpt/j/", (Keys("a"),), after=100, beat_s=1.0)
    try:
        assert not made.wait(100, timeout_s=1.0)
        assert OPENED == ["endpoint 0"]
        calls.failed(0)  # a call was refused there: that member is cut off from the others
        for _ in range(500):
            if len(OPENED) > 1:
                break
            made.wait(100, timeout_s=0.02)
        assert OPENED == ["endpoint 0", "endpoint 1"]
    finally:
        made.close()
