"""Objects that arrive otherwise than they were sent."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends.objects.arrival import PUTS_MAX, ArrivalCheck, md5_etag
from ckpt.errors import KeyExistsError, UnavailableError


class Server:
    """One object; the first ``flips`` bodies arrive with one bit changed."""

    def __init__(self, *, flips: int = 0, etags: str = "md5") -> None:
        self.flips = flips
        self.etags = etags
        self.body: bytes | None = None
        self.puts: list[bool] = []
        self.reads = 0

    def put(self, body: bytes, *, create_only: bool) -> str | None:
        self.puts.append(create_only)
        if create_only and self.body is not None:
            raise KeyExistsError("there is one")
        flipped = self.flips > 0
        self.flips -= flipped
        self.body = bytes([body[0] ^ 1]) + body[1:] if flipped else body
        if self.etags == "none":
            return None
        digest = hashlib.md5(self.body).hexdigest()
        return f'"{digest}"' if self.etags == "md5" else hashlib.md5(digest.encode()).hexdigest()

    def read(self, at: int, out: memoryview) -> int:
        self.reads += 1
        found = (self.body or b"")[at : at + len(out)]
        out[: len(found)] = found
        return len(found)


def send(check: ArrivalCheck, server: Server, body: bytes, *, create_only: bool = False) -> None:
    check.put(
        "k",
        [body[:3], body[3:]],
        lambda create: server.put(body, create_only=create),
        server.read,
        create_only=create_only,
    )


@pytest.mark.parametrize("etags", ["md5", "other", "none"])
@pytest.mark.parametrize("create_only", [False, True])
def test_object_that_arrives_changed_is_sent_again(etags: str, create_only: bool) -> None:
    check, server = ArrivalCheck("s"), Server(flips=1, etags=etags)
    send(check, server, b"the body", create_only=create_only)
    assert server.body == b"the body"
    assert server.puts == [create_only, False], "what this call created is its own"


def test_object_that_never_arrives_right_is_no_object() -> None:
    server = Server(flips=PUTS_MAX)
    with pytest.raises(UnavailableError, match="otherwise than it was sent"):
        send(ArrivalCheck("s"), server, b"the body")


def test_object_of_another_writer_is_never_replaced() -> None:
    server = Server()
    server.body = b"another one"
    with pytest.raises(KeyExistsError):
        send(ArrivalCheck("s"), server, b"the body", create_only=True)
    assert server.body == b"another one"


def test_store_is_read_back_only_if_its_etags_are_no_digests() -> None:
    check, server = ArrivalCheck("s"), Server()
    assert check.how == "unknown"
    send(check, server, b"the body")
    assert (check.how, server.reads) == ("etag", 0)
    check, server = ArrivalCheck("s"), Server(etags="other")
    for _ in range(2):
        send(check, server, b"the body")
    assert check.how == "read back"
    assert server.reads == 2 * 3


def test_object_that_is_longer_than_what_was_sent_is_another_one() -> None:
    server = Server(etags="none")

    def put(create_only: bool) -> None:
        server.body = b"the body, and more"

    with pytest.raises(UnavailableError):
        ArrivalCheck("s").put("k", [b"the body"], put, server.read, create_only=False)


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 30))
def test_etag_of_parts_is_that_of_their_digests(pieces: list[bytes], part_bytes: int) -> None:
    whole = b"".join(pieces)
    assert md5_etag(pieces) == hashlib.md5(whole).hexdigest()
    parts = [whole[at : at + part_bytes] for at in range(0, len(whole), part_bytes)]
    joined = b"".join(hashlib.md5(part).digest() for part in parts)
    assert md5_etag(pieces, part_bytes=part_bytes) == (
        f"{hashlib.md5(joined).hexdigest()}-{len(parts)}"
    )
