"""Machines with addresses of their own: network namespaces on one bridge, whose links can be
pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SUBNET = "10.213.77"
"""Addresses that exist in these namespaces alone; nothing is routed there."""

NOBODY = "02:00:00:00:00:01"
"""A hardware address that no link here has: the bridge passes what is sent to it on to all, and
nobody takes it."""


def require() -> None:
    """Skips the test where namespaces can't be made; where CI runs as root, a missing program is a
    failure."""
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    if shutil.which("ip") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "ip is not installed (Debian: apt-get install iproute2)"
        )


class Network:
    """``count`` hosts, numbered from 1, each in a namespace with one link to a bridge in another
    namespace."""

    def __init__(self, count: int) -> None:
        self._tag = f"ckpt{os.getpid() % 100_000}"
        self._hub = f"{self._tag}hub"
        self._count = count

    def space(self, host: int) -> str:
        """The name of a host's namespace."""
        return f"{self._tag}h{host}"

    def address(self, host: int) -> str:
        return f"{SUBNET}.{host}"

    def command(self, host: int) -> list[str]:
        """What to put before a command that is to run on that host."""
        return ["ip", "netns", "exec", self.space(host)]

    def hub(self) -> list[str]:
        """What to put before a command that is to run where all that hosts send comes by."""
        return ["ip", "netns", "exec", self._hub]

    def pull(self, host: int) -> None:
        """The link is down: nothing goes in or out, and nobody is told."""
        self._ip("-n", self._hub, "link", "set", f"port{host}", "down")

    def plug(self, host: int) -> None:
        """It is up again."""
        self._ip("-n", self._hub, "link", "set", f"port{host}", "up")

    def lose(self, host: int, to: int) -> None:
        """All that ``host`` sends to ``to`` is lost, and nobody is told; what comes the other way
        arrives."""
        self._ip(
            "-n",
            self.space(host),
            "neigh",
            "replace",
            self.address(to),
            "lladdr",
            NOBODY,
            "nud",
            "permanent",
            "dev",
            "eth0",
        )

    def deliver(self, host: int, to: int) -> None:
        """It arrives again."""
        self._ip("-n", self.space(host), "neigh", "del", self.address(to), "dev", "eth0")

    def make(self) -> None:
        self._ip("netns", "add", self._hub)
        self._ip("-n", self._hub, "link", "add", "hub", "type", "bridge")
        self._ip("-n", self._hub, "link", "set", "hub", "up")
        for host in range(1, self._count + 1):
            space = self.space(host)
            self._ip("netns", "add", space)
            self._ip(
                "-n",
                self._hub,
                "link",
                "add",
                f"port{host}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            self._ip("-n", self._hub, "link", "set", f"port{host}", "master", "hub")
            self._ip("-n", self._hub, "link", "set", f"port{host}", "up")
            self._ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")

    def remove(self) -> None:
        for space in (*(self.space(host) for host in range(1, self._count + 1)), self._hub):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def _ip(self, *arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def network(count: int) -> Iterator[Network]:
    """A network, and its end."""
    require()
    made = Network(count)
    made.remove()
    try:
        made.make()
        yield made
    finally:
        made.remove()
