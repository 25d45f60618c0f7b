"""What nodes write comes back as it was, and nothing else is believed."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.cluster.membership.records import (
    EpochRecord,
    NodeInfo,
    NodePlacement,
    RemovedNode,
    StateInventory,
    decode_epoch,
    decode_inventory,
    decode_node,
    encode_epoch,
    encode_inventory,
    encode_node,
)
from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.values import SnapshotId

NODE = NodeInfo(
    node="0a-b_C", host="h1", slots=8, domain="r1", address="[::1]:7", capabilities=("x",)
)
EPOCH = EpochRecord(
    job="j",
    number=7,
    places=(NodePlacement("a", 2), NodePlacement("b", 3)),
    leader="a",
    nodes_min=1,
    nodes_max=4,
    removed=(RemovedNode("c", "why"),),
    resumes=SnapshotId(6, 100),
)
HELD = StateInventory(8, {0: 5, 7: 1 << 40})


def test_values_come_back_and_equal_ones_give_equal_bytes() -> None:
    assert decode_node(encode_node(NODE)) == NODE
    assert decode_epoch(encode_epoch(EPOCH)) == EPOCH
    assert decode_inventory(encode_inventory(HELD)) == HELD
    assert encode_inventory(StateInventory(8, {7: 1 << 40, 0: 5})) == encode_inventory(HELD)


def test_a_domain_is_the_host_where_none_is_said() -> None:
    assert (NODE.failure_domain, replace(NODE, domain="").failure_domain) == ("r1", "h1")


def test_ranks_follow_each_other_by_places() -> None:
    assert (EPOCH.world_size, EPOCH.ranks) == (5, {"a": range(2), "b": range(2, 5)})
    assert EPOCH.rank0_node == "a"


@pytest.mark.parametrize(
    "bad",
    [
        {"node": ""},
        {"node": "a/b"},
        {"node": "x" * 65},
        {"node": "ü"},
        {"host": ""},
        {"host": "x" * 256},
        {"slots": 0},
        {"slots": 1025},
        {"address": "a\n"},
        {"capabilities": ("",) * 65},
        {"domain": "\0"},
    ],
)
def test_a_node_that_can_not_be_is_not_written(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        encode_node(replace(NODE, **bad))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"job": ""},
        {"number": 0},
        {"number": 10**10},
        {"places": ()},
        {"places": (NodePlacement("a", 2), NodePlacement("a", 2))},
        {"places": (NodePlacement("a", 0),)},
        {"places": (NodePlacement("a/b", 1),)},
        {"leader": ""},
        {"nodes_min": 0},
        {"nodes_min": 3},
        {"nodes_max": 0},
        {"removed": (RemovedNode("a", "placed"),)},
        {"removed": (RemovedNode("c", "x" * 201),)},
        {"removed": (RemovedNode("c", "\n"),)},
        {"resumes": SnapshotId(-1, 0)},
        {"removed": tuple(RemovedNode(f"n{n}", "") for n in range(1001))},
    ],
)
def test_an_epoch_that_can_not_be_is_not_written(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        encode_epoch(replace(EPOCH, **bad))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        StateInventory(0, {}),
        StateInventory(4, {4: 1}),
        StateInventory(4, {-1: 1}),
        StateInventory(4, {0: -1}),
    ],
)
def test_holdings_that_can_not_be_are_not_written(bad: StateInventory) -> None:
    with pytest.raises(UsageError):
        encode_inventory(bad)


def test_an_epoch_of_too_many_nodes_is_refused_by_its_size() -> None:
    places = tuple(NodePlacement(f"{n:016x}", 8) for n in range(60_000))
    with pytest.raises(UsageError, match="too large"):
        encode_epoch(replace(EPOCH, places=places))


def test_other_bytes_are_refused() -> None:
    for data, decode in (
        (encode_node(NODE), decode_node),
        (encode_epoch(EPOCH), decode_epoch),
        (encode_inventory(HELD), decode_inventory),
    ):
        for at in range(len(data)):
            for bad in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
                with pytest.raises((IntegrityError, FormatVersionError)):
                    decode(bad)
        with pytest.raises(IntegrityError):
            decode(data + b" ")


def test_a_newer_version_is_told_from_damage() -> None:
    wire = msgspec.json.decode(encode_node(NODE))
    with pytest.raises(FormatVersionError):
        decode_node(msgspec.json.encode({**wire, "v": 2}))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    for decode in (decode_node, decode_epoch, decode_inventory):
        with pytest.raises(IntegrityError):
            decode(data)
