"""Lines over real sockets: who dials, what is told, what breaks and comes back."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from kit.jobs import wait_for
from kit.mesh_nodes import WAIT_S, Node, acquaint

from ckpt.cluster.mesh import connections as lines_room
from ckpt.cluster.mesh import protocol as cable_room
from ckpt.cluster.mesh.addresses import NameResolver, SocketAddress
from ckpt.cluster.mesh.messages import MeshMessage, MeshPost


class Network:
    """A network between a dialler and one port, which can be dead: bytes are lost, and nobody is
    told."""

    def __init__(self, port: int) -> None:
        self.dead = threading.Event()
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._socks: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Network:
        self._go(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _go(self, call: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=call, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._socks += [sock, there]
                self._go(self._carry, sock, there)
                self._go(self._carry, there, sock)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.dead.is_set():
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


def test_three_nodes_reach_each_other_and_words_come_in_order(node: Callable[..., Node]) -> None:
    nodes = [node(name) for name in ("a", "b", "c")]
    acquaint(*nodes)
    words = [MeshPost(room="1", key=str(n), value=bytes(1000)) for n in range(300)]
    for word in words:
        assert nodes[2].lines.send("a", word)
    nodes[0].wait(lambda: len(nodes[0].words) == len(words), "all words")
    assert nodes[0].words == [("c", word) for word in words]
    assert nodes[1].words == []


def test_large_word_comes_whole(node: Callable[..., Node]) -> None:
    one, other = node("a"), node("b")
    acquaint(one, other)
    word = MeshPost(room="1", key="k", value=bytes(range(256)) * 80_000)
    assert one.lines.send("b", word)
    other.wait(lambda: other.words, "the word")
    assert other.words == [("a", word)]


def test_end_of_a_node_is_told_at_once_and_a_call_then_is_refused(
    node: Callable[..., Node],
) -> None:
    one, other = node("a"), node("b")
    acquaint(one, other)
    other.lines.close()
    one.wait(lambda: any(why.startswith("refused") for _, why in one.downs), "the refusal")
    assert one.downs[0][0] == "b"
    assert one.lines.connected_nodes() == frozenset()
    assert not one.lines.send("b", MeshPost(room="1", key="k", value=b""))


def test_port_that_closes_a_moment_after_its_line_is_found_closed(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_room, "PROBE_S", 0.0)
    other = node("b")
    with socket.create_server(("127.0.0.1", 0)) as dying:
        dying.settimeout(WAIT_S)
        other.lines.set_targets({"a": f"127.0.0.1:{dying.getsockname()[1]}"})
        dying.accept()[0].close()  # "a" would dial: "b" has looked, and somebody listens
    other.wait(lambda: any(why.startswith("refused") for _, why in other.downs), "the refusal")


def test_node_that_comes_back_at_its_address_is_reached_again(node: Callable[..., Node]) -> None:
    one, other = node("a"), node("b")
    acquaint(one, other)
    address = other.address
    other.lines.close()
    one.wait(lambda: one.downs, "the end")
    again = node("b", listen=address)
    again.lines.set_targets({"a": one.address})
    one.wait(lambda: one.ups == ["b", "b"], "the new line")
    assert one.lines.send("b", MeshPost(room="2", key="k", value=b"v"))
    again.wait(lambda: again.words, "a word over the new line")


def test_node_with_another_secret_is_told_and_never_up(node: Callable[..., Node]) -> None:
    one, stranger = node("a"), node("b", secret=b"a secret of somebody else")
    addresses = {"a": one.address, "b": stranger.address}
    one.lines.set_targets(addresses)
    stranger.lines.set_targets(addresses)
    for end in (one, stranger):
        end.wait(lambda end=end: end.events, "the alarm at both ends")
        assert end.events[0].alarm
        assert end.events[0].kind == "line-refused"
        assert "another secret" in end.events[0].text
    assert one.ups == stranger.ups == []


@pytest.mark.slow
def test_node_behind_a_dead_network_is_given_up_and_found_again(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_room, "SILENCE_S_MAX", 0.5)
    monkeypatch.setattr(lines_room, "HEARTBEAT_S", 0.1)
    one, other = node("a"), node("b")
    with Network(other.lines.port) as network:
        one.lines.set_targets({"b": f"127.0.0.1:{network.port}"})
        other.lines.set_targets({"a": one.address})
        one.wait(lambda: one.ups, "the line")
        other.wait(lambda: other.ups, "the line")
        network.dead.set()
        one.wait(lambda: one.downs, "that nothing comes any more")
        other.wait(lambda: other.downs, "that nothing comes any more")
        assert any(
            "silent" in why for _, why in (*one.downs, *other.downs)
        )  # whoever noticed first hung up
        network.dead.clear()
        one.wait(lambda: len(one.ups) == 2, "the line again")


@pytest.mark.slow
def test_node_that_is_silent_for_less_than_the_ttl_keeps_its_connections(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_room, "SILENCE_S_MAX", 0.3)
    monkeypatch.setattr(lines_room, "HEARTBEAT_S", 0.1)
    patient, hasty, other = node("a", ttl_s=60.0), node("b"), node("c", ttl_s=60.0)
    with Network(other.lines.port) as network:
        way = {"c": f"127.0.0.1:{network.port}"}
        for one in (patient, hasty):
            one.lines.set_targets(way)
            one.wait(lambda one=one: one.ups, "the line")
        network.dead.set()
        hasty.wait(lambda: hasty.downs, "that nothing comes any more")
        # Later than the other, for which nothing has come for as long.
        assert not patient.downs
        network.dead.clear()


def test_strangers_who_say_nothing_take_no_place_for_ever(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_room, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(lines_room, "HEARTBEAT_S", 0.1)
    one = node("a")
    with ExitStack() as ending:
        mute = [
            ending.enter_context(socket.create_connection(("127.0.0.1", one.lines.port)))
            for _ in range(lines_room.UNAUTHENTICATED_MAX + 5)
        ]
        for sock in mute:
            sock.settimeout(WAIT_S)
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                continue
        other = node("b")
        acquaint(one, other)


def test_line_that_nobody_wants_any_more_is_hung_up(node: Callable[..., Node]) -> None:
    one, other = node("a"), node("b")
    acquaint(one, other)
    one.lines.set_targets({})
    other.wait(lambda: other.downs, "the end of the line")
    assert one.downs == []


def test_name_server_that_hangs_for_one_node_holds_up_no_other(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    answers = {"b.train": "127.0.0.1"}

    def ask(host: str, port: int) -> SocketAddress:
        if host not in answers:
            hangs.wait(WAIT_S)
            raise socket.gaierror(f"nobody knows {host}")
        return SocketAddress(socket.AF_INET, (answers[host], port))

    monkeypatch.setattr(lines_room, "NameResolver", lambda found: NameResolver(found, ask))
    one, other = node("a"), node("b")
    wanted = {"b": f"b.train:{other.lines.port}", "c": "c.train:7"}
    one.lines.set_targets(wanted)
    other.lines.set_targets({"a": one.address})
    one.wait(
        lambda: one.lines.connected_nodes() == {"b"}, "the line to the node whose name is known"
    )
    assert one.lines.send("b", MeshPost(room="1", key="k", value=b"v"))
    other.wait(lambda: other.words, "a word meanwhile")
    answers.clear()  # by now nobody knows that name either
    other.lines.close()
    one.wait(
        lambda: any(why.startswith("refused") for name, why in one.downs if name == "b"),
        "the refusal where it was",
    )
    hangs.set()
    one.wait(
        lambda: any("nobody knows c.train" in why for name, why in one.downs if name == "c"),
        "why there is no line",
    )


def test_name_that_led_elsewhere_is_resolved_anew_though_somebody_refused_there(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        elsewhere = gone.getsockname()[1]
    answers = [elsewhere]  # of a node that is gone, for as long as somebody's cache says so

    def ask(host: str, port: int) -> SocketAddress:
        return SocketAddress(socket.AF_INET, ("127.0.0.1", answers.pop(0) if answers else port))

    monkeypatch.setattr(lines_room, "NameResolver", lambda found: NameResolver(found, ask))
    one, other = node("a"), node("b")
    one.lines.set_targets({"b": f"b.train:{other.lines.port}"})
    one.wait(lambda: any(why.startswith("refused") for _, why in one.downs), "the refusal")
    one.wait(lambda: one.lines.connected_nodes() == {"b"}, "the line")


def test_what_is_said_to_all_is_encoded_once(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, others = node("a"), [node(name) for name in "bcde"]
    acquaint(one, *others)
    encoded: list[MeshMessage] = []
    real = cable_room._ENCODER

    class Counting:
        def encode(self, word: MeshMessage) -> bytes:
            encoded.append(word)
            return real.encode(word)

    monkeypatch.setattr(cable_room, "_ENCODER", Counting())
    words = [MeshPost(room="1", key=f"k{n}", value=b"v") for n in range(20)]
    for word in words:
        for other in others:
            assert one.lines.send(other.name, word)
    for other in others:
        other.wait(lambda other=other: len(other.words) == len(words), f"all words at {other.name}")
        assert [word for _, word in other.words] == words
    # A beat may come between two: then it is encoded once more.
    assert len([word for word in encoded if isinstance(word, MeshPost)]) < 2 * len(words)


@pytest.mark.slow
def test_process_without_a_free_descriptor_does_not_spin_and_takes_connections_later(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = node("a")
    tries: list[float] = []
    accept = one.lines._accept

    def counted() -> None:
        tries.append(time.monotonic())
        accept()

    monkeypatch.setattr(one.lines, "_accept", counted)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as caller, ExitStack() as held:
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        while (file := held.enter_context(Path("/dev/null").open("rb"))).fileno() <= highest:
            continue  # every gap below is filled
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, limits[1]))
        try:
            caller.connect(("127.0.0.1", one.lines.port))
            wait_for(lambda: len(tries) >= 3, "three tries")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert tries[2] - tries[0] >= 1.9 * lines_room.ACCEPT_PAUSE_S, "one try a pause"
        assert len(one.events) == 1
    other = node("b")
    acquaint(one, other)
