"""What a peer's memory costs as a store: puts and gets over loopback beside a bare TCP stream of
the same bytes.

    python benchmarks/peer.py
    python benchmarks/peer.py --mib 64 256 1024 --rounds 7

Server and client are processes of their own, and so is the other end of the bare stream.
Contestants alternate; medians of several rounds. Prints MB/s with ratios, and CPU seconds of both
ends together with ratios: those stand also where the machine has other work. In the clear and over
TLS; then peak memory. A put of which a tenth changed is measured in bytes of the object, beside the
whole put. The first table is what the MAC was chosen by.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import hmac
import mmap
import multiprocessing as processes
import os
import platform
import resource
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kit.peers.certificates import Files, make_certificates

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import PeerSecret, mac
from ckpt.cluster.peermem.body_mac import body_mac, known_macs
from ckpt.cluster.peermem.http import PeerRequest, StoredContent, parse_head, split_mac, with_mac
from ckpt.cluster.peermem.memory import PeerMemory
from ckpt.cluster.peermem.server import PeerServer
from ckpt.cluster.peermem.store import PeerClientLimits, PeerStore
from ckpt.cluster.tls import client_context, server_context
from ckpt.events import Event

SECRET = PeerSecret.of(bytes(range(32)))
BLOCK_BYTES = 256 << 10
SEND_BYTES = 1 << 20
KEY = "bench/pack"
OUT, IN = "bare stream out", "bare stream in"
PUT, TENTH = "put", "put, a tenth changed (ratio to put)"
MAC_BYTES = 64 << 20
Act = Callable[[], object]


def quiet(event: Event) -> None:
    print(event.text, file=sys.stderr)


def lend(pipe: Connection, budget_bytes: int, spare_bytes: int, files: Files | None) -> None:
    """A server, until the pipe says None; anything else asks for its peak memory."""
    tls = (
        None
        if files is None
        else server_context(certificate=files.certificate, key=files.key, ca=files.ca)
    )
    server = PeerServer(
        PeerMemory(budget_bytes, spare_bytes_max=spare_bytes),
        SECRET,
        endpoint=Endpoint(tls=tls),
        emit=quiet,
    )
    server.start()
    pipe.send(server.address)
    while pipe.recv() is not None:
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    server.stop()


def swallow(pipe: Connection, size_bytes: int, files: Files | None) -> None:
    """The far end of a bare stream: takes ``size_bytes`` into memory that it keeps, then sends as
    many, for ever."""
    memory = memoryview(mmap.mmap(-1, size_bytes))
    memory[:] = bytes(size_bytes)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname())
        sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if files is not None:
        context = server_context(certificate=files.certificate, key=files.key, ca=files.ca)
        sock = context.wrap_socket(sock, server_side=True)
    with sock:
        while fill(sock, memory):
            sock.sendall(b"k")
            drain(sock, memory)


def fill(sock: socket.socket, memory: memoryview) -> bool:
    at = 0
    while at < len(memory):
        count = sock.recv_into(memory[at : at + (1 << 20)])
        if not count:
            return False
        at += count
    return True


def drain(sock: socket.socket, memory: memoryview) -> None:
    for at in range(0, len(memory), SEND_BYTES):
        sock.sendall(memory[at : at + SEND_BYTES])


@dataclass(frozen=True)
class Cost:
    """Medians: MB/s by the clock, and CPU seconds a GiB of this process and those beside it."""

    rate: float
    cpu_s: float


def rates(
    acts: dict[str, Act], *, size_bytes: int, rounds: int, beside: tuple[int, ...] = ()
) -> dict[str, Cost]:
    """What each act costs, taking turns. ``beside``: processes that work for it."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    for turn in range(rounds + 1):
        for name, act in acts.items():
            cpu_s, start = spent_s(beside), time.perf_counter()
            act()
            took = time.perf_counter() - start, spent_s(beside) - cpu_s
            if turn:
                times[name].append(took)
    return {
        name: Cost(
            size_bytes / statistics.median(one[0] for one in taken) / 1e6,
            statistics.median(one[1] for one in taken) / size_bytes * (1 << 30),
        )
        for name, taken in times.items()
    }


def spent_s(pids: tuple[int, ...]) -> float:
    """CPU time of this process, and of all threads of others."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return time.process_time() + sum(int(file.read_text().split()[0]) for file in files) / 1e9


def show(title: str, found: dict[str, Cost], beside: Callable[[str], str]) -> None:
    print(f"\n{title}")
    for name, cost in found.items():
        base = found[beside(name)]
        cpu = f"{cost.cpu_s:8.2f} CPU s/GiB  x{cost.cpu_s / base.cpu_s:.2f}"
        print(f"  {name:36} {cost.rate:8.0f} MB/s  x{cost.rate / base.rate:.2f} {cpu}")


def macs() -> None:
    memory = memoryview(mmap.mmap(-1, MAC_BYTES))
    memory[:] = os.urandom(1 << 20) * (MAC_BYTES >> 20)
    key = bytes(range(32))
    copy = bytearray(BLOCK_BYTES)

    def over(update: Callable[[memoryview], object], end: Callable[[], object]) -> None:
        for at in range(0, MAC_BYTES, BLOCK_BYTES):
            update(memory[at : at + BLOCK_BYTES])
        end()

    def ours(name: str) -> Act:
        def act() -> None:
            one = body_mac(name, key, counter=1, head_mac=key)
            over(one.update, one.tag)

        return act

    def theirs(make: Callable[[], object]) -> Act:
        def act() -> None:
            one = make()
            over(one.update, one.digest)  # type: ignore[attr-defined]

        return act

    def copying() -> None:
        for at in range(0, MAC_BYTES, BLOCK_BYTES):
            copy[:] = memory[at : at + BLOCK_BYTES]

    acts: dict[str, Act] = {f"{name} (ours)": ours(name) for name in known_macs()}
    acts |= {
        "blake2b, keyed": theirs(lambda: hashlib.blake2b(key=key)),
        "blake2s": theirs(lambda: hashlib.blake2s(key=key)),
    }
    acts |= {
        "hmac-sha512": theirs(lambda: hmac.new(key, digestmod="sha512")),
        "memcpy, for scale": copying,
    }
    found = rates(acts, size_bytes=MAC_BYTES, rounds=5)
    show(
        "A body's MAC, 64 MiB in blocks of 256 KiB, one thread",
        found,
        lambda name: "memcpy, for scale",
    )


def heads(count: int = 2000) -> None:
    request = PeerRequest(
        verb="PUT", key=KEY, boot="0" * 32, epoch=3, counter=7, body_bytes=1 << 20, waits=True
    )

    def one() -> None:
        head = request.encode("127.0.0.1:1")
        split = split_mac(with_mac(head, mac(bytes(32), head)))
        assert split is not None
        PeerRequest.parse(parse_head(split[0]))

    start = time.perf_counter()
    for _ in range(count):
        one()
    print(
        "\nA request's head spelled, signed, checked and parsed: "
        f"{(time.perf_counter() - start) / count * 1e6:.0f} us"
    )


def one_size(
    size_bytes: int, *, rounds: int, files: tuple[Files, Files] | None, fresh: bool = False
) -> None:
    spawn = processes.get_context("spawn")
    server_files, tls, spare = None, None, 0 if fresh else size_bytes
    if files is not None:
        server_files, mine = files
        tls = client_context(certificate=mine.certificate, key=mine.key, ca=mine.ca)
    here, there = spawn.Pipe()
    server = spawn.Process(
        target=lend, args=(there, 2 * size_bytes + (64 << 20), spare, server_files), daemon=True
    )
    server.start()
    stream_here, stream_there = spawn.Pipe()
    stream = spawn.Process(
        target=swallow, args=(stream_there, size_bytes, server_files), daemon=True
    )
    stream.start()
    endpoint = Endpoint(*here.recv(), tls=tls)
    bare = bare_socket(stream_here.recv(), tls)
    fd = os.memfd_create("bench")
    os.ftruncate(fd, size_bytes)
    data, out = memoryview(mmap.mmap(fd, size_bytes)), memoryview(mmap.mmap(-1, size_bytes))
    data[:] = os.urandom(1 << 20) * (size_bytes >> 20)
    out[:] = bytes(size_bytes)
    store = PeerStore(endpoint, SECRET, epoch=lambda: 1, limits=PeerClientLimits(streams_max=1))
    parallel = PeerStore(endpoint, SECRET, epoch=lambda: 1)
    store.put(KEY, [data])
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def bare_out() -> None:
        drain(bare, data)
        bare.recv(1)

    pieces = [data[:4096], data[4096:]]
    part = size_bytes // 100
    tenth = [(10 * number * part, part) for number in range(10)]
    stored: list[StoredContent] = []

    def put() -> None:
        stored[:] = [store.put_whole(KEY, pieces)]

    def put_tenth() -> None:
        store.put_changed(KEY, pieces, base=stored[0], changed=tenth)

    streams: dict[str, Act] = {OUT: bare_out, IN: lambda: fill(bare, out)}
    puts = {
        **streams,
        PUT: put,
        TENTH: put_tenth,
    }
    gets = {
        **streams,
        "get": lambda: store.read_into(KEY, out),
        "get, parallel": lambda: parallel.read_into(KEY, out),
    }
    pids = tuple(pid for pid in (server.pid, stream.pid) if pid is not None)
    measure = functools.partial(rates, size_bytes=size_bytes, rounds=rounds, beside=pids)
    where = (
        f"{'in the clear' if files is None else 'over TLS'}, {'fresh' if fresh else 'used'} memory"
    )
    title = f"{size_bytes >> 20} MiB {where}, MAC {known_macs()[0]}"
    show(f"{title}: puts", measure(puts), lambda name: {IN: IN, TENTH: PUT}.get(name, OUT))
    if not fresh:
        show(f"{title}: gets", measure(gets), lambda name: OUT if name == OUT else IN)
        assert out == data, "other bytes came back"
    here.send("peak")
    peak, mine_bytes = (
        here.recv(),
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before_bytes,
    )
    print(
        f"  peak memory: server {peak / size_bytes:.2f} objects, client "
        f"{mine_bytes / size_bytes:.2f} beyond its own"
    )
    for one in (store, parallel):
        one.close()
    bare.close()
    here.send(None)
    server.join()
    stream.join()


def bare_socket(address: tuple[str, int], tls: ssl.SSLContext | None) -> socket.socket:
    sock = socket.create_connection(address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock if tls is None else tls.wrap_socket(sock, server_hostname=address[0])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    versions = f"Python {platform.python_version()}, cryptography {metadata.version('cryptography')}, {ssl.OPENSSL_VERSION}"
    return f"{model}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine())
    macs()
    heads()
    with tempfile.TemporaryDirectory() as folder:
        made = make_certificates(Path(folder))
        for mib in options.mib:
            one_size(mib << 20, rounds=options.rounds, files=None)
            one_size(mib << 20, rounds=options.rounds, files=None, fresh=True)
            one_size(mib << 20, rounds=options.rounds, files=(made.one, made.two))


if __name__ == "__main__":
    main()
