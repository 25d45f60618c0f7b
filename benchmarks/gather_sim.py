"""How long the node of rank 0 takes to learn what all hold in memory, and to tell all: a simulation
of links and processors.

Questions, answers and the plan are those of a job: ``keeper.gather.Gather`` asks and counts,
``keeper.held.complete`` makes the plan. Simulated is what lies between: each keeper's one
processor, each node's link both ways, the delay. One seed is one run.

``python benchmarks/gather_sim.py [--nodes 1000 12500] [--gbit 25] [--seed 1]`` compares ways to
gather:

* ``flat``, as built: every node answers the node of rank 0, which sends each the whole plan;
* ``tree F``: a node asks up to F others, which ask theirs; what a subtree holds goes up, and the whole plan down, in one word;
* ``own``: each subtree is told only where its own ranks' shares are.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from scale_records import holdings, node_name

from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.keeper.mirrors.plan import WAIT_S, InventoryQuery, MemorySnapshot, complete_snapshots

Held = dict[str, Sequence[InventoryEntry]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds and bytes, from ``scale_sizes.py``; ``gbit``: a keeper's link. ``way_s``: the median
    one-way delay of a word."""

    gbit: float = 25.0
    way_s: float = 100e-6
    word_s: float = 13e-6
    """At one end, socket included."""
    said_s_per_byte: float = 1.0e-9
    heard_s_per_byte: float = 16.0e-9
    """Authenticating and sending what was encoded once for all; checking and decoding."""
    holding_bytes: float = 107.0
    """One in an answer: a node's ranks of one pair."""
    holding_s: float = 3.2e-6
    """One in ``complete``."""
    source_bytes: float = 47.0
    """A node in the plan of three pairs: its name, and its ranks' places."""
    ask_bytes: float = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How it is gathered. ``fan_in`` 0: flat. ``own``: see the module."""

    name: str
    fan_in: int = 0
    own: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of one run: when the node of rank 0 had the plan, when the last node had it, and
    what it cost that node.

    ``answers``: how many nodes' words reached the plan, each once; ``plans``: how many nodes heard
    it.
    """

    gathered_s: float
    known_s: float
    root_in_bytes: float
    root_out_bytes: float
    answers: int
    plans: int
    pairs: tuple[MemorySnapshot, ...]


@dataclass(slots=True)
class _Station:
    """One node: when its processor and its link, out and in, are free next."""

    cpu_s: float = 0.0
    out_s: float = 0.0
    in_s: float = 0.0
    sent: float = 0.0
    received: float = 0.0


@dataclass(slots=True)
class _World:
    """The clock, and what is due."""

    costs: Costs
    random: random.Random
    stations: list[_Station]
    now_s: float = 0.0
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when_s, next(self._order), call))

    def work(self, node: int, seconds: float, then: Callable[[], None]) -> None:
        """Have a node's processor busy, after what it has to do already."""
        station = self.stations[node]
        station.cpu_s = max(self.now_s, station.cpu_s) + seconds
        self.at(station.cpu_s, then)

    def send(self, source: int, target: int, size_bytes: float, then: Callable[[], None]) -> None:
        """A word: said, sent, on its way, received, heard."""
        costs, link = self.costs, self.costs.gbit * 1e9 / 8
        way_s = costs.way_s * self.random.lognormvariate(0.0, 0.5)

        def leave() -> None:
            station = self.stations[source]
            station.out_s = max(self.now_s, station.out_s) + size_bytes / link
            station.sent += size_bytes
            self.at(station.out_s + way_s, arrive)

        def arrive() -> None:
            station = self.stations[target]
            station.in_s = max(self.now_s, station.in_s + size_bytes / link)
            station.received += size_bytes
            self.at(station.in_s, hear)

        def hear() -> None:
            self.work(target, costs.word_s + size_bytes * costs.heard_s_per_byte, then)

        self.work(source, costs.word_s + size_bytes * costs.said_s_per_byte, leave)

    def run(self) -> None:
        while self._due:
            self.now_s, _, call = heapq.heappop(self._due)
            call()


class GatherRun:
    """One gather. ``lost``: nodes without a connection, whose mirrors are with others; not
    node 0, which is rank 0's.

    ``real_slots`` and ``real_kept``: how many pairs the real holdings have; costs are always those
    of ``holdings_a_node``.
    """

    def __init__(
        self,
        nodes: int,
        way: Way,
        costs: Costs,
        *,
        seed: int = 1,
        lost: frozenset[int] = frozenset(),
        real_slots: int = 3,
        real_kept: int = 2,
        holdings_a_node: int = 5,
        wait_s: float = WAIT_S,
    ) -> None:
        self.nodes = nodes
        self.way = way
        self.costs = costs
        self._lost = lost
        self._real = (real_slots, real_kept)
        self._count = holdings_a_node
        self._wait_s = wait_s
        self._numbers = {node_name(n): n for n in range(nodes)}
        self._world = _World(costs, random.Random(seed), [_Station() for _ in range(nodes)])
        living = [n for n in range(nodes) if n not in lost]
        self._children: dict[int, list[int]] = {n: [] for n in living}
        for place, node in enumerate(living[1:], start=1):
            parent = living[(place - 1) // way.fan_in] if way.fan_in else 0
            self._children[parent].append(node)
        if not way.fan_in:  # as built: the node of rank 0 asks all, and learns that there is no line to the lost ones
            self._children[0] += sorted(lost)
        self._below: dict[int, int] = {}
        self._plans: set[int] = set()
        self._known_s = self._gathered_s = 0.0
        self._held: Held = {}
        self._found: tuple[MemorySnapshot, ...] = ()

    def run(self) -> Run:
        """From the question until the last node knows the plan."""
        self._gather(0, self._have)
        self._world.run()
        root = self._world.stations[0]
        return Run(
            gathered_s=self._gathered_s,
            known_s=self._known_s,
            root_in_bytes=root.received,
            root_out_bytes=root.sent,
            answers=len(self._held),
            plans=len(self._plans),
            pairs=self._found,
        )

    # ---- up

    def _gather(self, node: int, have: Callable[[Held], None]) -> None:
        """Have ``node`` ask its children with the code of a keeper; ``have`` hears what its subtree
        holds."""
        world = self._world
        own = (node_name(node), holdings(node, self.nodes, slots=self._real[0], kept=self._real[1]))

        def say(name: str, word: said.MeshMessage) -> bool:
            child = self._numbers[name]
            if child in self._lost:
                return False
            assert isinstance(word, said.AskNodeInventory)
            world.send(
                node,
                child,
                self.costs.ask_bytes,
                lambda: self._gather(child, lambda held: reply(child, word.call, held)),
            )
            return True

        def reply(child: int, call: int, held: Held) -> None:
            # A subtree's answer has one more level than said.Held; all else of it is the same.
            word = SimpleNamespace(call=call, holdings=held)
            world.send(
                child,
                node,
                self._answer_bytes(len(held)),
                lambda: gather.answered(node_name(child), word, world.now_s),
            )

        def told(found: Mapping[str, object]) -> None:
            held: Held = {}
            for name, value in found.items():
                for one, its in value.items() if isinstance(value, dict) else ((name, value),):
                    assert one not in held, "a node's word came twice"
                    held[one] = its
            have(held)

        # Measured is the plain wait: what is missing is waited for longer, and is rare.
        gather = InventoryQuery(say, incomplete=lambda held: False)
        gather.ask([node_name(child) for child in self._children[node]], own, world.now_s, told)
        world.at(world.now_s + self._wait_s, lambda: void(gather.tick(world.now_s)))

    def _answer_bytes(self, nodes: int) -> float:
        return self.costs.ask_bytes + nodes * self._count * self.costs.holding_bytes

    def _have(self, held: Held) -> None:
        self._held = held
        self._world.work(0, len(held) * self._count * self.costs.holding_s, self._plan)

    def _plan(self) -> None:
        self._gathered_s = self._world.now_s
        self._found = tuple(complete_snapshots(self._held))
        self._tell(0)

    # ---- down

    def _tell(self, node: int) -> None:
        self._plans.add(node)
        self._known_s = max(self._known_s, self._world.now_s)
        for child in self._children[node]:
            if child not in self._lost:
                self._world.send(node, child, self._plan_bytes(child), self._teller(child))

    def _teller(self, child: int) -> Callable[[], None]:
        return lambda: self._tell(child)

    def _plan_bytes(self, child: int) -> float:
        return (
            self.costs.ask_bytes
            + (self._size_of(child) if self.way.own else self.nodes) * self.costs.source_bytes
        )

    def _size_of(self, node: int) -> int:
        """How many nodes are in a subtree."""
        if node not in self._below:
            self._below[node] = 1 + sum(self._size_of(child) for child in self._children[node])
        return self._below[node]


def void(_: object) -> None:
    """What a clock's call returns is of no use here."""


def ways_for(nodes: int) -> list[Way]:
    """The ways that are compared."""
    root = math.isqrt(nodes - 1) + 1
    return [
        Way(name="flat, as built"),
        Way(name="flat, own", own=True),
        Way(name=f"tree {root} (square root)", fan_in=root),
        Way(name="tree 64", fan_in=64),
        Way(name="tree 64, own", fan_in=64, own=True),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[64, 256, 1000, 12_500])
    parser.add_argument("--gbit", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    costs = Costs(gbit=args.gbit)
    print(
        f"a link of {args.gbit:g} Gbit/s, seed {args.seed}; an answer that comes after {WAIT_S:g} "
        "s counts for nothing"
    )
    print(
        f"{'nodes':>7}  {'way':24} {'words in time':>14} {'gathered':>9} {'known by all':>13} "
        f"{'root in':>9} {'root out':>9}"
    )
    for nodes in args.nodes:
        # The costs are those of all that nodes hold; the words themselves hold one pair where there
        # are many nodes.
        thin = {"real_slots": 1, "real_kept": 1} if nodes > 1000 else {}
        for way in ways_for(nodes):
            run = GatherRun(nodes, way, costs, seed=args.seed, **thin).run()
            print(
                f"{nodes:>7}  {way.name:24} {run.answers:>14} {run.gathered_s:>7.2f} s "
                f"{run.known_s:>11.2f} s "
                f"{run.root_in_bytes / 1e6:>6.0f} MB {run.root_out_bytes / 1e6:>6.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    gc.disable()  # millions of small objects, none of them in a cycle
    main()
