"""The keeper's loop: one thread, one selector, no call that waits. Uploads have threads of their
own and post back here."""

from __future__ import annotations

import errno
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ckpt.errors import CkptError, InternalError, UsageError
from ckpt.events import Emit, Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.frames import close_fds
from ckpt.ipc.messages import (
    WIRE_VERSION,
    BoardKept,
    Bye,
    GetStatus,
    Hello,
    KeeperReport,
    Message,
    RankReport,
    SlotCreated,
    SlotKept,
    Status,
    Welcome,
)
from ckpt.keeper.attempts.supervisors import Supervisors
from ckpt.keeper.connection import ClientConnection
from ckpt.keeper.job import Job
from ckpt.keeper.process import KeeperListener, StallDetector, Watchdog, end_hung_process
from ckpt.keeper.trainer_calls import TrainerCalls

# What a keeper tells tools about itself.

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def status_report(job: Job, crew: Supervisors) -> KeeperReport:
    """All of it, at one moment."""
    roster = crew.roster
    complete = job.slots.complete_snapshots(job.ranks) if job.slots is not None else []
    state = "lingering"
    if job.members:
        state = roster.state.value if roster is not None and crew.supervised else "in place"
    return KeeperReport(
        job=job.spec.job,
        store=job.spec.store,
        pid=os.getpid(),
        boot=job.incarnation,
        launch=job.launch,
        attempt=crew.attempt,
        epoch=job.uploads.epoch if job.uploads is not None else 0,
        state=state,
        since_s=time.monotonic() - job.times.began_s,
        complete=complete[0] if complete else None,
        durable=job.uploads.durable if job.uploads is not None else None,
        uploads=job.uploads.in_flight if job.uploads is not None else 0,
        slot_bytes=job.slots.total_bytes if job.slots is not None else 0,
        rss_bytes=_own_bytes(),
        ranks=tuple(_rank(job, crew, rank) for rank in range(job.ranks)),
        recoveries=tuple(crew.recoveries),
        nodes=job.nodes.standbys.report() if job.nodes is not None else (),
        mirror_bytes=job.nodes.memory.sent_bytes if job.nodes is not None else 0,
        refused=job.nodes.refused if job.nodes is not None else {},
    )


def _rank(job: Job, crew: Supervisors, rank: int) -> RankReport:
    assert job.board is not None and job.slots is not None, "there are ranks"
    words = job.board.rank(rank)
    member = crew.roster.members.get(rank) if crew.roster is not None else None
    alone = next(
        (peer.hello for peer in job.members if peer.role == "trainer" and peer.rank == rank), None
    )
    trainer_pid = (
        member.trainer_pid if member is not None else alone.pid if alone is not None else 0
    )
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    completed = words.completed
    return RankReport(
        rank=rank,
        supervisor_pid=member.pid if member is not None else 0,
        trainer_pid=trainer_pid,
        completed=-1 if completed is None else completed,
        phase=words.phase.name.lower(),
        idle_s=(now_ns - words.beat_ns) / 1e9 if words.beat_ns else 0.0,
        staged=words.staged,
        skipped=words.skipped,
        slots=job.slots.report(rank),
    )


def _own_bytes() -> int:
    """Memory of this process that is no slot: resident pages that are not shared."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES


FIRST_HELLO_S = 30.0
"""How long a keeper that nobody spoke to stays, and a connection on which nobody says hello."""

TICK_S_MAX = 1.0

HOME_LOOK_S = 5.0
"""How often a keeper looks whether it can still be found: who logs out of a machine may have all
runtime folders removed."""

FULL_WAIT_S = 0.2
"""How long connections wait where this process has no descriptor left for them."""

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

DRAIN_READS_MAX = 256
"""Reads, of 1 MiB each at most, to take what one trainer left; one that lives may go on sending for
ever."""

CARRIERS = (SlotCreated, SlotKept, BoardKept)
"""The messages that come with one descriptor."""

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Daemon:
    """Serves one job until it is over."""

    def __init__(
        self, spec: KeeperSpec, listener: KeeperListener, *, incarnation: str, emit: Emit
    ) -> None:
        self._home = listener
        self._home_look_s = time.monotonic() + HOME_LOOK_S
        self._accept_at_s: float | None = None
        self._alarms: set[str] = set()
        """Kinds of alarms about finding and taking connections that were told, and have not been
        overcome since."""
        self._importing: threading.Thread | None = None
        self._tell = emit
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], object]] = deque()
        # Sockets, not a pipe: a thread that posts after the end must not write to whatever has its
        # number then.
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.get_ident()
        self._job = Job(spec, incarnation=incarnation, post=self.post, emit=emit)
        self._job.drain = self._drain
        self._desk = TrainerCalls(self._job)
        self._crew = Supervisors(self._job, self._desk, stacks=listener.folder.stacks)
        self._numbers = 0
        self._met_anyone = False

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call`` made by the loop; from any thread."""
        self._posted.append(call)
        try:
            self._wake_write.send(b"\0")
        except OSError:  # it is awake already, or it has ended
            return

    def run(self) -> None:
        """Serve until the job is over."""
        began_s, stalls = time.monotonic(), StallDetector(self._tell)
        watchdog = Watchdog(end_hung_process)
        self._selector.register(self._home.listener, _READ, self._home)
        self._selector.register(self._wake_read, _READ, None)
        try:
            while not (self._over(began_s) and self._hidden()):
                wait_s = min(
                    TICK_S_MAX, self._crew.tick(), self._desk.tick(time.monotonic()), self._look()
                )
                stalls.before_wait(wait_s)
                watchdog.beat()
                for key, mask in self._selector.select(max(0.0, wait_s)):
                    self._serve(key, mask)
                self._run_posted()
        finally:
            watchdog.stop()
            if self._importing is not None:
                self._importing.join()
            for peer in list(self._job.peers.values()):
                peer.close()
            self._job.close()
            self._selector.close()
            self._wake_read.close()
            self._wake_write.close()

    def _over(self, began_s: float) -> bool:
        now_s = time.monotonic()
        if any(peer.role != "tool" and not _mute(peer, now_s) for peer in self._job.peers.values()):
            return False
        if not self._met_anyone:
            return now_s - began_s > FIRST_HELLO_S
        return self._job.over()

    def _hidden(self) -> bool:
        """Whether nobody comes any more. Who had found the keeper before it was hidden is served,
        by the same keeper."""
        self._home.hide()
        if not self._home.has_pending():
            return True
        self._move()
        return False

    def _look(self) -> float:
        """See whether the keeper can be found, and can take connections again; returns seconds
        until the next look."""
        now_s = time.monotonic()
        for peer in [one for one in self._job.peers.values() if _mute(one, now_s)]:
            self._tell(Event("peer-lost", "a connection on which nobody said hello was ended"))
            self._gone(peer)
        if self._accept_at_s is not None and now_s >= self._accept_at_s:
            self._accept_at_s = None
            self._selector.register(self._home.listener, _READ, self._home)
        if now_s >= self._home_look_s:
            self._home_look_s = now_s + HOME_LOOK_S
            if not self._home.is_reachable():
                self._move()
        return min(self._home_look_s, self._accept_at_s or self._home_look_s) - now_s

    def _move(self) -> None:
        """Be found again. Where another keeper has come instead, this one goes on with those that
        it has."""
        try:
            old = self._home.renew()
        except (CkptError, OSError) as error:
            self._alarm("home-lost", f"the keeper's folder can't be made anew: {error}")
            return
        if old is None:
            self._alarm("home-lost", "another keeper has taken over this job's folder")
            return
        self._alarms.discard("home-lost")
        self._tell(Event("home-renewed", "the keeper's socket was gone, and is there again"))
        if self._accept_at_s is None:
            self._selector.unregister(old)
            self._selector.register(self._home.listener, _READ, self._home)
        while self._accept(old):
            continue
        old.close()

    def _alarm(self, kind: str, text: str) -> None:
        """Tell it once for as long as it lasts."""
        if kind not in self._alarms:
            self._alarms.add(kind)
            self._tell(Event(kind, text, alarm=True))

    def _serve(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.data is self._home:
            self._accept(self._home.listener)
        elif key.fileobj is self._wake_read:
            self._drain_wake()
        else:
            peer: ClientConnection = key.data
            if peer.number not in self._job.peers:  # it went while another's words were obeyed
                return
            if mask & _WRITE and peer.flush():
                self._selector.modify(peer.sock, _READ, peer)
            if mask & _READ and peer.number in self._job.peers:
                self._read(peer)

    def _accept(self, listener: socket.socket) -> bool:
        """Take one connection; False where there is none, or no room for one."""
        try:
            sock, _ = listener.accept()
        except OSError as error:  # else it hung up before we looked
            if error.errno in _FULL and self._accept_at_s is None:
                self._selector.unregister(
                    self._home.listener
                )  # it would be shown as readable again and again
                self._accept_at_s = time.monotonic() + FULL_WAIT_S
                self._alarm("full", f"the keeper can take no connection now: {error}")
            return False
        self._alarms.discard("full")
        sock.setblocking(False)
        self._numbers += 1
        peer = ClientConnection(self._numbers, sock, on_blocked=self._blocked)
        self._job.peers[peer.number] = peer
        self._selector.register(sock, _READ, peer)
        return True

    def _blocked(self, peer: ClientConnection) -> None:
        """Something is left to send: look for room too."""
        if peer.number in self._job.peers:
            self._selector.modify(peer.sock, _READ | _WRITE, peer)

    def _drain_wake(self) -> None:
        try:
            while self._wake_read.recv(4096):
                continue
        except BlockingIOError:
            return

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            call = self._posted.popleft()
            try:
                call()
            except Exception as error:  # noqa: BLE001  the loop's border: a keeper that ends takes the slots with it
                self._tell(
                    Event(
                        "keeper-failed",
                        f"a call failed in an unforeseen way: {error!r}",
                        alarm=True,
                    )
                )

    def _read(self, peer: ClientConnection) -> None:
        try:
            messages, ended = peer.read()
        except (CkptError, OSError) as error:
            self._tell(
                Event(
                    "peer-lost",
                    f"a connection failed: {error}",
                    {"role": peer.role, "rank": peer.rank},
                )
            )
            messages, ended = [], True
        for message, fds in messages:
            if peer.lost:
                close_fds(fds)
            else:
                self._take(peer, message, fds)
        if ended:
            self._gone(peer)

    def _drain(self) -> None:
        """Read what trainers sent: one that is dead left all of it in its socket, and its end."""
        for peer in list(self._job.peers.values()):
            for _ in range(DRAIN_READS_MAX):
                if (
                    peer.role != "trainer"
                    or peer.number not in self._job.peers
                    or not _readable(peer.sock)
                ):
                    break
                self._read(peer)

    def _take(self, peer: ClientConnection, message: Message, fds: list[int]) -> None:
        try:
            if fds and (len(fds) > 1 or peer.hello is None or not isinstance(message, CARRIERS)):
                close_fds(fds)
                raise UsageError(
                    "descriptors beside a message that has no use for them. "
                    f"message={type(message).__name__}"
                )
            self._dispatch(peer, message, fds)
        except CkptError as error:
            self._fail(peer, message, error)
        except Exception as error:  # noqa: BLE001  the loop's border, as above
            self._tell(
                Event(
                    "keeper-failed",
                    f"a message failed: {type(message).__name__} {error!r}",
                    alarm=True,
                )
            )
            self._fail(
                peer,
                message,
                InternalError(
                    f"the keeper failed. message={type(message).__name__} cause={error!r}"
                ),
            )

    def _fail(self, peer: ClientConnection, message: Message, error: CkptError) -> None:
        if message.id:
            self._job.refuse(peer, message.id, error)
        else:
            self._tell(
                Event("refused", str(error), {"role": peer.role, "rank": peer.rank}, alarm=True)
            )

    def _dispatch(self, peer: ClientConnection, message: Message, fds: list[int]) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message)
            if peer.role != "tool":
                self._import_ahead()
            return
        if peer.hello is None:
            raise UsageError(f"a peer speaks before its hello. message={type(message).__name__}")
        match message:
            case Bye():
                peer.planned = True
            case GetStatus():
                peer.send(Status(id=message.id, report=status_report(self._job, self._crew)))
            case _ if peer.role != "tool" and (
                self._crew.handle(peer, message, fds)
                or (self._job.board and self._desk.handle(peer, message, fds))
            ):
                return
            case _:
                close_fds(fds)
                raise UsageError(
                    f"a message that a {peer.role} does not send. message={type(message).__name__}"
                )

    def _hello(self, peer: ClientConnection, hello: Hello) -> None:
        if peer.hello is not None:
            raise UsageError("a peer says hello twice.")
        if hello.version != WIRE_VERSION:
            raise UsageError(
                f"another release of torch-ckpt holds this job. theirs={WIRE_VERSION} "
                f"ours={hello.version}; end that run first"
            )
        if hello.role not in ("supervisor", "trainer", "events", "tool"):
            raise UsageError(f"an unknown role. role={hello.role!r}")
        self._met_anyone |= hello.role != "tool"
        if hello.role == "tool":
            peer.admit(hello)
            peer.send(
                Welcome(
                    id=hello.id,
                    boot=self._job.incarnation,
                    pid=os.getpid(),
                    attempt=self._crew.attempt,
                )
            )
            return
        new = self._job.admit(hello)
        peer.admit(hello)
        if hello.role == "supervisor":
            self._crew.join(peer, hello, new=new)
            return
        if new and self._job.slots is not None and self._job.board is not None:
            self._desk.clear()
            self._job.board.begin_attempt(max(self._job.board.attempt, self._crew.attempt) + 1)
            self._job.slots.sync_board()
        self._job.welcome(peer, hello, attempt=self._crew.attempt, new=new)
        if self._crew.attempt and hello.role == "events":
            self._crew.repeat_stop(peer)

    def _import_ahead(self) -> None:
        """Import what uploads need beside the loop: a supervisor is answered before that, and needs
        none of it."""
        if self._importing is None:
            self._importing = threading.Thread(
                target=lambda: import_module("ckpt.keeper.uploads.uploads"), name="ckpt-import"
            )
            self._importing.start()

    def _gone(self, peer: ClientConnection) -> None:
        self._selector.unregister(peer.sock)
        peer.close()
        self._job.peers.pop(peer.number, None)
        self._desk.disconnected(peer)
        if peer.role == "supervisor":
            self._crew.disconnected(peer)
        if peer.role in ("", "tool"):
            return
        if peer.role == "trainer" and not peer.planned and not self._crew.supervised:
            self._job.lone_trainer_lost()
        cut_off = not peer.planned or self._job.cut_off or self._crew.cut_off
        if not self._job.members and cut_off and not self._crew.ended_well:
            self._job.abandon()


def _mute(peer: ClientConnection, now_s: float) -> bool:
    """Whether it has had all the time in the world to say hello."""
    return peer.hello is None and now_s - peer.since_s > FIRST_HELLO_S


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
