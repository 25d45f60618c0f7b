"""Who may speak: a job's secret, and the keys that one connection draws from it. Pure; no key is
ever shown.

Each connection begins with a hello in which both sides prove that they know the secret and give a
fresh nonce. All its keys depend on both, so nothing that was recorded on one connection means
anything on another.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import NoReturn

from ckpt.errors import UsageError

SECRET_BYTES = 32
"""Length of a job's secret."""
NONCE_BYTES = 16
"""Length of nonces, and of the name of a server's start (its boot)."""
MAC_BYTES = 32

_DISTINCT_MIN = 12
"""Fewest different bytes in a secret: 32 random ones have 30, and fewer than 12 come once in 10^22
draws."""


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one connection: for heads and bodies, one way and the other."""

    request_head: bytes = field(repr=False)
    request_body: bytes = field(repr=False)
    answer_head: bytes = field(repr=False)
    answer_body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PeerSecret:
    """What the keepers of one job share. Shows and pickles nothing of it."""

    _root: bytes = field(repr=False)

    @classmethod
    def of(cls, raw: bytes) -> PeerSecret:
        """The secret of 32 random bytes. Raises UsageError for another length and for bytes that
        can't be random."""
        if len(raw) != SECRET_BYTES:
            raise UsageError(
                f"a peer secret has another length. size_bytes={len(raw)} wanted={SECRET_BYTES}"
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
        """What a client proves itself with, over its hello's head."""
        return mac(self._root, b"hello" + head)

    def welcome_mac(self, hello_mac: bytes, head: bytes) -> bytes:
        """What a server proves itself with, over its answer's head and the hello that it
        answers."""
        return mac(self._root, b"welcome" + hello_mac + head)

    def session(self, hello_mac: bytes, welcome_mac: bytes) -> SessionKeys:
        """The keys of the connection that began with these two heads, so with both nonces."""
        base = mac(self._root, b"session" + hello_mac + welcome_mac)
        uses = (b"request head", b"request body", b"answer head", b"answer body")
        return SessionKeys(*(mac(base, use) for use in uses))


def mac(key: bytes, data: bytes) -> bytes:
    """HMAC-SHA256."""
    return hmac.digest(key, data, "sha256")


def macs_equal(one: bytes, other: bytes) -> bool:
    """Whether two MACs are equal, in a time that tells nothing."""
    return hmac.compare_digest(one, other)
