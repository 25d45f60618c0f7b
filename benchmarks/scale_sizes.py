"""How large the records of a job are and how long they take, by number of nodes: real records, real
encoders.

``python benchmarks/scale_sizes.py [--nodes 64 1000 12500] [--repeats 3]`` prints bytes and CPU
times: the best of some tries, on one core. What the code refuses is printed as refused. 8 ranks a
node.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from scale_records import (
    NEWEST,
    RANKS_A_NODE,
    across,
    all_holdings,
    commit_record,
    epoch_record,
    holdings,
    line,
    manifest,
    node_info,
    node_name,
    receipt,
)

from ckpt.cluster.membership.mirrors import RankHolder, place_mirrors
from ckpt.cluster.membership.records import decode_epoch, decode_node, encode_epoch, encode_node
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.mesh.protocol import frame_mac
from ckpt.errors import CkptError
from ckpt.format.manifest import Manifest
from ckpt.keeper.mirrors.plan import MirrorRound, complete_snapshots, to_message
from ckpt.keeper.nodes.progress import common_progress_without_each
from ckpt.save.receipts import Receipt, check_groups, merge_receipts
from ckpt.values import SnapshotId

SOURCES_NODES_MAX = 12_500
"""Beyond that one word holds more than FRAME_BYTES_MAX, and building it takes gigabytes."""


def best_s(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds, the least of some tries: other processes on the machine don't count."""
    found = []
    for _ in range(repeats):
        began_s = time.process_time()
        call()
        found.append(time.process_time() - began_s)
    return min(found)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. ``size_bytes`` None: refused, or no record; ``seconds`` None: not
    measured."""

    what: str
    size_bytes: int | None
    seconds: float | None
    note: str = ""


def size_text(size_bytes: int | None) -> str:
    """For people."""
    if size_bytes is None:
        return ""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes} B"


def time_text(seconds: float | None) -> str:
    """For people."""
    if seconds is None:
        return ""
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} us"
    )


def encoded(what: str, make: Callable[[], bytes], repeats: int) -> tuple[Line, bytes]:
    """A record's size and the time of making its bytes; what is refused says why."""
    try:
        data = make()
    except CkptError as error:
        return Line(what, None, None, f"refused: {str(error)[:90]}"), b""
    return Line(what, len(data), best_s(make, repeats)), data


def word_lines(name: str, word: said.MeshMessage, repeats: int) -> list[Line]:
    """What a word costs at either end of a line: bytes, authentication, both."""
    ends = line()
    size, data = across(ends, word)
    ends[1].receive_data(data)

    def both() -> None:
        ends[1].receive_data(across(ends, word)[1])

    say_s = _say_s(word, repeats)
    return [
        Line(f"{name}: said", size, say_s),
        Line(f"{name}: heard", size, best_s(both, repeats) - say_s),
    ]


def _say_s(word: said.MeshMessage, repeats: int) -> float:
    ends = line()
    return best_s(lambda: across(ends, word), repeats)


def standing_word(pairs: int = 3) -> said.NodeProgress:
    """A node's standing: the pairs in its slots, its place in the round of mirrors."""
    sealed = tuple(SnapshotId(NEWEST.epoch, NEWEST.step - back) for back in range(pairs))
    return said.NodeProgress(attempt=8, sealed=sealed, completed=NEWEST.step, mirrored=sealed[-1])


def standing_round(nodes: int) -> Callable[[], object]:
    """What the node of rank 0 works out each time it tells the others how far all are: see
    ``Nodes._tell_standing``."""
    words = {node_name(n): standing_word() for n in range(1, nodes)}
    return lambda: common_progress_without_each(standing_word(), words, 8, MirrorRound())


def over_sockets_s(word: said.MeshMessage, count: int) -> float:
    """CPU seconds of both ends for one word on a real line over loopback, of many that are said one
    after the other."""
    heard, up, done = itertools.count(1), threading.Event(), threading.Event()

    def hear(node: str, word: said.MeshMessage) -> None:
        if next(heard) == count:
            done.set()

    def lines(node: str) -> Mesh:
        told = MeshObserver(
            on_message=hear,
            on_connected=lambda node: up.set(),
            on_disconnected=lambda node, why: None,
        )
        return Mesh(
            bytes(32),
            job="train",
            node=node,
            listen="127.0.0.1:0",
            observer=told,
            emit=lambda event: None,
        )

    a, b = lines("a"), lines("b")
    try:
        addresses = {"a": f"127.0.0.1:{a.port}", "b": f"127.0.0.1:{b.port}"}
        a.set_targets(addresses)
        b.set_targets(addresses)
        up.wait(10.0)
        while "b" not in a.connected_nodes():
            time.sleep(0.01)
        began_s = time.process_time()
        for _ in range(count):
            a.send("b", word)
        done.wait(600.0)
        return (time.process_time() - began_s) / count
    finally:
        a.close()
        b.close()


def constant(repeats: int) -> list[Line]:
    """What doesn't depend on the number of nodes."""
    node, data = encoded("a node's record", lambda: encode_node(node_info(12_345)), repeats)
    commit, _ = encoded("a commit record", lambda: commit_record().encode(), repeats)
    body = msgspec.msgpack.encode(receipt(12_345))
    post = said.MeshPost(room="uploads/5", key="receipt/123/12345", value=body)
    peek = said.MeshPeek(call=123_456, room="attempt/8", key="proposal/12", wait_s=0.0)
    return [
        node,
        Line("a node's record: read", len(data), best_s(lambda: decode_node(data), repeats)),
        commit,
        Line(
            "a node's receipt",
            len(body),
            best_s(lambda: msgspec.msgpack.encode(receipt(12_345)), repeats),
        ),
        *word_lines("a receipt posted", post, repeats),
        *word_lines("a question", peek, repeats),
        *word_lines("an answer", said.MeshReply(call=123_456, value=None), repeats),
        *word_lines("a beat", said.NodeHeartbeat(), repeats),
        *word_lines("a standing", standing_word(), repeats),
        *word_lines(
            "what a node holds",
            said.NodeInventory(call=1, holdings=tuple(holdings(4, 12_500))),
            repeats,
        ),
        Line("a line made (both ends)", None, best_s(line, repeats)),
        Line("a standing over a socket (both ends)", None, over_sockets_s(standing_word(), 20_000)),
        Line(
            "a MiB authenticated",
            1 << 20,
            best_s(partial(frame_mac, bytes(32), 1, bytes(1 << 20)), repeats),
        ),
    ]


def merged(bodies: Sequence[bytes]) -> Receipt:
    """What the head of rank 0's node does with the receipts of all others."""
    return check_groups(
        merge_receipts([msgspec.msgpack.decode(body, type=Receipt) for body in bodies])
    )


def growing(nodes: int, repeats: int) -> list[Line]:
    """What grows with the number of nodes."""
    found, data = encoded("epoch record: made", lambda: encode_epoch(epoch_record(nodes)), repeats)
    lines = [found]
    if data:
        lines.append(
            Line("epoch record: read", len(data), best_s(partial(decode_epoch, data), repeats))
        )
    found, data = encoded("manifest: made", manifest(nodes).encode, repeats)
    lines.append(found)
    if data:
        lines.append(
            Line("manifest: read", len(data), best_s(partial(Manifest.decode, data), repeats))
        )
    bodies = [msgspec.msgpack.encode(receipt(node)) for node in range(nodes)]
    lines.append(
        Line(
            "receipts: read and merged",
            sum(map(len, bodies)),
            best_s(lambda: merged(bodies), repeats),
        )
    )
    view = [encode_node(node_info(n)) for n in range(nodes)]
    lines.append(
        Line(
            "all nodes' records: read",
            sum(map(len, view)),
            best_s(lambda: [*map(decode_node, view)], 1),
        )
    )
    holders = [RankHolder(node_name(n), f"rack-{n // 16}") for n in range(nodes)]
    lines.append(Line("mirrors placed", None, best_s(lambda: place_mirrors(holders, 1), 1)))
    lines.append(
        Line("standing told to all: worked out", None, best_s(standing_round(nodes), repeats))
    )
    if nodes > SOURCES_NODES_MAX:
        return lines
    held = all_holdings(nodes)
    pairs = complete_snapshots(held)
    count = sum(map(len, held.values()))
    lines.append(
        Line(
            "which pairs are whole",
            None,
            best_s(partial(complete_snapshots, held), 1),
            f"{count} holdings, {len(pairs)} pairs",
        )
    )
    del held
    try:
        lines += word_lines("sources, one word", to_message(8, pairs), 1)
    except CkptError as error:
        lines.append(Line("sources, one word", None, None, f"refused: {str(error)[:90]}"))
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[64, 1000, 12_500])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    versions = f"Python {platform.python_version()}, msgspec {msgspec.__version__}"
    print(f"{versions}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    tables = [("any number of nodes", constant(20 * args.repeats))]
    for nodes in args.nodes:
        tables.append(
            (f"{nodes} nodes, {nodes * RANKS_A_NODE} ranks", growing(nodes, args.repeats))
        )
    for title, lines in tables:
        print(f"\n{title}")
        for one in lines:
            print(
                f"  {one.what:34} {size_text(one.size_bytes):>10} {time_text(one.seconds):>10}  "
                f"{one.note}"
            )


if __name__ == "__main__":
    main()
