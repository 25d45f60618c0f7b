"""Servers that tests start on loopback: a free port, the process, when it answers, and that it is
gone afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

READY_S = 60.0
"""No server takes longer to answer; against hangs only."""

POLL_S = 0.02
PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to clients, so that a stopped server finds its port free
when it comes back."""

_PORT_TRIES = 200
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    for port in random.sample(PORTS, _PORT_TRIES):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port. tried={_PORT_TRIES} from={PORTS.start} to={PORTS.stop}")


STOP_WAIT_S = 30.0


class ServerProcess:
    """One process that serves HTTP on a port of loopback, ended by its id; it dies with the test
    process too."""

    def __init__(
        self, command: Sequence[str], *, ready_url: str, log: Path, env: Mapping[str, str]
    ) -> None:
        """Start ``command``. ``ready_url`` is what answers with 200 once it serves; ``log`` takes
        all that it prints."""
        self.log = log
        self._ready_url = ready_url
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **env},
                # A stopped process in the tests' own process group would have the kernel hang up the
                # whole group, pytest too, once another one there is orphaned.
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  one system call, no lock, no allocation
            )

    @property
    def running(self) -> bool:
        """Whether it was not stopped and has not ended by itself."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Return once it answers. Raises with its output where it ended, TimeoutError where it
        never does."""
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            if not self.running:
                raise ChildProcessError(
                    f"the server ended. exit_status={self._process.returncode}\n{self.log.read_text()}"
                )
            if _answers(self._ready_url):
                return
            time.sleep(POLL_S)
        raise TimeoutError(
            f"the server did not answer. url={self._ready_url} "
            f"waited_s={READY_S}\n{self.log.read_text()}"
        )

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Harmless where it is gone already."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered until ``thaw``. Waits until every
        thread stands still.

        On a busy machine one that is running may go on for a while after the signal was sent.
        """
        self._process.send_signal(signal.SIGSTOP)
        deadline_s = time.monotonic() + STOP_WAIT_S
        while not _stands_still(self._process.pid):
            assert time.monotonic() < deadline_s, "a process does not stop"
            time.sleep(0.005)

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)


def _answers(url: str) -> bool:
    # Not through a proxy that the environment names: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stands_still(pid: int) -> bool:
    """Whether no thread of a process runs any more."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX":
                return False
    return True
