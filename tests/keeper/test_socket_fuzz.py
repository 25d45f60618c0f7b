"""Whatever comes over a keeper's socket, it lives, takes no more than is stated, and the job beside
it notices nothing.

What strangers may cost: for each connection that is open STRANGER_BYTES_MAX of a frame, a chunk of
64 KiB, and TOOL_WAITING_BYTES_MAX of answers that are not read. The tests hold CONNECTIONS_MAX open
and check GROWTH_BYTES_MAX, in which what the allocator keeps is counted too. A rank of the job
itself may cost what a frame (FRAME_BYTES_MAX) and its slots take.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kit.keepers.served import POLICY, WAIT_S, until
from kit.keepers.slot_makers import MadeSlot
from kit.servers.keeper_fuzz import (
    CONNECTIONS_MAX,
    Strangers,
    any_fds,
    any_message,
    descriptors,
    framed,
    mutated,
    own_bytes,
    send_fds,
    tool_hello,
)
from msgspec.msgpack import encode as msgpack

from ckpt.ipc import messages as answers
from ckpt.ipc import messages as words
from ckpt.ipc.board import Board
from ckpt.ipc.client import KeeperClient, KeeperSpec, ensure_keeper
from ckpt.ipc.frames import READ_BYTES, close_fds
from ckpt.ipc.messages import (
    Count,
    GetBoard,
    GetSlots,
    GetStatus,
    Hello,
    Peek,
    Post,
    SlotCreated,
    Slots,
    Status,
    Value,
    Welcome,
)
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.keeper.connection import TOOL_WAITING_BYTES_MAX, UNADMITTED_BYTES_MAX
from ckpt.values import SnapshotId

SOAK = os.environ.get("CKPT_SOAK") == "1"
SEEDS = range(
    int(os.environ.get("CKPT_SEED", "1")),
    int(os.environ.get("CKPT_SEED", "1")) + (40 if SOAK else 2),
)
TURNS = 3000 if SOAK else 250
PAIR = SnapshotId(3, 17)
GROWTH_BYTES_MAX = CONNECTIONS_MAX * (
    UNADMITTED_BYTES_MAX + READ_BYTES + TOOL_WAITING_BYTES_MAX
) + (64 << 20)


class Live:
    """A keeper process, and rank 0 of a job in place of two ranks, with a sealed slot and something
    said in its room."""

    def __init__(self, tmp_path: Path) -> None:
        self.spec = KeeperSpec(job="job", store=str(tmp_path / "store"))
        self.folder = JobFolder(self.spec.store, self.spec.job)
        self.calls = KeeperClient(ensure_keeper(self.spec))
        self.pid = self.calls.ask(self.hello(rank=0), Welcome, timeout_s=WAIT_S).pid
        _, fds = self.calls.call_fds(GetBoard())
        self.board = Board.attach(fds[0])
        self.slot = MadeSlot()
        self.calls.call(
            SlotCreated(index=0, size_bytes=self.slot.size_bytes), [self.slot.fd], timeout_s=WAIT_S
        )
        generation = self.slot.seal(PAIR, rank=0, ranks=2)
        self.board.rank(0).publish(0, PAIR, generation)
        self.bytes = bytes(self.slot.memory)
        self.calls.send(Post(key="said", value=b"before"))
        self.calls.call(Count(key="counted", amount=3), timeout_s=WAIT_S)
        self.check()
        self.descriptors, self.own_bytes = descriptors(self.pid), own_bytes(self.pid)
        self.attempt = self.report().attempt

    def hello(self, **changes: object) -> Hello:
        known = {
            "id": 1,
            "version": words.WIRE_VERSION,
            "role": "trainer",
            "pid": os.getpid(),
            "launch": "l",
            "ranks": 2,
            "policy": POLICY,
        }
        return Hello(**{**known, **changes})  # type: ignore[arg-type]

    def connect(self) -> socket.socket:
        return self.folder.connect()

    def report(self):
        report = self.calls.ask(GetStatus(), Status, timeout_s=WAIT_S).report
        assert report is not None
        return report

    def check(self) -> None:
        """Nothing of rank 0 has changed: what it staged, what it said, and who it is to its
        keeper."""
        reply, fds = self.calls.call_fds(GetSlots(rank=0))
        assert isinstance(reply, Slots)
        try:
            assert [(one.index, one.size_bytes) for one in reply.slots] == [
                (0, self.slot.size_bytes)
            ]
            with os.fdopen(os.dup(fds[0]), "rb") as file:
                file.seek(0)
                assert file.read() == self.bytes
        finally:
            close_fds(fds)
        assert self.board.rank(0).slot(0).snapshot == PAIR
        assert self.calls.ask(Peek(key="said"), Value, timeout_s=WAIT_S).value == b"before"
        assert (
            self.calls.ask(Count(key="counted", amount=0), answers.Number, timeout_s=WAIT_S).number
            == 3
        )
        report = self.report()
        assert (report.pid, report.state, report.launch) == (self.pid, "in place", "l")

    def unforeseen(self) -> list[str]:
        """What the keeper says that it had not reckoned with."""
        said = (self.folder.path / "keeper.log").read_text(errors="replace").splitlines()
        return [line for line in said if "unexpected error" in line or "Traceback" in line]

    def settled(self) -> None:
        """All descriptors and connections of others are gone again."""
        until(lambda: descriptors(self.pid) <= self.descriptors, wait_s=60.0)

    def close(self) -> None:
        self.calls.close()
        self.board.close()
        self.slot.close()
        if self.folder.has_keeper():
            os.kill(self.pid, signal.SIGKILL)
            until(lambda: not self.folder.has_keeper())
        self.folder.sweep()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    made = Live(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_strangers_change_nothing_and_cost_what_is_stated(live: Live, seed: int) -> None:
    print(f"seed {seed}")
    strangers = Strangers(random.Random(seed), live.connect)
    most = 0
    for turn in range(TURNS):
        strangers.attack()
        if turn % 50 == 0:
            live.check()
            most = max(most, own_bytes(live.pid) - live.own_bytes)
    live.check()
    most = max(most, own_bytes(live.pid) - live.own_bytes)
    print(f"grew by {most >> 20} MiB at most, of {GROWTH_BYTES_MAX >> 20} MiB")
    assert most <= GROWTH_BYTES_MAX
    strangers.close()
    live.settled()
    live.check()
    assert live.unforeseen() == []


def test_peers_that_are_none_are_hung_up_on(live: Live) -> None:
    """Each in its way; and a tool that asks nothing unheard-of stays."""
    rng = random.Random(0)
    too_long = struct.pack("<I", UNADMITTED_BYTES_MAX + 1)
    for raw in (
        b"\xff\xff\xff\xff",
        too_long,
        tool_hello(rng) + too_long,
        framed(b"no msgpack"),
        framed(any_message(rng)[:-1]),
        tool_hello(rng) + framed(b"\xc1"),
    ):
        assert ends(live, lambda sock, raw=raw: sock.sendall(raw)), raw
    with live.connect() as sock:
        sock.settimeout(WAIT_S)
        sock.sendall(tool_hello(rng))
        assert sock.recv(1 << 16)
        live.check()
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
    live.settled()


@pytest.mark.slow
def test_tool_that_reads_nothing_is_hung_up_on(live: Live) -> None:
    def ask(sock: socket.socket) -> None:
        status = framed(msgpack(GetStatus(id=1))) * 1000
        sock.sendall(tool_hello(random.Random(0)))
        for _ in range(200):
            sock.sendall(status)

    assert ends(live, ask)
    assert own_bytes(live.pid) - live.own_bytes <= GROWTH_BYTES_MAX
    live.check()
    live.settled()


def ends(live: Live, speak: Callable[[socket.socket], object]) -> bool:
    """Whether the keeper hangs up after that."""
    with live.connect() as sock:
        sock.settimeout(WAIT_S)
        try:
            speak(sock)
            while sock.recv(1 << 20):
                continue
        except ConnectionError:
            return True
    return True


def test_tool_may_only_ask(live: Live) -> None:
    """It has a socket, and no part in the job: whatever a rank may say is refused, with descriptors
    and without."""
    rng = random.Random(1)
    fields = {
        "attempt": 0,
        "key": "said",
        "value": b"changed",
        "amount": 5,
        "index": 0,
        "rank": 0,
        "size_bytes": 4096,
    }
    with live.connect() as sock:
        sock.settimeout(WAIT_S)
        sock.sendall(tool_hello(rng))
        for kind in (
            "Post",
            "Count",
            "Forget",
            "SlotGone",
            "SlotMade",
            "SlotKept",
            "Preempt",
            "Died",
            "Failing",
            "OpenEpoch",
        ):
            body = {
                "type": kind,
                "id": 0,
                **fields,
                "status": 1,
                "at_s": 0.0,
                "grace_s": 0.0,
                "resume": None,
                "kind": "k",
                "text": "t",
                "fingerprint": "f",
                "step": 1,
                "final": True,
            }
            sock.sendall(framed(msgpack(body)))
        with any_fds(rng, 1) as fds:
            send_fds(sock, framed(msgpack({"type": "SlotMade", "id": 5, **fields})), fds)
        live.check()
    live.settled()
    live.check()


INSIDERS_SAY = (
    words.Post,
    words.Peek,
    words.Count,
    words.GetBoard,
    words.GetSlots,
    words.SlotCreated,
    words.SlotReleased,
    words.VerifiedChunks,
    words.Persist,
    words.Refuse,
    words.Phase,
    words.Decided,
    words.GetSources,
    words.GetChoices,
    words.Hello,
    answers.Done,
    words.Start,
    words.Kill,
    words.Keep,
    words.PrintLine,
    words.Outcome,
)
"""What a rank says of itself. Left out is what ends, restarts or re-opens the job, as any rank
may."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_rank_that_talks_nonsense_spoils_nothing_of_another(live: Live, seed: int) -> None:
    """It has said a right hello, so its frames may be long and bring descriptors."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    before = 0
    for _ in range(TURNS // 5):
        with live.connect() as sock:
            sock.settimeout(WAIT_S)
            sock.sendall(framed(msgpack(live.hello(rank=1))))
            assert sock.recv(1 << 16)
            with suppress(ConnectionError, TimeoutError):
                for _ in range(rng.randrange(1, 12)):
                    frame = framed(any_message(rng, rng.choice(INSIDERS_SAY)))
                    match rng.randrange(4):
                        case 0:
                            sock.sendall(mutated(rng, frame))
                        case 1:
                            with any_fds(rng) as fds:
                                send_fds(sock, frame, fds)
                        case _:
                            sock.sendall(frame)
                if rng.random() < 0.2:
                    sock.sendall(struct.pack("<I", 48 << 20) + bytes(rng.choice((0, 4 << 20))))
        if time.monotonic() - before > 0.5:
            live_check_of_rank_0(live)
            before = time.monotonic()
    live_check_of_rank_0(live)
    assert live.unforeseen() == []
    assert own_bytes(live.pid) - live.own_bytes <= GROWTH_BYTES_MAX


def live_check_of_rank_0(live: Live) -> None:
    """As ``Live.check``, but for the room, into which every rank may speak."""
    reply, fds = live.calls.call_fds(GetSlots(rank=0))
    assert isinstance(reply, Slots)
    close_fds(fds)
    assert [(one.index, one.size_bytes) for one in reply.slots] == [(0, live.slot.size_bytes)]
    assert bytes(live.slot.memory) == live.bytes
    assert live.report().pid == live.pid
