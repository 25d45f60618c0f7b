"""A trainer's connection to its keeper: questions and words on one socket, what the keeper has to
say on another."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Choice,
    Choices,
    Count,
    Decided,
    Done,
    Failing,
    Fenced,
    Finished,
    Forget,
    GetBoard,
    GetChoices,
    GetSlots,
    GetSources,
    Hello,
    Message,
    Number,
    OpenEpoch,
    Outcome,
    Peek,
    Persist,
    Phase,
    Post,
    Preempt,
    Refuse,
    Reply,
    Retention,
    SetTag,
    SlotCreated,
    SlotReleased,
    Slots,
    Sources,
    Stop,
    Value,
    VerifiedChunks,
    Welcome,
    from_error,
)
from ckpt.staging.memory import Region
from ckpt.values import ChunkLocation, Digest, SnapshotId

# Finding a keeper and saying hello to it: one that ends just then is no answer, one that is busy
# says so.

_T = TypeVar("_T")

HELLO_ID = 1
"""The first call on a connection, and the only one on that for events."""

RETRY_FIRST_S = 0.01
RETRY_LAST_S = 1.0
"""Pauses between tries to find a keeper that doesn't end just then."""


class KeeperBusyError(UnavailableError):
    """The keeper lives and takes nobody yet: it still settles what an earlier launch left."""


class _KeeperEndedError(UnavailableError):
    """It ended before it said hello."""


def open_connections(spec: KeeperSpec, *, start: bool) -> tuple[MessageSocket, MessageSocket]:
    """A trainer's two connections to its keeper, which is started where none runs, unless ``start``
    is false."""
    calls = ensure_keeper(spec, start=start)
    try:
        return calls, ensure_keeper(spec, start=False)
    except UnavailableError as error:
        calls.close()
        raise _KeeperEndedError(str(error)) from error
    except BaseException:
        calls.close()
        raise


def greet(wire: MessageSocket, hello: Hello) -> Welcome:
    """Say hello and return the answer. Raises what the keeper has against this peer."""
    try:
        return client.exchange_hello(wire, replace(hello, id=HELLO_ID))
    except client.HungUpError as error:
        raise _KeeperEndedError(str(error)) from error
    except UnavailableError as error:
        raise KeeperBusyError(str(error)) from error


def retry_while_keeper_ends(connect: Callable[[], _T], *, again: bool) -> _T:
    """``connect``, and ``again`` for START_WAIT_S seconds where the keeper that was found ended
    just then."""
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
"""Places of chunks that one message carries, far below a frame's limit. The others are stored anew,
once."""


class KeeperLink:
    """One rank's connection. It is the rank's ``Channel`` too. Thread-safe.

    Everything raises UnavailableError once the keeper is gone, and the keeper's own errors. A child
    that is forked lets go of the connection: it is its parent's.
    """

    def __init__(self, calls: MessageSocket, events: MessageSocket, hello: Hello) -> None:
        """Say hello on both connections, which the link owns from now on. Raises what the keeper
        has against this rank."""
        self._hello = hello
        self._spec: KeeperSpec | None = None
        self._closing = False
        self._state = threading.Lock()
        self._on_outcome: Callable[[Outcome], None] | None = None
        self._on_fenced: Callable[[str], None] | None = None
        self._on_lost: Callable[[CkptError], None] | None = None
        self._on_stop: Callable[[float], object] | None = None
        self._stop_s: float | None = None
        self._fenced: str | None = None
        self._open(calls, events)
        forget = weakref.WeakMethod(self._forget_after_fork)
        os.register_at_fork(after_in_child=lambda: _call(forget))

    @classmethod
    def connect(cls, spec: KeeperSpec, hello: Hello, *, start: bool = True) -> KeeperLink:
        """Find the job's keeper, start it where none runs (unless ``start`` is false), and say
        hello as a trainer.

        A keeper that ends just then is no answer: the next one is started. Raises KeeperBusyError
        where it takes nobody yet.
        """
        link = retry_while_keeper_ends(
            lambda: cls(*open_connections(spec, start=start), hello), again=start
        )
        link._spec = spec
        return link

    def reconnect(self, board: Board) -> None:
        """In the place of a keeper that is gone: find or start the next one, and give it the board
        where it has none.

        For a program without a supervisor, from one thread. Slots come next
        (``SharedSlots.hand_in_again``); nothing that was posted or handed in before is known any
        more. Raises UsageError where the keeper is still there. Where it raises anything else the
        link is as lost as it was.
        """
        if self._lost is None or self._spec is None or self._closing:
            raise UsageError(
                "a link is made anew only after its keeper is gone, where it was found by its job"
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
        """See ``Channel``."""
        seating = self.welcome.seating
        return self._hello.rank + (seating.first_rank if seating is not None else 0)

    @property
    def size(self) -> int:
        """See ``Channel``."""
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
        """Why nothing can be asked any more, or None while the keeper is there."""
        return self._lost

    # ---- what the keeper says by itself; one listener each, called in the link's thread, quick and never raising

    def on_outcome(self, call: Callable[[Outcome], None]) -> None:
        """Have ``call`` told of each snapshot that is settled."""
        with self._state:
            self._on_outcome = call

    def on_fenced(self, call: Callable[[str], None]) -> None:
        """Have ``call`` told when another writer takes the job over; at once where that has
        happened."""
        with self._state:
            self._on_fenced, told = call, self._fenced
        if told is not None:
            call(told)

    def on_stop(self, call: Callable[[float], object]) -> None:
        """Have ``call`` told when the job is preempted, and in how many seconds; at once where that
        has happened."""
        with self._state:
            self._on_stop, told = call, self._stop_s
        if told is not None:
            call(told)

    def on_lost(self, call: Callable[[CkptError], None]) -> None:
        """Have ``call`` told when the keeper is gone; at once where it is. Not told after
        ``close``."""
        with self._state:
            self._on_lost, told = call, self._lost
        if told is not None:
            call(told)

    # ---- the other ranks

    def post(self, key: str, value: bytes) -> None:
        """See ``Channel``."""
        self._calls.send(Post(key=key, value=value))

    def peek(self, key: str) -> bytes | None:
        """See ``Channel``."""
        return self._calls.ask(Peek(key=key), Value).value

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """See ``WaitingMailbox``: the keeper answers as soon as the value is there."""
        return self._calls.ask(Peek(key=key, wait_s=timeout_s), Value).value

    def count(self, key: str, amount: int = 0) -> int:
        """See ``Channel``."""
        return self._calls.ask(Count(key=key, amount=amount), Number).number

    def forget(self, key: str) -> None:
        """See ``Channel``."""
        self._calls.send(Forget(key=key))

    # ---- board and slots

    def board(self) -> Board:
        """The board of this node's ranks, mapped anew; the caller closes it."""
        _, fds = self._asked(GetBoard(), Done, count=1)
        return Board.attach(fds[0])

    def slots(self, rank: int) -> list[tuple[int, Region]]:
        """The slots of ``rank`` that the keeper holds, by number, mapped anew; the caller closes
        them."""
        reply, fds = self._asked(GetSlots(rank=rank), Slots)
        found: list[tuple[int, Region]] = []
        left = list(fds)
        try:
            if len(fds) != len(reply.slots):
                raise IntegrityError(
                    f"not one descriptor a slot. slots={len(reply.slots)} descriptors={len(fds)}"
                )
            for entry in reply.slots:
                found.append((entry.index, Region.from_fd(left.pop(0), entry.size_bytes)))
        except BaseException:
            close_fds(left)
            for _, region in found:
                region.close()
            raise
        return found

    def slot_made(self, index: int, fd: int, size_bytes: int) -> None:
        """Hand slot ``index`` of this rank to the keeper, which has it on return. UsageError where
        memory is short."""
        self._calls.call(SlotCreated(index=index, size_bytes=size_bytes), [fd])

    def slot_gone(self, index: int) -> None:
        """Tell that this rank gave slot ``index`` up."""
        self._calls.send(SlotReleased(index=index))

    # ---- snapshots

    def choices(self) -> tuple[Choice, ...]:
        """What can be restored, best first. Waits until the keeper has read the log."""
        return self._calls.ask(GetChoices(), Choices).choices

    def sources(self, snapshot: SnapshotId) -> Sources:
        """Where the shares of a staged pair's ranks are, where the job has several nodes."""
        return self._calls.ask(GetSources(snapshot=snapshot), Sources)

    def open_epoch(
        self, resume: SnapshotId | None, *, retention: Retention | None = None, newest: bool = False
    ) -> tuple[int, str]:
        """Rank 0: open the next epoch, going on from ``resume``; number and origin. Raises
        FencedError, UnavailableError.

        ``retention``: what the keeper shall drop from now on (None: nothing). ``newest``:
        ``resume`` is the best of the last ``choices``; raises NewerSnapshotError where there is a
        better one by now.
        """
        opened = self._calls.ask(
            OpenEpoch(resume=resume, retention=retention, newest=newest), Number
        )
        return opened.number, opened.origin

    def persist(
        self,
        snapshot: SnapshotId,
        *,
        index: int,
        generation: int,
        tags: tuple[str, ...] = (),
        shared: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        """Have slot ``index``, marked as in use, made durable. On return the keeper will do it even
        if this process dies."""
        self._calls.send(
            Persist(
                snapshot=snapshot,
                index=index,
                generation=generation,
                tags=tags,
                shared=dict(shared or {}),
            )
        )

    def refuse(self, snapshot: SnapshotId, error: CkptError) -> None:
        """Instead of ``persist``: this rank can't give its share, and why."""
        self._calls.send(Refuse(snapshot=snapshot, error=from_error(error, rank=self.rank)))

    def known(self, base: SnapshotId, places: Mapping[Digest, ChunkLocation]) -> None:
        """Chunks of the committed ``base`` that this rank read and found right; what comes next may
        refer to them."""
        some = dict(list(places.items())[:KNOWN_CHUNKS_MAX])
        self._calls.send(
            VerifiedChunks(base=base, digests=tuple(some), locations=tuple(some.values()))
        )

    def set_tag(self, name: str, snapshot: SnapshotId) -> None:
        """Rank 0: tag a durable snapshot; the record is written on return."""
        self._calls.call(SetTag(name=name, snapshot=snapshot))

    def decided(self, boundary: int, flags: int) -> None:
        """Rank 0: have the boards of other nodes say it too. They learn it a moment later; without
        a keeper nobody does."""
        with contextlib.suppress(
            UnavailableError
        ):  # the loop notices by itself that the keeper is gone
            self._calls.send(Decided(boundary=boundary, flags=flags))

    # ---- this trainer

    def phase(self, name: str, at_s: float | None = None, **facts: Fact) -> None:
        """Tell a point of the start that is reached, or was at ``at_s``: see ``messages.Phase``."""
        self._calls.send(
            Phase(name=name, at_s=time.monotonic() if at_s is None else at_s, facts=facts)
        )

    def failing(
        self, kind: str, text: str, *, fingerprint: str, step: int, final: bool = False
    ) -> None:
        """Tell that this trainer is about to die of an exception: see ``messages.Failing``."""
        self._calls.send(
            Failing(kind=kind, text=text, fingerprint=fingerprint, step=step, final=final)
        )

    def finished(self) -> None:
        """Tell that the decorated function returned and all is durable."""
        self._calls.send(Finished())

    def preempt(self, grace_s: float) -> None:
        """Tell that the node is about to be taken away."""
        self._calls.send(Preempt(grace_s=grace_s))

    def close(self) -> None:
        """Leave as planned. Nobody is told that the keeper is gone. Idempotent; not for the link's
        own thread."""
        self._closing = True
        with contextlib.suppress(UnavailableError):  # the keeper left first
            self._events.send(Bye())
        self._calls.close()
        self._events.close()
        self._thread.join()

    def _open(self, calls: MessageSocket, events: MessageSocket) -> None:
        try:
            self.welcome = greet(calls, self._hello)
            """What the keeper said first."""
            greet(events, replace(self._hello, role="events"))
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
                f"another answer than asked for. wanted={kind.__name__} "
                f"came={type(reply).__name__} descriptors={len(fds)}"
            )
        return reply, fds

    def _listen(self) -> None:
        try:
            for message in self._words():
                match message:
                    case Outcome():
                        if self._on_outcome is not None:
                            self._on_outcome(message)
                    case Fenced(text=text):
                        with self._state:
                            self._fenced, call = text, self._on_fenced
                        if call is not None:
                            call(text)
                    case Stop(grace_s=grace_s):
                        with self._state:
                            self._stop_s, stop = grace_s, self._on_stop
                        if stop is not None:
                            stop(grace_s)
            error: CkptError = UnavailableError(
                "the keeper is gone; what it had not made durable may be lost"
            )
        except Exception as met:  # noqa: BLE001  a thread's border: nobody would learn of any outcome any more
            error = UnavailableError(f"the connection to the keeper broke. cause={met!r}")
            error.__cause__ = met
        with self._state:
            self._lost, told = error, self._on_lost
        if told is not None and not self._closing:
            told(error)

    def _words(self) -> Iterator[Message]:
        while (received := self._events.receive()) is not None:
            message, fds = received
            close_fds(fds)
            yield message

    def _forget_after_fork(self) -> None:
        self._state = threading.Lock()  # the link's thread may have held it
        self._lost = UnavailableError(
            "the connection to the keeper belongs to the process that this one was forked from"
        )
        self._calls.forget_after_fork()
        self._events.forget_after_fork()


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    found = method()
    if found is not None:
        found()
