"""Everything that a process of the same user may do to a keeper's socket without being of its job,
at random.

A stranger has no launch: it says nothing, or no frames, or messages that nobody sends, or greets as
a tool, which may only ask.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import socket
import struct
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from ckpt.ipc.frames import FDS_MAX, FRAME_BYTES_MAX
from ckpt.ipc.messages import WIRE_VERSION, AnyMessage, GetStatus, Hello, Message

KINDS: tuple[type[Message], ...] = typing.get_args(AnyMessage)
_PACK = msgspec.msgpack.Encoder().encode
CONNECTIONS_MAX = 40
"""Open at a time."""
WORDS = (
    "",
    "job",
    "l1",
    "\0",
    "ü" * 50,
    "x" * 3000,
    "supervisor",
    "slots/1-5/0",
    "../../etc",
    "tool",
    "committed",
)
NUMBERS = (0, 1, -1, 2, 16, 255, 4096, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)


def any_value(rng: random.Random, depth: int = 0) -> object:
    """A value of any type."""
    match rng.randrange(9 if depth < 3 else 6):
        case 0:
            return None
        case 1:
            return rng.choice((True, False))
        case 2:
            return rng.choice(NUMBERS)
        case 3:
            return rng.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
        case 4:
            return rng.choice(WORDS)
        case 5:
            return rng.randbytes(rng.choice((0, 1, 16, 5000)))
        case 6:
            return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
        case 7:
            return {rng.choice(WORDS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
        case _:
            return [[1, 2], rng.choice(NUMBERS), "x"]


def typed_value(rng: random.Random, kind: object) -> object:
    """A value that mostly has the type that a field wants."""
    text = str(kind)
    if rng.random() < 0.1:
        return any_value(rng)
    for word, values in (
        (
            "RemoteError",
            (
                {"code": "integrity", "text": "t", "rank": 1},
                {"code": "", "text": "", "rank": -1},
                None,
            ),
        ),
        ("Mapping", ({}, {"a": 5}, {"a": [3, "b"]}, {"x": None})),
        ("tuple", ([], [], [bytes(16)], ["tag"], [["packs/p", 0, 5]])),
        (
            "SnapshotId",
            (
                {"epoch": 3, "step": 17},
                {"epoch": 1, "step": 5},
                {"epoch": 2**62, "step": -1},
                [1, 5],
            ),
        ),
        ("bool", (True, False)),
        ("int", NUMBERS),
        ("float", (0.0, -1.0, 1e300, float("nan"))),
        ("bytes", (b"", b"v" * 999)),
        ("str", WORDS),
        ("None", (None,)),
    ):
        if word in text:
            return rng.choice(values)
    return any_value(rng)


def any_message(rng: random.Random, kind: type[Message] | None = None) -> bytes:
    """A body that looks like a message of some kind, right or wrong."""
    kind = kind or rng.choice(KINDS)
    fields = {one.name: typed_value(rng, one.type) for one in msgspec.structs.fields(kind)}
    fields["type"] = kind.__name__
    for name in list(fields):
        if rng.random() < 0.05:
            del fields[name]
    return _PACK(fields)


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut off or put in."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(4):
            case 0:
                found[at : at + 1] = rng.randbytes(1)
            case 1:
                del found[at : at + rng.randrange(1, 20)]
            case 2:
                found[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                del found[at:]
    return bytes(found)


@contextlib.contextmanager
def any_fds(rng: random.Random, most: int = FDS_MAX) -> Iterator[list[int]]:
    """Descriptors of all sorts, closed here afterwards."""
    made: list[int] = []
    try:
        for _ in range(rng.choice((1, 1, 2, most))):
            match rng.randrange(4):
                case 0:
                    made += os.pipe()
                case 1:
                    made.append(os.memfd_create("fuzz"))
                    os.ftruncate(made[-1], rng.choice((0, 1, 4096, 1 << 20)))
                case 2:
                    made.append(os.open(os.devnull, os.O_RDONLY))
                case _:
                    made += [one.detach() for one in socket.socketpair()]
        yield made[:most]
    finally:
        for fd in made:
            os.close(fd)


def tool_hello(rng: random.Random) -> bytes:
    """Of somebody who may look."""
    return framed(
        _PACK(
            Hello(
                id=1, version=WIRE_VERSION, role="tool", pid=os.getpid(), launch=rng.choice(WORDS)
            )
        )
    )


def bad_hello(rng: random.Random) -> bytes:
    """Of somebody who is not of this job: another version, role or launch, or no such rank."""
    known = {
        "id": 1,
        "version": WIRE_VERSION,
        "role": "trainer",
        "pid": 1,
        "launch": "no launch of this job",
        "ranks": 1,
    }
    wrong = rng.choice(
        (
            {"version": rng.choice((0, 1, 99, 2**31, -1))},
            {"role": "keeper"},
            {"role": "supervisor"},
            {"rank": 7},
            {"ranks": 0},
            {"ranks": 10**6},
            {},
        )
    )
    return framed(_PACK({**known, **wrong, "type": "Hello"}))


class Strangers:
    """Attack after attack over sockets that ``connect`` gives. What is left open is closed by
    ``close``."""

    def __init__(self, rng: random.Random, connect: Callable[[], socket.socket]) -> None:
        self._rng = rng
        self._connect = connect
        self._open: list[socket.socket] = []

    def attack(self) -> None:
        """One connection, and what is done on it."""
        rng, sock = self._rng, self._connect()
        sock.settimeout(5.0)
        with contextlib.suppress(
            ConnectionError, TimeoutError
        ):  # the keeper hung up, or does not read
            self._speak(sock)
        if rng.random() < 0.4 and len(self._open) < CONNECTIONS_MAX:
            self._open.append(sock)
        else:
            sock.close()
        if self._open and rng.random() < 0.3:
            self._open.pop(rng.randrange(len(self._open))).close()

    def close(self) -> None:
        for sock in self._open:
            sock.close()
        self._open.clear()

    def _speak(self, sock: socket.socket) -> None:
        rng = self._rng
        if rng.random() < 0.5:
            sock.sendall(rng.choice((tool_hello, bad_hello))(rng))
        match rng.randrange(9):
            case 0:
                return  # never a word
            case 1:
                sock.sendall(rng.randbytes(rng.choice((1, 3, 4, 100, 70_000))))
            case 2:
                length = rng.choice(
                    (FRAME_BYTES_MAX + 1, FRAME_BYTES_MAX, 2**32 - 1, 65_537, 65_536)
                )
                sock.sendall(
                    struct.pack("<I", length) + rng.randbytes(rng.choice((0, 10, 300_000)))
                )
            case 3:
                sock.sendall(
                    b"".join(framed(any_message(rng)) for _ in range(rng.randrange(1, 30)))
                )
            case 4:
                frame = framed(any_message(rng))
                sock.sendall(frame[: rng.randrange(len(frame))])
            case 5:
                sock.sendall(mutated(rng, b"".join(framed(any_message(rng)) for _ in range(3))))
            case 6:
                self._with_fds(sock)
            case 7:
                sock.sendall(
                    framed(_PACK(GetStatus(id=1))) * rng.choice((1, 50, 3000))
                )  # and reads nothing
            case _:
                sock.sendall(b"".join(framed(any_message(rng, Hello)) for _ in range(5)))
        if rng.random() < 0.3:
            _read_some(sock)

    def _with_fds(self, sock: socket.socket) -> None:
        rng = self._rng
        with any_fds(rng) as fds:
            frame = framed(any_message(rng))
            cut = rng.choice((0, 0, 1, len(frame) // 2))
            if cut:
                sock.sendall(frame[:cut])
            send_fds(sock, frame[cut:], fds)


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    socket.send_fds(sock, [data], list(fds))


def _read_some(sock: socket.socket) -> None:
    if select.select([sock], [], [], 0.05)[0]:
        _, fds, _, _ = socket.recv_fds(sock, 1 << 16, FDS_MAX)
        for fd in fds:
            os.close(fd)


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def own_bytes(pid: int) -> int:
    """Resident memory of a process that it shares with nobody: without slots and libraries."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()
