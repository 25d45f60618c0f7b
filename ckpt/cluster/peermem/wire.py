"""The heads of requests and answers, as bytes and as values. Pure.

HTTP/1.1 in one spelling, and nothing beside it: lower-case names, one space, no header twice, the MAC's line last. The MAC
covers every byte before its line and is compared first, so that a stranger's bytes are never taken apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from ckpt.cluster.peermem.auth import MAC_BYTES
from ckpt.errors import IntegrityError

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
class Head:
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
        return number(self.text(name), name)

    def only(self, *names: str) -> None:
        """Raise MalformedError where there is a field beside ``names``."""
        for name in self.fields:
            if name not in names:
                raise MalformedError(f"an unknown field. name={name}")


def number(text: str, name: str) -> int:
    """``text`` as a number. Raises MalformedError."""
    if not _NUMBER.fullmatch(text):
        raise MalformedError(f"not a number. name={name}")
    return int(text)


def spell_head(start: str, fields: dict[str, str]) -> bytes:
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


def parse_head(covered: bytes) -> Head:
    """The head in ``covered``, which is what ``spell_head`` makes. Raises MalformedError for everything else."""
    try:
        text = covered.decode("ascii")
    except UnicodeDecodeError:
        raise MalformedError("a head is not ASCII.") from None
    if len(covered) > HEAD_BYTES_MAX or not text.endswith("\r\n"):
        raise MalformedError(f"a head is too long or ends in the middle of a line. size_bytes={len(covered)}")
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
    return Head((start[1], start[2], start[3]), MappingProxyType(fields))
