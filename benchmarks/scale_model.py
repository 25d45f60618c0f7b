"""What a job of so many nodes asks of etcd, of rank 0's node and of the store: each figure a
formula, and where it comes from.

``python benchmarks/scale_model.py [--nodes 64 1000 12500 100000] [--step-s 1]`` prints them. Sizes
and times are those that ``scale_sizes.py`` measures; limits are the code's own constants. 8 ranks a
node, TTL 5 s, one mirror.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from scale_records import RANKS_A_NODE
from scale_sizes import size_text, time_text

from ckpt.cluster.membership.records import EPOCH_BYTES_MAX
from ckpt.cluster.mesh.connections import HEARTBEAT_S
from ckpt.cluster.mesh.protocol import FRAME_BYTES_MAX
from ckpt.cluster.node.leading import FULL_MESH_NODES_MAX
from ckpt.cluster.node.node import VIEW_S
from ckpt.elastic.rendezvous.agent import LOOK_S as AGENT_LOOK_S
from ckpt.elastic.rendezvous.agent import VIEW_S as AGENT_VIEW_S
from ckpt.format.manifest import MANIFEST_BYTES_MAX
from ckpt.ipc.mailbox import POLL_LAST_S
from ckpt.keeper.nodes.progress import PROGRESS_S, REPORTS_PER_S_MAX, report_every_s
from ckpt.keeper.nodes.remote_mailbox import ANSWER_S
from ckpt.session.decisions import RANKS_PER_S_MAX

TTL_S = 5.0

# Measured by scale_sizes.py.
WORD_S = 13e-6
"""A small word at one end of a line, its socket included."""
NODE_BYTES = 218
PLACE_BYTES = 30
PART_REF_BYTES = 164
RECEIPT_BYTES = 476
RECEIPT_S = 4e-6
"""Read and merged with all others."""
HOLDING_BYTES = 107
HOLDINGS = 5
"""Runs of ranks that a node tells of: three pairs in slots, two kept for itself and its partner."""
SOURCE_BYTES = 47
"""A node in the plan of three pairs."""
STANDING_S_A_NODE = 15e-6
"""Kept, and worked on with all others: ``rank0_load`` in tests/keeper/nodes/test_nodes.py, at 5,000
nodes."""
SAID_S_PER_BYTE = 1.0e-9
"""Authenticated and sent; encoded once for all."""
REQUEST_S = 37e-6
"""A peer request's head at one end (016)."""
ROUND_TRIP_S = 0.2e-3
HEADER_REQUESTS = 3
"""``far_slots._look``: length, head, index."""


@dataclass(frozen=True, slots=True)
class Row:
    """``value`` of the number of nodes and the step time; ``show`` for people."""

    what: str
    where: str
    value: Callable[[int, float], float]
    show: Callable[[float], str]


def count_text(count: float) -> str:
    """For people."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def rate_text(count: float) -> str:
    """For people."""
    return f"{count_text(count)}/s"


def flow_text(size_bytes: float) -> str:
    """For people."""
    return f"{size_text(int(size_bytes))}/s"


def bytes_text(size_bytes: float) -> str:
    """For people."""
    return size_text(int(size_bytes))


def cores_text(cores: float) -> str:
    """For people; a keeper has one."""
    return f"{100 * cores:.0f} %"


def ranks(nodes: int) -> int:
    """How many there are."""
    return nodes * RANKS_A_NODE


def steps_a_s(step_s: float) -> float:
    """How often a node's progress changes, and is reported at most."""
    return min(1 / step_s, 1 / PROGRESS_S)


def lines(nodes: int, *, centre: bool) -> int:
    """How many lines a node keeps: see ``cluster/node/leading.py``."""
    return nodes - 1 if nodes <= FULL_MESH_NODES_MAX or centre else min(4, nodes - 1)


ROWS = (
    Row("etcd: keepalives of keepers", "TTL/3", lambda n, _: n * 3 / TTL_S, rate_text),
    Row(
        "etcd: looks of agents at two keys",
        "elastic/rendezvous, LOOK_S or TTL/3; cluster, TTL",
        lambda n, _: n * (1 / min(AGENT_LOOK_S, TTL_S / 3) + 1 / TTL_S),
        rate_text,
    ),
    Row(
        "etcd: writes when all join",
        "grant, put; of agents move, revoke",
        lambda n, _: 6 * n,
        count_text,
    ),
    Row("etcd: epoch record", "values.encode_epoch", lambda n, _: n * PLACE_BYTES, bytes_text),
    Row(
        "etcd: reads of keepers, nothing happening",
        "cluster/node/node.py: all, each VIEW_S",
        lambda n, _: n * n * (NODE_BYTES + PLACE_BYTES) / VIEW_S,
        flow_text,
    ),
    Row(
        "etcd: reads of agents, nothing happening",
        "rendezvous_agent.py: all, each VIEW_S",
        lambda n, _: n * n * (NODE_BYTES + PLACE_BYTES) / AGENT_VIEW_S,
        flow_text,
    ),
    Row(
        "lines: of the leader and of rank 0's node",
        "cluster/node/leading.py",
        lambda n, _: lines(n, centre=True),
        count_text,
    ),
    Row(
        "lines: of any other node",
        "cluster/node/leading.py",
        lambda n, _: lines(n, centre=False),
        count_text,
    ),
    Row(
        "rank 0's node: beats",
        "2 a line and HEARTBEAT_S",
        lambda n, _: 2 * n / HEARTBEAT_S * WORD_S,
        cores_text,
    ),
    Row(
        "rank 0's node: standings",
        "keeper/nodes/progress.py, 1 in and 1 out a step, at most REPORTS_PER_S_MAX",
        lambda n, step_s: (
            min(n * steps_a_s(step_s), REPORTS_PER_S_MAX) * (2 * WORD_S + STANDING_S_A_NODE)
        ),
        cores_text,
    ),
    Row(
        "a node's progress is told at least each",
        "keeper/nodes/progress.py, report_every_s",
        lambda n, _: report_every_s(n),
        time_text,
    ),
    Row(
        "rank 0's node: ranks ask for proposals",
        "session/decisions.py, RANKS_PER_S_MAX",
        lambda n, _: min(ranks(n) / POLL_LAST_S, RANKS_PER_S_MAX) * 2 * WORD_S,
        cores_text,
    ),
    Row(
        "a request reaches the last rank after",
        "the same",
        lambda n, _: max(POLL_LAST_S, ranks(n) / RANKS_PER_S_MAX),
        time_text,
    ),
    Row(
        "rank 0's node: nodes wait for an outcome",
        "keeper/nodes/remote_mailbox.py, ANSWER_S",
        lambda n, _: n / ANSWER_S * 2 * WORD_S,
        cores_text,
    ),
    Row(
        "a snapshot: receipts",
        "save/receipts.py, 1 a node",
        lambda n, _: n * RECEIPT_BYTES,
        bytes_text,
    ),
    Row(
        "a snapshot: receipts heard and merged in",
        "the same, on one core",
        lambda n, _: n * (3 * WORD_S + RECEIPT_S),
        time_text,
    ),
    Row(
        "a snapshot: manifest",
        "manifest.py, 1 part a node",
        lambda n, _: n * PART_REF_BYTES,
        bytes_text,
    ),
    Row(
        "a snapshot: objects put, packs aside",
        "parts, manifest, commit",
        lambda n, _: n + 2,
        count_text,
    ),
    Row(
        "restore from the store: reads of parts",
        "log/catalog.py: each rank reads all",
        lambda n, _: ranks(n) * n,
        count_text,
    ),
    Row(
        "gather: all answers",
        "fleet/words.Held, 5 a node",
        lambda n, _: n * HOLDINGS * HOLDING_BYTES,
        bytes_text,
    ),
    Row(
        "gather: the plan, one word",
        "fleet/words.Sources",
        lambda n, _: n * SOURCE_BYTES,
        bytes_text,
    ),
    Row(
        "gather: the plan said to all",
        "nodes_memory.py, on one core",
        lambda n, _: n * (WORD_S + n * SOURCE_BYTES * SAID_S_PER_BYTE),
        time_text,
    ),
    Row(
        "restore from memory: a rank reads headers for",
        "session/peer_memory.py, one after the other",
        lambda n, _: HEADER_REQUESTS * (ranks(n) - RANKS_A_NODE) * (ROUND_TRIP_S + REQUEST_S),
        time_text,
    ),
    Row(
        "restore from memory: a keeper answers for",
        "the same, from the other end",
        lambda n, _: HEADER_REQUESTS * RANKS_A_NODE * (ranks(n) - RANKS_A_NODE) * REQUEST_S,
        time_text,
    ),
)

LIMITS = (
    ("epoch record", EPOCH_BYTES_MAX // PLACE_BYTES, "nodes"),
    ("manifest", MANIFEST_BYTES_MAX // PART_REF_BYTES, "nodes"),
    ("the plan in one word", FRAME_BYTES_MAX // SOURCE_BYTES, "nodes"),
)
"""What is refused, from what number on."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[64, 1000, 12_500, 100_000])
    parser.add_argument("--step-s", type=float, default=1.0)
    args = parser.parse_args()
    print(f"{'nodes':46}" + "".join(f"{nodes:>11}" for nodes in args.nodes) + "   where")
    for row in ROWS:
        values = "".join(f"{row.show(row.value(nodes, args.step_s)):>11}" for nodes in args.nodes)
        print(f"{row.what:46}{values}   {row.where}")
    for what, number, unit in LIMITS:
        print(f"refused above {number} {unit}: {what}")


if __name__ == "__main__":
    main()
