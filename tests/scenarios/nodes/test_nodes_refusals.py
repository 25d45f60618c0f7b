"""A real job of two nodes, and somebody at every port and socket of one of its keepers: all is
refused and counted, and the job neither fails nor changes by a bit."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from kit.jobs import SEED, SOAK, WAIT_S, differences, wait_for
from kit.machines import Machine, calm, cluster
from kit.servers.keeper_fuzz import Strangers, descriptors, own_bytes
from kit.template import run

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.store import PeerStore
from ckpt.cluster.secret import read_secret
from ckpt.errors import FencedError, StoreDeniedError
from ckpt.ipc.runtime_dir import JobFolder

STEPS = 2_500 if SOAK else 250
FUZZ_AT, UNDISTURBED = 10, 15
"""From which step on it is disturbed, and how many steps its nodes have afterwards to bring their
mirrors up to date."""
REDONE_MAX = 12
ARGUMENTS = (STEPS, "--every", 1000, "--step-s", 0.2)
TURNS = 3000 if SOAK else 60
GROWTH_BYTES_MAX = 128 << 20
"""What the keeper may have grown by: its connections' bounds (``peer.server``, ``keeper.peers``),
and its allocator's."""

HTTP = (
    b"GET /hello HTTP/1.1\r\n\r\n",
    b"PUT /o/mirrors/1-1/0 HTTP/1.1\r\ncontent-length: 5\r\n\r\nhello",
    b"\r\n\r\n",
    b"DELETE /o/mirrors/1-1/0 HTTP/1.1\r\nckpt-epoch: 99\r\nckpt-mac: " + b"0" * 64 + b"\r\n\r\n",
    b"GET /l?prefix=&after= HTTP/1.1\r\nckpt-mac: " + b"f" * 64 + b"\r\n\r\n",
)


@pytest.mark.slow
def test_whoever_is_not_of_the_job_is_refused_counted_and_changes_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    print(f"CKPT_SEED={SEED}")
    rng = random.Random(f"refusals-{SEED}")
    undisturbed = calm(tmp_path_factory, 2, ARGUMENTS)
    with cluster(tmp_path / "cluster", nodes="2") as one:
        for _ in range(3):
            one.start(
                *ARGUMENTS, more={"ttl_s": 8.0}
            )  # a keeper under attack may be slow: no reason to take its ranks
        one.wait_steps(FUZZ_AT)
        target = one.of_rank(0)
        keeper = target.keeper()
        web, lines = ports_of(keeper)
        fds, memory = descriptors(keeper), own_bytes(keeper)
        before = refused(target)

        # Nobody's requests: 401 or 400, and not a byte more.
        asked = [rng.choice(HTTP) for _ in range(TURNS)]
        answers = [answer_of(web, raw) for raw in asked]
        assert {answer[:12] for answer in answers} <= {b"HTTP/1.1 401", b"HTTP/1.1 400"}
        # A node of an older epoch that knows the secret: 409, whatever it wants.
        secret = PeerSecret.of(read_secret(one.folder / "members.db.secret"))
        with closing(PeerStore(Endpoint("127.0.0.1", web), secret, epoch=lambda: 0)) as zombie:
            for _ in range(3):
                for want in (
                    lambda: zombie.put("mirrors/9-9/0", [b"old"]),
                    lambda: zombie.delete("mirrors/1-1/0"),
                    lambda: zombie.stat("mirrors/1-1/0"),
                    lambda: list(zombie.list("")),
                ):
                    with pytest.raises(FencedError):
                        want()
        another = PeerSecret.of(bytes(range(32)))
        with (
            closing(PeerStore(Endpoint("127.0.0.1", web), another, epoch=lambda: 99)) as stranger,
            pytest.raises(StoreDeniedError),
        ):
            stranger.put("mirrors/9-9/0", [b"x"])
        for _ in range(TURNS):
            answer_of(lines, rng.randbytes(rng.choice((4, 400, 70_000))))
        strangers = Strangers(rng, lambda: socket_of(target))
        for _ in range(TURNS):
            strangers.attack()
        strangers.close()

        counted = refused(target)
        assert counted.get("mac", 0) - before.get("mac", 0) >= TURNS // 2, counted
        assert counted.get("epoch", 0) - before.get("epoch", 0) == 12, counted
        assert counted.get("line", 0) - before.get("line", 0) >= TURNS // 2, counted
        assert own_bytes(keeper) - memory <= GROWTH_BYTES_MAX
        assert (
            descriptors(keeper) <= fds + 8
        )  # of lines, mirrors and their threads there are more or fewer at any moment
        with closing(PeerStore(Endpoint("127.0.0.1", web), secret, epoch=lambda: 1)) as current:
            assert "mirrors/9-9/0" not in [stat.key for stat in current.list("")]
        assert target.keeper() == keeper
        assert one.job.attempts(0) == 1, one.output()

        one.wait_steps(one.job.completed + UNDISTURBED)
        lost = one.of_rank(1)
        lost.kill()
        ends = one.wait_end(hurry=True)
        assert {status for name, status in ends.items() if name != lost.name} == {0}, one.output()
        assert differences(undisturbed, one.job, world_size=2) == [], one.output()
        assert one.job.losses[0].poll().redone <= REDONE_MAX, one.output()


def refused(machine: Machine) -> dict[str, int]:
    """What a machine's keeper says that it turned away; it may be busy with turning away for a
    while."""
    environment = {**os.environ, "CKPT_RUNTIME_DIR": str(machine.folder / "runtime")}
    found: list[dict[str, int]] = []

    def answered() -> bool:
        done = run(
            [sys.executable, "-m", "ckpt", "ps", "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode in (0, 11), done.stderr
        if done.returncode == 0:
            found.append(json.loads(done.stdout)["jobs"][0]["refused"])
        return bool(found)

    wait_for(answered, "its keeper's answer", say=machine.output)
    return found[0]


def ports_of(pid: int) -> tuple[int, int]:
    """Where a keeper lends its memory, and where it takes lines."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = []
    for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        if fields[3] == "0A" and fields[9] in inodes:
            found.append(int(fields[1].rpartition(":")[2], 16))
    assert len(found) == 2, found
    web = next(port for port in found if answer_of(port, HTTP[0]).startswith(b"HTTP/1.1 "))
    return web, next(port for port in found if port != web)


def answer_of(port: int, raw: bytes) -> bytes:
    """All that comes back."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as sock, suppress(ConnectionError):
        sock.sendall(raw)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)  # not connected: the keeper has closed it already
        while data := sock.recv(1 << 16):
            answer += data
    return answer


def socket_of(machine: Machine) -> socket.socket:
    """A connection to the machine's keeper."""
    (path,) = (machine.folder / "runtime").glob("*/job.json")
    return JobFolder.at(path.parent).connect()
