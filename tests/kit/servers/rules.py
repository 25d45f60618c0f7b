"""What a ``FaultProxy`` does to requests: the faults, and rules that choose one for each request.
Pure.

A rule is a function from ``PeerRequest`` to a fault or None (let it through). The proxy calls it
once for each request, one call at a time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the client sent it. ``headers`` have lower-case names; ``number`` counts from
    0 for each proxy."""

    number: int
    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def path(self) -> str:
        """``/bucket/key``, decoded."""
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        """The decoded query, such as ``{"uploadId": "...", "partNumber": "1"}``."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait, then let it through, or do ``then``. A long one is a server that hangs; closing the
    proxy ends it."""

    seconds: float
    then: Fault | None = None


@dataclass(frozen=True, slots=True)
class ResetBefore:
    """Reset the connection; the server never hears of the request."""


@dataclass(frozen=True, slots=True)
class ResetAfter:
    """Let the server do it and answer, then reset the connection: the client gets no byte of the
    answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer for the server, which never hears of it; ``code`` is S3's word for what is wrong."""

    status: int = 503
    code: str = "SlowDown"


@dataclass(frozen=True, slots=True)
class Truncate:
    """Pass on the answer's head and so many bytes of its body, then end the connection in order."""

    keep_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Flip:
    """Change one bit of the byte at ``at_byte`` of the body; bodies that are shorter pass
    unchanged.

    ``where``: in what the client sends (the server checks what was signed) or in what it receives.
    """

    at_byte: int = 0
    where: Literal["request", "response"] = "response"


Fault = Delay | ResetBefore | ResetAfter | Answer | Truncate | Flip
Rule = Callable[[Request], "Fault | None"]
When = Callable[[Request], bool]


def let_through(request: Request) -> None:
    """The rule that does nothing."""


def always(fault: Fault, *, when: When = lambda _: True) -> Rule:
    """``fault`` for each request that ``when`` accepts."""
    return lambda request: fault if when(request) else None


def first(count: int, fault: Fault, *, when: When = lambda _: True) -> Rule:
    """``fault`` for the first ``count`` requests that ``when`` accepts."""
    return scripted([fault] * count, when=when)


def scripted(faults: Sequence[Fault | None], *, when: When = lambda _: True) -> Rule:
    """One entry for each request that ``when`` accepts, in order of arrival; nothing once they are
    used up."""
    left = list(reversed(faults))
    return lambda request: left.pop() if left and when(request) else None


def seeded(seed: int | str, chances: Mapping[Fault, float], *, when: When = lambda _: True) -> Rule:
    """A fault at random: ``chances`` has the probability of each, at most 1 in all.

    What meets a request depends on the seed, its method and target and how often that came before,
    not on the order in which concurrent requests arrive.
    """
    assert sum(chances.values()) <= 1, "chances are parts of 1"
    seen: Counter[tuple[str, str]] = Counter()

    def choose(request: Request) -> Fault | None:
        if not when(request):
            return None
        seen[request.method, request.target] += 1
        times = seen[request.method, request.target]
        drawn = random.Random(f"{seed} {request.method} {request.target} {times}").random()
        for fault, chance in chances.items():
            drawn -= chance
            if drawn < 0:
                return fault
        return None

    return choose
