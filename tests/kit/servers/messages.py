"""HTTP/1.1 messages as they travel, for a proxy that passes them on piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from kit.servers.rules import Answer, Flip, Request

PIECE_BYTES = 256 << 10
HEAD_LINES_MAX = 200

Pieces = Iterator[tuple[bytes, bool]]
"""A body's bytes as they travel; beside each piece whether it is content, not the framing of
chunks."""


class BrokenError(Exception):
    """The other side ended in the middle of a message."""


@dataclass(frozen=True, slots=True)
class Head:
    """A start line and the header lines; ``headers`` has lower-case names, ``lines`` is as it
    came."""

    start: str
    lines: tuple[bytes, ...]
    headers: dict[str, str]

    @property
    def status(self) -> int:
        """An answer's status."""
        return int(self.start.split(" ", 2)[1])

    def encode(self, start: str, *, without: frozenset[str] = frozenset()) -> bytes:
        """The head's bytes under another start line, less the headers named in ``without``."""
        kept = [
            line
            for line in self.lines
            if line.partition(b":")[0].strip().lower().decode("latin-1") not in without
        ]
        return b"\r\n".join([start.encode("latin-1"), *kept, b"", b""])


def read_head(reader: BinaryIO) -> Head | None:
    """The next message's head, None where the other side ended in order before it."""
    start = reader.readline()
    if not start.endswith(b"\r\n"):
        return None
    lines: list[bytes] = []
    while (line := reader.readline()) != b"\r\n":
        if not line.endswith(b"\r\n") or len(lines) >= HEAD_LINES_MAX:
            raise BrokenError
        lines.append(line[:-2])
    pairs = (line.decode("latin-1").partition(":") for line in lines)
    return Head(
        start[:-2].decode("latin-1"),
        tuple(lines),
        {name.strip().lower(): value.strip() for name, _, value in pairs},
    )


def lasts_to_end(head: Head) -> bool:
    """Whether nothing says how long the body is: an answer's then lasts until the connection
    ends."""
    return not head.headers.keys() & {"content-length", "transfer-encoding"}


def body_of(reader: BinaryIO, head: Head, *, to_end: bool = False) -> Pieces:
    """The body of the message that begins with ``head``. ``to_end``: it may last until the
    connection ends (answers do)."""
    if to_end and lasts_to_end(head):
        while piece := reader.read(PIECE_BYTES):
            yield piece, True
        return
    if "chunked" in head.headers.get("transfer-encoding", "").lower():
        while True:
            line = reader.readline()
            yield line, False
            size = int(line.split(b";")[0], 16)
            for piece in _exactly(reader, size):
                yield piece, True
            yield reader.readline(), False
            if size == 0:
                return
    for piece in _exactly(reader, int(head.headers.get("content-length", 0))):
        yield piece, True


def _exactly(reader: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    while size_bytes:
        piece = reader.read(min(size_bytes, PIECE_BYTES))
        if not piece:
            raise BrokenError
        size_bytes -= len(piece)
        yield piece


def flipped(body: Pieces, flip: Flip | None) -> Iterator[bytes]:
    """The body with the fault in it; as it is where there is none."""
    at = 0
    for piece, content in body:
        if flip is not None and content and at <= flip.at_byte < at + len(piece):
            spoiled = bytearray(piece)
            spoiled[flip.at_byte - at] ^= 1
            yield bytes(spoiled)
        else:
            yield piece
        at += len(piece) if content else 0


def cut(body: Iterator[bytes], keep_bytes: int | None) -> Iterator[bytes]:
    """The first ``keep_bytes``; all where it is None."""
    for piece in body:
        if keep_bytes is None:
            yield piece
            continue
        yield piece[:keep_bytes]
        keep_bytes -= len(piece)
        if keep_bytes <= 0:
            return


def error_answer(answer: Answer, request: Request) -> bytes:
    """A whole error answer in S3's words."""
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{answer.code}</Code><Message>spoiled</Message></Error>'
    body = b"" if request.method == "HEAD" else text.encode()
    head = f"HTTP/1.1 {answer.status} Spoiled\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
