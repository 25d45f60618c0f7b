"""A keeper that does as it is told, over a real socket, and one trainer of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from ckpt.errors import CkptError, UnavailableError
from ckpt.events import Event
from ckpt.ipc import messages as answers
from ckpt.ipc import messages as words
from ckpt.ipc.board import Board
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import KeeperReport, Message, RemoteError
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.keeper.persister import KeeperPersister
from ckpt.session.keeper.slots import SharedSlots
from ckpt.session.staging import StagedSlot
from ckpt.staging.slot import SlotPool
from ckpt.values import SnapshotId, StagedIndex

WAIT_S = 60.0
SPEC = KeeperSpec(job="job", store="/store")
HELLO = words.Hello(
    version=words.WIRE_VERSION, role="trainer", pid=1, launch="l", rank=0, ranks=2, attempt=3
)
SNAPSHOT = SnapshotId(1, 10)


@pytest.fixture(autouse=True)
def _needs_memfd() -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("needs memory that can be handed on")


class FakeKeeper:
    """Answers each connection in a thread of its own. ``heard`` is all that trainers said, in
    order."""

    def __init__(
        self, folder: JobFolder, *, new: bool = False, against: CkptError | None = None
    ) -> None:
        self.board = Board.create(2)
        self.heard: list[Message] = []
        self.slots: dict[int, tuple[int, int]] = {}
        self.changed = threading.Condition()
        self.new = new
        self.against = against
        self.silent = False
        self.ends = 0
        """So many hellos are answered by hanging up."""
        self.busy = 0
        """So many hellos are refused for now."""
        self.reports: list[KeeperReport | None] = []
        """What it says to tools, one after the other; the last one stays."""
        self.spare_fds = 0
        self._values: dict[str, bytes] = {}
        self._wires: list[MessageSocket] = []
        self._events: list[MessageSocket] = []
        self._threads: list[threading.Thread] = []
        with folder.in_use():
            self._listening = folder.listen()
        self._start(self._accept)

    def say(self, message: Message) -> None:
        """A word on every connection for events."""
        for wire in self._events:
            wire.send(message)

    def wait(self, kind: type[Message], count: int = 1) -> list[Message]:
        """The words of that kind, once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self._of(kind)) >= count, WAIT_S), (
                kind,
                self.heard,
            )
            return self._of(kind)

    def die(self) -> None:
        """Cut everything off."""
        if self._listening.fileno() >= 0:
            self._listening.shutdown(2)
            self._threads[0].join(WAIT_S)  # what was accepted last is among the wires now
            self._listening.close()
        for wire in self._wires:
            wire.close()
        for thread in self._threads:
            thread.join(WAIT_S)

    def close(self) -> None:
        self.die()
        for fd, _ in self.slots.values():
            os.close(fd)
        self.board.close()

    def _of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.heard if isinstance(message, kind)]

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            wire = MessageSocket(sock)
            self._wires.append(wire)
            self._start(self._serve, wire)

    def _serve(self, wire: MessageSocket) -> None:
        while (received := wire.receive()) is not None:
            message, fds = received
            with self.changed:
                if isinstance(message, words.Hello) and message.role == "events":
                    self._events.append(wire)
                self.heard.append(message)
                self.changed.notify_all()
            if isinstance(message, words.Hello) and self.ends:
                self.ends -= 1
                wire.close()
                return
            if message.id and not self.silent:
                answer, beside = self._answer(message, fds)
                try:
                    wire.send(replace(answer, id=message.id), beside)
                except UnavailableError:  # it died before it could answer
                    return

    def _answer(self, message: Message, fds: Sequence[int]) -> tuple[answers.Reply, list[int]]:
        match message:
            case words.Hello():
                error = None
                if self.busy:
                    self.busy -= 1
                    error = RemoteError("unavailable", "still bringing step 3 to the store", -1)
                elif self.against is not None:
                    error = RemoteError(self.against.code, str(self.against), 0)
                return answers.Welcome(boot="b", pid=2, attempt=3, new=self.new, error=error), []
            case words.Peek():
                with self.changed:
                    self.changed.wait_for(
                        lambda: self._value(message.key) is not None, message.wait_s
                    )
                    return answers.Value(value=self._value(message.key)), []
            case words.Count():
                return answers.Number(number=message.amount + 1), []
            case words.GetBoard():
                return answers.Done(), [self.board.fd, *[self.board.fd] * self.spare_fds]
            case words.SlotCreated():
                self.slots[message.index] = fds[0], message.size_bytes
                return answers.Done(), []
            case words.GetSlots():
                entries = tuple(
                    answers.SlotEntry(index, size) for index, (_, size) in self.slots.items()
                )
                held = [fd for fd, _ in self.slots.values()]
                return answers.Slots(slots=entries), held[: len(held) - self.spare_fds]
            case words.GetChoices():
                return answers.Choices(choices=(answers.Choice(SNAPSHOT, "staged"),)), []
            case words.GetStatus():
                return answers.Status(
                    report=self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
                ), []
            case words.OpenEpoch():
                return answers.Number(number=7), []
            case _:
                return answers.Done(error=RemoteError("fenced", "another writer", 1)), []

    def _value(self, key: str) -> bytes | None:
        posts = [one.value for one in self.heard if isinstance(one, words.Post) and one.key == key]
        return posts[-1] if posts else None


class Rank:
    """A trainer's slots and persister over a link."""

    def __init__(self, link: KeeperLink) -> None:
        self.events: list[Event] = []
        self.board = link.board()
        self.own = self.board.rank(0)
        self.shared = SharedSlots(link, self.board, 0)
        self.shared.epoch = 1
        self.pool = SlotPool(
            count=3, data_bytes=4096, header_bytes=8192, prefault=False, regions=self.shared
        )
        self.persister = KeeperPersister(link, self.shared, emit=self.events.append)

    def stage(self, step: int = 10) -> StagedSlot:
        slot = self.pool.acquire()
        assert slot is not None
        pin = slot.pin()
        slot.begin()
        index = StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=2, shards=())
        slot.seal(index)
        return StagedSlot(slot, index, pin, {"g": (2, "d")})

    def close(self) -> None:
        self.pool.close()
        self.board.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "run"))
    return JobFolder(SPEC.store, SPEC.job)


@pytest.fixture
def keeper(folder: JobFolder) -> Iterator[FakeKeeper]:
    made = FakeKeeper(folder)
    yield made
    made.close()


@pytest.fixture
def link(keeper: FakeKeeper) -> Iterator[KeeperLink]:
    made = KeeperLink.connect(SPEC, HELLO, start=False)
    yield made
    made.close()


@pytest.fixture
def rank(link: KeeperLink) -> Iterator[Rank]:
    made = Rank(link)
    yield made
    made.close()


@pytest.fixture
def connect(folder: JobFolder) -> Callable[[], KeeperLink]:
    """Makes a link to whoever listens in the job's folder."""
    return lambda: KeeperLink.connect(SPEC, HELLO, start=False)


@pytest.fixture
def make_keeper(folder: JobFolder) -> Callable[..., FakeKeeper]:
    """Makes one more keeper in the job's folder; the caller closes it."""
    return lambda **how: FakeKeeper(folder, **how)


@pytest.fixture
def make_rank() -> Callable[[KeeperLink], Rank]:
    """Makes one more trainer over a link; the caller closes it."""
    return Rank
