"""What a template process is asked for: one program, as ``subprocess.Popen`` would start it."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_LENGTH_BYTES = 4
NUMBER_BYTES = 4
"""A process's number, in network order; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One program. Descriptors travel beside it: standard input, output and error, then those in
    ``keep``.

    Texts are the system's, decoded by ``os.fsdecode``. ``parent``: whose child it is to be.
    ``keep``: the numbers that further descriptors have in it. ``group``: its process group, 0 for
    one of its own, unless it gets a new session. ``network``: the name of its network namespace, ""
    for the usual one.
    """

    words: list[str]
    environment: dict[str, str]
    folder: str
    network: str
    keep: list[int]
    parent: int
    new_session: bool
    group: int
    umask: int

    @property
    def launches(self) -> bool:
        """Whether it is torchrun, under this name or another, whose workers are to be forks too."""
        what = arguments_of(self.words)
        return what[:2] == ["-m", "torch.distributed.run"] or what[:3] == ["-m", "ckpt", "run"]


def arguments_of(words: Sequence[str]) -> list[str]:
    """What follows an interpreter's own options in a command: a script, or -m or -c, and arguments.
    Empty where a fork cannot be what the options say."""
    at = 1
    while at < len(words) and words[at] in ("-u", "-W"):
        at += 2 if words[at] == "-W" else 1
    rest = list(words[at:])
    return (
        rest
        if rest and (not rest[0].startswith("-") or (rest[0] in ("-m", "-c") and len(rest) > 1))
        else []
    )


def send(peer: socket.socket, order: Order, fds: Sequence[int]) -> None:
    """Ask for a program. Raises OSError where the template is gone."""
    told = json.dumps(asdict(order)).encode()
    socket.send_fds(peer, [len(told).to_bytes(_LENGTH_BYTES, "little")], fds)
    peer.sendall(told)


def receive(peer: socket.socket) -> tuple[Order, list[int]] | None:
    """What the next program is, and its descriptors; None where nobody asks any more."""
    head, fds, _, _ = socket.recv_fds(peer, _LENGTH_BYTES, 64)
    if not head:
        return None
    told = exactly(peer, int.from_bytes(head, "little"))
    return Order(**json.loads(told)), fds


def exactly(peer: socket.socket, count: int) -> bytes:
    """So many bytes. Raises EOFError where the other side is gone before."""
    got = b""
    while len(got) < count:
        piece = peer.recv(count - len(got))
        if not piece:
            raise EOFError(f"the other side is gone after {len(got)} of {count} bytes")
        got += piece
    return got
