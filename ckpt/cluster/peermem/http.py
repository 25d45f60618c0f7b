"""The protocol of peer memory: requests and answers as values, and their encoding as heads. Pure.

HTTP/1.1 in one spelling: lower-case field names, one space, no field twice, the MAC's line last.
The MAC covers every byte before its line and is compared first, so that no stranger's bytes reach
the parser.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal
from urllib.parse import quote, unquote_to_bytes

from ckpt.backends.base import Buffer, check_key
from ckpt.cluster.peermem.auth import MAC_BYTES, NONCE_BYTES
from ckpt.errors import IntegrityError, NotFoundError, UsageError

# ---- heads

HEAD_BYTES_MAX = 8 << 10
"""No head is longer. A quoted key takes at most 1.5 KiB, and no head has more than two."""
FIELDS_MAX = 16
"""Fields of one head, that is lines after the first."""
TAG_BYTES = 16
"""The MAC behind the bytes of every body."""
END = b"\r\n\r\n"

REASONS = MappingProxyType(
    {
        100: "Continue",
        200: "OK",
        201: "Created",
        204: "No Content",
        206: "Partial Content",
        400: "Bad Request",
        401: "Unauthorized",
        403: "Forbidden",
        404: "Not Found",
        409: "Conflict",
        412: "Precondition Failed",
        413: "Content Too Large",
        416: "Range Not Satisfiable",
        421: "Misdirected Request",
        424: "Failed Dependency",
        503: "Service Unavailable",
        507: "Insufficient Storage",
    }
)

_MAC_FIELD = b"ckpt-mac: "
_MAC_LINE_BYTES = len(_MAC_FIELD) + 2 * MAC_BYTES + len(END)
_MAC_LINE = re.compile(rb"ckpt-mac: [0-9a-f]{64}\r\n\r\n")
_LINE = re.compile(r"([a-z][a-z0-9-]*): ([!-~](?:[ -~]*[!-~])?)")
_START = re.compile(r"([!-~]+) ([!-~]+) ([!-~](?:[ -~]*[!-~])?)")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


class MalformedError(IntegrityError):
    """Bytes that are no head of this protocol."""

    code = "malformed"


@dataclass(frozen=True, slots=True)
class HttpHead:
    """A parsed head: the three parts of its first line, and its fields."""

    start: tuple[str, str, str]
    fields: MappingProxyType[str, str]

    def text(self, name: str) -> str:
        """The field's value. Raises MalformedError if it is missing."""
        if name not in self.fields:
            raise MalformedError(f"a field is missing. name={name}")
        return self.fields[name]

    def number(self, name: str, default: int | None = None) -> int:
        """The field as a number below 10^18, in its one spelling. Raises MalformedError."""
        if default is not None and name not in self.fields:
            return default
        return parse_number(self.text(name), name)

    def only(self, *names: str) -> None:
        """Raise MalformedError if there is a field beside ``names``."""
        for name in self.fields:
            if name not in names:
                raise MalformedError(f"an unknown field. name={name}")


def parse_number(text: str, name: str) -> int:
    """``text`` as a number. Raises MalformedError."""
    if not _NUMBER.fullmatch(text):
        raise MalformedError(f"not a number. name={name}")
    return int(text)


def encode_head(start: str, fields: dict[str, str]) -> bytes:
    """A head without its MAC and end."""
    lines = [start, *(f"{name}: {value}" for name, value in fields.items())]
    return "".join(f"{line}\r\n" for line in lines).encode("ascii")


def with_mac(head: bytes, mac: bytes) -> bytes:
    """A whole signed head."""
    return head + _MAC_FIELD + mac.hex().encode() + END


def unsigned(head: bytes) -> bytes:
    """A whole head without a MAC."""
    return head + b"\r\n"


def split_mac(raw: bytes) -> tuple[bytes, bytes] | None:
    """The bytes that the MAC covers, and the MAC; None if the head does not end with one."""
    if len(raw) < _MAC_LINE_BYTES or not _MAC_LINE.fullmatch(raw, len(raw) - _MAC_LINE_BYTES):
        return None
    at = len(raw) - _MAC_LINE_BYTES
    return raw[:at], bytes.fromhex(raw[at + len(_MAC_FIELD) : -len(END)].decode())


def parse_head(covered: bytes) -> HttpHead:
    """The head in ``covered``, as ``encode_head`` makes it. Raises MalformedError for anything
    else.
    """
    try:
        text = covered.decode("ascii")
    except UnicodeDecodeError:
        raise MalformedError("a head is not ASCII.") from None
    if len(covered) > HEAD_BYTES_MAX or not text.endswith("\r\n"):
        raise MalformedError(
            f"a head is too long, or its last line is incomplete. size_bytes={len(covered)}"
        )
    first, *lines = text[:-2].split("\r\n")
    if len(lines) > FIELDS_MAX:
        raise MalformedError(f"too many fields. count={len(lines)} limit={FIELDS_MAX}")
    start = _START.fullmatch(first)
    if start is None:
        raise MalformedError("not a first line of a head.")
    fields: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or match[1] in fields:
            raise MalformedError("not a field, or a duplicate one.")
        fields[match[1]] = match[2]
    return HttpHead((start[1], start[2], start[3]), MappingProxyType(fields))


# ---- deltas: puts of which only the changed ranges are sent
#
# The body begins with the table of ranges: offset and length of each, 8 bytes each, big-endian. The
# bytes of the ranges follow in order. All bytes between the ranges are those of the base.

RANGE_BYTES = 16
"""One entry of the table."""

RANGES_MAX = 4096
"""Ranges of one put: a table of 64 KiB, well within the memory of one connection."""

ByteRange = tuple[int, int]
"""Offset and length in bytes."""


class BaseGoneError(NotFoundError):
    """The peer no longer has this content of the base: put the whole object."""

    code = "base-gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredContent:
    """One content of a key in a peer's memory, as the peer named it when it was put.

    ``version`` tells it from all other contents within one incarnation of the peer's server, which
    is ``boot``.
    """

    key: str
    size_bytes: int
    version: int
    boot: str


def encode_ranges(ranges: Sequence[ByteRange]) -> bytes:
    """The table of ``ranges``, which must be valid by ``ranges_problem``."""
    return struct.pack(
        f">{2 * len(ranges)}Q", *(number for byte_range in ranges for number in byte_range)
    )


def parse_ranges(table: bytes | bytearray, *, size_bytes: int, sent_bytes: int) -> list[ByteRange]:
    """The ranges in ``table``, of an object of ``size_bytes``; ``sent_bytes`` follow the table.

    Raises MalformedError.
    """
    numbers = struct.unpack(f">{len(table) // 8}Q", table)
    ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
    problem = ranges_problem(ranges, size_bytes=size_bytes)
    if problem is None and sum(length for _, length in ranges) != sent_bytes:
        problem = f"the ranges are not as long as what follows. sent_bytes={sent_bytes}"
    if problem is not None:
        raise MalformedError(problem)
    return ranges


def ranges_problem(ranges: Sequence[ByteRange], *, size_bytes: int) -> str | None:
    """Why ``ranges`` are invalid for an object of ``size_bytes``, or None.

    Ranges are not empty, ascend, and don't overlap.
    """
    if len(ranges) > RANGES_MAX:
        return f"too many ranges. count={len(ranges)} limit={RANGES_MAX}"
    end = 0
    for offset, length in ranges:
        if length < 1 or offset < end or offset + length > size_bytes:
            return (
                f"a range is empty, out of order or outside. offset={offset} length={length} "
                f"size_bytes={size_bytes}"
            )
        end = offset + length
    return None


def kept_and_sent(
    ranges: Sequence[ByteRange], *, size_bytes: int
) -> Iterator[tuple[ByteRange, ByteRange]]:
    """For each range, the part of the base that is kept before it, and that range.

    Last the part that is kept behind all of them, and an empty range.
    """
    at = 0
    for offset, length in (*ranges, (size_bytes, 0)):
        yield (at, offset - at), (offset, length)
        at = offset + length


def slice_ranges(data: Sequence[Buffer], ranges: Sequence[ByteRange]) -> list[memoryview]:
    """Views of ``ranges`` of the concatenation of ``data``. Nothing is copied."""
    pieces: list[memoryview] = []
    views = [memoryview(buffer).cast("B") for buffer in data]
    index, begin = 0, 0  # the buffer that holds the next byte, and the offset at which it begins
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            while offset >= begin + len(views[index]):
                begin += len(views[index])
                index += 1
            piece = views[index][offset - begin : end - begin]
            pieces.append(piece)
            offset += len(piece)
    return pieces


Verb = Literal["PUT", "GET", "HEAD", "LIST", "DELETE"]

PROTOCOL = 1
OBJECTS = "/o/"
LISTING = "/l?"
HELLO = "/hello"
WHY_CHARS_MAX = 300

_HTTP = "HTTP/1.1"
_NONCE = re.compile(rf"[0-9a-f]{{{2 * NONCE_BYTES}}}")
_SPAN = re.compile(r"bytes=([0-9]+)-([0-9]+)")
_LIST = re.compile(r"/l\?prefix=([^&]*)&after=([^&]*)")
_MACS = re.compile(r"[a-z0-9-]{1,20}(?:,[a-z0-9-]{1,20}){0,3}")
_COMMON = ("host", "ckpt-boot", "ckpt-epoch", "ckpt-counter")
_BASE = ("ckpt-base", "ckpt-base-version", "ckpt-size", "ckpt-ranges")
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class PeerHello:
    """A client's first request: its nonce, and the body MACs that it supports, best first."""

    nonce: str
    macs: tuple[str, ...]

    def encode(self, host: str) -> bytes:
        """The head without its MAC."""
        fields = {"host": host, "ckpt-protocol": str(PROTOCOL), "ckpt-nonce": self.nonce}
        return encode_head(
            f"GET {HELLO} {_HTTP}", {**fields, "ckpt-body-macs": ",".join(self.macs)}
        )

    @classmethod
    def parse(cls, head: HttpHead) -> PeerHello:
        """Parse it. Raises MalformedError."""
        if head.start != ("GET", HELLO, _HTTP) or head.text("ckpt-protocol") != str(PROTOCOL):
            raise MalformedError(f"not a hello of this protocol version. protocol={PROTOCOL}")
        head.only("host", "ckpt-protocol", "ckpt-nonce", "ckpt-body-macs")
        macs = head.text("ckpt-body-macs")
        if not _MACS.fullmatch(macs):
            raise MalformedError("not a list of body MACs.")
        return cls(_nonce(head, "ckpt-nonce"), tuple(macs.split(",")))


@dataclass(frozen=True, slots=True)
class PeerWelcome:
    """A server's answer to a hello: its nonce, incarnation, epoch, and the body MAC to use."""

    nonce: str
    boot: str
    epoch: int
    mac: str

    def encode(self) -> bytes:
        """The head without its MAC."""
        fields = {"content-length": "0", "ckpt-nonce": self.nonce, "ckpt-boot": self.boot}
        return encode_head(
            f"{_HTTP} 200 OK", {**fields, "ckpt-epoch": str(self.epoch), "ckpt-body-mac": self.mac}
        )

    @classmethod
    def parse(cls, head: HttpHead) -> PeerWelcome:
        """Parse it. Raises MalformedError."""
        if head.start[:2] != (_HTTP, "200"):
            raise MalformedError("not a welcome.")
        boot, mac = _nonce(head, "ckpt-boot"), head.text("ckpt-body-mac")
        return cls(_nonce(head, "ckpt-nonce"), boot, head.number("ckpt-epoch"), mac)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBase:
    """The base of a PUT: the content ``version`` of ``key``, as long as the object that is put.

    The body begins with a table of ``ranges`` ranges; all other bytes are the base's.
    """

    key: str
    version: int
    size_bytes: int
    ranges: int

    @property
    def table_bytes(self) -> int:
        """Length of the table."""
        return self.ranges * RANGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """One operation. ``key`` is the prefix of a LIST.

    ``boot``: the incarnation of the server that it is meant for. ``counter`` grows on a connection.
    ``body_bytes``: the body of a PUT without its tag: the object, or with a ``base`` what changed.
    ``span``: offset and size of a GET. ``waits``: the body is sent after the server's go-ahead.
    """

    verb: Verb
    key: str
    boot: str
    epoch: int
    counter: int
    after: str = ""
    body_bytes: int | None = None
    span: tuple[int, int] | None = None
    create_only: bool = False
    waits: bool = False
    base: DeltaBase | None = None

    @property
    def object_bytes(self) -> int:
        """Length of a PUT's object."""
        return (self.body_bytes or 0) if self.base is None else self.base.size_bytes

    def encode(self, host: str) -> bytes:
        """The head without its MAC."""
        fields = {
            "host": host,
            "ckpt-boot": self.boot,
            "ckpt-epoch": str(self.epoch),
            "ckpt-counter": str(self.counter),
        }
        if self.body_bytes is not None:
            fields["content-length"] = str(self.body_bytes + TAG_BYTES)
        if self.span is not None:
            fields["range"] = f"bytes={self.span[0]}-{self.span[0] + self.span[1] - 1}"
        if self.create_only:
            fields["if-none-match"] = "*"
        if self.waits:
            fields["expect"] = "100-continue"
        if self.base is not None:
            facts = (
                OBJECTS + _quoted(self.base.key),
                self.base.version,
                self.base.size_bytes,
                self.base.ranges,
            )
            fields |= {name: str(fact) for name, fact in zip(_BASE, facts, strict=True)}
        if self.verb == "LIST":
            return encode_head(
                f"GET {LISTING}prefix={_quoted(self.key)}&after={_quoted(self.after)} {_HTTP}",
                fields,
            )
        return encode_head(f"{self.verb} {OBJECTS}{_quoted(self.key)} {_HTTP}", fields)

    @classmethod
    def parse(cls, head: HttpHead) -> PeerRequest:
        """Parse it. Raises MalformedError."""
        method, target, version = head.start
        if version != _HTTP:
            raise MalformedError("not HTTP/1.1.")
        head.text("host")
        boot, epoch, counter = (
            _nonce(head, "ckpt-boot"),
            head.number("ckpt-epoch"),
            head.number("ckpt-counter"),
        )
        if method == "GET" and (listing := _LIST.fullmatch(target)):
            head.only(*_COMMON)
            prefix, after = _unquoted(listing[1]), _unquoted(listing[2])
            return cls(
                verb="LIST", key=prefix, after=after, boot=boot, epoch=epoch, counter=counter
            )
        key = _key(target)
        match method:
            case "PUT":
                based = _BASE if _BASE[0] in head.fields else ()
                head.only(*_COMMON, "content-length", "if-none-match", "expect", *based)
                size = head.number("content-length") - TAG_BYTES
                if size < 0:
                    raise MalformedError("a body without its tag.")
                return cls(
                    verb="PUT",
                    key=key,
                    boot=boot,
                    epoch=epoch,
                    counter=counter,
                    body_bytes=size,
                    create_only=_flag(head, "if-none-match", "*"),
                    waits=_flag(head, "expect", "100-continue"),
                    base=_base(head, body_bytes=size),
                )
            case "GET":
                head.only(*_COMMON, "range")
                return cls(
                    verb="GET",
                    key=key,
                    boot=boot,
                    epoch=epoch,
                    counter=counter,
                    span=_span(head.text("range")),
                )
            case "HEAD" | "DELETE":
                head.only(*_COMMON)
                verb: Verb = "HEAD" if method == "HEAD" else "DELETE"
                return cls(verb=verb, key=key, boot=boot, epoch=epoch, counter=counter)
            case _:
                raise MalformedError("an unknown method.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAnswer:
    """A server's answer. ``counter`` is the request's. A body of ``body_bytes``, if any, is
    followed by its tag.
    """

    status: int
    boot: str
    epoch: int
    counter: int
    body_bytes: int = 0
    size_bytes: int | None = None
    version: int = 0
    modified_us: int = 0
    more: bool = False
    why: str = ""

    def encode(self) -> bytes:
        """The head without its MAC."""
        length = self.body_bytes + TAG_BYTES if self.body_bytes else 0
        fields = {
            "content-length": str(length),
            "ckpt-boot": self.boot,
            "ckpt-epoch": str(self.epoch),
        }
        fields["ckpt-counter"] = str(self.counter)
        if self.size_bytes is not None:
            fields["ckpt-size"] = str(self.size_bytes)
            fields["ckpt-version"] = str(self.version)
            fields["ckpt-modified"] = str(self.modified_us)
        if self.more:
            fields["ckpt-more"] = "1"
        if self.why:
            fields["ckpt-why"] = header_text(self.why)
        return encode_head(f"{_HTTP} {self.status} {REASONS[self.status]}", fields)

    @classmethod
    def parse(cls, head: HttpHead) -> PeerAnswer:
        """Parse it. Raises MalformedError."""
        status = parse_status(head)
        length = head.number("content-length")
        if 0 < length <= TAG_BYTES:
            raise MalformedError("a body without its tag.")
        size = head.number("ckpt-size") if "ckpt-size" in head.fields else None
        return cls(
            status=status,
            boot=_nonce(head, "ckpt-boot"),
            epoch=head.number("ckpt-epoch"),
            counter=head.number("ckpt-counter"),
            body_bytes=max(0, length - TAG_BYTES),
            size_bytes=size,
            version=head.number("ckpt-version", 0),
            modified_us=head.number("ckpt-modified", 0),
            more="ckpt-more" in head.fields,
            why=head.fields.get("ckpt-why", ""),
        )

    @property
    def modified_unix_s(self) -> float:
        """When the object was put, by the server's clock."""
        return self.modified_us / _MILLION


CONTINUE = f"{_HTTP} 100 {REASONS[100]}\r\n\r\n".encode()
"""The go-ahead for a body. It has no MAC: a client that believes a forged one sends bytes that are
then refused.
"""


def parse_status(head: HttpHead) -> int:
    """The status in an answer's head. Raises MalformedError."""
    if head.start[0] != _HTTP:
        raise MalformedError("not an answer of HTTP/1.1.")
    status = parse_number(head.start[1], "status")
    if status not in REASONS:
        raise MalformedError(f"an unknown status. status={status}")
    return status


def unsigned_refusal(status: int, why: str) -> bytes:
    """The head of a refusal for a client with which no keys are shared."""
    fields = {"content-length": "0", "ckpt-why": header_text(why), "connection": "close"}
    return encode_head(f"{_HTTP} {status} {REASONS[status]}", fields)


def header_text(text: str) -> str:
    """``text``, reduced to what a field may hold."""
    kept = "".join(c if " " <= c <= "~" else "?" for c in text).strip()
    return kept[:WHY_CHARS_MAX].strip() or "-"


def to_micros(seconds: float) -> int:
    """Whole microseconds, the unit of times in heads."""
    return max(0, int(seconds * _MILLION))


def _key(target: str) -> str:
    if not target.startswith(OBJECTS):
        raise MalformedError("an unknown path.")
    try:
        return check_key(_unquoted(target[len(OBJECTS) :]))
    except UsageError as error:
        raise MalformedError(f"not a key. reason={error}") from None


def _base(head: HttpHead, *, body_bytes: int) -> DeltaBase | None:
    if _BASE[0] not in head.fields:
        return None
    version, size, ranges = (head.number(name) for name in _BASE[1:])
    base = DeltaBase(key=_key(head.text(_BASE[0])), version=version, size_bytes=size, ranges=ranges)
    if ranges > RANGES_MAX:
        raise MalformedError(f"too many ranges. count={ranges} limit={RANGES_MAX}")
    if not 0 <= body_bytes - base.table_bytes <= size:
        raise MalformedError("the length of a body does not fit its table and object.")
    return base


def _quoted(text: str) -> str:
    return quote(text, safe="/")


def _unquoted(text: str) -> str:
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise MalformedError("a path is not UTF-8.") from None
    if _quoted(decoded) != text:
        raise MalformedError("a path that is not in its one spelling.")
    return decoded


def _nonce(head: HttpHead, name: str) -> str:
    if not _NONCE.fullmatch(text := head.text(name)):
        raise MalformedError(f"not a nonce. name={name}")
    return text


def _flag(head: HttpHead, name: str, value: str) -> bool:
    if name in head.fields and head.fields[name] != value:
        raise MalformedError(f"an unknown value. name={name}")
    return name in head.fields


def _span(text: str) -> tuple[int, int]:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise MalformedError("not a range of bytes.")
    first, last = parse_number(match[1], "range"), parse_number(match[2], "range")
    if last < first:
        raise MalformedError("an empty range of bytes.")
    return first, last - first + 1


# ---- authorization: whether an authenticated request is served

RefusalKind = Literal[
    "mac",
    "malformed",
    "replay",
    "boot",
    "epoch",
    "taken",
    "missing",
    "range",
    "read-only",
    "too-large",
    "full",
    "base",
    "body",
    "slow",
    "crowded",
    "tls",
]
"""Why a request or a connection was refused; each kind is counted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal: its status, its kind, and the reason as text."""

    status: int
    kind: RefusalKind
    why: str


def authorize(request: PeerRequest, *, boot: str, epoch: int, last_counter: int) -> Refusal | None:
    """Why ``request`` is refused, or None.

    ``epoch`` is the highest seen, ``last_counter`` the last one of this connection.
    """
    if request.counter <= last_counter:
        return Refusal(
            401,
            "replay",
            f"a counter that was used before. counter={request.counter} last={last_counter}",
        )
    if request.boot != boot:
        return Refusal(
            421,
            "boot",
            f"meant for another incarnation of this server. meant={request.boot} boot={boot}",
        )
    if request.epoch < epoch:
        return epoch_refusal(request.epoch, epoch)
    return None


def epoch_refusal(epoch: int, known: int) -> Refusal:
    """The refusal of an older epoch."""
    return Refusal(409, "epoch", f"a newer epoch is open. epoch={epoch} known={known}")
