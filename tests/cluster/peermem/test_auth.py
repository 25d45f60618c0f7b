"""The secret: that it is never shown, and what is made of it."""

from __future__ import annotations

import pickle

import pytest

from ckpt.cluster.peermem import body_mac as macs
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.errors import UsageError

RAW = bytes(range(32))


@pytest.mark.parametrize("raw", [b"", bytes(range(31)), bytes(range(33)), bytes(32), b"ab" * 16])
def test_bytes_that_are_no_secret_are_refused(raw: bytes) -> None:
    with pytest.raises(UsageError):
        PeerSecret.of(raw)


def test_a_secret_is_neither_shown_nor_pickled() -> None:
    secret = PeerSecret.of(RAW)
    keys = secret.session(b"h" * 32, b"w" * 32)
    for shown in (repr(secret), str(secret), repr(keys)):
        assert RAW.hex() not in shown
        assert repr(secret._root) not in shown
        assert repr(keys.request_head) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_every_key_differs_from_every_other() -> None:
    found = set()
    for raw in (RAW, RAW[::-1]):
        secret = PeerSecret.of(raw)
        for hello in (b"h" * 32, b"i" * 32):
            found |= {secret.hello_mac(hello), secret.welcome_mac(hello, b"")}
            for welcome in (b"w" * 32, b"x" * 32):
                keys = secret.session(hello, welcome)
                found |= {keys.request_head, keys.request_body, keys.answer_head, keys.answer_body}
    assert len(found) == 2 * (2 * 2 + 2 * 2 * 4)


@pytest.mark.parametrize("name", [macs.GMAC, macs.HMAC])
def test_a_body_mac_depends_on_all_that_it_covers_and_not_on_the_pieces(name: str) -> None:
    def tag(key: bytes = RAW, counter: int = 1, head: bytes = b"head", *pieces: bytes) -> bytes:
        one = macs.body_mac(name, key, counter=counter, head_mac=head)
        for piece in pieces:
            one.update(piece)
        return one.tag()

    body = bytes(range(256)) * 40
    whole = tag(RAW, 1, b"head", body)
    assert len(whole) == 16
    assert whole == tag(RAW, 1, b"head", body[:5], b"", body[5:9000], body[9000:])
    others = {
        tag(RAW[::-1], 1, b"head", body),
        tag(RAW, 2, b"head", body),
        tag(RAW, 1, b"heaD", body),
        tag(RAW, 1, b"head", body[:-1]),
        tag(RAW, 1, b"head", body + b"\0"),
        tag(RAW, 1, b"head", b"\1" + body[1:]),
        tag(RAW, 1, b"head"),
    }
    assert len(others | {whole}) == 8


def test_an_unknown_mac_is_refused() -> None:
    with pytest.raises(UsageError):
        macs.body_mac("crc32", RAW, counter=1, head_mac=b"")
