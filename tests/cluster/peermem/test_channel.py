"""Heads and bodies come whole, wherever the network cuts them; and what is gathered to be sent has
bounds."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.peers.servers import WAIT_S, until

from ckpt.cluster.peermem.body_mac import BodyMac, HmacBody
from ckpt.cluster.peermem.channel import (
    BLOCK_BYTES,
    PIECES_MAX,
    EndedError,
    PeerChannel,
    PeerTimeouts,
    _blocks,
)
from ckpt.cluster.peermem.http import HEAD_BYTES_MAX, MalformedError

KEY, NONCE = bytes(32), bytes(12)
BODY = bytes(range(200)) * 3
FIRST, SECOND = b"GET /a HTTP/1.1\r\na: b\r\n\r\n", b"PUT /c HTTP/1.1\r\nd: e\r\n\r\n"


def mac() -> BodyMac:
    return HmacBody(KEY, NONCE)


def tagged(body: bytes) -> bytes:
    one = mac()
    one.update(body)
    return body + one.tag()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, PeerChannel]]:
    ours, theirs = socket.socketpair()
    channel = PeerChannel(theirs, PeerTimeouts(grace_s=WAIT_S))
    yield ours, channel
    ours.close()
    channel.close()


def taken_in(channel: PeerChannel) -> bool:
    """Whether the other end has nothing left to receive."""
    return not select.select([channel._socket], [], [], 0)[0]


@pytest.mark.slow
def test_a_head_and_a_body_are_read_alike_wherever_they_are_cut(
    pair: tuple[socket.socket, PeerChannel],
) -> None:
    ours, channel = pair
    raw = FIRST + SECOND + tagged(BODY) + FIRST
    out = bytearray(len(BODY))

    def take() -> tuple[bytes | None, bytes | None, bool, bytes | None]:
        heads = channel.read_head(idle_s=WAIT_S), channel.read_head()
        proven = channel.read_body(memoryview(out), mac())
        return *heads, proven, channel.read_head()

    with ThreadPoolExecutor(1) as pool:
        for cut in (*range(1, 80), 300, *range(len(raw) - 60, len(raw))):
            taking = pool.submit(take)
            ours.sendall(raw[:cut])
            until(lambda: taken_in(channel))
            ours.sendall(raw[cut:])
            assert taking.result(WAIT_S) == (FIRST, SECOND, True, FIRST), cut
            assert out == BODY


def test_heads_longer_than_the_buffer_together_are_read_one_by_one(
    pair: tuple[socket.socket, PeerChannel],
) -> None:
    ours, channel = pair
    head = b"GET /a HTTP/1.1\r\na: " + b"x" * (HEAD_BYTES_MAX // 2) + b"\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(ours.sendall, head * 9)
        for _ in range(9):
            assert channel.read_head() == head
        sending.result(WAIT_S)
    assert channel.is_idle()


def test_a_head_without_an_end_is_given_up_when_the_buffer_is_full(
    pair: tuple[socket.socket, PeerChannel],
) -> None:
    ours, channel = pair
    ours.sendall(FIRST + b"x" * HEAD_BYTES_MAX)
    assert channel.read_head() == FIRST
    with pytest.raises(MalformedError):
        channel.read_head()


def test_an_end_in_the_middle_is_told_from_one_between(
    pair: tuple[socket.socket, PeerChannel],
) -> None:
    ours, channel = pair
    ours.sendall(FIRST + SECOND[:-1])
    ours.shutdown(socket.SHUT_WR)
    assert channel.read_head() == FIRST
    with pytest.raises(EndedError):
        channel.read_head()


@pytest.mark.parametrize("kept", [0, 1, 599, 600, 615])
def test_a_body_that_ends_early_is_no_body(
    pair: tuple[socket.socket, PeerChannel], kept: int
) -> None:
    ours, channel = pair
    ours.sendall(tagged(BODY)[:kept])
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EndedError):
        channel.read_body(memoryview(bytearray(len(BODY))), mac())


def test_what_goes_in_one_call_is_bounded_and_nothing_is_lost() -> None:
    data = [
        bytes([i & 255]) * size
        for i, size in enumerate((0, 1, BLOCK_BYTES, 5, 3 * BLOCK_BYTES + 7, *[3] * 500, 0))
    ]
    blocks = list(_blocks([memoryview(one) for one in data], BLOCK_BYTES))
    assert b"".join(piece for block in blocks for piece in block) == b"".join(data)
    assert max(len(block) for block in blocks) <= PIECES_MAX
    assert max(sum(len(piece) for piece in block) for block in blocks) <= BLOCK_BYTES
    assert all(len(piece) for block in blocks for piece in block)
