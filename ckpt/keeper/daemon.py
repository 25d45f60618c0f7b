"""The keeper's loop: one thread, one selector, no call that blocks. Uploads have threads of their
own and post back."""

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

from ckpt.errors import CkptError, InternalError, UsageError
from ckpt.events import Emit, Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.frames import close_fds, peer_uid
from ckpt.ipc.messages import BoardKept, Hello, Message, Settings, SlotCreated, SlotKept
from ckpt.keeper.connection import ClientConnection, Clients
from ckpt.keeper.job import Job
from ckpt.keeper.process import KeeperListener, StallDetector, Watchdog, end_hung_process
from ckpt.keeper.slots import Estate

FIRST_HELLO_S = 30.0
"""How long a keeper without any client stays, and a connection that sends no hello."""

TICK_S_MAX = 1.0

FOLDER_CHECK_S = 5.0
"""How often a keeper checks that it can still be found: a logout from a machine may remove all
runtime folders."""

FULL_WAIT_S = 0.2
"""How long new connections wait if this process has no descriptor left for them."""

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

DRAIN_READS_MAX = 256
"""Reads, of at most 1 MiB each, of what one trainer sent. A trainer that is alive might send
without end."""

CARRIERS = (SlotCreated, SlotKept, BoardKept)
"""The messages that arrive with one descriptor."""

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Daemon:
    """Serves one job until it is over. More attributes than usual: sockets, wake-up and timers
    belong to one loop."""

    def __init__(
        self,
        spec: KeeperSpec,
        listener: KeeperListener,
        *,
        incarnation: str,
        emit: Emit,
        estate: Estate | None = None,
    ) -> None:
        self._listener = listener
        self._folder_check_s = time.monotonic() + FOLDER_CHECK_S
        self._accept_at_s: float | None = None
        """When the listener is watched again after descriptors ran out; None: it is watched."""
        self._alarms: set[str] = set()
        """Kinds of alarms about the folder and the listener that were reported and still last."""
        self._importing: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], object]] = deque()
        # Sockets, not a pipe: a thread that posts after the end must not write to whatever has its
        # number then.
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._job = Job(
            spec,
            incarnation=incarnation,
            post=self.post,
            emit=emit,
            drain=self._drain_trainers,
            stacks=listener.folder.stacks,
            estate=estate,
        )
        self._emit: Emit = self._job.state.emit
        self._numbers = 0

    @property
    def _clients(self) -> Clients:
        return self._job.state.clients

    def post(self, call: Callable[[], object]) -> None:
        """Have the loop make ``call``; from any thread."""
        self._posted.append(call)
        try:
            self._wake_write.send(b"\0")
        except OSError:  # the loop is awake already, or it has ended
            return

    def run(self) -> None:
        """Serve until the job is over."""
        began_s, stalls = time.monotonic(), StallDetector(self._emit)
        watchdog = Watchdog(end_hung_process)
        self._selector.register(self._listener.listener, _READ, self._listener)
        self._selector.register(self._wake_read, _READ, None)
        try:
            while not (self._over(began_s) and self._hidden()):
                wait_s = min(TICK_S_MAX, self._job.tick(), self._check_listener())
                stalls.before_wait(wait_s)
                watchdog.beat()
                for key, mask in self._selector.select(max(0.0, wait_s)):
                    self._serve(key, mask)
                self._run_posted()
        finally:
            watchdog.stop()
            if self._importing is not None:
                self._importing.join()
            for client in self._clients:
                client.close()
            self._job.close()
            self._selector.close()
            self._wake_read.close()
            self._wake_write.close()

    def _over(self, began_s: float) -> bool:
        now_s = time.monotonic()
        if any(client.role != "tool" and not _mute(client, now_s) for client in self._clients):
            return False
        if not self._job.met_anyone:
            return now_s - began_s > FIRST_HELLO_S
        return self._job.over()

    def _hidden(self) -> bool:
        """Remove the socket's name; True if no connection is pending. A client that had found the
        keeper is served."""
        self._listener.hide()
        if not self._listener.has_pending():
            return True
        self._renew_listener()
        return False

    def _check_listener(self) -> float:
        """Check that clients can find the keeper and connect; returns the seconds until the next
        check."""
        now_s = time.monotonic()
        for client in [one for one in self._clients if _mute(one, now_s)]:
            self._emit(Event("peer-lost", "closed a connection that sent no hello"))
            self._disconnected(client)
        if self._accept_at_s is not None and now_s >= self._accept_at_s:
            self._accept_at_s = None
            self._selector.register(self._listener.listener, _READ, self._listener)
        if now_s >= self._folder_check_s:
            self._folder_check_s = now_s + FOLDER_CHECK_S
            if not self._listener.is_reachable():
                self._renew_listener()
        return min(self._folder_check_s, self._accept_at_s or self._folder_check_s) - now_s

    def _renew_listener(self) -> None:
        """Make folder and socket anew. If another keeper has taken the folder, this one serves the
        clients it has."""
        try:
            old = self._listener.renew()
        except (CkptError, OSError) as error:
            self._alarm("home-lost", f"the keeper's folder can't be made anew: {error}")
            return
        if old is None:
            self._alarm("home-lost", "another keeper has taken over this job's folder")
            return
        self._alarms.discard("home-lost")
        self._emit(Event("home-renewed", "the keeper's socket was removed, and has been made anew"))
        if self._accept_at_s is None:
            self._selector.unregister(old)
            self._selector.register(self._listener.listener, _READ, self._listener)
        # Clients that connected to the old socket wait in its queue, and would be reset when it is
        # closed.
        while self._accept(old):
            continue
        old.close()

    def _alarm(self, kind: str, text: str) -> None:
        """Report a condition once for as long as it lasts."""
        if kind not in self._alarms:
            self._alarms.add(kind)
            self._emit(Event(kind, text, alarm=True))

    def _serve(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.data is self._listener:
            self._accept(self._listener.listener)
        elif key.fileobj is self._wake_read:
            self._drain_wake()
        else:
            client: ClientConnection = key.data
            if client not in self._clients:  # removed while another client's message was handled
                return
            if mask & _WRITE and client.flush():
                self._selector.modify(client.sock, _READ, client)
            if mask & _READ and client in self._clients:
                self._read(client)

    def _accept(self, listener: socket.socket) -> bool:
        """Take one connection; False if there is none, or no descriptor for one."""
        try:
            sock, _ = listener.accept()
        except OSError as error:  # else the client has closed it already
            if error.errno in _FULL and self._accept_at_s is None:
                # Unregistered, or the selector would report it as readable in each turn.
                self._selector.unregister(self._listener.listener)
                self._accept_at_s = time.monotonic() + FULL_WAIT_S
                self._alarm("full", f"the keeper can't accept connections now: {error}")
            return False
        self._alarms.discard("full")
        uid = peer_uid(sock)
        if uid not in (None, os.geteuid()):
            # The folder's mode keeps other users out; this holds too where it was opened.
            self._listener.strangers += 1
            sock.close()
            text = "refused a connection of another user; look who can enter the keeper's folder"
            facts = {"uid": uid, "refused": self._listener.strangers}
            self._emit(Event("stranger-refused", text, facts, alarm=True))
            return True
        sock.setblocking(False)
        self._numbers += 1
        client = ClientConnection(self._numbers, sock, on_blocked=self._blocked)
        self._clients.add(client)
        self._selector.register(sock, _READ, client)
        return True

    def _blocked(self, client: ClientConnection) -> None:
        """The socket's buffer is full: watch for room too."""
        if client in self._clients:
            self._selector.modify(client.sock, _READ | _WRITE, client)

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
                self._emit(
                    Event(
                        "keeper-failed", f"unexpected error in a posted call: {error!r}", alarm=True
                    )
                )

    def _read(self, client: ClientConnection) -> None:
        try:
            messages, ended = client.read()
        except (CkptError, OSError) as error:
            self._emit(Event("peer-lost", f"a connection failed: {error}", client.facts()))
            messages, ended = [], True
        for message, fds in messages:
            if client.lost:
                close_fds(fds)
            else:
                self._take(client, message, fds)
        if ended:
            self._disconnected(client)

    def _drain_trainers(self) -> None:
        """Read what trainers sent: all messages of a dead one are in its socket, and then its
        end."""
        for client in self._clients:
            for _ in range(DRAIN_READS_MAX):
                if (
                    client.role != "trainer"
                    or client not in self._clients
                    or not _readable(client.sock)
                ):
                    break
                self._read(client)

    def _take(self, client: ClientConnection, message: Message, fds: list[int]) -> None:
        kind = type(message).__name__
        try:
            if fds and (len(fds) > 1 or client.hello is None or not isinstance(message, CARRIERS)):
                close_fds(fds)
                raise UsageError(f"unexpected descriptors beside a message. message={kind}")
            self._dispatch(client, message, fds)
        except CkptError as error:
            self._fail(client, message, error)
        except Exception as error:  # noqa: BLE001  the loop's border, as above
            self._emit(
                Event(
                    "keeper-failed", f"unexpected error in a message: {kind} {error!r}", alarm=True
                )
            )
            self._fail(
                client, message, InternalError(f"the keeper failed. message={kind} cause={error!r}")
            )

    def _dispatch(self, client: ClientConnection, message: Message, fds: list[int]) -> None:
        if isinstance(message, Hello):
            self._job.hello(client, message)
            if client.role not in ("", "tool"):
                self._job.state.emit.joined()
                self._import_ahead()
        elif isinstance(message, Settings) and client.other is not None:
            if self._job.may_end_for(client.other, KeeperSpec.decode(message.spec)):
                self._succeed(message)
            else:
                client.hang_up()  # it says hello again
        elif client.hello is None:
            raise UsageError(f"a client must say hello first. message={type(message).__name__}")
        else:
            self._job.handle(client, message, fds)

    def _succeed(self, settings: Settings) -> None:
        """Start the keeper that follows this one, and end. Raises what keeps it from listening;
        then nothing has changed.

        Blocks the loop: nobody but tools is served meanwhile. No orderly end: what is in flight is
        the successor's, by the slots that it has.
        """
        self._listener.start_successor(settings, self._job.state.memory.estate(self._listener.lock))
        self._emit(Event("replaced", "a new launch has other settings; its keeper takes over"))
        os._exit(0)

    def _fail(self, client: ClientConnection, message: Message, error: CkptError) -> None:
        if message.id:
            client.send_error(message.id, error)
        else:
            self._emit(Event("refused", str(error), client.facts(), alarm=True))

    def _import_ahead(self) -> None:
        """Import what uploads need, beside the loop: supervisors are answered before that and need
        none of it."""
        if self._importing is None:
            self._importing = threading.Thread(
                target=lambda: import_module("ckpt.keeper.uploads.uploads"), name="ckpt-import"
            )
            self._importing.start()

    def _disconnected(self, client: ClientConnection) -> None:
        self._selector.unregister(client.sock)
        client.close()
        self._clients.remove(client)
        self._job.disconnected(client)


def _mute(client: ClientConnection, now_s: float) -> bool:
    """Whether its time to say hello has passed."""
    return client.hello is None and now_s - client.since_s > FIRST_HELLO_S


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
