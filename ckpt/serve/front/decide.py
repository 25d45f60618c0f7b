"""What a front does with a request: take it in, send it on, send it again, refuse it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from ckpt.errors import UsageError
from ckpt.serve.front.policies import ReplicaLoad
from ckpt.serve.headers import DEADLINE_MS, IDEMPOTENCY_KEY

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
"""Methods that may be repeated: RFC 9110, 9.2.2."""

AttemptEnd = Literal["answered", "not-handled", "refused", "broken"]
"""How one try ended. ``answered``: an answer came. ``not-handled``: the replica said that it began
nothing. ``refused``: no connection was made. ``broken``: sent, and no whole answer came."""

NO_LIMIT_S = 1e9


def repeatable(method: str, path: str, headers: Mapping[str, str], paths: Collection[str]) -> bool:
    """Whether a request may be sent again when nobody knows if it was computed.

    ``paths``: those that the program declared so, which counts for POST.
    """
    return method in IDEMPOTENT or IDEMPOTENCY_KEY in headers or path in paths


def goes_elsewhere(end: AttemptEnd, *, repeatable: bool) -> bool:
    """Whether a request is sent to another replica after a try that ended so."""
    match end:
        case "answered":
            return False
        case "not-handled" | "refused":
            return True  # nothing of it was begun
        case "broken":
            return repeatable


def deadline_s(headers: Mapping[str, str], default_s: float) -> float:
    """In how many seconds the answer is of no use any more. Raises UsageError."""
    text = headers.get(DEADLINE_MS)
    if text is None:
        return default_s
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{DEADLINE_MS} is a number of milliseconds. value={text!r}")
    return min(int(text) / 1e3, NO_LIMIT_S)


def expected_wait_s(loads: Sequence[ReplicaLoad]) -> float:
    """How long the next request waits at the least loaded replica until it is its turn; 0 for none.

    L / C of the load equation, with the replicas' observed rates.
    """
    return min((load.outstanding / load.capacity for load in loads), default=0.0)


def refusal(held: int, loads: Sequence[ReplicaLoad], *, queue: int, left_s: float) -> str:
    """Why a request is refused before it is sent anywhere; empty: it is taken in.

    ``held``: requests that the front holds already. Those who are refused at once can ask again
    when it is better; those who wait for an answer that comes too late are lost and cost the same.
    """
    if held >= queue:
        return f"the front holds as many requests as it may. held={held}"
    wait_s = expected_wait_s(loads)
    if wait_s > left_s:
        return f"it would wait longer than its deadline. wait_s={wait_s:.2f} left_s={left_s:.2f}"
    return ""
