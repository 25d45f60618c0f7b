"""A wire waits for whole messages, and is shut down rather than left in the middle of one."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.errors import UnavailableError, UsageError
from ckpt.ipc import frames
from ckpt.ipc.frames import FDS_MAX, MessageSocket, close_fds, peer_uid
from ckpt.ipc.messages import Bye, Hello, Keep, Post, Slots, Value

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


def marked(number: int) -> int:
    """A descriptor of a file that holds ``number``."""
    fd = os.memfd_create("mark")
    os.write(fd, number.to_bytes(4, "little"))
    return fd


def marks(fds: list[int]) -> list[int]:
    """The numbers behind descriptors, which are closed."""
    found = [int.from_bytes(os.pread(fd, 4, 0), "little") for fd in fds]
    close_fds(fds)
    return found


@pytest.fixture
def wires() -> Iterator[tuple[MessageSocket, MessageSocket]]:
    one, other = (MessageSocket(sock) for sock in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_what_came_before_the_end_is_given_first(
    wires: tuple[MessageSocket, MessageSocket],
) -> None:
    one, other = wires
    one.send(Post(key="a", value=b"1"))
    one.send(Bye())
    one.close()
    assert other.receive(5) == (Post(key="a", value=b"1"), [])
    assert other.receive(5) == (Bye(), [])
    assert other.receive(5) is None
    assert other.receive(5) is None
    with pytest.raises(UnavailableError, match="lost"):
        other.send(Bye())


def test_receive_gives_up_in_time(wires: tuple[MessageSocket, MessageSocket]) -> None:
    with pytest.raises(UnavailableError, match="time limit"):
        wires[0].receive(0.01)
    wires[1].send(Bye())
    assert wires[0].receive(0) == (Bye(), [])


def test_closing_wakes_who_waits(wires: tuple[MessageSocket, MessageSocket]) -> None:
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(wires[0].receive()))
    thread.start()
    wires[0].close()
    thread.join(10)
    assert got == [None]
    assert wires[0].receive() is None
    assert wires[0].fileno() == -1


def test_a_peer_that_reads_nothing_is_given_up(
    monkeypatch, wires: tuple[MessageSocket, MessageSocket]
) -> None:
    monkeypatch.setattr(frames, "SEND_WAIT_S", 0.05)
    with pytest.raises(UnavailableError, match="doesn't read"):
        wires[0].send(Post(key="k", value=bytes(4 << 20)))
    with pytest.raises(UnavailableError, match="lost"):
        wires[0].send(Bye())


def test_a_signal_that_cuts_a_frame_ends_the_connection(
    wires: tuple[MessageSocket, MessageSocket],
) -> None:
    class CutError(Exception):
        pass

    def handler(*_: object) -> None:
        raise CutError

    def interrupt() -> None:
        assert select.select([wires[1]], [], [], 20)[0]  # a part is sent, and nobody reads the rest
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(CutError):
            wires[0].send(Post(key="k", value=bytes(4 << 20)))
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)
    assert wires[1].receive(20) is None


def test_arrived_gives_all_that_is_there(wires: tuple[MessageSocket, MessageSocket]) -> None:
    one, other = wires
    assert other.receive_available() == ([], False)
    for number in range(5):
        one.send(Post(key=str(number), value=b""))
    assert other.receive(5) == (Post(key="0", value=b""), [])
    rest, ended = other.receive_available()
    assert [message for message, _ in rest] == [
        Post(key=str(number), value=b"") for number in range(1, 5)
    ]
    assert not ended
    one.close()
    assert other.receive_available() == ([], True)


def test_what_was_not_taken_is_closed(wires: tuple[MessageSocket, MessageSocket]) -> None:
    fd = marked(1)
    for _ in range(3):
        wires[0].send(Bye(), [fd])
    os.close(fd)
    received = wires[1].receive(5)
    assert received is not None
    assert marks(received[1]) == [1]
    wires[1].close()


def test_too_many_descriptors_and_too_long_messages_are_not_sent(
    monkeypatch, wires: tuple[MessageSocket, MessageSocket]
) -> None:
    fd = marked(1)
    with pytest.raises(UsageError, match="too many descriptors"):
        wires[0].send(Bye(), [fd] * (FDS_MAX + 1))
    monkeypatch.setattr(frames, "FRAME_BYTES_MAX", 1000)
    with pytest.raises(UsageError, match="too long"):
        wires[0].send(Post(key="k", value=bytes(1001)), [fd])
    wires[0].send(Keep(rank=0, index=1, size_bytes=2), [fd])
    os.close(fd)
    received = wires[1].receive(5)
    assert received is not None
    assert (received[0], marks(received[1])) == (Keep(rank=0, index=1, size_bytes=2), [1])


def test_as_many_descriptors_as_allowed_arrive(wires: tuple[MessageSocket, MessageSocket]) -> None:
    fds = [marked(number) for number in range(FDS_MAX)]
    wires[0].send(Slots(slots=()), fds)
    close_fds(fds)
    received = wires[1].receive(5)
    assert received is not None
    assert not any(os.get_inheritable(fd) for fd in received[1])
    assert marks(received[1]) == list(range(FDS_MAX))


# ---- threads and forks


def test_many_threads_send_whole_messages(wires: tuple[MessageSocket, MessageSocket]) -> None:
    one, other = wires

    def send(number: int) -> None:
        for at in range(50):
            one.send(Value(id=number, value=bytes([at]) * 5000))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[bytes | None]] = {number: [] for number in range(4)}
    for _ in range(200):
        received = other.receive(10)
        assert received is not None
        message = received[0]
        assert isinstance(message, Value)
        seen[message.id].append(message.value)
    for thread in threads:
        thread.join(10)
    assert all(values == [bytes([at]) * 5000 for at in range(50)] for values in seen.values())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_connection_to_its_parent(
    wires: tuple[MessageSocket, MessageSocket],
) -> None:
    one, other = wires
    child = os.fork()
    if child == 0:
        one.forget_after_fork()
        os._exit(0 if one.receive() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    one.send(Hello(version=1, role="tool", pid=1))
    assert other.receive(5) == (Hello(version=1, role="tool", pid=1), [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_user_at_the_other_end_is_the_one_who_connected(tmp_path: Path) -> None:
    nobody = 65534
    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "socket"
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o666)
        tmp_path.chmod(0o777)
        folder = os.open(tmp_path, os.O_PATH)
        for uid in (nobody, 0):
            child = os.fork()
            if child == 0:
                try:
                    os.setuid(uid)
                    # Through the descriptor: the folders above it are root's alone.
                    with socket.socket(socket.AF_UNIX) as peer:
                        peer.connect(f"/proc/self/fd/{folder}/socket")
                        peer.recv(1)
                finally:
                    os._exit(0)
            sock, _ = listener.accept()
            assert peer_uid(sock) == uid
            sock.close()
            os.waitpid(child, 0)
        os.close(folder)
