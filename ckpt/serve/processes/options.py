"""What the processes of a serving group are started with, and what they say to people."""

from __future__ import annotations

import sys
import threading
from typing import TypeVar

import msgspec

from ckpt.errors import UsageError
from ckpt.events import Emit, Event

DEADLINE_S = 30.0
BODY_BYTES_MAX = 64 << 20


class ReplicaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One replica. ``app``: ``MODULE:NAME`` of the program's Replica. ``group``: see open_group.

    ``wanted``: how many replicas serve, for a group that is new. ``threads``: handlers that run at
    a time; ``queue``: requests that may wait for a thread. ``host``: the address at which fronts
    reach it; ``port`` 0: any. ``leave_at_eof``: leave when standard input ends, as it does when the
    process that started this one dies.
    """

    app: str
    group: str
    wanted: int = 1
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    threads: int = 2
    queue: int = 64
    body_bytes_max: int = BODY_BYTES_MAX
    leave_at_eof: bool = False

    def __post_init__(self) -> None:
        module, colon, name = self.app.partition(":")
        if not (module and colon and name):
            raise UsageError(f"an app is named MODULE:NAME. app={self.app!r}")
        if self.threads < 1 or self.queue < 0 or self.wanted < 1:
            raise UsageError(
                "a replica has a thread or more, and a queue of 0 or more. "
                f"threads={self.threads} queue={self.queue} replicas={self.wanted}"
            )


class FrontOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One front. ``policy``: a name of POLICIES. ``queue``: requests that it holds at a time; more
    are refused at once. ``deadline_s``: for requests that name none. ``hedge_s``: after so long a
    repeatable request is sent to a second replica too; 0: never."""

    group: str
    wanted: int = 1
    host: str = "127.0.0.1"
    port: int = 8080
    policy: str = "two-choices"
    queue: int = 1024
    deadline_s: float = DEADLINE_S
    hedge_s: float = 0.0
    body_bytes_max: int = BODY_BYTES_MAX

    def __post_init__(self) -> None:
        if self.queue < 1 or not self.deadline_s > 0 or self.hedge_s < 0:
            raise UsageError(
                "a front holds one request or more, for a time above 0. "
                f"queue={self.queue} deadline_s={self.deadline_s} hedge_s={self.hedge_s}"
            )


O = TypeVar("O", ReplicaOptions, FrontOptions)  # noqa: E741


def decode_options(text: str, kind: type[O]) -> O:
    """Options as another process of ours passed them. Raises UsageError."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise UsageError(f"not the options of a serving process: {error}") from error


def encode_options(options: ReplicaOptions | FrontOptions) -> str:
    """See ``decode_options``."""
    return msgspec.json.encode(options).decode()


def emit_to_stderr(name: str) -> Emit:
    """An ``Emit`` that writes one line for each event, behind the name of who speaks."""
    lock = threading.Lock()

    def emit(event: Event) -> None:
        facts = " ".join(
            f"{key}={value}" for key, value in event.facts.items() if str(value) not in event.text
        )
        alarm = "warning: " if event.alarm else ""
        line = f"{name}: {alarm}{event.text}{f' ({facts})' if facts else ''}\n"
        with lock:
            sys.stderr.write(line)
            sys.stderr.flush()

    return emit
