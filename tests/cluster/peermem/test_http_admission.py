"""Who is let in: nothing that isn't wholly genuine, new, of this start and of no older epoch
changes anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit.peers.raw import RawPeer, Said
from kit.peers.servers import OTHER_SECRET, SECRET, PeerServers, until

from ckpt.cluster.peermem.auth import mac
from ckpt.cluster.peermem.http import DeltaBase, PeerRequest, authorize, encode_ranges, with_mac
from ckpt.cluster.peermem.server import PeerServer

OLD_BOOT = "00" * 16
BODY = b"the body of an object"
CHANGED = encode_ranges([(1, 2)]) + b"ne"


def state(server: PeerServer) -> tuple[object, ...]:
    """All that a request could change."""
    vault = server.memory
    bodies = []
    for one in vault.list():
        with vault.reading(one.key) as held:
            bodies.append((one, bytes(held.view), held.version))
    stats = vault.stats()
    return server.epoch, bodies, stats.total_bytes - stats.spare_bytes


def prepared(world: PeerServers) -> PeerServer:
    server = world.serve(epoch=1)
    for key in ("a", "b/c"):
        with server.memory.incoming(key, 3) as incoming:
            incoming.view[:] = b"old"
            incoming.publish()
    return server


def refused(server: PeerServer, kind: str) -> int:
    return server.stats().refused.get(kind, 0)


REQUESTS: dict[str, Callable[[RawPeer], PeerRequest]] = {
    "put": lambda peer: peer.request(verb="PUT", key="a", body_bytes=len(BODY)),
    "create": lambda peer: peer.request(
        verb="PUT", key="new", body_bytes=len(BODY), create_only=True
    ),
    "announced": lambda peer: peer.request(verb="PUT", key="a", body_bytes=len(BODY), waits=True),
    "changed": lambda peer: peer.request(
        verb="PUT",
        key="a",
        body_bytes=len(CHANGED),
        base=DeltaBase(key="b/c", version=2, size_bytes=3, ranges=1),
    ),
    "delete": lambda peer: peer.request(verb="DELETE", key="a"),
    "get": lambda peer: peer.request(verb="GET", key="a", span=(0, 3)),
    "stat": lambda peer: peer.request(verb="HEAD", key="a"),
    "list": lambda peer: peer.request(verb="LIST", key="b", after="a"),
}


def whole(peer: RawPeer, request: PeerRequest) -> bytes:
    """A request as it would be served."""
    if request.body_bytes is not None and not request.waits:
        return peer.put_bytes(request, BODY if request.base is None else CHANGED)
    return peer.sign(request.encode("test"))


FIELDS = {
    "method": (b"PUT /", b"GET /"),
    "other method": (b"DELETE /", b"HEAD /"),
    "path": (b"/o/a ", b"/o/b "),
    "query": (b"after=a", b"after=b"),
    "prefix": (b"prefix=b", b"prefix="),
    "host": (b"host: test", b"host: tesu"),
    "epoch": (b"ckpt-epoch: 1", b"ckpt-epoch: 2"),
    "boot": (b"ckpt-boot: ", b"ckpt-boot: f"),
    "counter": (b"ckpt-counter: 1", b"ckpt-counter: 2"),
    "length": (b"content-length: 37", b"content-length: 36"),
    "range": (b"bytes=0-2", b"bytes=0-1"),
    "base": (b"/o/b/c", b"/o/a"),
    "base version": (b"base-version: 2", b"base-version: 1"),
    "object length": (b"ckpt-size: 3", b"ckpt-size: 2"),
    "ranges": (b"ckpt-ranges: 1", b"ckpt-ranges: 0"),
    "condition": (b"if-none-match: *\r\n", b""),
    "expectation": (b"expect: 100-continue\r\n", b""),
    "a field more": (b"host: test\r\n", b"host: test\r\nx: y\r\n"),
    "version": (b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changed_alone_is_refused_and_changes_nothing(
    world: PeerServers, field: str
) -> None:
    server = prepared(world)
    before, tried = state(server), 0
    old, new = FIELDS[field]
    for make in REQUESTS.values():
        with RawPeer(server) as peer:
            raw = whole(peer, make(peer))
            spoiled = raw.replace(old, new, 1)
            if field == "boot":
                spoiled = raw.replace(
                    f"ckpt-boot: {peer.boot}".encode(), f"ckpt-boot: {OLD_BOOT}".encode(), 1
                )
            if spoiled == raw:
                continue
            tried += 1
            said = peer.ask(spoiled)
            assert said == Said(401, False, None)
            assert peer.hear() is None, "such a connection is ended"
        assert refused(server, "mac") == tried
        assert state(server) == before
    assert tried


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delete", "get"])
def test_a_bit_of_a_head_changed_anywhere_is_refused(world: PeerServers, name: str) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server) as peer:
        length = len(whole(peer, REQUESTS[name](peer)))
    for at in range(length - 4):  # without its end it is no head yet
        with RawPeer(server) as peer:
            raw = bytearray(whole(peer, REQUESTS[name](peer)))
            raw[at] ^= 1 << at % 8
            said = peer.ask(bytes(raw))
            assert said == Said(401, False, None)
    assert refused(server, "mac") == length - 4
    assert state(server) == before


@pytest.mark.parametrize("at", [0, len(BODY) // 2, len(BODY) - 1, len(BODY), len(BODY) + 15])
@pytest.mark.parametrize("name", ["put", "create", "announced"])
def test_a_body_or_tag_changed_is_refused_and_stores_nothing(
    world: PeerServers, name: str, at: int
) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server) as peer:
        raw = bytearray(peer.put_bytes(REQUESTS[name](peer), BODY))
        raw[len(raw) - len(BODY) - 16 + at] ^= 0x20
        peer.send(bytes(raw))
        if name == "announced":
            assert peer.channel.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        said = peer.hear()
        assert said is not None
        assert (said.status, said.proven) == (401, True)
        assert peer.hear() is None
    assert refused(server, "body") == 1
    assert state(server) == before


def test_other_keys_are_refused(world: PeerServers) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server) as other, RawPeer(server) as again:
        assert other.keys is not None
        for key in (other.keys.request_head, other.keys.answer_head, bytes(32)):
            with RawPeer(server) as peer:
                head = peer.request(verb="DELETE", key="a").encode("test")
                assert peer.ask(with_mac(head, mac(key, head))) == Said(401, False, None)
        with RawPeer(server) as peer:
            head = peer.request(verb="DELETE", key="a").encode("test")
            assert peer.keys is not None
            assert peer.ask(with_mac(head, mac(peer.keys.answer_head, head))) == Said(
                401, False, None
            )
        assert again.ask(again.sign(again.request(key="a").encode("test"))) is not None
    assert state(server) == before


def test_nothing_is_served_before_the_hello_and_to_another_secret(world: PeerServers) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server) as known, RawPeer(server, meet=False) as peer:
        peer.keys, peer.mac_name = known.keys, known.mac_name
        assert peer.ask(whole(peer, REQUESTS["delete"](peer))) == Said(401, False, None)
    with RawPeer(server, meet=False, secret=OTHER_SECRET) as peer:
        head = b"GET /hello HTTP/1.1\r\nhost: h\r\n"
        assert peer.ask(with_mac(head, OTHER_SECRET.hello_mac(head))) == Said(401, False, None)
    with RawPeer(server, meet=False) as peer:
        head = b"GET /hello HTTP/1.1\r\nhost: h\r\nckpt-protocol: 2\r\n"
        assert peer.ask(with_mac(head, SECRET.hello_mac(head))) == Said(400, False, None)
    assert state(server) == before
    assert (refused(server, "mac"), refused(server, "malformed")) == (2, 1)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_is_played_again_is_refused(world: PeerServers, name: str) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = whole(peer, REQUESTS[name](peer))
        peer.send(raw)
        if name == "announced":
            assert peer.channel.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw += peer.put_bytes(
                PeerRequest(
                    verb="PUT",
                    key="a",
                    boot=peer.boot,
                    epoch=1,
                    counter=1,
                    body_bytes=len(BODY),
                    waits=True,
                ),
                BODY,
            )[len(raw) :]
            peer.send(raw[-len(BODY) - 16 :])
        first = peer.hear()
        assert first is not None
        assert first.answer is not None
        assert first.status < 300
        if first.answer.body_bytes:
            peer.body(first.answer)
        before = state(server)
        again = peer.ask(raw)
        assert again is not None
        assert (again.status, again.proven) == (401, True)
        assert again.answer is not None
        assert "used before" in again.answer.why
        assert refused(server, "replay") == 1
        assert state(server) == before
    with RawPeer(server) as elsewhere:
        assert elsewhere.ask(raw) == Said(401, False, None)
    assert state(server) == before


def test_a_hello_that_is_played_again_opens_nothing(world: PeerServers) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server, meet=False) as peer:
        hello = peer.meet()
        request = whole(peer, REQUESTS["put"](peer))
    with RawPeer(server, meet=False) as thief:
        thief.keys = peer.keys
        thief.send(hello)
        assert thief.channel.read_head() is not None
        assert thief.ask(request) == Said(401, False, None)
    assert state(server) == before


def test_numbers_may_leave_gaps_and_never_go_back(world: PeerServers) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        for counter, wanted in ((5, 200), (6, 200), (100, 200), (100, 401)):
            said = peer.ask(peer.sign(peer.request(key="a", counter=counter).encode("t")))
            assert said is not None
            assert said.status == wanted
    with RawPeer(server) as peer:
        said = peer.ask(peer.sign(peer.request(key="a", counter=0).encode("t")))
        assert said is not None
        assert said.status == 401


@pytest.mark.parametrize("name", REQUESTS)
def test_an_older_epoch_is_told_the_newer_one_and_changes_nothing(
    world: PeerServers, name: str
) -> None:
    server = prepared(world)
    server.see_epoch(7)
    before = state(server)
    with RawPeer(server) as peer:
        said = peer.ask(whole(peer, REQUESTS[name](peer)))
        assert said is not None
        assert said.answer is not None
        assert (said.status, said.answer.epoch) == (409, 7)
        assert refused(server, "epoch") == 1
        assert state(server) == before
        said = peer.ask(peer.sign(peer.request(key="a", epoch=7).encode("t")))
        assert said is not None
        assert said.status == 200, "a refused epoch does not spoil the connection"


def test_a_newer_epoch_is_learned_from_any_genuine_request_and_from_no_other(
    world: PeerServers,
) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = peer.sign(peer.request(key="a", epoch=9).encode("t"))
        peer.ask(raw.replace(b"epoch: 9", b"epoch: 8"))
    assert server.epoch == 1
    with RawPeer(server) as peer:
        said = peer.ask(peer.sign(peer.request(key="none", epoch=9).encode("t")))
        assert said is not None
        assert said.status == 404
    assert server.epoch == 9


def test_an_epoch_that_opens_while_a_body_comes_fences_the_put(world: PeerServers) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server) as peer:
        raw = peer.put_bytes(REQUESTS["put"](peer), BODY)
        peer.send(raw[:-5])
        until(lambda: server.memory.stats().incoming_bytes)
        server.see_epoch(2)
        said = peer.ask(raw[-5:])
        assert said is not None
        assert said.status == 409
    assert state(server) == (2, *before[1:])


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_for_an_earlier_start_is_told_the_new_one(world: PeerServers, name: str) -> None:
    server = prepared(world)
    before = state(server)
    with RawPeer(server) as peer:
        right, peer.boot = peer.boot, OLD_BOOT
        said = peer.ask(whole(peer, REQUESTS[name](peer)))
        assert said is not None
        assert said.answer is not None
        assert (said.status, said.proven, said.answer.boot) == (421, True, right)
        assert refused(server, "boot") == 1
        assert state(server) == before
        peer.boot = said.answer.boot
        said = peer.ask(peer.sign(peer.request(key="a").encode("t")))
        assert said is not None
        assert said.status == 200


def test_admission_says_the_first_reason_of_several() -> None:
    request = PeerRequest(verb="HEAD", key="a", boot=OLD_BOOT, epoch=1, counter=3)

    def kind(**facts: object) -> str | None:
        found = authorize(request, **{"boot": OLD_BOOT, "epoch": 1, "last_counter": 2, **facts})  # type: ignore[arg-type]
        return None if found is None else found.kind

    assert kind() is None
    assert kind(epoch=0) is None
    assert kind(epoch=2) == "epoch"
    assert kind(epoch=2, boot="f" * 32) == "boot"
    assert kind(epoch=2, boot="f" * 32, last_counter=3) == "replay"
