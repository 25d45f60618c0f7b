"""Roles change only where they must, whoever decides; an operator's commands do what they say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import ConflictError, NotFoundError, UsageError
from ckpt.serve.group.decide import (
    decide_roles,
    drained,
    follow_order,
    newest_served,
    promoted,
    rollback_order,
    scaled,
    stay_order,
)
from ckpt.serve.group.records import GroupView, OrderRecord, ReplicaRecord, RolesRecord
from ckpt.values import SnapshotId

NAMES = ["a", "b", "c", "d", "e", "f"]


def replica(
    name: str, state: str = "ready", generation: str = "1-10", kept: tuple[str, ...] = ()
) -> ReplicaRecord:
    return ReplicaRecord(
        name=name,
        address="127.0.0.1:1",
        state=state,  # type: ignore[arg-type]
        generation=generation,
        kept=kept or (generation,),
    )


def view(
    *replicas: ReplicaRecord,
    serving: str = "",
    wanted: int = 3,
    drained: str = "",
    order: OrderRecord | None = None,
) -> GroupView:
    return GroupView(
        1,
        replicas={one.name: one for one in replicas},
        roles=RolesRecord(wanted=wanted, serving=tuple(serving), drained=tuple(drained)),
        roles_revision=1,
        order=order,
    )


def serving(roles: RolesRecord | None) -> str:
    assert roles is not None, "roles were to change"
    return "".join(roles.serving)


# ---- who serves

REPLICAS = st.lists(
    st.builds(
        replica,
        st.sampled_from(NAMES),
        st.sampled_from(["warming", "ready", "draining"]),
        st.sampled_from(["", "x", "1-9", "1-10", "2-3"]),
    ),
    unique_by=lambda record: record.name,
)
SOME = st.lists(st.sampled_from(NAMES), unique=True)
VIEWS = st.builds(
    lambda replicas, serving, wanted, drained: view(
        *replicas, serving="".join(serving), wanted=wanted, drained="".join(drained)
    ),
    REPLICAS,
    SOME,
    st.integers(1, 4),
    SOME,
)


@given(VIEWS, SOME)
def test_places_are_filled_and_nobody_who_can_serve_is_moved(
    seen: GroupView, suspects: list[str]
) -> None:
    before = seen.roles
    assert before is not None
    roles = decide_roles(seen, wanted=9, suspects=suspects) or before
    able = {
        name
        for name, record in seen.replicas.items()
        if record.state == "ready" and name not in before.drained
    }
    good = able - set(suspects)
    placed = set(roles.serving)
    assert len(placed) == len(roles.serving) == min(before.wanted, len(able))
    assert placed <= able
    assert len(placed & good) == min(before.wanted, len(good)), "those who answer come first"
    stays = [name for name in before.serving if name in good]
    kept = [name for name in roles.serving if name in stays]
    assert kept == stays[: before.wanted], "who serves and answers goes on, in its place"
    assert set(roles.drained) == set(before.drained) & set(seen.replicas)
    assert roles.wanted == before.wanted


@given(VIEWS, SOME, SOME)
def test_what_was_decided_is_decided_once(
    seen: GroupView, suspects: list[str], others: list[str]
) -> None:
    """A second process that saw the same changes nothing, nor does one that suspects nobody."""
    roles = decide_roles(seen, wanted=9, suspects=suspects)
    after = GroupView(2, seen.replicas, roles or seen.roles, 2)
    assert decide_roles(after, wanted=9, suspects=suspects) is None
    assert decide_roles(after, wanted=9) is None


def test_first_roles_are_those_that_were_configured() -> None:
    empty = decide_roles(GroupView(1), wanted=2)
    assert empty == RolesRecord(wanted=2)
    ready = {name: replica(name) for name in "cab"}
    assert serving(decide_roles(GroupView(1, replicas=ready), wanted=2)) == "ab"


def test_free_place_goes_to_the_standby_with_the_newest_generation() -> None:
    standbys = [replica("c", generation="1-9"), replica("d", generation="1-10")]
    seen = view(replica("a"), *standbys, replica("e", "warming"), serving="ab", wanted=2)
    assert serving(decide_roles(seen, wanted=2)) == "ad"


def test_suspect_gives_its_place_to_one_that_answers_and_keeps_it_if_none_does() -> None:
    seen = view(*map(replica, "abc"), serving="ab", wanted=2)
    assert serving(decide_roles(seen, wanted=2, suspects="a")) == "bc"
    assert decide_roles(seen, wanted=2, suspects="ac") is None


# ---- what an operator asks


def test_scaling_up_takes_standbys_and_scaling_down_the_last() -> None:
    seen = view(*map(replica, "abcd"), serving="ab", wanted=2)
    assert scaled(seen, 3) == RolesRecord(wanted=3, serving=("a", "b", "c"))
    assert scaled(seen, 1) == RolesRecord(wanted=1, serving=("a",))
    with pytest.raises(UsageError, match="at least one"):
        scaled(seen, 0)


def test_promotion_takes_the_place_of_the_last() -> None:
    seen = view(*map(replica, "abcd"), serving="ab", wanted=2)
    assert promoted(seen, "d").serving == ("a", "d")
    assert promoted(seen, "a").serving == ("a", "b"), "it serves already"
    free = view(*map(replica, "abcd"), serving="a", wanted=2)
    assert promoted(free, "d").serving == ("a", "d")


def test_promotion_needs_a_replica_that_is_ready() -> None:
    seen = view(replica("a"), replica("b", "warming"), serving="a")
    with pytest.raises(NotFoundError, match=r"replica=x replicas=\['a', 'b'\]"):
        promoted(seen, "x")
    with pytest.raises(ConflictError, match="state=warming"):
        promoted(seen, "b")


def test_drained_replica_is_replaced_at_once_and_serves_again_only_if_promoted() -> None:
    seen = view(*map(replica, "abc"), serving="ab", wanted=2)
    roles = drained(seen, "a")
    assert roles == RolesRecord(wanted=2, serving=("b", "c"), drained=("a",))
    after = GroupView(2, seen.replicas, roles, 2)
    assert decide_roles(after, wanted=2) is None
    assert drained(after, "a") == roles
    back = promoted(after, "a")
    assert back == RolesRecord(wanted=2, serving=("b", "a"))
    assert decide_roles(GroupView(3, seen.replicas, back, 3), wanted=2) is None


def test_last_that_serves_is_not_drained() -> None:
    with pytest.raises(ConflictError, match="nobody would serve"):
        drained(view(replica("a"), replica("b", "warming"), serving="a"), "a")


def test_orders_count_on_and_a_follow_ends_a_stay() -> None:
    first = follow_order(view(replica("a"), serving="a"), "tag:prod")
    assert first == OrderRecord(serial=1, follow="tag:prod")
    stay = stay_order(view(replica("a"), serving="a", order=first), "1-7")
    assert stay == OrderRecord(serial=2, follow="tag:prod", generation="1-7")
    after = view(replica("a"), serving="a", order=stay)
    assert stay_order(after, None).generation == "1-10", "the served one"
    assert follow_order(after, "latest") == OrderRecord(serial=3, follow="latest")
    with pytest.raises(UsageError, match="EPOCH-STEP"):
        stay_order(after, "yesterday")


def test_rollback_goes_to_what_all_that_serve_have_in_memory() -> None:
    seen = view(
        replica("a", generation="2-10", kept=("2-10", "1-9", "1-8")),
        replica("b", generation="1-9", kept=("1-9", "1-8", "?")),
        replica("c", generation="1-8", kept=("1-8",)),
        serving="ab",
    )
    assert newest_served(seen) == SnapshotId(2, 10)
    assert rollback_order(seen).generation == "1-9"
    everyone = msgspec.structs.replace(seen.roles, serving=("a", "b", "c"))
    assert rollback_order(GroupView(1, seen.replicas, everyone)).generation == "1-8"


def test_rollback_says_what_is_kept_if_nothing_is_common() -> None:
    seen = view(
        replica("a", kept=("1-10", "1-9")), replica("b", kept=("1-10", "1-8")), serving="ab"
    )
    with pytest.raises(NotFoundError, match=r"served=1-10 kept=\{'a': \['1-10', '1-9'\]"):
        rollback_order(seen)
    with pytest.raises(NotFoundError, match="no replica serves"):
        rollback_order(view(replica("a", generation=""), serving="a"))
