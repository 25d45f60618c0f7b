"""Nodes of which each has only its lines, and what was heard over them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.cluster.tls import TlsContexts
from ckpt.events import Event

SECRET = b"a secret of all nodes"
WAIT_S = 30.0


class Node:
    """One keeper's lines, and all that it heard."""

    def __init__(
        self,
        name: str,
        *,
        secret: bytes = SECRET,
        listen: str = "127.0.0.1:0",
        tls: TlsContexts | None = None,
        ttl_s: float = 0.0,
    ) -> None:
        self.name = name
        self.words: list[tuple[str, MeshMessage]] = []
        self.downs: list[tuple[str, str]] = []
        self.ups: list[str] = []
        self.events: list[Event] = []
        self.changed = threading.Condition()
        heard = MeshObserver(
            on_message=lambda node, word: self._note(self.words, (node, word)),
            on_connected=lambda node: self._note(self.ups, node),
            on_disconnected=lambda node, why: self._note(self.downs, (node, why)),
        )
        self.lines = Mesh(
            secret,
            job="job",
            node=name,
            listen=listen,
            observer=heard,
            emit=lambda event: self._note(self.events, event),
            tls=tls,
            ttl_s=ttl_s,
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.lines.port}"

    def wait(self, until: Callable[[], object], what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(until, WAIT_S), f"not in time: {what}"

    def _note(self, kept: list, one: object) -> None:  # type: ignore[type-arg]
        with self.changed:
            kept.append(one)
            self.changed.notify_all()


def acquaint(*nodes: Node) -> None:
    addresses = {one.name: one.address for one in nodes}
    for one in nodes:
        one.lines.set_targets(addresses)
    for one in nodes:
        one.wait(
            lambda one=one: one.lines.connected_nodes() == addresses.keys() - {one.name},
            f"the lines of {one.name}",
        )
