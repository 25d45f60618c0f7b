"""Stands between a client and a server: passes bytes on, and changes or cuts what a test says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from ckpt.cluster.peermem.server import PeerServer

Spoil = Callable[[int, bytes], "bytes | None"]
"""Offset in the stream of one direction, and bytes; gives what is passed on, or None to cut the
connection."""


def as_is(offset: int, data: bytes) -> bytes | None:
    """Pass everything on."""
    return data


class Proxy:
    """Listens at ``address``; ``down`` is applied to what the server sends, ``up`` to what clients
    do."""

    def __init__(self, server: PeerServer) -> None:
        self._target = server.address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self.down: Spoil = as_is
        self.up: Spoil = as_is
        self._run(self._accept)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()
        return str(host), int(port)

    def close(self) -> None:
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()

    def _run(self, act: Callable[[], None]) -> None:
        thread = threading.Thread(target=act, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                self._run(
                    lambda client=client, server=server: self._pump(client, server, lambda: self.up)
                )  # type: ignore[misc]
                self._run(
                    lambda client=client, server=server: self._pump(
                        server, client, lambda: self.down
                    )
                )  # type: ignore[misc]

    def _pump(
        self, source: socket.socket, target: socket.socket, spoil: Callable[[], Spoil]
    ) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed = spoil()(offset, data)
                if passed is None:
                    break
                target.sendall(passed)
                offset += len(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
