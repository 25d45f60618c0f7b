"""On how many stores an object must be, and of how many it must be missing: each count at its
edge."""

from __future__ import annotations

import pytest

from ckpt.backends.replicated.policy import Quorum, quorum_of, with_counting
from ckpt.errors import UsageError


@pytest.mark.parametrize(
    ("stores", "write", "absent"),
    [(1, 1, 1), (3, 2, 2), (3, 3, 1), (4, 3, 2), (5, 3, 3), (5, 4, 2)],
)
def test_so_many_places_acknowledge_and_so_many_prove_absence(
    stores: int, write: int, absent: int
) -> None:
    quorum = quorum_of(stores, write)
    for count in range(stores + 1):
        places = frozenset(range(stores - count, stores))
        assert quorum.is_write_quorum(places) is (count >= write)
        assert quorum.is_read_quorum(places) is (count >= absent)
        assert quorum.proves_absent(places) is (count >= absent)


def test_a_store_that_does_not_count_acknowledges_nothing_and_proves_nothing() -> None:
    quorum = with_counting(quorum_of(4, 3), [0, 1, 3])
    assert quorum == Quorum(4, 3, frozenset({0, 1, 3}))
    assert not quorum.is_write_quorum(frozenset({0, 1, 2})) and quorum.is_write_quorum(
        frozenset({0, 1, 3})
    )
    assert not quorum.is_read_quorum(frozenset({0, 2})) and quorum.is_read_quorum(frozenset({0, 3}))


@pytest.mark.parametrize(
    ("stores", "write", "says"),
    [
        (0, None, "needs stores"),
        (3, 0, "between 1 and the number of stores. write_quorum=0"),
        (3, -1, "between 1 and the number of stores. write_quorum=-1"),
        (3, 4, "between 1 and the number of stores. write_quorum=4"),
        (4, 2, "share no store. write_quorum=2 stores=4; use 3 or more"),
    ],
)
def test_a_write_quorum_that_cannot_be_is_refused_with_what_can(
    stores: int, write: int | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        quorum_of(stores, write)


def test_silent_places_count_for_what_they_take_and_not_for_what_they_lack() -> None:
    quorum = with_counting(quorum_of(3, 2), {0}, {1, 2})
    assert quorum.voters == {0, 1, 2}
    assert quorum.is_write_quorum({1, 2})
    assert not quorum.proves_absent({1, 2})
    assert not quorum.is_read_quorum({0, 1})
    assert with_counting(quorum, {0, 1}, {1}).silent == frozenset()
    with pytest.raises(UsageError, match="no store has this index"):
        with_counting(quorum, {0}, {3})
