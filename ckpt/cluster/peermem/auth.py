"""Authentication of peers: a job's secret, and the keys of one connection derived from it. Pure.

A connection begins with a hello in which both sides prove that they know the secret, and give a
fresh nonce. All keys of the connection depend on both nonces, so nothing recorded on one connection
is valid on another. No message shows a key.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import NoReturn

from ckpt.errors import UsageError

SECRET_BYTES = 32
"""Length of a job's secret."""
NONCE_BYTES = 16
"""Length of nonces, and of the id of a server's incarnation (``boot``)."""
MAC_BYTES = 32

_DISTINCT_MIN = 12
"""Fewest distinct bytes in a secret: 32 random bytes have 30, and fewer than 12 once in 10^22
draws."""


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one connection: for heads and bodies, in each direction."""

    request_head: bytes = field(repr=False)
    request_body: bytes = field(repr=False)
    answer_head: bytes = field(repr=False)
    answer_body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PeerSecret:
    """The secret that the keepers of one job share. Can't be printed or pickled."""

    _root: bytes = field(repr=False)

    @classmethod
    def of(cls, raw: bytes) -> PeerSecret:
        """The secret of 32 random bytes.

        Raises UsageError for another length, and for bytes that can't be random.
        """
        if len(raw) != SECRET_BYTES:
            raise UsageError(
                f"a peer secret has the wrong length. size_bytes={len(raw)} expected={SECRET_BYTES}"
            )
        if len(set(raw)) < _DISTINCT_MIN:
            raise UsageError(
                "a peer secret isn't random: it holds only a few different bytes; make a new one"
            )
        return cls(mac(b"ckpt peer 1", raw))

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a secret isn't pickled: hand its file to the other process and load it there"
        )

    def hello_mac(self, head: bytes) -> bytes:
        """The client's proof, over the head of its hello."""
        return mac(self._root, b"hello" + head)

    def welcome_mac(self, hello_mac: bytes, head: bytes) -> bytes:
        """The server's proof, over the head of its answer and the hello that it answers."""
        return mac(self._root, b"welcome" + hello_mac + head)

    def session(self, hello_mac: bytes, welcome_mac: bytes) -> SessionKeys:
        """The keys of the connection that began with these two heads, which hold both nonces."""
        base = mac(self._root, b"session" + hello_mac + welcome_mac)
        uses = (b"request head", b"request body", b"answer head", b"answer body")
        return SessionKeys(*(mac(base, use) for use in uses))


def mac(key: bytes, data: bytes) -> bytes:
    """HMAC-SHA256."""
    return hmac.digest(key, data, "sha256")


def macs_equal(first: bytes, second: bytes) -> bool:
    """Whether two MACs are equal, compared in constant time."""
    return hmac.compare_digest(first, second)
