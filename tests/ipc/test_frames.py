"""Frames come out as they went in, however the stream is cut, and every descriptor with its own
message."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import IntegrityError, UnavailableError
from ckpt.ipc import frames
from ckpt.ipc.frames import FDS_MAX, FRAME_BYTES_MAX, Inbox, Outbox, close_fds, encode
from ckpt.ipc.messages import Bye, Message, Post

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def marked(number: int) -> int:
    """A descriptor of a file that holds ``number``."""
    fd = os.memfd_create("mark")
    os.write(fd, number.to_bytes(4, "little"))
    return fd


def mark(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 4, 0), "little")


def marks(fds: list[int]) -> list[int]:
    """The numbers behind descriptors, which are closed."""
    found = [mark(fd) for fd in fds]
    close_fds(fds)
    return found


def read_until(inbox: Inbox, sock: socket.socket, count: int) -> list[tuple[Message, list[int]]]:
    received: list[tuple[Message, list[int]]] = []
    while len(received) < count:
        came, ended = inbox.read(sock)
        received += came
        assert came or not ended
    return received


# ---- cuts


plans = st.lists(
    st.tuples(st.integers(0, 300) | st.integers(60_000, 70_000), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(plan=plans, read_bytes=st.sampled_from([1, 3, 7, 64, 1000, 65536]), data=st.data())
def test_messages_and_descriptors_arrive_together_however_the_stream_is_cut(
    plan, read_bytes, data
) -> None:
    one, other = socket.socketpair()
    outbox, inbox = Outbox(), Inbox(read_bytes=read_bytes)
    if read_bytes < 64:
        plan = [(size % 300, count) for size, count in plan]
    expected = []
    received: list[tuple[Message, list[int]]] = []
    number = 0
    try:
        for at, (size, count) in enumerate(plan):
            message = Post(key=str(at), value=bytes(size))
            outbox.push(message, [marked(number + n) for n in range(count)])
            expected.append((message, list(range(number, number + count))))
            number += count
            if data.draw(st.booleans()):
                outbox.flush(one)
            if data.draw(st.booleans()):
                received += inbox.read(other)[0]
        while len(received) < len(plan):
            outbox.flush(one)
            received += inbox.read(other)[0]
        assert not outbox
        assert outbox.size_bytes == 0
        assert [(message, [mark(fd) for fd in fds]) for message, fds in received] == expected
    finally:
        one.close()
        other.close()
        outbox.close()
        inbox.close()
        for _, fds in received:
            close_fds(fds)


@settings(max_examples=100, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 400), max_size=20),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    read_bytes=st.sampled_from([1, 5, 65536]),
)
def test_a_sender_that_cuts_anywhere_is_understood(cuts, sizes, read_bytes) -> None:
    messages = [Post(key=str(at), value=bytes(size)) for at, size in enumerate(sizes)]
    stream = b"".join(map(encode, messages))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    one, other = socket.socketpair()
    inbox = Inbox(read_bytes=read_bytes)
    received = []
    with one, other:
        for start, stop in pairwise(edges):
            one.sendall(stream[start:stop])
            while select.select([other], [], [], 0)[0]:
                received += inbox.read(other)[0]
    assert [message for message, _ in received] == messages


def test_a_long_message_with_descriptors_survives_a_small_socket_buffer(pair: Pair) -> None:
    one, other = pair
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    outbox, inbox = Outbox(), Inbox()
    long = Post(key="k", value=os.urandom(3 << 20))
    outbox.push(long, [marked(1), marked(2)])
    outbox.push(Bye(), [marked(3)])
    received = []
    flushes = 0
    while len(received) < 2:
        flushes += not outbox.flush(one)
        received += inbox.read(other)[0]
    assert flushes > 10
    assert [(message, marks(fds)) for message, fds in received] == [(long, [1, 2]), (Bye(), [3])]


def test_reads_of_one_call_are_bounded(pair: Pair) -> None:
    one, other = pair
    inbox = Inbox(read_bytes=16)
    one.sendall(encode(Post(key="k", value=bytes(1000))))
    assert inbox.read(other) == ([], False)
    assert read_until(inbox, other, 1)[0][0] == Post(key="k", value=bytes(1000))


# ---- what is no frame


def test_garbage_is_refused(pair: Pair) -> None:
    one, other = pair
    inbox = Inbox()
    outbox = Outbox()
    outbox.push(Bye(), [marked(1)])
    outbox.flush(one)
    one.sendall(b"\x03\0\0\0abc")
    with pytest.raises(IntegrityError, match="not a message"):
        while True:
            for _, fds in inbox.read(other)[0]:
                assert marks(fds) == [1]
    assert inbox.read(other) == ([], True)


def test_garbage_behind_descriptors_closes_them(pair: Pair) -> None:
    one, other = pair
    fd = marked(1)
    socket.send_fds(one, [encode(Bye()) + b"\x03\0\0\0abc"], [fd])
    os.close(fd)
    with pytest.raises(IntegrityError, match="not a message"):
        Inbox().read(other)


@pytest.mark.parametrize(
    "body", [b"", b"\x80", b"\xc1", b"\x81\xa4type\xa7Unknown", b"\x91" * 100_000]
)
def test_a_body_that_is_no_message_is_refused(pair: Pair, body: bytes) -> None:
    pair[0].sendall(len(body).to_bytes(4, "little") + body)
    with pytest.raises(IntegrityError):
        Inbox(read_bytes=1 << 20).read(pair[1])


def test_a_claim_of_too_many_bytes_is_refused_before_they_come(pair: Pair) -> None:
    pair[0].sendall((FRAME_BYTES_MAX + 1).to_bytes(4, "little"))
    with pytest.raises(IntegrityError, match="not a frame"):
        Inbox().read(pair[1])


def test_an_inbox_takes_longer_frames_once_its_limit_is_raised(pair: Pair) -> None:
    one, other = pair
    frame = encode(Post(key="k", value=bytes(1000)))
    inbox = Inbox(frame_bytes_max=500)
    one.sendall(encode(Bye()))
    assert inbox.read(other) == ([(Bye(), [])], False)
    inbox.frame_bytes_max = FRAME_BYTES_MAX
    one.sendall(frame)
    assert [type(message) for message, _ in inbox.read(other)[0]] == [Post]
    inbox.frame_bytes_max = 500
    one.sendall(frame)
    with pytest.raises(IntegrityError, match="limit_bytes=500"):
        inbox.read(other)


def test_descriptors_in_the_middle_of_a_frame_are_refused(pair: Pair) -> None:
    one, other = pair
    frame = encode(Bye())
    inbox = Inbox()
    one.sendall(frame[:3])
    assert inbox.read(other) == ([], False)
    fd = marked(1)
    socket.send_fds(one, [frame[3:]], [fd])
    os.close(fd)
    with pytest.raises(IntegrityError, match="middle"):
        inbox.read(other)


def test_more_descriptors_than_allowed_are_refused(pair: Pair) -> None:
    one, other = pair
    fd = marked(1)
    beside = array.array("i", [fd] * (FDS_MAX + 4))
    one.sendmsg([encode(Bye())], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, beside)])
    os.close(fd)
    with pytest.raises(IntegrityError, match="lost on their way"):
        Inbox().read(other)


def test_an_outbox_refuses_more_than_its_limit(monkeypatch, pair: Pair) -> None:
    monkeypatch.setattr(frames, "OUTBOX_BYTES_MAX", 2000)
    outbox = Outbox()
    outbox.push(Post(key="k", value=bytes(1500)), [marked(1)])
    with pytest.raises(UnavailableError, match="doesn't read"):
        outbox.push(Post(key="k", value=bytes(1500)), [marked(2)])
    outbox.close()
    assert not outbox


# ---- ends


def test_a_frame_that_the_end_cut_off_is_dropped_with_its_descriptors(pair: Pair) -> None:
    one, other = pair
    inbox = Inbox()
    fd = marked(1)
    socket.send_fds(one, [encode(Post(key="k", value=bytes(100)))[:50]], [fd])
    os.close(fd)
    assert inbox.read(other) == ([], False)
    one.close()
    assert inbox.read(other) == ([], True)


def test_an_end_with_unread_bytes_on_the_other_side_is_an_end(pair: Pair) -> None:
    one, other = pair
    other.sendall(b"never read")
    one.close()
    assert Inbox().read(other) == ([], True)
