"""MACs over the bodies of requests and answers, computed while the bytes are sent or received.

A body's MAC covers the MAC of its head too. GMAC is loaded on first use: it needs the package
``cryptography``.
"""

from __future__ import annotations

import hmac
import importlib
import importlib.util
from typing import Protocol, cast

from ckpt.cluster.peermem.http import TAG_BYTES
from ckpt.errors import UsageError

GMAC = "gmac"
HMAC = "hmac-sha256"


class BodyMac(Protocol):
    """The MAC of one body, whose bytes are given in order."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Add bytes."""
        ...

    def tag(self) -> bytes:
        """The MAC, TAG_BYTES long. Ends this object's use."""
        ...


class HmacBody:
    """The first half of HMAC-SHA256, from the standard library."""

    __slots__ = ("_hash",)

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._hash = hmac.new(key, nonce, "sha256")

    def update(self, data: memoryview | bytes, /) -> None:
        self._hash.update(data)

    def tag(self) -> bytes:
        return self._hash.digest()[:TAG_BYTES]


def known_macs() -> tuple[str, ...]:
    """The MACs that this process can compute, fastest first."""
    return (GMAC, HMAC) if importlib.util.find_spec("cryptography") else (HMAC,)


def body_mac(name: str, key: bytes, *, counter: int, head_mac: bytes) -> BodyMac:
    """A new MAC for the body behind the head with ``head_mac``.

    ``counter`` must be used for one body per key and direction only: it is the nonce, and two GMAC
    tags with one nonce give the key away. Raises UsageError for an unknown name.
    """
    nonce = counter.to_bytes(12, "big")
    mac: BodyMac
    if name == GMAC:
        mac = cast("BodyMac", importlib.import_module("ckpt.cluster.peermem.gmac").Gmac(key, nonce))
    elif name == HMAC:
        mac = HmacBody(key, nonce)
    else:
        raise UsageError(f"unknown body MAC. name={name}")
    mac.update(head_mac)
    return mac
