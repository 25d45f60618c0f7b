"""Clients of the keeper: find it, start it if none runs, and call it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
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
from ckpt.ipc.messages import (
    Bye,
    Hello,
    Message,
    OtherSettings,
    Reply,
    Settings,
    Welcome,
    to_error,
)
from ckpt.ipc.runtime_dir import JobFolder

START_WAIT_S = 30.0
"""The time limit for starting a keeper, all tries together."""
FAILS_MAX = 3
"""Give up after that many keepers that exited at once."""
HELLO_WAIT_S = 30.0
"""The time limit for a keeper's reply to ``Hello``."""

POLL_FIRST_S = 0.002
POLL_LAST_S = 0.05
TAIL_BYTES = 2000

KEEPER_PROGRAM = ("-m", "ckpt.keeper")
"""Arguments of the interpreter that run a keeper; the job's folder follows."""
EXIT_LISTENING = 0
"""The exit status of a keeper's first process once the keeper listens."""
EXIT_LOCKED = 3
"""Its exit status if another keeper holds the job's lock."""

_R = TypeVar("_R", bound=Reply)

_ACCESS_VARIABLES = re.compile(
    r"(AWS|AZURE|BOTO|FSSPEC|GCE|GCLOUD|GCS|GOOGLE|REQUESTS|S3|SSL|STORAGE)_.*|.*_PROXY"
    r"|CKPT_(OBJECT_CLIENT|SEQUENCER|STATE_DIR)",
    re.IGNORECASE,
)
"""The environment variables that change how a store is reached."""

_ACCESS_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CONFIG_FILE": "~/.aws/config",
    "GOOGLE_APPLICATION_CREDENTIALS": "",
}
"""Variables that name files with credentials, and where the file is without the variable."""

_PATH_VARIABLES = (
    *_ACCESS_FILES,
    "AWS_CA_BUNDLE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "CKPT_STATE_DIR",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "XDG_STATE_HOME",
)
"""Variables whose relative paths would mean other files in a keeper, which has a working folder of
its own."""

_DIGEST_BYTES = 16


class KeeperSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a keeper needs to know: the job, its stores, and how to write there.

    Stores are absolute paths or URLs. ``store`` is the first one, which identifies the job on
    this machine; ``others`` hold the same. ``storage_options`` apply to all stores, or are a list
    with one entry for each. They may hold credentials: a specification travels through a pipe,
    never on a command line. ``encryption_key`` says where the key is, never what it is.
    ``scrub_every_s``: how often all stored data is read and compared (None: never).
    """

    job: str
    store: str
    nodes: NodesSpec | None = None
    """How the job's other nodes are found; None if it has none."""
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

    @property
    def folder(self) -> JobFolder:
        """The runtime folder of the job's keeper."""
        return JobFolder(self.store, self.job, 0 if self.nodes is None else self.nodes.instance)

    @property
    def named(self) -> bool:
        """Whether the user chose the job's name; else it is the last part of the store's
        address."""
        return self.job != self.store.rstrip("/").rpartition("/")[2]

    def encode(self) -> bytes:
        """As JSON. Raises UsageError if JSON cannot hold a storage option."""
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

    def stores_digest(self) -> str:
        """Digest of where snapshots go; equal on all ranks of one launch."""
        return _digest(msgspec.json.encode([self.stores, self.write_quorum, self.encryption_key]))

    def access_digest(self, environment: Mapping[str, str] | None = None) -> str:
        """Digest of all else that decides how the keeper works: options, nodes, and the credentials
        in ``environment`` (default: this process's) and in the files that it names.

        Ranks of one launch may differ in it: each may hold a token of its own. Reads small files.
        """
        variables = _with_absolute_paths(os.environ if environment is None else environment)
        # These two are others with each launch, and are sent with the hello.
        nodes = self.nodes and msgspec.structs.replace(self.nodes, agent="", ends_after=-1)
        options = (self.storage_options, self.compression, self.scrub_every_s, nodes)
        return _digest(msgspec.json.encode(options), *_access_of(self, variables))

    @classmethod
    def decode(cls, data: bytes) -> KeeperSpec:
        """From JSON. Raises UsageError if ``data`` is not from ``encode``."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise UsageError(f"not a keeper's specification. why={error}") from error


def _names(options: Mapping[str, object] | list[Mapping[str, object] | None] | None) -> list[str]:
    """The names of storage options, whose values may be secret."""
    each = options if isinstance(options, list) else [options]
    return sorted({name for mapping in each for name in mapping or ()})


prepare_decoders(KeeperSpec)


def _access_of(spec: KeeperSpec, variables: Mapping[str, str]) -> list[bytes]:
    """The variables and files that decide how the stores of ``spec`` are reached."""
    sources = (spec.encryption_key or "").split(",")
    named = {source.removeprefix("env:") for source in sources if source.startswith("env:")}
    files = {source.removeprefix("file:") for source in sources if source.startswith("file:")}
    remote = any("://" in store for store in spec.stores)
    if remote:
        named |= {name for name in variables if _ACCESS_VARIABLES.fullmatch(name)}
        files |= {variables.get(name, usual) for name, usual in _ACCESS_FILES.items()} - {""}
    found = [os.fsencode(f"{name}={variables.get(name, '')}") for name in sorted(named)]
    return found + [os.fsencode(path) + b"\0" + _content(path) for path in sorted(files)]


def _with_absolute_paths(variables: Mapping[str, str]) -> dict[str, str]:
    """The same, with what names files relative to this process's working folder made absolute."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed: such a path names no file for anybody, but must stay the same
        here = Path("/proc/self/cwd")
    found = dict(variables)
    for name in _PATH_VARIABLES:
        if (value := found.get(name)) and not value.startswith(("/", "~")):
            found[name] = os.fspath(here / value)
    return found


def _content(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError):  # the error is raised when the store is opened
        return b""


def _digest(*parts: bytes) -> str:
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def ensure_keeper(
    spec: KeeperSpec,
    *,
    start: bool = True,
    program: Sequence[str] = KEEPER_PROGRAM,
    wait_s: float = START_WAIT_S,
) -> MessageSocket:
    """A connection to the job's keeper; starts one if none runs, unless ``start`` is false.

    If several processes call this at once, one of them starts a keeper and the others wait for
    it. Raises UnavailableError, with the end of the keeper's log, if no keeper listens within
    ``wait_s`` seconds.
    """
    folder = spec.folder
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
    """The keeper closed the connection before it replied to the hello: it was just ending.

    Another can be started.
    """


def exchange_hello(wire: MessageSocket, hello: Hello, *, spec: KeeperSpec | None = None) -> Welcome:
    """Send ``hello``, which has an ``id``, as the first message, and wait for the reply.

    ``spec``: what the keeper must have been started with. If it has other settings, it starts its
    successor, which takes over what it holds, and ends. Raises HungUpError then, and if the keeper
    closed the connection before it answered; and the error in the keeper's reply.
    """
    if spec is not None:
        hello = msgspec.structs.replace(
            hello, stores=spec.stores_digest(), access=spec.access_digest()
        )
    reply = _first_reply(wire, hello)
    if isinstance(reply, OtherSettings) and spec is not None:
        settings = Settings(
            id=hello.id,
            spec=spec.encode(),
            environment={os.fsencode(k): os.fsencode(v) for k, v in _environment().items()},
            program=(sys.executable, *KEEPER_PROGRAM),
        )
        reply = _first_reply(wire, settings)
    if reply.error is not None:
        raise to_error(reply.error)
    if not isinstance(reply, Welcome):
        raise InternalError(f"unexpected reply to the hello. type={type(reply).__name__}")
    return reply


def _first_reply(wire: MessageSocket, message: Message) -> Reply:
    try:
        wire.send(message)
        received = wire.receive(HELLO_WAIT_S)
    except (UnavailableError, OSError) as error:  # OSError: cut off with our hello unread
        raise HungUpError(f"the keeper gave no answer to the hello: {error}") from error
    if received is None:
        raise HungUpError("the keeper hung up at the hello; see `ckpt logs`")
    reply, fds = received
    close_fds(fds)
    if not isinstance(reply, Reply):
        raise InternalError(f"unexpected reply to the hello. type={type(reply).__name__}")
    return reply


def connect_with_hello(
    connect: Callable[[], MessageSocket],
    hello: Hello,
    *,
    spec: KeeperSpec | None = None,
    wait_s: float = START_WAIT_S,
) -> tuple[MessageSocket, Welcome]:
    """A connection from ``connect`` on which the keeper has accepted ``hello``, and its
    ``Welcome``.

    A keeper that is just ending still accepts connections and then closes them: in that case
    ``connect`` is called again, for up to ``wait_s`` seconds. Raises what ``connect`` and
    ``exchange_hello`` raise.
    """
    until_s = time.monotonic() + wait_s
    pause_s = POLL_FIRST_S
    while True:
        wire = connect()
        try:
            return wire, exchange_hello(wire, hello, spec=spec)
        except HungUpError:
            wire.close()
            if time.monotonic() > until_s:
                raise
        except BaseException:
            wire.close()
            raise
        time.sleep(pause_s)  # a keeper that is ending releases its lock when its process is gone
        pause_s = min(pause_s * 1.5, POLL_LAST_S)


class _KeeperStarter:
    """Starts the keeper of one job. Gives up after FAILS_MAX failures."""

    def __init__(
        self, folder: JobFolder, spec: KeeperSpec, program: Sequence[str], *, until_s: float
    ) -> None:
        self._folder = folder
        self._spec_json = spec.encode()
        self._program = program
        self._until_s = until_s
        self._fails = 0
        self._log_bytes = 0
        self._reason = "another keeper holds the job's lock and takes no connection"

    def start(self) -> bool:
        """Start a keeper, unless one lives or is being started; true if one listens now.

        Raises UnavailableError once the tries or the time are used up.
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
                    input=self._spec_json,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder.path,
                    env=_environment(),
                    start_new_session=True,
                    timeout=max(0.1, self._until_s - time.monotonic()),
                    check=False,
                )
            except subprocess.TimeoutExpired:
                self._reason = "the keeper was started, but didn't listen in time"
                return False
            except OSError as error:
                raise UnavailableError(
                    f"no keeper can be started. program={sys.executable} why={error}"
                ) from error
        if ended.returncode not in (EXIT_LISTENING, EXIT_LOCKED):
            self._fails += 1
            self._reason = f"the keeper exited at once with status {ended.returncode}"
        return ended.returncode == EXIT_LISTENING

    def _error(self) -> UnavailableError:
        tail = self._folder.log_tail(start_bytes=self._log_bytes, limit_bytes=TAIL_BYTES)
        output = f"; it printed:\n{tail}" if tail else ""
        return UnavailableError(f"no keeper: {self._reason}. log={self._folder.log_path}{output}")


def _environment() -> dict[str, str]:
    """This process's environment, changed so that the keeper imports the same ``ckpt`` and finds
    the same files."""
    environment = _with_absolute_paths(os.environ)
    home = os.fspath(Path(__file__).parents[2])
    # Not for site-packages: it is found anyway, and as first entry it would hide the standard
    # library.
    if home not in (*site.getsitepackages(), site.getusersitepackages()):
        rest = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{home}{os.pathsep}{rest}" if rest else home
    return environment


class KeeperClient:
    """Calls and one-way messages over one connection to a keeper. Thread-safe. Owns the socket.

    For connections on which the keeper only replies. Replies may arrive in any order: the thread
    that reads passes each reply to the thread that waits for it.
    """

    def __init__(self, wire: MessageSocket) -> None:
        self._wire = wire
        self._changed = threading.Condition()
        self._last_id = 0
        self._waiting: set[int] = set()
        self._replies: dict[int, tuple[Reply, list[int]]] = {}
        self._reading = False
        self._lost = ""

    def call(
        self, message: Message, fds: Sequence[int] = (), *, timeout_s: float | None = None
    ) -> Reply:
        """Send a call and wait for the reply; about 0.1 ms. The caller keeps ``fds``.

        Raises the keeper's error if the call failed. Raises UnavailableError if the connection is
        lost or after ``timeout_s`` seconds; then it is unknown whether the call was carried out.
        """
        reply, reply_fds = self.call_fds(message, fds, timeout_s=timeout_s)
        close_fds(reply_fds)
        return reply

    def ask(self, message: Message, kind: type[_R], *, timeout_s: float | None = None) -> _R:
        """Like ``call``, for a reply of one type.

        Raises IntegrityError if the reply has another type.
        """
        reply = self.call(message, timeout_s=timeout_s)
        if not isinstance(reply, kind):
            raise IntegrityError(
                f"unexpected reply. wanted={kind.__name__} received={type(reply).__name__}"
            )
        return reply

    def call_fds(
        self, message: Message, fds: Sequence[int] = (), *, timeout_s: float | None = None
    ) -> tuple[Reply, list[int]]:
        """Like ``call``; also returns the descriptors beside the reply, which the caller owns."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._last_id += 1
            call_id = self._last_id
            self._waiting.add(call_id)
        try:
            self._wire.send(msgspec.structs.replace(message, id=call_id), fds)
            reply, reply_fds = self._wait_for_reply(call_id, until_s)
        finally:
            self._discard(call_id)
        if reply.error is not None:
            close_fds(reply_fds)
            raise to_error(reply.error)
        return reply, reply_fds

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a one-way message.

        The caller keeps ``fds``. Raises UnavailableError if the connection is lost.
        """
        self._wire.send(message, fds)

    def close(self) -> None:
        """Leave as planned. Waiting calls fail. Idempotent."""
        with contextlib.suppress(UnavailableError):  # the keeper left first
            self._wire.send(Bye())
        self._wire.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close this copy silently; the connection stays the parent's."""
        self._changed = threading.Condition()  # a thread of the parent may have held it
        self._lost = "it belongs to the process that this one was forked from"
        self._wire.forget_after_fork()

    def _wait_for_reply(self, call_id: int, until_s: float | None) -> tuple[Reply, list[int]]:
        # One of the waiting threads reads the socket; the others wait until it has read something,
        # then check whether it was theirs or whether it is their turn to read.
        while True:
            with self._changed:
                while self._reading and call_id not in self._replies and not self._lost:
                    if not self._changed.wait(_left_s(until_s)):
                        raise UnavailableError("no answer within the time limit.")
                if call_id in self._replies:
                    return self._replies.pop(call_id)
                if self._lost:
                    raise UnavailableError(f"the connection to the keeper is lost: {self._lost}.")
                self._reading = True
            try:
                self._take(self._wire.receive(_left_s(until_s)))
            finally:
                with self._changed:
                    self._reading = False
                    self._changed.notify_all()

    def _take(self, received: Received | None) -> None:
        """Pass a reply to the call that waits for it."""
        if received is None:
            self._lost = "the other end closed it"
            return
        message, fds = received
        if not isinstance(message, Reply):
            close_fds(fds)
            raise IntegrityError(
                f"unexpected message: only replies are allowed here. type={type(message).__name__}"
            )
        with self._changed:
            if message.id in self._waiting:
                self._replies[message.id] = message, fds
                return
        close_fds(fds)  # its caller has given up

    def _discard(self, call_id: int) -> None:
        """Forget a call; a reply that has arrived meanwhile is dropped."""
        with self._changed:
            self._waiting.discard(call_id)
            unread = self._replies.pop(call_id, None)
        if unread is not None:
            close_fds(unread[1])


def _left_s(until_s: float | None) -> float | None:
    return None if until_s is None else max(0.0, until_s - time.monotonic())
