"""Records come back as they were written; what is none is refused with its key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import CkptError, IntegrityError, UsageError
from ckpt.serve.group.records import (
    REPLICAS,
    GroupView,
    OrderRecord,
    ReplicaRecord,
    RolesRecord,
    decode_order,
    decode_replica,
    decode_roles,
    encode,
    generation_name,
    parse_generation,
)
from ckpt.values import SnapshotId

NAME = st.text(min_size=1, max_size=8)
NAMES = st.lists(NAME, max_size=4).map(tuple)


@given(
    st.builds(
        ReplicaRecord,
        name=NAME,
        address=NAME,
        state=st.sampled_from(["warming", "ready", "draining"]),
        kept=NAMES,
        order=st.integers(0, 2**60),
        repeatable=NAMES,
    ),
    st.builds(RolesRecord, wanted=st.integers(0, 9), serving=NAMES, drained=NAMES),
    st.builds(OrderRecord, serial=st.integers(0, 2**60), follow=NAME, generation=NAME),
)
def test_records_come_back(replica: ReplicaRecord, roles: RolesRecord, order: OrderRecord) -> None:
    assert decode_replica(REPLICAS + replica.name, encode(replica)) == replica
    assert decode_roles(encode(roles)) == roles
    assert decode_order(encode(order)) == order


@given(st.binary(max_size=40))
def test_bytes_are_a_record_or_an_error_of_ours(data: bytes) -> None:
    for decode in (lambda: decode_replica("replicas/a", data), lambda: decode_roles(data)):
        try:
            decode()
        except CkptError as error:
            assert isinstance(error, IntegrityError)
            assert "key=ro" in str(error) or "key=replicas/a" in str(error)


def test_record_under_another_name_is_refused() -> None:
    other = encode(ReplicaRecord(name="b", address="127.0.0.1:1"))
    with pytest.raises(IntegrityError, match="key=replicas/a name='b'"):
        decode_replica("replicas/a", other)


@given(st.integers(0, 10**9), st.integers(0, 10**12))
def test_generation_has_a_name(epoch: int, step: int) -> None:
    assert parse_generation(generation_name(SnapshotId(epoch, step))) == SnapshotId(epoch, step)


@pytest.mark.parametrize("text", ["", "-", "1", "1-", "-1", "1-x", "1-2-3", "-", "１-2", " 1-2"])
def test_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="EPOCH-STEP"):
        parse_generation(text)
    replica = ReplicaRecord(name="a", address="", generation=text, kept=(text, "1-2"))
    assert replica.served is None
    assert replica.in_memory == (SnapshotId(1, 2),)


def test_role_of_a_replica() -> None:
    records = {
        name: ReplicaRecord(name=name, address="", state=state)
        for name, state in {"a": "ready", "b": "draining", "c": "ready", "d": "warming"}.items()
    }
    view = GroupView(1, records, RolesRecord(wanted=2, serving=("a", "b", "d", "gone")))
    assert [view.role(name) for name in "abcd"] == ["serving", "draining", "standby", "serving"]
    assert [replica.name for replica in view.serving] == ["a"]
