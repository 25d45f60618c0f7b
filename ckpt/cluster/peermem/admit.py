"""Whether a request that came from a holder of the secret is served. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckpt.cluster.peermem.http import Request

Kind = Literal[
    "mac", "malformed", "replay", "boot", "epoch", "taken", "missing", "range", "read-only", "too-large", "full", "base",
    "body", "slow", "crowded", "tls",
]  # fmt: skip
"""What a request or a connection was turned away for; each is counted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status, and why in words for programs and for people."""

    status: int
    kind: Kind
    why: str


def admit(request: Request, *, boot: str, epoch: int, last_counter: int) -> Refusal | None:
    """Why ``request`` is refused, or None. ``epoch`` is the highest seen, ``last_counter`` this connection's last number."""
    if request.counter <= last_counter:
        return Refusal(401, "replay", f"a number that was used before. counter={request.counter} last={last_counter}")
    if request.boot != boot:
        return Refusal(421, "boot", f"meant for an earlier start of this server. meant={request.boot} boot={boot}")
    if request.epoch < epoch:
        return fenced(request.epoch, epoch)
    return None


def fenced(epoch: int, known: int) -> Refusal:
    """The refusal of an epoch that is over."""
    return Refusal(409, "epoch", f"a newer epoch is open. epoch={epoch} known={known}")
