"""Programs that tests start, without what every new interpreter spends on imports.

``Program`` is ``subprocess.Popen`` and ``run`` is ``subprocess.run``, but that a command which
begins with this interpreter is no new one, whichever network namespace it is put into: it is a fork
of a template process that has imported torch and ckpt and has done nothing else. The program is a
child of the caller all the same, with its own command line, environment, folder, descriptors,
session and signals, and ends as a program does; see ``template_process`` for what it is not. All
other commands are started as ever, and an interpreter with options other than -u and -W.

``CKPT_TEST_STARTS=real`` starts every program for real, and so do the long campaigns.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from kit import orders
from kit.orders import Order

REAL = (
    sys.platform != "linux"
    or os.environ.get("CKPT_TEST_STARTS") == "real"
    or os.environ.get("CKPT_SOAK") == "1"
)
"""Whether every program is started for real."""

_SERVES = Path(__file__).with_name("template_process.py")
_PR_SET_CHILD_SUBREAPER = 36


class Template:
    """The asking side of one template process, which is a child of this process. Thread-safe."""

    def __init__(self, peer: socket.socket) -> None:
        self._owner = os.getpid()
        self._peer = peer
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None, use_errno=True)

    @classmethod
    def start(cls) -> Template:
        """A new one. It ends when this process ends or closes its side."""
        ours, theirs = socket.socketpair()
        said = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        kept = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
            if name in os.environ
        }
        with theirs:
            process = subprocess.Popen(
                [sys.executable, str(_SERVES), str(theirs.fileno())],
                env={**kept, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd="/",
                pass_fds=[theirs.fileno()],
            )
        made = cls(ours)
        made._process, made._said = process, said
        atexit.register(made.close)
        return made

    @property
    def ours(self) -> bool:
        """Whether this process started it; else it is a fork of one that did."""
        return self._owner == os.getpid()

    def close(self) -> None:
        """End it, and wait for that. Programs go on."""
        if self.ours:
            self._peer.close()
            if self._process is not None:
                self._process.wait()

    def fork(self, order: Order, fds: list[int]) -> int:
        """Start a program and give its process, a child of this one. Raises RuntimeError where the
        template is gone.

        The template forks a process that forks the program and ends; an orphan goes to the nearest
        process above it that asks for such, which for that moment is this one. The program begins
        when it has come here.
        """
        with self._lock:
            try:
                orders.send(self._peer, order, fds)
                pid = int.from_bytes(orders.exactly(self._peer, orders.NUMBER_BYTES), "big")
                self._take_orphans(True)
                try:
                    self._peer.sendall(b"!")
                    orders.exactly(self._peer, 1)
                finally:
                    self._take_orphans(False)
                self._peer.sendall(b"!")
            except (OSError, EOFError) as error:
                raise RuntimeError(f"no template process: {error}\n{self._last_words()}") from error
        if pid == 0:
            raise RuntimeError(
                "the program ended before it began; it may have said why. CKPT_TEST_STARTS=real "
                f"does without. {order}"
            )
        return pid

    def _take_orphans(self, yes: bool) -> None:
        if self._libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(yes), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "this process cannot take orphans")

    def _last_words(self) -> str:
        if self._said is None:
            return ""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-4000:]


class _Here:
    """This process's template; in torchrun's process, that of its workers."""

    template: Template | None = None
    lock = threading.Lock()


def here() -> Template:
    """This process's template, started at the first call."""
    with _Here.lock:
        if _Here.template is None or not _Here.template.ours:
            _Here.template = Template.start()
        return _Here.template


def use(template: Template) -> None:
    """From now on this process's programs come from that one."""
    _Here.template = template


class Program(subprocess.Popen[Any]):
    """A started program, with all that ``subprocess.Popen`` has. Takes its arguments too, but for
    ``preexec_fn`` and such."""

    def _execute_child(self, *arguments: Any) -> None:
        asked = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments  # type: ignore[attr-defined]
        if REAL or asked["shell"] or isinstance(asked["args"], (str, bytes, os.PathLike)):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        network, words = _network_of([os.fsdecode(word) for word in asked["args"]])
        if words[0] != sys.executable or not orders.arguments_of(words):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        told = {
            name: asked[name]
            for name in ("executable", "preexec_fn", "gid", "gids", "uid")
            if asked[name] is not None
        }
        if told or asked["umask"] >= 0:
            raise ValueError(
                f"a forked program cannot have {sorted(told) or 'umask'}; start it with "
                "subprocess.Popen"
            )
        environment = os.environ if asked["env"] is None else asked["env"]
        keep = sorted(map(int, asked["pass_fds"]))
        group = asked.get("process_group")
        order = Order(
            words=words,
            environment={
                os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()
            },
            folder=str(Path(os.fsdecode(asked["cwd"] or ".")).absolute()),
            network=network,
            keep=keep,
            parent=os.getpid(),
            new_session=bool(asked["start_new_session"]),
            group=os.getpgrp() if group is None or group < 0 else group,
            umask=_umask(),
        )
        ends = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = here().fork(
            order, [*(end if end >= 0 else number for number, end in enumerate(ends)), *keep]
        )
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in names))  # type: ignore[attr-defined]


def run(
    command: Any,
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **how: Any,
) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` with a ``Program``."""
    told = how.pop("input", None)
    if told is not None:
        how["stdin"] = subprocess.PIPE
    if capture_output:
        how["stdout"] = how["stderr"] = subprocess.PIPE
    with Program(command, **how) as process:
        try:
            said, complained = process.communicate(told, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, said, complained)
    if check:
        done.check_returncode()
    return done


def _network_of(words: list[str]) -> tuple[str, list[str]]:
    """The network namespace that a command begins with, "" for none, and the command in it."""
    return (words[3], words[4:]) if words[:3] == ["ip", "netns", "exec"] else ("", words)


def _umask() -> int:
    """Read, not set and set back as ``os.umask`` has it: other threads make files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    raise RuntimeError("/proc/self/status names no umask")
