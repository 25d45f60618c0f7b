"""An etcd of three members, each on a host of its own, that can be killed, frozen and cut off."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kit.etcd import require
from kit.jobs import wait_for
from kit.networks import Network

CLIENTS, PEERS = 2379, 2380

OWN_MACHINE = ("nice", "-n", "-10")
"""It needs little, and elsewhere has machines of its own: without this a busy test machine makes it
change its leader for ever.
"""


@dataclass(eq=False)
class Member:
    """One member, on one host."""

    name: str
    host: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, what: signal.Signals) -> None:
        """A signal, where it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(what)

    def kill(self) -> None:
        """SIGKILL; frozen ones too."""
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


class Etcd:
    """The cluster. ``hosts``: where its members are."""

    def __init__(self, folder: Path, lan: Network, hosts: Sequence[int]) -> None:
        self._lan = lan
        folder.mkdir()
        self.members = [Member(f"e{host}", host, folder / f"e{host}") for host in hosts]

    @property
    def where(self) -> str:
        return "etcd://" + ",".join(self.endpoints)

    @property
    def endpoints(self) -> list[str]:
        return [f"{self._lan.address(one.host)}:{CLIENTS}" for one in self.members]

    def start(self, member: Member) -> None:
        """Start it, where it doesn't run; it answers once a majority does."""
        if member.running:
            return
        member.folder.mkdir(exist_ok=True)
        address = f"http://{self._lan.address(member.host)}"
        initial = ",".join(
            f"{one.name}=http://{self._lan.address(one.host)}:{PEERS}" for one in self.members
        )
        with (member.folder / "log").open("ab") as log:
            member.process = subprocess.Popen(
                [
                    *self._lan.command(member.host),
                    *OWN_MACHINE,
                    require(),
                    "--name",
                    member.name,
                    "--data-dir",
                    str(member.folder / "data"),
                    "--listen-client-urls",
                    f"{address}:{CLIENTS}",
                    "--advertise-client-urls",
                    f"{address}:{CLIENTS}",
                    "--listen-peer-urls",
                    f"{address}:{PEERS}",
                    "--initial-advertise-peer-urls",
                    f"{address}:{PEERS}",
                    "--initial-cluster",
                    initial,
                    "--initial-cluster-state",
                    "new",
                    "--unsafe-no-fsync",
                    "--logger",
                    "zap",
                    "--log-level",
                    "error",
                ],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # see kit.servers.process: it is stopped
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
            )

    def leader(self) -> Member:
        """Who leads; the first one where nobody says."""
        for status in self._status():
            for member in self.members:
                # Where none leads, its number is 0 and so left out.
                leads = status["Status"].get("leader") == status["Status"]["header"]["member_id"]
                if leads and status["Endpoint"].startswith(f"{self._lan.address(member.host)}:"):
                    return member
        return self.members[0]

    def revision(self) -> int:
        """The newest revision that a member knows of; 0 where none answers."""
        return max((int(one["Status"]["header"]["revision"]) for one in self._status()), default=0)

    def _status(self) -> list[dict]:  # type: ignore[type-arg]
        done = subprocess.run(
            [
                *self._lan.command(self.members[0].host),
                require("etcdctl"),
                "--endpoints",
                ",".join(self.endpoints),
                "--command-timeout=2s",
                "endpoint",
                "status",
                "-w",
                "json",
            ],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "ETCDCTL_API": "3"},
        )
        return json.loads(done.stdout) if done.stdout.strip() else []


@contextlib.contextmanager
def etcd(folder: Path, lan: Network, hosts: Sequence[int]) -> Iterator[Etcd]:
    """A cluster that answers, and its end."""
    made = Etcd(folder, lan, hosts)
    try:
        for member in made.members:
            made.start(member)
        wait_for(lambda: made.revision() > 0, "etcd")
        yield made
    finally:
        for member in made.members:
            member.kill()
