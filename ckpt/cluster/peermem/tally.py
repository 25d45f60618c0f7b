"""What a server counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt.cluster.peermem.admit import Kind
from ckpt.cluster.peermem.http import Verb


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Since the start: requests served by verb, bytes of bodies, what was turned away by kind; and connections now."""

    served: Mapping[str, int]
    refused: Mapping[str, int]
    received_bytes: int
    sent_bytes: int
    connections: int
    strangers: int


class Tally:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._received_bytes = self._sent_bytes = 0

    def serve(self, verb: Verb, *, received_bytes: int = 0, sent_bytes: int = 0) -> None:
        """A request was answered as it was meant."""
        with self._lock:
            self._served[verb] += 1
            self._received_bytes += received_bytes
            self._sent_bytes += sent_bytes

    def refuse(self, kind: Kind) -> None:
        """A request or a connection was turned away."""
        with self._lock:
            self._refused[kind] += 1

    def stats(self, *, connections: int, strangers: int) -> ServerStats:
        """All counts at this moment."""
        with self._lock:
            return ServerStats(
                dict(self._served), dict(self._refused), self._received_bytes, self._sent_bytes, connections, strangers
            )
