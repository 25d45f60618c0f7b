"""A trainer's connection to its keeper: requests on one socket, the keeper's own messages on
another.

The second socket keeps outcomes and stop requests from waiting behind a reply, and lets its end be
noticed at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from msgspec.structs import replace

from ckpt.errors import CkptError, IntegrityError, UnavailableError, UsageError
from ckpt.events import Fact
from ckpt.ipc import client
from ckpt.ipc.board import Board
from ckpt.ipc.client import START_WAIT_S, KeeperClient, KeeperSpec, ensure_keeper
from ckpt.ipc.frames import MessageSocket, close_fds
from ckpt.ipc.messages import (
    BoardKept,
    Bye,
    Count,
    Done,
    Failing,
    Finished,
    Forget,
    GetBoard,
    GetSlots,
    Hello,
    Message,
    Number,
    Outcome,
    Peek,
    Phase,
    Post,
    PrintLine,
    Progress,
    Reply,
    SlotCreated,
    SlotReleased,
    Slots,
    Stop,
    Value,
    VerifiedChunks,
    Welcome,
)
from ckpt.staging.memory import Region
from ckpt.values import ChunkLocation, Digest, SnapshotId

_T = TypeVar("_T")

HELLO_ID = 1
"""The id of the first request on a connection, and of the only one on the event connection."""

RETRY_FIRST_S = 0.01
RETRY_LAST_S = 1.0
"""First and longest pause between two tries to find a keeper that is not just ending."""


class KeeperBusyError(UnavailableError):
    """The keeper lives and accepts no trainer yet: it still uploads what an earlier launch left."""


class _KeeperEndedError(UnavailableError):
    """The keeper ended before it answered the hello."""


def open_connections(spec: KeeperSpec, *, start: bool) -> tuple[MessageSocket, MessageSocket]:
    """A trainer's two connections to its keeper. Starts a keeper if none runs, unless ``start`` is
    false.
    """
    calls = ensure_keeper(spec, start=start)
    try:
        return calls, ensure_keeper(spec, start=False)
    except UnavailableError as error:
        calls.close()
        raise _KeeperEndedError(str(error)) from error
    except BaseException:
        calls.close()
        raise


def greet(wire: MessageSocket, hello: Hello, spec: KeeperSpec | None = None) -> Welcome:
    """Send the hello and return the keeper's welcome. Raises the keeper's reason to refuse this
    trainer.
    """
    try:
        return client.exchange_hello(wire, replace(hello, id=HELLO_ID), spec=spec)
    except client.HungUpError as error:
        raise _KeeperEndedError(str(error)) from error
    except UnavailableError as error:
        raise KeeperBusyError(str(error)) from error


def retry_while_keeper_ends(connect: Callable[[], _T], *, again: bool) -> _T:
    """Call ``connect`` until its keeper does not end during the handshake.

    Retries for START_WAIT_S seconds if ``again``, else not at all. A keeper that has finished its
    work still accepts connections for a moment and then closes them; the next one can be started at
    once.
    """
    until_s = time.monotonic() + START_WAIT_S
    pause_s = RETRY_FIRST_S
    while True:
        try:
            return connect()
        except _KeeperEndedError:
            if not again or time.monotonic() > until_s:
                raise
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, RETRY_LAST_S)


_R = TypeVar("_R", bound=Reply)

KNOWN_CHUNKS_MAX = 200_000
"""Chunk locations that one message carries. 200,000 of them stay far below a frame's limit; chunks
beyond that are stored again, once.
"""


class KeeperLink:
    """One rank's connection to its keeper. Thread-safe.

    Every call raises UnavailableError once the keeper is lost, and the errors that the keeper
    replies with. A forked child gives the connection up: it belongs to the parent. Larger than
    other classes, because it has one method for each kind of message that carries descriptors or
    that other packages send.
    """

    def __init__(
        self,
        calls: MessageSocket,
        events: MessageSocket,
        hello: Hello,
        spec: KeeperSpec | None = None,
    ) -> None:
        """Send the hello on both connections, which the link owns from now on. Raises the keeper's
        reason to refuse this rank.
        """
        self._hello = hello
        self._spec = spec
        self._closing = False
        self._state = threading.Lock()
        self._on_outcome: Callable[[Outcome], None] | None = None
        self._on_lost: Callable[[CkptError], None] | None = None
        self._on_stop: Callable[[float], object] | None = None
        self._on_alarm: Callable[[str], object] | None = None
        self._stop_s: float | None = None
        self._open(calls, events)
        forget = weakref.WeakMethod(self._forget_after_fork)
        os.register_at_fork(after_in_child=lambda: _call_if_alive(forget))

    @classmethod
    def connect(cls, spec: KeeperSpec, hello: Hello, *, start: bool = True) -> KeeperLink:
        """Connect to the job's keeper as a trainer. Starts a keeper if none runs, unless ``start``
        is false.

        Raises KeeperBusyError if the keeper accepts no trainer yet, UnavailableError if there is no
        keeper.
        """
        return retry_while_keeper_ends(
            lambda: cls(*open_connections(spec, start=start), hello, spec), again=start
        )

    def reconnect(self, board: Board) -> None:
        """Replace a lost connection: find or start the next keeper, and give it the board if it is
        new.

        Only for a program without a supervisor, and from one thread. The caller hands the slots
        over next (``SharedSlots.hand_over_all``); the new keeper knows no message and no submission
        of before. Raises UsageError if the connection is not lost. After any other error the link
        is lost as before.
        """
        if self._lost is None or self._spec is None or self._closing:
            raise UsageError(
                "a link reconnects only after its keeper is lost, and only if made by connect()"
            )
        self._thread.join()
        self._calls.close()
        self._events.close()
        spec = self._spec
        retry_while_keeper_ends(lambda: self._open(*open_connections(spec, start=True)), again=True)
        if self.welcome.new:
            self._calls.send(BoardKept(), [board.fd])

    @property
    def rank(self) -> int:
        """This rank in the whole job."""
        seating = self.welcome.seating
        return self._hello.rank + (seating.first_rank if seating is not None else 0)

    @property
    def size(self) -> int:
        """Number of ranks of the whole job."""
        seating = self.welcome.seating
        return seating.world_size if seating is not None else self._hello.ranks

    @property
    def local_rank(self) -> int:
        """This rank among those of its node."""
        return self._hello.rank

    @property
    def spans_nodes(self) -> bool:
        """Whether the job has ranks on other nodes."""
        seating = self.welcome.seating
        return seating is not None and seating.nodes > 1

    @property
    def lost(self) -> CkptError | None:
        """Why the connection is lost, or None while it works."""
        return self._lost

    # ---- the keeper's own messages: one observer each, called in the link's thread; quick, must
    # not raise

    def on_outcome(self, call: Callable[[Outcome], None]) -> None:
        """Call ``call`` with the outcome of each submitted snapshot."""
        with self._state:
            self._on_outcome = call

    def on_stop(self, call: Callable[[float], object]) -> None:
        """Call ``call`` when the job is preempted, with the seconds left; at once if that has
        happened.
        """
        with self._state:
            self._on_stop, grace_s = call, self._stop_s
        if grace_s is not None:
            call(grace_s)

    def on_alarm(self, call: Callable[[str], object]) -> None:
        """Call ``call`` with each alarm of the keeper, if no supervisor prints them."""
        with self._state:
            self._on_alarm = call

    def on_lost(self, call: Callable[[CkptError], None]) -> None:
        """Call ``call`` with the reason when the keeper is lost; at once if it is. Not called after
        ``close``.
        """
        with self._state:
            self._on_lost, lost = call, self._lost
        if lost is not None:
            call(lost)

    # ---- messages

    def call(self, message: Message, fds: Sequence[int] = ()) -> Reply:
        """Send a request and wait for the keeper's reply. The caller keeps ``fds``."""
        return self._calls.call(message, fds)

    def ask(self, message: Message, kind: type[_R]) -> _R:
        """Send a request whose reply is of one kind. Raises IntegrityError if it is of another
        kind.
        """
        return self._calls.ask(message, kind)

    def send(self, message: Message) -> None:
        """Send a message that has no reply; the keeper takes messages in the order they are
        sent.
        """
        self._calls.send(message)

    def count_as_lost(self) -> None:
        """The keeper does not take what is sent: end the connection. ``on_lost`` observers are
        called in the link's thread, also if the keeper still lives.
        """
        self._events.close()

    # ---- board and slots

    def board(self) -> Board:
        """The board of this node's ranks, mapped anew; the caller closes it."""
        _, fds = self._asked(GetBoard(), Done, count=1)
        return Board.attach(fds[0])

    def slots(self, rank: int) -> list[tuple[int, Region]]:
        """The slots of ``rank`` that the keeper holds, by number, mapped anew; the caller closes
        them.
        """
        reply, fds = self._asked(GetSlots(rank=rank), Slots)
        slots: list[tuple[int, Region]] = []
        not_mapped = list(fds)
        try:
            if len(fds) != len(reply.slots):
                raise IntegrityError(
                    "slots and descriptors differ in number. "
                    f"slots={len(reply.slots)} descriptors={len(fds)}"
                )
            for entry in reply.slots:
                slots.append((entry.index, Region.from_fd(not_mapped.pop(0), entry.size_bytes)))
        except BaseException:
            close_fds(not_mapped)
            for _, region in slots:
                region.close()
            raise
        return slots

    def slot_created(
        self, index: int, fd: int, size_bytes: int, *, free_share: float = 0.0
    ) -> None:
        """Give slot ``index`` of this rank to the keeper, which holds it on return. Raises
        UsageError if memory is short, for this node's other ranks too if ``free_share`` is set.
        """
        message = SlotCreated(index=index, size_bytes=size_bytes, free_share=free_share)
        self._calls.call(message, [fd])

    def slot_released(self, index: int) -> None:
        """Report that this rank gave slot ``index`` up."""
        self._calls.send(SlotReleased(index=index))

    # ---- reports about this trainer

    def phase(self, name: str, at_s: float | None = None, **facts: Fact) -> None:
        """Report a milestone of the start, reached at ``at_s`` (CLOCK_MONOTONIC) or now."""
        self._calls.send(
            Phase(name=name, at_s=time.monotonic() if at_s is None else at_s, facts=facts)
        )

    def failing(self, failing: Failing) -> None:
        """Report that this trainer is about to end with an exception."""
        self._calls.send(failing)

    def progress(self, store: str, completed: int) -> None:
        """Report steps of a run that the keeper's board does not show."""
        self._calls.send(Progress(store=store, completed=completed))

    def finished(self) -> None:
        """Report that the decorated function returned and everything is durable."""
        self._calls.send(Finished())

    def close(self) -> None:
        """Leave as planned; ``on_lost`` observers are not called. Idempotent. Must not be called in
        the link's own thread.
        """
        self._closing = True
        with contextlib.suppress(UnavailableError):  # the keeper left first
            self._events.send(Bye())
        self._calls.close()
        self._events.close()
        self._thread.join()

    def _open(self, calls: MessageSocket, events: MessageSocket) -> None:
        try:
            self.welcome = greet(calls, self._hello, self._spec)
            """The keeper's answer to the hello."""
            greet(events, replace(self._hello, role="events"), self._spec)
        except BaseException:
            calls.close()
            events.close()
            raise
        self._calls = KeeperClient(calls)
        self._events = events
        self._lost: CkptError | None = None
        self._thread = threading.Thread(target=self._listen, name="ckpt-keeper-events", daemon=True)
        self._thread.start()

    def _asked(
        self, message: Message, kind: type[_R], *, count: int | None = None
    ) -> tuple[_R, Sequence[int]]:
        reply, fds = self._calls.call_fds(message)
        if not isinstance(reply, kind) or (count is not None and len(fds) != count):
            close_fds(fds)
            raise IntegrityError(
                f"unexpected kind of reply. wanted={kind.__name__} "
                f"came={type(reply).__name__} descriptors={len(fds)}"
            )
        return reply, fds

    def _listen(self) -> None:
        try:
            while (received := self._events.receive()) is not None:
                message, fds = received
                close_fds(fds)  # events carry none
                match message:
                    case Outcome():
                        if self._on_outcome is not None:
                            self._on_outcome(message)
                    case PrintLine(text=text):
                        if self._on_alarm is not None:
                            self._on_alarm(text)
                    case Stop(grace_s=grace_s):
                        with self._state:
                            self._stop_s, on_stop = grace_s, self._on_stop
                        if on_stop is not None:
                            on_stop(grace_s)
            error: CkptError = UnavailableError(
                "the keeper is lost; what it had not made durable may be lost"
            )
        except Exception as cause:  # noqa: BLE001  a thread ends here: outcomes would be lost silently
            error = UnavailableError(f"the connection to the keeper broke. cause={cause!r}")
            error.__cause__ = cause
        with self._state:
            self._lost, on_lost = error, self._on_lost
        if on_lost is not None and not self._closing:
            on_lost(error)

    def _forget_after_fork(self) -> None:
        self._state = threading.Lock()  # the link's thread may have held it
        self._lost = UnavailableError(
            "the connection to the keeper belongs to the process that this one was forked from"
        )
        self._calls.forget_after_fork()
        self._events.forget_after_fork()


class LinkMailbox:
    """A mailbox of this attempt's ranks, kept by the keeper, under a key prefix. Thread-safe."""

    def __init__(self, link: KeeperLink, prefix: str) -> None:
        self._link = link
        self._prefix = prefix
        self.rank = link.rank
        self.size = link.size

    def post(self, key: str, value: bytes) -> None:
        self._link.send(Post(key=self._prefix + key, value=value))

    def peek(self, key: str) -> bytes | None:
        return self._link.ask(Peek(key=self._prefix + key), Value).value

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        return self._link.ask(Peek(key=self._prefix + key, wait_s=timeout_s), Value).value

    def count(self, key: str, amount: int = 0) -> int:
        return self._link.ask(Count(key=self._prefix + key, amount=amount), Number).number

    def forget(self, key: str) -> None:
        self._link.send(Forget(key=self._prefix + key))


def verified_chunks(base: SnapshotId, chunks: Mapping[Digest, ChunkLocation]) -> VerifiedChunks:
    """Chunks of the committed ``base`` that this rank read and verified: later snapshots may refer
    to them.
    """
    sent = dict(list(chunks.items())[:KNOWN_CHUNKS_MAX])
    return VerifiedChunks(base=base, digests=tuple(sent), locations=tuple(sent.values()))


def _call_if_alive(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (call := method()) is not None:
        call()
