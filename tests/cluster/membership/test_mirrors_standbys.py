"""Standbys keep nodes' state in turn."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ckpt.cluster.membership.mirrors import standby_copies

NAMES = st.sets(st.text("abc", min_size=1, max_size=4), max_size=12)


@given(placed=NAMES, standbys=NAMES)
def test_each_node_has_one_standby_and_each_standby_as_many_nodes_as_any_other(
    placed: set[str], standbys: set[str]
) -> None:
    standbys = {f"s{name}" for name in standbys}
    found = standby_copies(placed, standbys)
    assert found.keys() == (placed if standbys else set())
    assert set(found.values()) <= standbys
    loads = Counter(found.values())
    assert max(loads.values(), default=0) - min((loads[one] for one in standbys), default=0) <= 1
    assert found == standby_copies(sorted(placed, reverse=True), sorted(standbys)), (
        "everybody finds the same"
    )
