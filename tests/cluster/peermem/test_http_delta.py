"""Puts of what changed: the peer makes exactly the object that was meant, of the base that was
meant, or none."""

from __future__ import annotations

import itertools
import struct
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.peers.certificates import Certificates
from kit.peers.proxy import Proxy
from kit.peers.raw import RawPeer
from kit.peers.servers import SECRET, Epoch, PeerServers, read, until

from ckpt.backends.replicated.buffers import Loan, TakenBackError
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem import client as connection
from ckpt.cluster.peermem import server as serving
from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.http import (
    RANGE_BYTES,
    RANGES_MAX,
    BaseGoneError,
    ByteRange,
    DeltaBase,
    MalformedError,
    PeerRequest,
    StoredContent,
    encode_ranges,
    kept_and_sent,
    parse_ranges,
    ranges_problem,
    slice_ranges,
)
from ckpt.cluster.peermem.memory import PeerMemory
from ckpt.cluster.peermem.server import PeerServer, PeerServerLimits
from ckpt.cluster.peermem.store import PeerClientLimits
from ckpt.cluster.tls import client_context, server_context
from ckpt.errors import (
    CkptError,
    FencedError,
    KeyExistsError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.rate_limit import RateLimit

MIB = 1 << 20
OLD = bytes(range(250)) * 4
RANGES: list[ByteRange] = [(0, 10), (10, 1), (500, 100), (999, 1)]


def changed(old: bytes, ranges: list[ByteRange], fill: int = 0xFF) -> bytes:
    """``old`` with other bytes in ``ranges``."""
    new = bytearray(old)
    for offset, length in ranges:
        new[offset : offset + length] = bytes([fill]) * length
    return bytes(new)


NEW = changed(OLD, RANGES)
SENT = b"".join(NEW[offset : offset + length] for offset, length in RANGES)


def held(server: PeerServer, key: str) -> bytes | None:
    if server.memory.stat(key) is None:
        return None
    with server.memory.reading(key) as found:
        return bytes(found.view)


def idle(server: PeerServer) -> bool:
    stats = server.memory.stats()
    return (stats.incoming_bytes, stats.removed_bytes) == (0, 0)


# ---- pure


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[ByteRange]]:
    """A size, and ranges in it."""
    cuts = sorted(draw(st.sets(st.integers(0, 400), max_size=40)))
    size = draw(st.integers(cuts[-1] if cuts else 0, 500))
    return size, [(low, high - low) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]


@given(layouts())
def test_table_is_read_as_it_was_meant(layout: tuple[int, list[ByteRange]]) -> None:
    size, ranges = layout
    assert ranges_problem(ranges, size_bytes=size) is None
    table = encode_ranges(ranges)
    assert len(table) == len(ranges) * RANGE_BYTES
    assert (
        parse_ranges(table, size_bytes=size, sent_bytes=sum(length for _, length in ranges))
        == ranges
    )


@given(layouts(), st.lists(st.integers(0, 500), max_size=5))
def test_pieces_and_what_is_kept_are_all_bytes_once(
    layout: tuple[int, list[ByteRange]], cuts: list[int]
) -> None:
    size, ranges = layout
    whole = bytes(number % 251 for number in range(size))
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    data = [whole[low:high] for low, high in itertools.pairwise(edges)]
    sent = b"".join(slice_ranges(data, ranges))
    assert sent == b"".join(whole[offset : offset + length] for offset, length in ranges)
    made = b""
    for (kept, kept_bytes), (offset, length) in kept_and_sent(ranges, size_bytes=size):
        assert kept == len(made)
        made += whole[kept : kept + kept_bytes]
        assert offset == len(made)
        made, sent = made + sent[:length], sent[length:]
    assert made == whole
    assert sent == b""


WRONG: dict[str, list[ByteRange]] = {
    "overlap": [(0, 10), (9, 10)],
    "descending": [(20, 10), (0, 10)],
    "twice": [(20, 10), (20, 10)],
    "empty": [(0, 10), (15, 0), (20, 10)],
    "behind the end": [(0, 10), (991, 10)],
    "at the end": [(0, 10), (1000, 10)],
    "far away": [(0, 10), (1 << 63, 10)],
    "around": [(0, 10), ((1 << 64) - 5, 10)],
    "endless": [(0, 10), (20, (1 << 64) - 1)],
    "too long": [(0, 10), (20, 11)],
    "too short": [(0, 10), (20, 9)],
    "swapped": [(10, 0), (10, 20)],
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_table_is_malformed(what: str) -> None:
    with pytest.raises(MalformedError):
        parse_ranges(encode_ranges(WRONG[what]), size_bytes=1000, sent_bytes=20)


# ---- a client


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_only_what_changed_is_sent_and_the_object_is_whole(world: PeerServers, size: int) -> None:
    server = world.serve()
    store = world.store(server)
    old = OLD * (size // 1000)
    old += bytes(size - len(old))
    ranges = [(5, 10), (size // 2, size // 10), (size - 1, 1)]
    new = changed(old, ranges)
    base = store.put_whole("a", [old])
    assert base == StoredContent(key="a", size_bytes=size, version=1, boot=server.boot)
    second = store.put_changed("b", [new[:7], new[7:]], base=base, changed=ranges)
    assert second == StoredContent(key="b", size_bytes=size, version=2, boot=server.boot)
    assert (read(store, "a"), read(store, "b")) == (old, new)
    until(lambda: server.stats().served["PUT"] == 2)
    assert server.stats().received_bytes == size + 11 + size // 10 + 3 * RANGE_BYTES
    third = store.put_changed("b", [changed(new, [(1, 3)])], base=second, changed=[(1, 3)])
    assert read(store, "b") == changed(new, [(1, 3)])
    assert store.put_changed("c", [held(server, "b") or b""], base=third, changed=[]).version == 4
    assert read(store, "c") == read(store, "b")
    with pytest.raises(BaseGoneError):
        store.put_changed("d", [new], base=second, changed=ranges)
    assert store.stat("d") is None


def test_most_ranges_go_and_one_more_is_the_callers_mistake(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    size = 2 * RANGES_MAX + 3
    base = store.put_whole("a", [bytes(size)])
    ranges = [(2 * number, 1) for number in range(RANGES_MAX)]
    new = changed(bytes(size), ranges)
    store.put_changed("b", [new], base=base, changed=ranges)
    assert read(store, "b") == new
    for wrong, facts in (
        ([*ranges, (size - 1, 1)], base),
        ([(0, 1), (0, 1)], base),
        ([(size, 1)], base),
        ([(0, 1)], replace(base, size_bytes=size - 1)),
    ):
        with pytest.raises(UsageError):
            store.put_changed("b", [new], base=facts, changed=wrong)
    assert server.stats().refused == {}


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_base_that_is_gone_or_another_is_refused_and_the_connection_stays(
    world: PeerServers, size: int
) -> None:
    server = world.serve()
    store = world.store(server)
    old, ranges = bytes(size), [(0, size - 10)]
    base = store.put_whole("a", [old])
    other = store.put_whole("other", [old + b"longer"])
    store.put("b", [b"before"])

    def refused(base: StoredContent) -> None:
        with pytest.raises(BaseGoneError) as found:
            store.put_changed("b", [old], base=base, changed=ranges)
        assert isinstance(found.value, NotFoundError)
        assert read(store, "b") == b"before"

    refused(replace(base, version=base.version + 1))
    refused(replace(base, key="none"))
    refused(replace(other, size_bytes=size))
    store.put("a", [old])
    refused(base)
    server.memory.delete("a")
    refused(base)
    assert server.stats().refused == {"base": 5}
    assert server.stats().connections == 1
    assert idle(server)


def test_base_of_another_start_is_no_base_though_key_version_and_length_are_the_same(
    world: PeerServers,
) -> None:
    server = world.serve()
    store = world.store(server)
    base = store.put_whole("a", [OLD])
    port = server.address[1]
    server.stop()
    again = world.serve(port=port)
    with again.memory.incoming("a", len(OLD)) as incoming:
        incoming.view[:] = bytes(len(OLD))
        assert incoming.publish() == base.version
    with pytest.raises(BaseGoneError):
        store.put_changed("b", [NEW], base=base, changed=RANGES)
    assert again.memory.stat("b") is None
    assert again.stats().refused == {}
    store.put_whole("b", [NEW])
    assert read(store, "b") == NEW
    assert again.stats().connections == 1


def test_nobody_refers_to_a_source_or_creates_what_is_there(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    base = store.put_whole("a", [OLD])
    with RawPeer(server) as peer:
        for key, status in (("a", 412), ("new", 201)):
            based = DeltaBase(
                key="a", version=base.version, size_bytes=len(OLD), ranges=len(RANGES)
            )
            body = encode_ranges(RANGES) + SENT
            request = peer.request(
                verb="PUT", key=key, body_bytes=len(body), create_only=True, base=based
            )
            said = peer.ask(peer.put_bytes(request, body))
            assert said is not None
            assert said.status == status
    assert (held(server, "a"), held(server, "new")) == (OLD, NEW)


def test_an_older_epoch_is_fenced(world: PeerServers) -> None:
    server = world.serve()
    epoch = Epoch(3)
    store = world.store(server, epoch=epoch)
    base = store.put_whole("a", [OLD])
    server.see_epoch(4)
    with pytest.raises(FencedError):
        store.put_changed("a", [NEW], base=base, changed=RANGES)
    assert held(server, "a") == OLD
    epoch.now = 4
    store.put_changed("a", [NEW], base=base, changed=RANGES)
    assert held(server, "a") == NEW


def test_budget_counts_the_whole_object_and_the_base_that_was_deleted_meanwhile(
    world: PeerServers,
) -> None:
    server = world.serve(vault=PeerMemory(MIB, spare_bytes_max=0))
    store = world.store(server)
    old = bytes(600_000)
    base = store.put_whole("a", [old])
    with pytest.raises(StoreFullError):
        store.put_changed("b", [old], base=base, changed=[(0, 10)])
    assert (held(server, "a"), held(server, "b")) == (old, None)
    store.delete("a")
    base = store.put_whole("a", [old[:400_000]])
    store.put_changed("b", [old[:400_000]], base=base, changed=[(0, 10)])
    assert server.stats().refused == {"full": 1}


def test_memory_that_is_used_again_shows_nothing_of_what_it_held(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    store.put("secret", [b"s" * 300_000])
    base = store.put_whole("a", [bytes(300_000)])
    store.delete("secret")
    assert server.memory.stats().spare_bytes
    store.put_changed("b", [bytes(300_000)], base=base, changed=[(7, 1), (200_000, 9)])
    assert server.memory.stats().spare_bytes == 0, "it was used"
    assert read(store, "b") == bytes(300_000)


def test_lent_memory_that_is_taken_back_is_never_stored(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    base = store.put_whole("a", [OLD])
    loan = Loan("b")
    loan.take_back()
    with pytest.raises(TakenBackError):
        store.put_changed("b", [NEW], base=base, changed=RANGES, check_unchanged=loan.still_lent)
    until(lambda: idle(server))
    assert store.stat("b") is None


@pytest.mark.slow
def test_a_cap_is_taken_for_what_is_sent_alone(world: PeerServers) -> None:
    cap = RateLimit(8 * MIB)
    store = world.store(world.serve(), cap=cap)
    base = store.put_whole("a", [bytes(4 * MIB)])
    taken: list[int] = []
    real = cap.take

    def take(size_bytes: int) -> float:
        taken.append(size_bytes)
        return real(size_bytes)

    cap.take = take  # type: ignore[method-assign]
    store.put_changed("b", [bytes(4 * MIB)], base=base, changed=[(0, 200_000)])
    assert sum(taken) == 200_000 + RANGE_BYTES


def test_it_goes_over_tls(world: PeerServers, certificates: Certificates) -> None:
    def files(one: object, make: object) -> object:
        return make(certificate=one.certificate, key=one.key, ca=one.ca)  # type: ignore[operator,attr-defined]

    server = world.serve(tls=files(certificates.one, server_context))  # type: ignore[arg-type]
    store = world.store(server, tls=files(certificates.two, client_context))  # type: ignore[arg-type]
    old = OLD * 2000
    ranges = [(3, 70_000), (1_000_000, 5), (1_500_000, 100_000)]
    base = store.put_whole("a", [old])
    store.put_changed("b", [changed(old, ranges)], base=base, changed=ranges)
    assert read(store, "b") == changed(old, ranges)
    with pytest.raises(BaseGoneError):
        store.put_changed("b", [old], base=replace(base, version=9), changed=ranges)


@pytest.mark.slow
def test_bytes_changed_on_the_way_are_never_stored(world: PeerServers) -> None:
    """In the table, in what is sent, in the tag."""
    server = world.serve()
    for place in (1, 8, 15, 40, 70, 100, 170, 175, 190):
        proxy = Proxy(server)
        store = world.store(server)
        base = store.put_whole("a", [OLD])
        through = type(store)(Endpoint(*proxy.address), SECRET, epoch=Epoch())
        through.stat("a")

        begin = [0]  # of the body

        def flip(
            offset: int, data: bytes, place: int = place, begin: list[int] = begin
        ) -> bytes | None:
            begin[0] = begin[0] or offset + data.index(b"\r\n\r\n") + 4
            at = begin[0] + place - offset
            return (
                data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data
            )

        proxy.up = flip
        with pytest.raises(CkptError) as found:
            through.put_changed("b", [NEW], base=base, changed=RANGES)
        assert isinstance(found.value, UnavailableError)
        assert server.memory.stat("b") is None
        assert held(server, "a") == OLD
        through.close()
        proxy.close()
    until(lambda: idle(server))


@pytest.mark.slow
@pytest.mark.parametrize("patient", [True, False])
def test_a_peer_is_waited_for_as_long_as_it_copies_and_waits_itself_no_less(
    world: PeerServers, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """It takes nothing in meanwhile. Copying here takes longer than either side's patience."""
    grace_s = 1.0
    real = serving.copy_bytes
    never = threading.Event()

    def slow(out: memoryview, data: memoryview) -> None:
        never.wait(2 * grace_s if len(data) > MIB else 0.0)
        real(out, data)

    monkeypatch.setattr(serving, "copy_bytes", slow)
    if patient:
        monkeypatch.setattr(connection, "COPY_BYTES_PER_S_MIN", MIB)
    server = world.serve(limits=PeerServerLimits(timeouts=PeerTimeouts(grace_s=grace_s)))
    store = world.store(server, limits=PeerClientLimits(timeouts=PeerTimeouts(grace_s=grace_s)))
    old, ranges = bytes(8 * MIB), [(7 * MIB, MIB)]
    new = changed(old, ranges)
    with server.memory.incoming("a", len(old)) as incoming:
        incoming.view[:] = old
        base = StoredContent(
            key="a", size_bytes=len(old), version=incoming.publish(), boot=server.boot
        )
    if patient:
        store.put_changed("b", [new], base=base, changed=ranges)
        assert held(server, "b") == new
    else:
        with pytest.raises(UnavailableError, match="too slow"):
            store.put_changed("b", [new], base=base, changed=ranges)
        until(lambda: server.stats().connections == 0)
        assert held(server, "b") in (None, new), "which of both nobody knows"


# ---- a client that says what it likes


def prepared(world: PeerServers) -> PeerServer:
    server = world.serve(epoch=1)
    for key in ("a", "b"):
        with server.memory.incoming(key, len(OLD)) as incoming:
            incoming.view[:] = OLD
            incoming.publish()
    return server


def put(peer: RawPeer, table: bytes, sent: bytes, **facts: object) -> tuple[PeerRequest, bytes]:
    """A put to ``b`` with ``a`` as its base."""
    base = DeltaBase(key="a", version=1, size_bytes=len(OLD), ranges=len(table) // RANGE_BYTES)
    return peer.request(
        verb="PUT", key="b", body_bytes=len(table) + len(sent), base=base, **facts
    ), table + sent


def test_the_sample_is_right_before_it_is_spoiled(world: PeerServers) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        said = peer.ask(peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT)))
        assert said is not None
        assert said.answer is not None
        assert (said.status, said.answer.size_bytes, said.answer.version) == (201, len(OLD), 3)
    assert (held(server, "a"), held(server, "b")) == (OLD, NEW)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_table_is_refused_before_anything_is_copied(
    world: PeerServers, monkeypatch: pytest.MonkeyPatch, what: str, waits: bool
) -> None:
    copied: list[int] = []
    monkeypatch.setattr(serving, "copy_bytes", lambda out, data: copied.append(len(data)))
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = peer.put_bytes(*put(peer, encode_ranges(WRONG[what]), bytes(20), waits=waits))
        peer.send(raw)
        if waits:
            assert peer.channel.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        said = peer.hear()
        assert said is not None
        assert (said.status, said.proven) == (400, True)
        assert peer.hear() is None, "what follows is no request"
    assert copied == []
    assert server.stats().refused == {"malformed": 1}
    assert (held(server, "a"), held(server, "b")) == (OLD, OLD)
    assert idle(server)


@pytest.mark.parametrize(
    "facts",
    [
        {"ranges": RANGES_MAX + 1},
        {"ranges": 10**17},
        {"ranges": 4},
        {"size_bytes": 19},
        {"size_bytes": 0},
        {"key": "../a"},
        {"key": ""},
    ],
)
def test_head_that_contradicts_itself_is_malformed(
    world: PeerServers, facts: dict[str, object]
) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        request, _ = put(peer, encode_ranges([(0, 10), (20, 10)]), bytes(20))
        assert request.base is not None
        spoiled = replace(request, waits=True, base=replace(request.base, **facts))  # type: ignore[arg-type]
        said = peer.ask(peer.sign(spoiled.encode("t")))
        assert said is not None
        assert said.status == 400
    assert server.memory.stats().incoming_bytes == 0
    assert server.stats().refused == {"malformed": 1}


@pytest.mark.parametrize(
    ("ranges", "status"), [(RANGES_MAX, 100), (RANGES_MAX + 1, 400), (1 << 40, 400)]
)
def test_a_table_longer_than_any_may_be_is_refused_before_it_comes(
    world: PeerServers, ranges: int, status: int
) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        base = DeltaBase(key="a", version=1, size_bytes=len(OLD), ranges=ranges)
        request = peer.request(
            verb="PUT", key="b", body_bytes=base.table_bytes + 20, waits=True, base=base
        )
        said = peer.ask(peer.sign(request.encode("t")))
        assert said is not None
        assert said.status == status
    assert held(server, "b") == OLD


@pytest.mark.parametrize("size", [1 << 50, 10**17])
def test_a_length_that_no_base_has_takes_no_memory(world: PeerServers, size: int) -> None:
    server = prepared(world)
    before = server.memory.stats()
    with RawPeer(server) as peer:
        request, _ = put(peer, encode_ranges([(0, 10)]), bytes(10))
        assert request.base is not None
        said = peer.ask(
            peer.sign(
                replace(request, waits=True, base=replace(request.base, size_bytes=size)).encode(
                    "t"
                )
            )
        )
        assert said is not None
        assert said.status == 424
        assert server.memory.stats() == before
        said = peer.ask(peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT)))
        assert said is not None
        assert said.status == 201, "the connection is still of use"


@pytest.mark.parametrize(
    "at", [0, 7, 15, 40, 64, 64 + len(SENT) - 1, 64 + len(SENT), 64 + len(SENT) + 15]
)
def test_a_table_a_byte_or_a_tag_changed_stores_nothing(world: PeerServers, at: int) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = bytearray(peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT)))
        raw[len(raw) - 64 - len(SENT) - 16 + at] ^= 0x01
        said = peer.ask(bytes(raw))
        assert said is not None
        assert (said.status in (400, 401), said.proven) == (True, True)
        assert peer.hear() is None
    assert (held(server, "a"), held(server, "b")) == (OLD, OLD)
    assert idle(server)


def test_a_range_moved_within_the_object_is_not_proven(world: PeerServers) -> None:
    """A table that is in order, but not the one that was meant."""
    server = prepared(world)
    with RawPeer(server) as peer:
        request, body = put(peer, encode_ranges([(0, 10), (20, 10)]), bytes(20))
        raw = peer.put_bytes(request, body)
        said = peer.ask(raw.replace(struct.pack(">2Q", 20, 10), struct.pack(">2Q", 40, 10)))
        assert said is not None
        assert (said.status, said.proven) == (401, True)
    assert server.stats().refused == {"body": 1}
    assert held(server, "b") == OLD


def test_cut_off_at_any_byte_it_leaves_the_old_object(world: PeerServers) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        length = len(peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT)))
    for cut in range(0, length, 7):
        with RawPeer(server) as peer:
            peer.send(peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT))[:cut])
    until(lambda: server.stats().connections == 0)
    assert (held(server, "a"), held(server, "b")) == (OLD, OLD)
    assert idle(server)


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_base_that_goes_while_the_bytes_come_is_the_one_that_was_meant(
    world: PeerServers, what: str
) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT))
        peer.send(raw[: -len(SENT) - 16])
        until(lambda: server.memory.stats().incoming_bytes)
        if what == "deleted":
            server.memory.delete("a")
        else:
            with server.memory.incoming("a", len(OLD)) as incoming:
                incoming.view[:] = bytes(len(OLD))
                incoming.publish()
        assert server.memory.stats().removed_bytes, "it is still needed"
        said = peer.ask(raw[-len(SENT) - 16 :])
        assert said is not None
        assert said.status == 201
    assert held(server, "b") == NEW
    until(lambda: idle(server))


def test_an_epoch_that_opens_while_the_bytes_come_fences_it(world: PeerServers) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = peer.put_bytes(*put(peer, encode_ranges(RANGES), SENT))
        peer.send(raw[:-5])
        until(lambda: server.memory.stats().incoming_bytes)
        server.see_epoch(2)
        said = peer.ask(raw[-5:])
        assert said is not None
        assert said.status == 409
    assert (held(server, "a"), held(server, "b")) == (OLD, OLD)
    assert idle(server)


def test_key_exists_is_said_where_it_came_meanwhile(world: PeerServers) -> None:
    server = prepared(world)
    store = world.store(server)
    with RawPeer(server) as peer:
        request, body = put(peer, encode_ranges(RANGES), SENT)
        raw = peer.put_bytes(replace(request, key="c", create_only=True), body)
        peer.send(raw[:-5])
        until(lambda: server.memory.stats().incoming_bytes)
        store.put("c", [b"first"], create_only=True)
        said = peer.ask(raw[-5:])
        assert said is not None
        assert said.status == 412
    assert held(server, "c") == b"first"
    with pytest.raises(KeyExistsError):
        store.put("c", [b"again"], create_only=True)
