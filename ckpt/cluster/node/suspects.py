"""What a node thinks of the others' lines, and what of it the membership has been told. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ckpt.cluster.membership.records import View


class Suspects:
    """Of one membership of this node: a new one begins with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[str, str | None] = {}
        """What is to be told, by node; None: that it is taken back."""
        self._told: set[str] = set()

    def refused(self, node: str, why: str) -> None:
        """Its machine answers, and nobody listens there any more."""
        with self._lock:
            if node not in self._told or node in self._due:
                self._due[node] = why

    def reached(self, node: str) -> None:
        """A line to it is up."""
        with self._lock:
            if node in self._told or node in self._due:
                self._due[node] = None

    def tell(self, view: View, suspect: Callable[[str, str | None], object]) -> None:
        """Tell what is due about those who are still members. What can't be told now is told the next time."""
        with self._lock:
            due, self._due = self._due, {}
            due = {node: why for node, why in due.items() if node in view.by_node}
            # Noted first: who is reached meanwhile must find that there is something to take back.
            self._told = {node for node in self._told if node in view.by_node} | due.keys()
        try:
            while due:
                node, why = next(iter(due.items()))
                suspect(node, why)
                del due[node]
                with self._lock:
                    if why is None and node not in self._due:
                        self._told.discard(node)
        finally:
            with self._lock:
                self._due = due | self._due
