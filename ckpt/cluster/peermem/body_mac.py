"""What proves a body: a MAC over the head's MAC and all bytes, made while they pass."""

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
    """Takes a body's bytes in order."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Take bytes in."""
        ...

    def tag(self) -> bytes:
        """The MAC, TAG_BYTES long. Ends this object's use."""
        ...


class HmacBody:
    """HMAC-SHA256, its first half: what the standard library has."""

    __slots__ = ("_hash",)

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._hash = hmac.new(key, nonce, "sha256")

    def update(self, data: memoryview | bytes, /) -> None:
        """See BodyMac. Releases the GIL for all but small data."""
        self._hash.update(data)

    def tag(self) -> bytes:
        """See BodyMac."""
        return self._hash.digest()[:TAG_BYTES]


def known_macs() -> tuple[str, ...]:
    """The MACs that this process can make, fastest first: GMAC where ``cryptography`` is
    installed."""
    return (GMAC, HMAC) if importlib.util.find_spec("cryptography") else (HMAC,)


def body_mac(name: str, key: bytes, *, counter: int, head_mac: bytes) -> BodyMac:
    """The MAC of the body behind the head with ``head_mac``. ``counter`` is used for one body a key
    and direction only.

    Raises UsageError for a name that this process can't make.
    """
    nonce = counter.to_bytes(12, "big")
    mac: BodyMac
    if name == GMAC:
        mac = cast("BodyMac", importlib.import_module("ckpt.cluster.peermem.gmac").Gmac(key, nonce))
    elif name == HMAC:
        mac = HmacBody(key, nonce)
    else:
        raise UsageError(f"an unknown body MAC. name={name}")
    mac.update(head_mac)
    return mac
