"""Rooms that are at another keeper, the one of rank 0's node; and on that node, serving those who
ask. All in the loop.

Each room has a name that no other ever has, so words of a dead attempt's room reach nobody. Words
about a room that is not open yet wait for it: another node may have begun the epoch a moment
earlier.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeoutError

from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox, ValueCallback

EARLY_MAX = 10_000
"""Words that wait for rooms that are not open yet; what comes beyond is dropped, and its attempt
fails in time."""

MailboxMessage = said.MeshPost | said.MeshPeek | said.MeshCount | said.MeshForget
Asked = tuple[str, "ValueCallback | Callable[[int], object]", bool]


class RemoteMailboxes:
    """The rooms of one keeper's job. ``say`` says a word to a node, and whether a line was
    there."""

    def __init__(self, say: Callable[[str, MeshMessage], bool]) -> None:
        self._say = say
        self._served: dict[str, LocalMailbox] = {}
        self._early: list[tuple[str, MailboxMessage]] = []
        self._calls = itertools.count(1)
        self._asked: dict[int, Asked] = {}

    def new_epoch(self, number: int, *, era: int) -> None:
        """Rooms of other attempts and eras are gone, and so are questions to them."""
        stay = {attempt_mailbox(number), uploads_mailbox(era)}
        self._served = {name: room for name, room in self._served.items() if name in stay}
        self._asked = {call: one for call, one in self._asked.items() if one[0] in stay}

    def serve(self, name: str, room: LocalMailbox) -> None:
        """Answer others' words about a room of this keeper, those that came too early first."""
        if self._served.get(name) is room:
            return
        self._served[name] = room
        early, self._early = self._early, []
        for node, word in early:
            self._serve(node, word)

    def ask(
        self,
        node: str,
        name: str,
        word: Callable[[int], MailboxMessage],
        answer: object,
        *,
        counts: bool,
    ) -> None:
        """Ask the node of rank 0; ``answer`` hears of it. Without a line nobody answers, and the
        attempt fails in time."""
        call = next(self._calls)
        self._asked[call] = (name, answer, counts)  # type: ignore[assignment]
        self._say(node, word(call))

    def tell(self, node: str, word: MailboxMessage) -> None:
        """Say something to the node of rank 0 that nobody answers."""
        self._say(node, word)

    def take(self, node: str, word: MailboxMessage | said.MeshReply) -> None:
        """A word about a room, or an answer."""
        if not isinstance(word, said.MeshReply):
            self._serve(node, word)
            return
        asked = self._asked.pop(word.call, None)
        if asked is not None:
            asked[1](word.number if asked[2] else word.value)  # type: ignore[arg-type]

    def _serve(self, node: str, word: MailboxMessage) -> None:
        room = self._served.get(word.room)
        if room is None:
            if len(self._early) < EARLY_MAX:
                self._early.append((node, word))
            return
        match word:
            case said.MeshPost():
                room.post(word.key, word.value)
            case said.MeshForget():
                room.forget(word.key)
            case said.MeshPeek(call=call):

                def value(found: bytes | None) -> None:
                    self._say(node, said.MeshReply(call=call, value=found))

                room.peek(word.key, wait_s=word.wait_s, owner=node, answer=value)
            case said.MeshCount(call=call):

                def number(found: int) -> None:
                    self._say(node, said.MeshReply(call=call, number=found))

                room.count(word.key, word.amount, answer=number)


def attempt_mailbox(number: int) -> str:
    """The name of an attempt's room."""
    return f"attempt/{number}"


def uploads_mailbox(era: int) -> str:
    """The name of the room in which an era's snapshots are made durable."""
    return f"uploads/{era}"


class RemoteMailbox:
    """A room that is at ``node``. See Room."""

    def __init__(self, rooms: RemoteMailboxes, name: str, node: str) -> None:
        self._rooms = rooms
        self._name = name
        self._node = node

    def post(self, key: str, value: bytes) -> None:
        """See Room."""
        self._rooms.tell(self._node, said.MeshPost(room=self._name, key=key, value=value))

    def peek(self, key: str, *, wait_s: float, owner: object, answer: ValueCallback) -> None:
        """See Room. Whoever leaves is answered all the same, and hears nothing of it."""
        del owner

        def word(call: int) -> MailboxMessage:
            return said.MeshPeek(call=call, room=self._name, key=key, wait_s=wait_s)

        self._rooms.ask(self._node, self._name, word, answer, counts=False)

    def count(self, key: str, amount: int, *, answer: Callable[[int], object]) -> None:
        """See Room."""

        def word(call: int) -> MailboxMessage:
            return said.MeshCount(call=call, room=self._name, key=key, amount=amount)

        self._rooms.ask(self._node, self._name, word, answer, counts=True)

    def forget(self, key: str) -> None:
        """See Room."""
        self._rooms.tell(self._node, said.MeshForget(room=self._name, key=key))


# How threads of a keeper speak to the ranks of other nodes: through a room that only its loop may
# touch.

ANSWER_S = 10.0
"""A question waits so long for its message. One that is not answered by so long after that was
lost; it is asked again."""

NOBODY_S = 0.05
"""Pause after a question that found nothing."""

REPEATED_MAX = 256
"""So many of the last messages are posted again where a line was broken. Only those of the last few
snapshots matter."""

PostToLoop = Callable[[Callable[[], object]], None]


class LoopChannel:
    """The channel of one rank over ``room``, which is asked for each time: None once that is over.
    Thread-safe.

    See ``persist.channel.RankMailbox``. What is lost on its way is said again, which counters would
    not bear.
    """

    stays = True
    """A rank leaves with its node, and that ends the era for all."""

    def __init__(
        self, post: PostToLoop, room: Callable[[], KeeperMailbox | None], *, rank: int, size: int
    ) -> None:
        self._call = post
        self._room = room
        self.rank = rank
        self.size = size
        self._posted: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[Future[bytes | None], float]] = {}
        """Questions on their way and until when they are: who asks again waits for the same
        answer."""

    def post(self, key: str, value: bytes) -> None:
        """See Messages."""

        def do() -> None:
            self._posted[key] = value
            if len(self._posted) > REPEATED_MAX:
                del self._posted[next(iter(self._posted))]
            if (room := self._room()) is not None:
                room.post(key, value)

        self._call(do)

    def peek(self, key: str) -> bytes | None:
        """See Messages."""
        try:
            return self._ask(key, 0.0).result(ANSWER_S)
        except WaitTimeoutError:
            return None

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """See Waiting."""
        now_s = time.monotonic()
        with self._lock:
            found, until_s = self._asked.get(key, (None, 0.0))
            if found is None or now_s >= until_s:
                found = self._ask(key, ANSWER_S)
                self._asked[key] = (found, now_s + 2 * ANSWER_S)
        try:
            value = found.result(timeout_s)
        except WaitTimeoutError:
            return None
        with self._lock:
            if self._asked.get(key, (None, 0.0))[0] is found:
                del self._asked[key]
        if value is None:
            time.sleep(min(timeout_s, NOBODY_S))  # the room is over, or there is nothing yet
        return value

    def _ask(self, key: str, wait_s: float) -> Future[bytes | None]:
        found: Future[bytes | None] = Future()

        def do() -> None:
            room = self._room()
            if room is None:
                _answer(found, None)
            else:
                room.peek(
                    key, wait_s=wait_s, owner=self, answer=lambda value: _answer(found, value)
                )

        self._call(do)
        return found

    def forget(self, key: str) -> None:
        """See Messages."""

        def do() -> None:
            self._posted.pop(key, None)
            if (room := self._room()) is not None:
                room.forget(key)

        self._call(do)

    def repeat(self) -> None:
        """In the loop: a line is up again, on which something may have been lost."""
        if (room := self._room()) is not None:
            for key, value in self._posted.items():
                room.post(key, value)


def _answer(found: Future[bytes | None], value: bytes | None) -> None:
    if not found.done():
        found.set_result(value)
