"""The process that keeps an HAProxy up to date with a group, through its runtime socket."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from pathlib import Path

from ckpt.errors import IntegrityError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.serve.front.haproxy import BACKEND, haproxy_suspects, parse_slots, slot_commands
from ckpt.serve.group.member import GroupMember, open_group
from ckpt.serve.group.records import GroupView

LOOK_S = 0.25
"""How often HAProxy's own checks are looked at, and its slots compared."""
ANSWER_S = 5.0
_DONE = ("IP changed", "port changed", "no need to change", "nothing changed")
"""How HAProxy begins what it says of a command that it carried out, if it says anything."""


class HaproxyController:
    """Brings HAProxy's slots to what the group's records say, again and again.

    It holds nothing that it could lose: each round compares what HAProxy has with what it should
    have. While the records name nobody who serves, the last who did go on, as at every front.
    """

    def __init__(self, socket_path: Path, *, emit: Emit) -> None:
        self._path = socket_path
        self._emit = emit
        self._told = ""
        self._replicas: dict[str, str] = {}
        self._serving: frozenset[str] = frozenset()
        self.suspects: frozenset[str] = frozenset()
        """The replicas that others are to replace. May be read in any thread."""
        self.changed = threading.Event()

    def see(self, view: GroupView) -> None:
        """Take in the group's records; in the member's thread."""
        serving = frozenset(replica.name for replica in view.serving)
        if serving or not self._serving:
            self._replicas = {
                name: _numeric(record.address) for name, record in view.replicas.items()
            }
            self._serving = serving
        self.changed.set()

    def round(self) -> None:
        """Compare once, and change what differs. Says when HAProxy does not answer, and when it
        does again."""
        replicas, serving = self._replicas, self._serving
        try:
            slots = parse_slots(self.ask(f"show servers state {BACKEND}"))
            commands, left = slot_commands(slots, replicas, serving)
            for command in commands:
                answer = self.ask(command).strip()
                if answer and not answer.startswith(_DONE):
                    raise IntegrityError(f"HAProxy refused. command={command!r} answer={answer!r}")
            self.suspects = haproxy_suspects(slots, replicas)
            problem = f"no slot is left for {', '.join(left)}" if left else ""
        except (UnavailableError, IntegrityError) as error:
            problem = str(error)
        if problem != self._told:
            self._told = problem
            text = problem or "HAProxy answers again, and has what the group's records say"
            self._emit(Event("haproxy", text, alarm=bool(problem)))

    def ask(self, command: str) -> str:
        """HAProxy's answer to a command. Raises UnavailableError."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ANSWER_S)
                connection.connect(str(self._path))
                connection.sendall(command.encode() + b"\n")
                parts = list(iter(lambda: connection.recv(1 << 16), b""))
        except OSError as error:
            raise UnavailableError(
                f"HAProxy does not answer at its runtime socket. socket={self._path} "
                f"why={error.strerror or error}; start it with the configuration that `ckpt serve "
                "haproxy --config` prints"
            ) from error
        return b"".join(parts).decode(errors="replace")


def _numeric(address: str) -> str:
    """The address with a number for the host: HAProxy resolves no names at its socket."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        return f"{found[0][4][0]}:{port}"
    return address


def run_haproxy_controller(group: str, socket_path: Path, *, wanted: int, emit: Emit) -> None:
    """Keep HAProxy up to date until SIGTERM or SIGINT. HAProxy goes on with what it has then.

    Raises UsageError, UnavailableError.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    controller = HaproxyController(socket_path, emit=emit)
    member = GroupMember(
        open_group(group),
        wanted=wanted,
        emit=emit,
        on_view=controller.see,
        suspects=lambda: controller.suspects,
    )
    try:
        emit(Event("haproxy", f"keeps HAProxy at {socket_path} up to date with the group {group}"))
        while not stop.is_set():
            controller.changed.wait(LOOK_S)
            controller.changed.clear()
            controller.round()
    finally:
        member.close()
