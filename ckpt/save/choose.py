"""Whether compression pays. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckpt.errors import UsageError

PAYS_FROM = 1.1
"""Compression must make the writing this much faster: it takes a core that training could use."""

LEVEL_MAX = 22


@dataclass(frozen=True, slots=True)
class Compression:
    """What a user asks for. ``auto`` compresses where a sample says that it makes writing faster, ``on`` wherever bytes shrink.

    ``level`` is zstd's. ``link_bytes_per_s`` is the speed of the way to the store; None: it is measured while writing.
    """

    mode: Literal["off", "auto", "on"] = "auto"
    level: int = 1
    link_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("off", "auto", "on"):
            raise UsageError(f"compression is off, auto or on. mode={self.mode!r}")
        if not 1 <= self.level <= LEVEL_MAX:
            raise UsageError(f"zstd's level out of range. level={self.level} (1..{LEVEL_MAX})")


OFF = Compression("off")


@dataclass(frozen=True, slots=True)
class Sample:
    """What compressing some bytes came to."""

    raw_bytes: int
    stored_bytes: int
    encode_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to compress bytes like the sampled ones, and why."""

    compress: bool
    why: str


def may_compress(compression: Compression, *, local: bool) -> bool:
    """Whether compression is worth a sample at all: never when off, and never to a local disk in ``auto``."""
    return compression.mode == "on" or (compression.mode == "auto" and not local)


def decide(compression: Compression, sample: Sample, *, link_bytes_per_s: float | None) -> Decision:
    """Compress bytes like ``sample``? One core encodes while the link carries what was encoded before."""
    match compression.mode:
        case "off":
            return Decision(False, "off")
        case "on":
            shrinks = sample.stored_bytes < sample.raw_bytes
            return Decision(shrinks, "on" if shrinks else "the sample does not shrink")
        case "auto":
            return _auto(sample, link_bytes_per_s)


def _auto(sample: Sample, link: float | None) -> Decision:
    if link is None or link <= 0:
        return Decision(False, "the link's speed is not known yet")
    if sample.stored_bytes >= sample.raw_bytes:
        return Decision(False, "the sample does not shrink")
    encode = sample.raw_bytes / sample.encode_s if sample.encode_s > 0 else float("inf")
    speed = min(encode, link * sample.raw_bytes / sample.stored_bytes)
    what = f"encode_bytes_per_s={encode:.3g} link_bytes_per_s={link:.3g} ratio={sample.raw_bytes / sample.stored_bytes:.2f}"
    return Decision(speed >= PAYS_FROM * link, what)
