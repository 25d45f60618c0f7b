"""Finding the keeper of a job, starting it where none runs, and asking it things."""

from __future__ import annotations

import contextlib
import os
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ckpt.errors import IntegrityError, InternalError, UnavailableError, UsageError
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.frames import MessageSocket, Received, close_fds
from ckpt.ipc.messages import Bye, Hello, Message, Reply, Welcome, to_error
from ckpt.ipc.runtime_dir import JobFolder

START_WAIT_S = 30.0
"""How long starting a keeper may take, all tries together."""
FAILS_MAX = 3
"""Keepers that end at once, until starting another is given up."""
HELLO_WAIT_S = 30.0
"""How long a keeper may take to answer a hello."""

POLL_FIRST_S = 0.002
POLL_LAST_S = 0.05
TAIL_BYTES = 2000

KEEPER_PROGRAM = ("-m", "ckpt.keeper")
"""What the interpreter is given to run a keeper; the job's folder follows."""
EXIT_LISTENING = 0
"""The exit status of a keeper's first process when the keeper listens."""
EXIT_LOCKED = 3
"""Its exit status where another keeper holds the job's lock."""

_R = TypeVar("_R", bound=Reply)


class KeeperSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a keeper must know to do its work: the job, its stores (absolute paths or URLs), and how
    to write there.

    ``store`` is the first one, which finds the job on this machine; ``others`` hold the same.
    ``storage_options`` are for all, or a list with one entry for each. They may hold credentials: a
    specification travels through a pipe, never on a command line. ``encryption_key`` says where the
    key is, never what it is. ``scrub_every_s``: how often all that the stores hold is read and
    compared, None for never.
    """

    job: str
    store: str
    nodes: NodesSpec | None = None
    """How the job's other nodes are found; None where it has none."""
    others: tuple[str, ...] = ()
    write_quorum: int | None = None
    storage_options: Mapping[str, object] | list[Mapping[str, object] | None] | None = None
    encryption_key: str | None = None
    compression: str = "auto"
    scrub_every_s: float | None = None

    @property
    def stores(self) -> tuple[str, ...]:
        """All stores."""
        return (self.store, *self.others)

    def encode(self) -> bytes:
        """As JSON. Raises UsageError where a storage option can't be spelled in it."""
        try:
            data = msgspec.json.encode(self)
            same = msgspec.json.decode(data)["storage_options"] == self.storage_options
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            raise UsageError(f"storage options can't be handed to the keeper: {error}") from error
        if not same:
            raise UsageError(
                "storage options can't be handed to the keeper: they hold other things than text, "
                "numbers, lists and mappings. "
                f"options={_names(self.storage_options)}"
            )
        return data

    @classmethod
    def decode(cls, data: bytes) -> KeeperSpec:
        """From JSON. Raises UsageError where it isn't what ``encode`` gives."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise UsageError(f"not a keeper's specification. why={error}") from error


def _names(options: Mapping[str, object] | list[Mapping[str, object] | None] | None) -> list[str]:
    """The names of storage options, whose values may be secret."""
    each = options if isinstance(options, list) else [options]
    return sorted({name for one in each for name in one or ()})


prepare_decoders(KeeperSpec)


def ensure_keeper(
    spec: KeeperSpec,
    *,
    start: bool = True,
    program: Sequence[str] = KEEPER_PROGRAM,
    wait_s: float = START_WAIT_S,
) -> MessageSocket:
    """A connection to the job's keeper, which is started where none runs, unless ``start`` is
    false.

    However many processes call this at once, one of them starts a keeper and the others wait for
    it. Raises UnavailableError where there is none within ``wait_s`` seconds, with the end of its
    log.
    """
    folder = JobFolder(spec.store, spec.job)
    if not start:
        return MessageSocket(folder.connect())
    starter = _KeeperStarter(folder, spec, program, until_s=time.monotonic() + wait_s)
    pause_s = POLL_FIRST_S
    while True:
        sock = folder.try_connect()
        if sock is not None:
            return MessageSocket(sock)
        if not starter.start():
            time.sleep(pause_s)  # another process is starting a keeper, or one is just ending
            pause_s = min(pause_s * 1.5, POLL_LAST_S)


class HungUpError(UnavailableError):
    """The keeper went away before it answered the hello: it was just ending, and the next one may
    be had at once."""


def exchange_hello(wire: MessageSocket, hello: Hello) -> Welcome:
    """Say hello, with an ``id``, as the first word on a connection, and wait for the answer.

    Raises HungUpError where the keeper is gone, and the error that it answers with.
    """
    try:
        wire.send(hello)
        got = wire.receive(HELLO_WAIT_S)
    except (UnavailableError, OSError) as error:  # OSError: cut off with our hello unread
        raise HungUpError(f"the keeper gave no answer to the hello: {error}") from error
    if got is None:
        raise HungUpError(
            "the keeper hung up at the hello; see keeper.log in the job's runtime folder"
        )
    answer, fds = got
    close_fds(fds)
    if isinstance(answer, Reply) and answer.error is not None:
        raise to_error(answer.error)
    if not isinstance(answer, Welcome):
        raise InternalError(
            f"the keeper answered a hello with something else. type={type(answer).__name__}"
        )
    return answer


def connect_with_hello(
    connect: Callable[[], MessageSocket], hello: Hello, *, wait_s: float = START_WAIT_S
) -> tuple[MessageSocket, Welcome]:
    """A connection from ``connect`` on which the keeper has said welcome to ``hello``, which is a
    call.

    A keeper that is just ending still takes connections, and hangs up: then ``connect`` is asked
    for the next one, as long as ``wait_s`` seconds. Raises what ``connect`` and ``greet`` raise.
    """
    until_s = time.monotonic() + wait_s
    pause_s = POLL_FIRST_S
    while True:
        wire = connect()
        try:
            return wire, exchange_hello(wire, hello)
        except HungUpError:
            wire.close()
            if time.monotonic() > until_s:
                raise
        except BaseException:
            wire.close()
            raise
        time.sleep(
            pause_s
        )  # between two looks: the one that ends lets go of its lock when it is gone
        pause_s = min(pause_s * 1.5, POLL_LAST_S)


class _KeeperStarter:
    """Starts the keeper of one job, at most FAILS_MAX times in vain."""

    def __init__(
        self, folder: JobFolder, spec: KeeperSpec, program: Sequence[str], *, until_s: float
    ) -> None:
        self._folder = folder
        self._told = spec.encode()
        self._program = program
        self._until_s = until_s
        self._fails = 0
        self._log_bytes = 0
        self._why = "another keeper holds the job's lock and takes no connection"

    def start(self) -> bool:
        """Start a keeper, unless one lives or another process is at it; says whether one listens
        now.

        Raises UnavailableError when it is time to give up.
        """
        if self._fails >= FAILS_MAX or time.monotonic() > self._until_s:
            raise self._error()
        lock = self._folder.try_lock(name="starting")
        if lock is None:
            return False
        try:
            return not self._folder.has_keeper() and self._run()
        finally:
            os.close(lock)

    def _run(self) -> bool:
        if not sys.executable:
            raise UnavailableError(
                "no keeper can be started: this process knows no Python interpreter "
                "(sys.executable)"
            )
        with self._folder.in_use(), self._folder.log_path.open("ab") as log:
            self._log_bytes = log.tell()
            try:
                ended = subprocess.run(
                    [sys.executable, *self._program, os.fspath(self._folder.path)],
                    input=self._told,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder.path,
                    env=_environment(),
                    start_new_session=True,
                    timeout=max(0.1, self._until_s - time.monotonic()),
                    check=False,
                )
            except subprocess.TimeoutExpired:
                self._why = "the keeper was started, but didn't listen in time"
                return False
            except OSError as error:
                raise UnavailableError(
                    f"no keeper can be started. program={sys.executable} why={error}"
                ) from error
        if ended.returncode not in (EXIT_LISTENING, EXIT_LOCKED):
            self._fails += 1
            self._why = f"the keeper ended at once, with status {ended.returncode}"
        return ended.returncode == EXIT_LISTENING

    def _error(self) -> UnavailableError:
        tail = self._folder.log_tail(start_bytes=self._log_bytes, limit_bytes=TAIL_BYTES)
        said = f"; it said:\n{tail}" if tail else ""
        return UnavailableError(f"no keeper: {self._why}. log={self._folder.log_path}{said}")


def _environment() -> dict[str, str]:
    """This process's environment, made so that the keeper imports this ``ckpt`` and no other."""
    environment = dict(os.environ)
    home = os.fspath(Path(__file__).parents[2])
    # What is installed is found anyway, and in front of everything it would hide the standard
    # library.
    if home not in (*site.getsitepackages(), site.getusersitepackages()):
        behind = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{home}{os.pathsep}{behind}" if behind else home
    return environment


class KeeperClient:
    """Questions and words over one connection. Thread-safe: answers may come in any order, whoever
    reads hands them round.

    Owns the wire. For connections on which the keeper only answers.
    """

    def __init__(self, wire: MessageSocket) -> None:
        self._wire = wire
        self._turn = threading.Condition()
        self._last_id = 0
        self._waiting: set[int] = set()
        self._answers: dict[int, tuple[Reply, list[int]]] = {}
        self._reading = False
        self._lost = ""

    def call(
        self, message: Message, fds: Sequence[int] = (), *, timeout_s: float | None = None
    ) -> Reply:
        """Ask, and wait for the answer; about 0.1 ms. The caller keeps ``fds``.

        Raises the keeper's error where the call failed; UnavailableError where the connection is
        gone or after ``timeout_s`` seconds, and then whether the call was carried out is unknown.
        """
        reply, came = self.call_fds(message, fds, timeout_s=timeout_s)
        close_fds(came)
        return reply

    def ask(self, message: Message, kind: type[_R], *, timeout_s: float | None = None) -> _R:
        """As ``call``, for an answer of one kind. Raises IntegrityError where it is of another."""
        reply = self.call(message, timeout_s=timeout_s)
        if not isinstance(reply, kind):
            raise IntegrityError(
                f"another answer than asked for. wanted={kind.__name__} came={type(reply).__name__}"
            )
        return reply

    def call_fds(
        self, message: Message, fds: Sequence[int] = (), *, timeout_s: float | None = None
    ) -> tuple[Reply, list[int]]:
        """As ``call``; also returns the descriptors that came with the answer, which are the
        caller's."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._turn:
            self._last_id += 1
            call_id = self._last_id
            self._waiting.add(call_id)
        try:
            self._wire.send(msgspec.structs.replace(message, id=call_id), fds)
            reply, came = self._answer(call_id, until_s)
        finally:
            self._unwanted(call_id)
        if reply.error is not None:
            close_fds(came)
            raise to_error(reply.error)
        return reply, came

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Say something that nobody answers. The caller keeps ``fds``. Raises UnavailableError
        where the connection is gone."""
        self._wire.send(message, fds)

    def close(self) -> None:
        """Leave as planned: calls that wait fail. Idempotent."""
        with contextlib.suppress(UnavailableError):  # the keeper left first
            self._wire.send(Bye())
        self._wire.close()

    def forget_after_fork(self) -> None:
        """In a child that was forked: give up this end without a word; the connection is the
        parent's."""
        self._turn = threading.Condition()  # a thread of the parent may have held it
        self._lost = "it belongs to the process that this one was forked from"
        self._wire.forget_after_fork()

    def _answer(self, call_id: int, until_s: float | None) -> tuple[Reply, list[int]]:
        while True:
            with self._turn:
                while self._reading and call_id not in self._answers and not self._lost:
                    if not self._turn.wait(_left_s(until_s)):
                        raise UnavailableError("no answer within the time limit.")
                if call_id in self._answers:
                    return self._answers.pop(call_id)
                if self._lost:
                    raise UnavailableError(f"the connection to the keeper is gone: {self._lost}.")
                self._reading = True
            try:
                self._take(self._wire.receive(_left_s(until_s)))
            finally:
                with self._turn:
                    self._reading = False
                    self._turn.notify_all()

    def _take(self, received: Received | None) -> None:
        """Put an answer where its caller looks for it."""
        if received is None:
            self._lost = "the other end closed it"
            return
        message, fds = received
        if not isinstance(message, Reply):
            close_fds(fds)
            raise IntegrityError(f"a word where only answers belong. type={type(message).__name__}")
        with self._turn:
            if message.id in self._waiting:
                self._answers[message.id] = message, fds
                return
        close_fds(fds)  # its caller has given up

    def _unwanted(self, call_id: int) -> None:
        with self._turn:
            self._waiting.discard(call_id)
            left = self._answers.pop(call_id, None)
        if left is not None:
            close_fds(left[1])


def _left_s(until_s: float | None) -> float | None:
    return None if until_s is None else max(0.0, until_s - time.monotonic())
