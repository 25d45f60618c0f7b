"""What is asked and answered, as values, and their one spelling as heads. Pure."""

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

# The heads of requests and answers, as bytes and as values. Pure.
#
# HTTP/1.1 in one spelling, and nothing beside it: lower-case names, one space, no header twice,
# the MAC's line last. The MAC covers every byte before its line and is compared first, so that a
# stranger's bytes are never taken apart.

HEAD_BYTES_MAX = 8 << 10
"""No head is longer; a quoted key takes 1.5 KiB at most, and no head has more than two."""
FIELDS_MAX = 16
"""Lines of one head behind the first."""
TAG_BYTES = 16
"""What follows the bytes of every body and proves them."""
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
    """The three words of a first line, and the fields behind it."""

    start: tuple[str, str, str]
    fields: MappingProxyType[str, str]

    def text(self, name: str) -> str:
        """The field's value. Raises MalformedError where it is missing."""
        if name not in self.fields:
            raise MalformedError(f"a field is missing. name={name}")
        return self.fields[name]

    def number(self, name: str, default: int | None = None) -> int:
        """The field as a number in its one decimal spelling, below 10^18."""
        if default is not None and name not in self.fields:
            return default
        return parse_number(self.text(name), name)

    def only(self, *names: str) -> None:
        """Raise MalformedError where there is a field beside ``names``."""
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
    """The whole of a signed head."""
    return head + _MAC_FIELD + mac.hex().encode() + END


def unsigned(head: bytes) -> bytes:
    """The whole of a head that nobody vouches for."""
    return head + b"\r\n"


def split_mac(raw: bytes) -> tuple[bytes, bytes] | None:
    """What a MAC covers, and the MAC; None where the head has none at its end."""
    if len(raw) < _MAC_LINE_BYTES or not _MAC_LINE.fullmatch(raw, len(raw) - _MAC_LINE_BYTES):
        return None
    at = len(raw) - _MAC_LINE_BYTES
    return raw[:at], bytes.fromhex(raw[at + len(_MAC_FIELD) : -len(END)].decode())


def parse_head(covered: bytes) -> HttpHead:
    """The head in ``covered``, which is what ``encode_head`` makes. Raises MalformedError for
    everything else."""
    try:
        text = covered.decode("ascii")
    except UnicodeDecodeError:
        raise MalformedError("a head is not ASCII.") from None
    if len(covered) > HEAD_BYTES_MAX or not text.endswith("\r\n"):
        raise MalformedError(
            f"a head is too long or ends in the middle of a line. size_bytes={len(covered)}"
        )
    first, *lines = text[:-2].split("\r\n")
    if len(lines) > FIELDS_MAX:
        raise MalformedError(f"too many fields. count={len(lines)} limit={FIELDS_MAX}")
    start = _START.fullmatch(first)
    if start is None:
        raise MalformedError("not the first line of a head.")
    fields: dict[str, str] = {}
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None or found[1] in fields:
            raise MalformedError("not a field, or one that is there twice.")
        fields[found[1]] = found[2]
    return HttpHead((start[1], start[2], start[3]), MappingProxyType(fields))


# Putting only what changed: which ranges of an object are sent, and which are those of its base.
# Pure.
#
# The table of ranges leads such a body: for each its offset and its length, 8 bytes each,
# big-endian. The ranges' bytes follow in order. Everything between them is the base's.

RANGE_BYTES = 16
"""One entry of the table."""

RANGES_MAX = 4096
"""Most ranges of one put: a table of 64 KiB, well inside what a connection may take."""

ByteRange = tuple[int, int]
"""Offset and length in bytes."""


class BaseGoneError(NotFoundError):
    """The peer does not have the base any more, or has another content of it: put the whole
    object."""

    code = "base-gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredContent:
    """One content of a key in a peer's memory, as the peer named it when that was put.

    ``version`` tells it from all others of one start of the peer's server, which is ``boot``.
    """

    key: str
    size_bytes: int
    version: int
    boot: str


def encode_ranges(ranges: Sequence[ByteRange]) -> bytes:
    """The table of ``ranges``, in which ``ranges_problem`` finds nothing wrong."""
    return struct.pack(f">{2 * len(ranges)}Q", *(number for one in ranges for number in one))


def parse_ranges(table: bytes | bytearray, *, size_bytes: int, sent_bytes: int) -> list[ByteRange]:
    """The ranges in ``table``, of an object of ``size_bytes`` of which ``sent_bytes`` follow.
    Raises MalformedError."""
    numbers = struct.unpack(f">{len(table) // 8}Q", table)
    ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
    why = ranges_problem(ranges, size_bytes=size_bytes)
    if why is None and sum(length for _, length in ranges) != sent_bytes:
        why = f"the ranges are not as long as what follows. sent_bytes={sent_bytes}"
    if why is not None:
        raise MalformedError(why)
    return ranges


def ranges_problem(ranges: Sequence[ByteRange], *, size_bytes: int) -> str | None:
    """What makes ``ranges`` unfit for an object of ``size_bytes``, or None. None may be empty; they
    ascend without overlap."""
    if len(ranges) > RANGES_MAX:
        return f"too many ranges. count={len(ranges)} limit={RANGES_MAX}"
    end = 0
    for offset, length in ranges:
        if length < 1 or offset < end or offset + length > size_bytes:
            return f"a range is empty, out of order or outside. offset={offset} length={length} size_bytes={size_bytes}"
        end = offset + length
    return None


def kept_and_sent(
    ranges: Sequence[ByteRange], *, size_bytes: int
) -> Iterator[tuple[ByteRange, ByteRange]]:
    """What is kept before each range, and that range; last what is kept behind all of them, and an
    empty range."""
    at = 0
    for offset, length in (*ranges, (size_bytes, 0)):
        yield (at, offset - at), (offset, length)
        at = offset + length


def slice_ranges(data: Sequence[Buffer], ranges: Sequence[ByteRange]) -> list[memoryview]:
    """Views of what ``ranges`` hold of the concatenation of ``data``; nothing is copied."""
    pieces: list[memoryview] = []
    views = [memoryview(one).cast("B") for one in data]
    place, begin = 0, 0  # of the buffer in which the next byte lies, and where that buffer begins
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            while offset >= begin + len(views[place]):
                begin += len(views[place])
                place += 1
            piece = views[place][offset - begin : end - begin]
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
    """A client's first words: its nonce, and the body MACs that it can make, best first."""

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
        """Raises MalformedError."""
        if head.start != ("GET", HELLO, _HTTP) or head.text("ckpt-protocol") != str(PROTOCOL):
            raise MalformedError(f"not a hello of this version. protocol={PROTOCOL}")
        head.only("host", "ckpt-protocol", "ckpt-nonce", "ckpt-body-macs")
        macs = head.text("ckpt-body-macs")
        if not _MACS.fullmatch(macs):
            raise MalformedError("not a list of body MACs.")
        return cls(_nonce(head, "ckpt-nonce"), tuple(macs.split(",")))


@dataclass(frozen=True, slots=True)
class PeerWelcome:
    """A server's answer to a hello."""

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
        """Raises MalformedError."""
        if head.start[:2] != (_HTTP, "200"):
            raise MalformedError("not a welcome.")
        boot, mac = _nonce(head, "ckpt-boot"), head.text("ckpt-body-mac")
        return cls(_nonce(head, "ckpt-nonce"), boot, head.number("ckpt-epoch"), mac)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBase:
    """What a PUT refers to: the content ``version`` of ``key``, as long as the object that is put.

    The body begins with a table of ``ranges`` ranges; what they don't hold is the base's.
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
    """One operation. ``key`` is the prefix of a LIST. ``body_bytes`` is what a PUT sends, its tag
    not counted: the object, or with a ``base`` what changed of it; ``span`` is a GET's offset and
    size. ``waits``: the body is sent only when the server says that it takes it.
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
        """Raises MalformedError."""
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
    """What a server says. ``counter`` is the request's. ``body_bytes`` are followed by a tag, where
    there are any."""

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
        """Raises MalformedError."""
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
"""The go-ahead for a body. Nobody vouches for it: who believes a false one sends bytes that are
then refused."""


def parse_status(head: HttpHead) -> int:
    """The status of an answer's head. Raises MalformedError."""
    if head.start[0] != _HTTP:
        raise MalformedError("not an answer of HTTP/1.1.")
    status = parse_number(head.start[1], "status")
    if status not in REASONS:
        raise MalformedError(f"an unknown status. status={status}")
    return status


def unsigned_refusal(status: int, why: str) -> bytes:
    """An answer's head for somebody with whom no keys are shared."""
    fields = {"content-length": "0", "ckpt-why": header_text(why), "connection": "close"}
    return encode_head(f"{_HTTP} {status} {REASONS[status]}", fields)


def header_text(text: str) -> str:
    """``text`` as it can stand in a field."""
    kept = "".join(c if " " <= c <= "~" else "?" for c in text).strip()
    return kept[:WHY_CHARS_MAX].strip() or "-"


def to_micros(seconds: float) -> int:
    """Whole microseconds, as times travel."""
    return max(0, int(seconds * _MILLION))


def _key(target: str) -> str:
    if not target.startswith(OBJECTS):
        raise MalformedError("an unknown path.")
    try:
        return check_key(_unquoted(target[len(OBJECTS) :]))
    except UsageError as error:
        raise MalformedError(f"not a key. why={error}") from None


def _base(head: HttpHead, *, body_bytes: int) -> DeltaBase | None:
    if _BASE[0] not in head.fields:
        return None
    version, size, ranges = (head.number(name) for name in _BASE[1:])
    base = DeltaBase(key=_key(head.text(_BASE[0])), version=version, size_bytes=size, ranges=ranges)
    if ranges > RANGES_MAX:
        raise MalformedError(f"too many ranges. count={ranges} limit={RANGES_MAX}")
    if not 0 <= body_bytes - base.table_bytes <= size:
        raise MalformedError("a body that is no table and a part of its object.")
    return base


def _quoted(text: str) -> str:
    return quote(text, safe="/")


def _unquoted(text: str) -> str:
    try:
        found = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise MalformedError("a path is not UTF-8.") from None
    if _quoted(found) != text:
        raise MalformedError("a path in another spelling.")
    return found


def _nonce(head: HttpHead, name: str) -> str:
    if not _NONCE.fullmatch(text := head.text(name)):
        raise MalformedError(f"not a nonce. name={name}")
    return text


def _flag(head: HttpHead, name: str, value: str) -> bool:
    if name in head.fields and head.fields[name] != value:
        raise MalformedError(f"an unknown value. name={name}")
    return name in head.fields


def _span(text: str) -> tuple[int, int]:
    found = _SPAN.fullmatch(text)
    if found is None:
        raise MalformedError("not a range of bytes.")
    first, last = parse_number(found[1], "range"), parse_number(found[2], "range")
    if last < first:
        raise MalformedError("an empty range of bytes.")
    return first, last - first + 1


# Whether a request that came from a holder of the secret is served. Pure.

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
"""What a request or a connection was turned away for; each is counted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status, and why in words for programs and for people."""

    status: int
    kind: RefusalKind
    why: str


def authorize(request: PeerRequest, *, boot: str, epoch: int, last_counter: int) -> Refusal | None:
    """Why ``request`` is refused, or None. ``epoch`` is the highest seen, ``last_counter`` this
    connection's last number."""
    if request.counter <= last_counter:
        return Refusal(
            401,
            "replay",
            f"a number that was used before. counter={request.counter} last={last_counter}",
        )
    if request.boot != boot:
        return Refusal(
            421,
            "boot",
            f"meant for an earlier start of this server. meant={request.boot} boot={boot}",
        )
    if request.epoch < epoch:
        return epoch_refusal(request.epoch, epoch)
    return None


def epoch_refusal(epoch: int, known: int) -> Refusal:
    """The refusal of an epoch that is over."""
    return Refusal(409, "epoch", f"a newer epoch is open. epoch={epoch} known={known}")
