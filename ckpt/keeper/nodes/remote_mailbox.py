"""Mailboxes at another keeper, that of rank 0's node; and on that node, serving those who ask. In
the keeper's loop.

Each mailbox has a name that is never used again, so messages for the mailbox of a dead attempt
reach nothing. Messages for a mailbox that is not open yet wait for it: another node may have begun
the epoch a moment earlier.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeoutError

from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox, ValueCallback
from ckpt.keeper.slots import PostToLoop

EARLY_MAX = 10_000
"""Messages that wait for mailboxes that are not open yet. More are dropped, and their attempt fails
in time."""

MailboxMessage = mesh.MeshPost | mesh.MeshPeek | mesh.MeshCount | mesh.MeshForget


class RemoteMailboxes:
    """All mailboxes of one keeper's job. ``send`` sends a message to a node; False if there was no
    connection."""

    def __init__(self, send: Callable[[str, MeshMessage], bool]) -> None:
        self._send = send
        self._served: dict[str, LocalMailbox] = {}
        self._early: list[tuple[str, MailboxMessage]] = []
        self._calls = itertools.count(1)
        self._values_asked: dict[int, tuple[str, ValueCallback]] = {}
        """Questions for values, by call: the mailbox's name and who gets the answer."""
        self._numbers_asked: dict[int, tuple[str, Callable[[int], object]]] = {}

    def new_epoch(self, number: int, *, generation: int) -> None:
        """Close the mailboxes of other attempts and generations, and drop the questions to them."""
        stay = {attempt_mailbox(number), uploads_mailbox(generation)}
        self._served = {name: mailbox for name, mailbox in self._served.items() if name in stay}
        self._values_asked = {
            call: asked for call, asked in self._values_asked.items() if asked[0] in stay
        }
        self._numbers_asked = {
            call: asked for call, asked in self._numbers_asked.items() if asked[0] in stay
        }

    def serve(self, name: str, mailbox: LocalMailbox) -> None:
        """Answer others' messages for a mailbox of this keeper, first those that arrived too
        early."""
        if self._served.get(name) is mailbox:
            return
        self._served[name] = mailbox
        early, self._early = self._early, []
        for node, message in early:
            self._serve(node, message)

    def peek(self, node: str, name: str, key: str, *, wait_s: float, answer: ValueCallback) -> None:
        """Ask ``node`` for a value. Without a connection nothing answers, and the attempt fails in
        time."""
        call = next(self._calls)
        self._values_asked[call] = (name, answer)
        self._send(node, mesh.MeshPeek(call=call, room=name, key=key, wait_s=wait_s))

    def count(
        self, node: str, name: str, key: str, amount: int, *, answer: Callable[[int], object]
    ) -> None:
        """Add to a counter at ``node``, and ask for the sum; as ``peek``."""
        call = next(self._calls)
        self._numbers_asked[call] = (name, answer)
        self._send(node, mesh.MeshCount(call=call, room=name, key=key, amount=amount))

    def send(self, node: str, message: mesh.MeshPost | mesh.MeshForget) -> None:
        """Send a message that needs no answer."""
        self._send(node, message)

    def receive(self, node: str, message: MailboxMessage | mesh.MeshReply) -> None:
        """A message for a mailbox here, or the answer to a question."""
        if not isinstance(message, mesh.MeshReply):
            self._serve(node, message)
        elif (value_asked := self._values_asked.pop(message.call, None)) is not None:
            value_asked[1](message.value)
        elif (number_asked := self._numbers_asked.pop(message.call, None)) is not None:
            number_asked[1](message.number)

    def _serve(self, node: str, message: MailboxMessage) -> None:
        mailbox = self._served.get(message.room)
        if mailbox is None:
            if len(self._early) < EARLY_MAX:
                self._early.append((node, message))
            return
        match message:
            case mesh.MeshPost():
                mailbox.post(message.key, message.value)
            case mesh.MeshForget():
                mailbox.forget(message.key)
            case mesh.MeshPeek(call=call):

                def value_is(value: bytes | None) -> None:
                    self._send(node, mesh.MeshReply(call=call, value=value))

                mailbox.peek(message.key, wait_s=message.wait_s, owner=node, answer=value_is)
            case mesh.MeshCount(call=call):

                def number_is(number: int) -> None:
                    self._send(node, mesh.MeshReply(call=call, number=number))

                mailbox.count(message.key, message.amount, answer=number_is)


def attempt_mailbox(number: int) -> str:
    """The name of an attempt's mailbox."""
    return f"attempt/{number}"


def uploads_mailbox(generation: int) -> str:
    """The name of the mailbox in which the ranks of a placement generation commit."""
    return f"uploads/{generation}"


class RemoteMailbox:
    """A ``KeeperMailbox`` that is at ``node``."""

    def __init__(self, mailboxes: RemoteMailboxes, name: str, node: str) -> None:
        self._mailboxes = mailboxes
        self._name = name
        self._node = node

    def post(self, key: str, value: bytes) -> None:
        self._mailboxes.send(self._node, mesh.MeshPost(room=self._name, key=key, value=value))

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        """``owner`` is ignored: an answer for a client that has left is dropped on arrival."""
        self._mailboxes.peek(self._node, self._name, key, wait_s=wait_s, answer=answer)

    def count(self, key: str, amount: int, *, answer: Callable[[int], object]) -> None:
        self._mailboxes.count(self._node, self._name, key, amount, answer=answer)

    def forget(self, key: str) -> None:
        self._mailboxes.send(self._node, mesh.MeshForget(room=self._name, key=key))


# ---- channel: how threads of a keeper reach the ranks of other nodes

ANSWER_S = 10.0
"""How long a question waits for its message. One without an answer after twice that was lost, and
is asked again."""

EMPTY_PAUSE_S = 0.05
"""Pause after a question that found nothing."""

REPEATED_MAX = 256
"""How many of the last messages are posted again after a broken connection: only the last few
snapshots matter."""


class LoopChannel:
    """The mailbox of one rank, over ``mailbox``, which is looked up each time: None once it is
    closed. Thread-safe.

    See ``ckpt.ipc.mailbox.RankMailbox``. What may have been lost is sent again, so it offers no
    counters: adding twice would be wrong.
    """

    stays = True
    """A rank leaves together with its node, and that ends the generation for all."""

    def __init__(
        self, post: PostToLoop, mailbox: Callable[[], KeeperMailbox | None], *, rank: int, size: int
    ) -> None:
        self._call = post
        self._mailbox = mailbox
        self.rank = rank
        self.size = size
        self._posted: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[Future[bytes | None], float]] = {}
        """Open questions, and until when they count as open: a second wait for the key shares the
        answer."""

    def post(self, key: str, value: bytes) -> None:
        def do() -> None:
            self._posted[key] = value
            if len(self._posted) > REPEATED_MAX:
                del self._posted[next(iter(self._posted))]
            if (mailbox := self._mailbox()) is not None:
                mailbox.post(key, value)

        self._call(do)

    def peek(self, key: str) -> bytes | None:
        try:
            return self._ask(key, 0.0).result(ANSWER_S)
        except WaitTimeoutError:
            return None

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """The value of ``key``, or None after ``timeout_s`` seconds or, at times, earlier: call
        again."""
        now_s = time.monotonic()
        with self._lock:
            asked, until_s = self._asked.get(key, (None, 0.0))
            if asked is None or now_s >= until_s:
                asked = self._ask(key, ANSWER_S)
                self._asked[key] = (asked, now_s + 2 * ANSWER_S)
        try:
            value = asked.result(timeout_s)
        except WaitTimeoutError:
            return None
        with self._lock:
            if self._asked.get(key, (None, 0.0))[0] is asked:
                del self._asked[key]
        if value is None:
            time.sleep(
                min(timeout_s, EMPTY_PAUSE_S)
            )  # the mailbox is closed, or there is nothing yet
        return value

    def _ask(self, key: str, wait_s: float) -> Future[bytes | None]:
        asked: Future[bytes | None] = Future()

        def do() -> None:
            mailbox = self._mailbox()
            if mailbox is None:
                _answer(asked, None)
            else:
                mailbox.peek(
                    key, wait_s=wait_s, owner=self, answer=lambda value: _answer(asked, value)
                )

        self._call(do)
        return asked

    def forget(self, key: str) -> None:
        def do() -> None:
            self._posted.pop(key, None)
            if (mailbox := self._mailbox()) is not None:
                mailbox.forget(key)

        self._call(do)

    def repeat(self) -> None:
        """In the loop: a connection is up again, on which messages may have been lost."""
        if (mailbox := self._mailbox()) is not None:
            for key, value in self._posted.items():
                mailbox.post(key, value)


def _answer(asked: Future[bytes | None], value: bytes | None) -> None:
    if not asked.done():
        asked.set_result(value)
