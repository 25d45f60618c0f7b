"""The simulation of ``benchmarks/gather_sim.py``, small: nothing is lost or counted twice, and each
way finds the same plan."""

from __future__ import annotations

import pytest
from gather_sim import Costs, GatherRun, Run, Way, ways_for
from scale_records import NEWEST, RANKS_A_NODE, SLOTS, all_holdings, node_name

from ckpt.keeper.mirrors.plan import complete_snapshots

NODES = 48
COSTS = Costs()


def run(
    way: Way,
    *,
    seed: int = 1,
    lost: frozenset[int] = frozenset(),
    costs: Costs = COSTS,
    nodes: int = NODES,
) -> Run:
    return GatherRun(nodes, way, costs, seed=seed, lost=lost).run()


@pytest.mark.parametrize(
    "way", [*ways_for(NODES), Way(name="tree 2", fan_in=2)], ids=lambda way: way.name
)
@pytest.mark.parametrize("seed", range(5))
def test_every_nodes_word_arrives_once_and_the_plan_is_that_of_one_who_sees_all(
    way: Way, seed: int
) -> None:
    found = run(way, seed=seed)
    assert found.answers == found.plans == NODES
    assert list(found.pairs) == complete_snapshots(all_holdings(NODES))
    assert len(found.pairs) == SLOTS
    assert 0.0 < found.gathered_s <= found.known_s
    assert run(way, seed=seed) == found, "one seed is one run"


@pytest.mark.parametrize("way", ways_for(NODES), ids=lambda way: way.name)
def test_lost_nodes_shares_come_from_their_mirrors(way: Way) -> None:
    lost = frozenset({1, 7, 40})
    found = run(way, lost=lost)
    assert found.answers == found.plans == NODES - len(lost)
    assert found.pairs[0].snapshot == NEWEST
    names = {node_name(node) for node in lost}
    assert not any(names & set(sources) for pair in found.pairs for sources in pair.sources)
    partner = node_name(6)
    assert set(found.pairs[0].sources[7 * RANKS_A_NODE]) == {partner}


def test_both_of_two_partners_lost_leave_no_pair() -> None:
    assert run(Way(name="flat"), lost=frozenset({6, 7})).pairs == ()


def test_answers_that_come_too_late_count_for_nothing() -> None:
    slow = Costs(
        heard_s_per_byte=1e-3
    )  # half a second a word, one after the other at the node of rank 0
    found = run(Way(name="flat"), costs=slow)
    assert 1 < found.answers < NODES // 2
    assert found.pairs == ()
    assert found.gathered_s >= 3.0


def test_what_node_0_sends_and_gets_is_the_sum_of_its_words() -> None:
    costs = Costs()
    flat = run(Way(name="flat"))
    others = NODES - 1
    plan = costs.ask_bytes + NODES * costs.source_bytes
    assert flat.root_out_bytes == pytest.approx(others * (costs.ask_bytes + plan))
    assert flat.root_in_bytes == pytest.approx(others * (costs.ask_bytes + 5 * costs.holding_bytes))
    tree = run(Way(name="tree", fan_in=7))
    assert tree.root_out_bytes == pytest.approx(7 * (costs.ask_bytes + plan))
    assert tree.known_s < flat.known_s
