"""A real keeper in a thread of the test, on a real socket, and those who speak to it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ckpt.errors import CkptError, UnavailableError
from ckpt.events import Event
from ckpt.ipc.board import Board
from ckpt.ipc.client import KeeperClient, KeeperSpec
from ckpt.ipc.frames import MessageSocket, close_fds
from ckpt.ipc.messages import (
    WIRE_VERSION,
    Bye,
    Died,
    GetBoard,
    GetStatus,
    Hello,
    Keep,
    KeepBoard,
    KeeperReport,
    Kill,
    Killed,
    Leave,
    Message,
    Number,
    OpenEpoch,
    Outcome,
    Persist,
    Policy,
    Retention,
    SlotCreated,
    Start,
    Started,
    Status,
    Welcome,
)
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.keeper.daemon import Daemon
from ckpt.keeper.process import KeeperListener
from ckpt.values import SnapshotId
from kit.keepers.slot_makers import MadeSlot

T = TypeVar("T", bound=Message)
WAIT_S = 60.0
POLICY = Policy(linger_s=0.0, hang_s=0.0)


def until(there: Callable[[], object], *, wait_s: float = WAIT_S) -> None:
    """Wait for something to be so."""
    deadline_s = time.monotonic() + wait_s
    while not there():
        assert time.monotonic() < deadline_s, "nothing came of it"
        time.sleep(0.002)


class Peer:
    """One connection whose words are read as they come."""

    def __init__(self, wire: MessageSocket, hello: Hello) -> None:
        self.wire = wire
        self.hello = hello
        self.fds: list[int] = []
        self._later: list[Message] = []
        wire.send(hello)

    def next(self, kind: type[T], *, wait_s: float = WAIT_S) -> T:
        """The next word of that kind; others are kept for later."""
        for at, word in enumerate(self._later):
            if isinstance(word, kind):
                del self._later[at]
                return word
        while True:
            got = self.wire.receive(wait_s)
            assert got is not None, f"the keeper hung up instead of saying {kind.__name__}"
            word, fds = got
            self.fds += fds
            if isinstance(word, kind):
                return word
            self._later.append(word)

    def so_far(self, kind: type[T]) -> list[T]:
        """The words of that kind that have come."""
        words, _ = self.wire.receive_available()
        for word, fds in words:
            self.fds += fds
            self._later.append(word)
        return [word for word in self._later if isinstance(word, kind)]

    def ended(self) -> bool:
        """Whether the keeper hung up; takes all words before that."""
        while (got := self.wire.receive(WAIT_S)) is not None:
            self._later.append(got[0])
            self.fds += got[1]
        return True

    def say(self, message: Message, fds: Sequence[int] = ()) -> None:
        self.wire.send(message, fds)

    def leave(self, *, planned: bool = True) -> None:
        """Hang up."""
        if planned:
            self.say(Bye())
        self.wire.close()
        close_fds(self.fds)
        self.fds = []


class Trainer:
    """A rank's two connections, with its board and the slots that it made."""

    def __init__(self, served: Served, hello: Hello) -> None:
        self.calls = KeeperClient(served.wire())
        self.rank, self.ranks = hello.rank, hello.ranks
        try:
            self.welcome = self.calls.ask(hello, Welcome, timeout_s=WAIT_S)
        except CkptError:
            self.calls.close()
            raise
        self.events = Peer(served.wire(), served.hello(hello, role="events", id=1))
        self.events.next(Welcome)
        _, fds = self.calls.call_fds(GetBoard())
        self.board = Board.attach(fds[0])
        self.slots: dict[int, MadeSlot] = {}

    def make(self, index: int) -> MadeSlot:
        """Make a slot and hand it over."""
        slot = self.slots[index] = MadeSlot()
        self.calls.call(SlotCreated(index=index, size_bytes=slot.size_bytes), [slot.fd])
        return slot

    def stage(self, snapshot: SnapshotId, index: int = 0) -> int:
        """Seal a slot and say so on the board."""
        slot = self.slots.get(index) or self.make(index)
        generation = slot.seal(snapshot, rank=self.rank, ranks=self.ranks)
        self.board.rank(self.rank).publish(index, snapshot, generation)
        return generation

    def hand_in(self, snapshot: SnapshotId, index: int = 0) -> None:
        """Stage it and have it made durable."""
        generation = self.stage(snapshot, index)
        self.board.rank(self.rank).hold(index)
        self.calls.send(Persist(snapshot=snapshot, index=index, generation=generation))

    def outcome(self) -> Outcome:
        return self.events.next(Outcome)

    def leave(self, *, planned: bool = True) -> None:
        """Both connections end; unplanned as in a death."""
        if planned:
            self.events.leave()
            self.calls.close()
        else:
            self.calls._wire.close()
            self.events.leave(planned=False)
        self.board.close()
        for slot in self.slots.values():
            slot.close()


class Served:
    """One job's keeper, in a thread."""

    def __init__(self, tmp_path: Path, policy: Policy = POLICY) -> None:
        self.store = tmp_path / "store"
        self.spec = KeeperSpec(job="job", store=str(self.store), compression="off")
        self.folder = JobFolder(self.spec.store, self.spec.job)
        self.policy = policy
        self.events: list[Event] = []
        self._launches = itertools.count(1)
        home = KeeperListener.acquire(self.spec, self.folder)
        assert home is not None
        self.home: KeeperListener | None = home
        self.daemon = Daemon(self.spec, home, incarnation="b00t", emit=self.events.append)
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.daemon.run()
        except BaseException as error:  # noqa: BLE001  a thread's border
            self.failed = error

    def wire(self) -> MessageSocket:
        return MessageSocket(self.folder.connect())

    def hello(self, like: Hello | None = None, **changes: object) -> Hello:
        """A hello of a trainer of a launch of its own, or one like another."""
        known = {
            "version": WIRE_VERSION,
            "role": "trainer",
            "pid": os.getpid(),
            "launch": "l1",
            "rank": 0,
            "ranks": 1,
            "policy": self.policy,
            "id": 1,
        }
        if like is not None:
            known = {name: getattr(like, name) for name in Hello.__struct_fields__}
        return Hello(**{**known, **changes})  # type: ignore[arg-type]

    def peer(self, **hello: object) -> Peer:
        return Peer(self.wire(), self.hello(**hello))

    def trainer(self, rank: int = 0, ranks: int = 1, **hello: object) -> Trainer:
        return Trainer(self, self.hello(rank=rank, ranks=ranks, **hello))

    def supervisors(self, ranks: int, **hello: object) -> list[Peer]:
        """All join; their words of welcome are read."""
        found = [
            self.peer(role="supervisor", rank=rank, ranks=ranks, **hello) for rank in range(ranks)
        ]
        for one in found:
            one.next(Welcome)
        return found

    def tool(self) -> KeeperClient:
        calls = KeeperClient(self.wire())
        calls.ask(
            self.hello(role="tool", launch="", ranks=0, policy=None), Welcome, timeout_s=WAIT_S
        )
        return calls

    def report(self) -> KeeperReport:
        """What tools see."""
        tool = self.tool()
        report = tool.ask(GetStatus(), Status, timeout_s=WAIT_S).report
        tool.close()
        assert report is not None
        return report

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def ends(self, wait_s: float = WAIT_S) -> bool:
        """Whether the keeper ends by itself, well."""
        self.thread.join(wait_s)
        if self.failed is not None:
            raise self.failed
        return not self.thread.is_alive()

    def pause(self) -> threading.Event:
        """Have the loop stand still until the event is set: what comes meanwhile is read in one
        go."""
        stands, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            stands.set()
            assert go_on.wait(WAIT_S)

        self.daemon.post(wait)
        assert stands.wait(WAIT_S)
        return go_on

    def crash(self) -> None:
        """The keeper is gone from one moment to the next, as for those who speak to it; its folder
        stays."""
        self.daemon._over = lambda _: True  # type: ignore[method-assign]
        self.daemon.post(lambda: None)
        assert self.ends()
        self._close()

    def finish(self) -> None:
        """Let it end, whatever it waits for."""
        if self.thread.is_alive() and not self.ends(0.5):
            ranks = self.daemon._job.state.memory.ranks or 1
            with suppress(UnavailableError):  # it ends at this moment
                self.trainer(0, ranks, launch=f"last-{next(self._launches)}").leave()
        assert self.ends()
        if self.home is not None:
            self._close()

    def _close(self) -> None:
        assert self.home is not None
        self.home.close(remove=False)
        self.home = None


def started(supervisors: Sequence[Peer]) -> Start:
    """All are told to start the same attempt, and say that they did."""
    starts = [one.next(Start) for one in supervisors]
    assert len(set(starts)) == 1
    for one in supervisors:
        one.say(
            Started(attempt=starts[0].attempt, trainer_pid=0, how="fork", at_s=time.monotonic())
        )
    return starts[0]


def die(supervisors: Sequence[Peer], attempt: int, *, rank: int = 0, status: int = -9) -> None:
    """One trainer dies; the others are killed when the keeper says so."""
    supervisors[rank].say(Died(attempt=attempt, status=status, at_s=time.monotonic()))
    for one in supervisors:
        assert one.next(Kill).attempt == attempt
        one.say(Killed(attempt=attempt))


def gone(supervisors: Sequence[Peer], some: Sequence[Trainer]) -> None:
    """Trainers are dead and supervisors leave as told."""
    for one in some:
        one.leave(planned=False)
    for one in supervisors:
        one.leave()


def end_well(supervisors: Sequence[Peer], attempt: int) -> None:
    """All trainers end, and their supervisors with them."""
    for one in supervisors:
        one.say(Died(attempt=attempt, status=0, at_s=time.monotonic()))
        assert one.next(Leave) == Leave(status=0)
        one.leave()


def kept(peer: Peer) -> tuple[KeepBoard, list[Keep]]:
    """What a supervisor was given to hold so far."""
    board = peer.next(KeepBoard)
    return board, peer.so_far(Keep)


def open_epoch(
    trainer: Trainer, resume: SnapshotId | None = None, *, retention: Retention | None = None
) -> int:
    return trainer.calls.ask(OpenEpoch(resume=resume, retention=retention), Number).number
