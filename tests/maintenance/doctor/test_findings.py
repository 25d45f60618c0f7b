"""What findings mean: over all single findings, and over all mixtures of a few stores."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.maintenance.doctor.findings import (
    Assessment,
    Latency,
    StoreContent,
    StoreFindings,
    assess,
    writable,
)

EMPTY = StoreContent(kind="empty")
A = StoreContent(
    kind="store",
    job="a",
    store_id="1" * 32,
    log_id="1" * 32,
    snapshots=3,
    newest="epoch 1 step 30",
    next_seq=9,
)

WELL = StoreFindings(
    url="s",
    create_only=True,
    read_back_right=True,
    list_after_put=True,
    list_after_delete=True,
    other_client=True,
    skew_s=0.1,
    skew_unsure_s=1.0,
    up_bytes_per_s=1e9,
    down_bytes_per_s=1e9,
    free_bytes=1 << 40,
    latency={"put": Latency(0.01, 0.02, 20)},
    content=EMPTY,
)
AWAY = StoreFindings(url="s", failures={"reach": "no route"})
DENIED = replace(WELL, failures={"put": "denied"}, create_only=False)


def codes(judged: Assessment, level: str | None = None) -> set[str]:
    return {one.code for one in judged.advice if level in (None, one.level)}


def member(number: int, **changes: object) -> StoreFindings:
    return replace(WELL, content=replace(A, store_id=str(number) * 32, **changes))  # type: ignore[arg-type]


def test_a_well_store_is_well_and_one_alone_is_noted() -> None:
    judged = assess([WELL])
    assert (judged.ok, judged.exit_code, judged.write_quorum, judged.answers_min) == (True, 0, 1, 1)
    assert codes(judged) == {"creates-once", "empty", "one-store"}


@pytest.mark.parametrize(
    ("change", "code", "level", "exit_code"),
    [
        ({"failures": {"put": "x"}}, "denied", "bad", 11),
        ({"failures": {"read": "x"}}, "denied", "bad", 11),
        ({"failures": {"list": "x"}}, "denied", "bad", 11),
        ({"failures": {"delete": "x"}}, "no-delete", "warning", 0),
        ({"read_back_right": False}, "read-back-wrong", "bad", 20),
        ({"list_after_put": False}, "stale-lists", "bad", 2),
        ({"list_after_delete": False}, "stale-lists", "bad", 2),
        ({"other_client": False}, "stale-lists", "bad", 2),
        ({"skew_s": 4000.0}, "clock-skew", "warning", 0),
        ({"skew_s": -4000.0}, "clock-skew", "warning", 0),
        ({"latency": {"put": Latency(3.0, 4.0, 20)}}, "slow-operations", "warning", 0),
        ({"up_bytes_per_s": 1e6}, "slow-up", "note", 0),
        ({"down_bytes_per_s": 1e6}, "slow-down", "note", 0),
        ({"free_bytes": 1 << 20}, "little-space", "warning", 0),
        ({"leftovers": ("probe/x",)}, "leftovers", "note", 0),
        ({"create_only": False}, "replica-only", "warning", 2),
        ({"content": StoreContent(kind="foreign")}, "foreign", "note", 0),
        ({"content": StoreContent(kind="unknown", problem="x")}, "unknown-content", "warning", 0),
        ({"content": StoreContent(kind="headless", problem="x")}, "headless", "bad", 20),
        ({"content": replace(A, hole="seq=3")}, "log-hole", "bad", 20),
        ({"content": A}, "store", "ok", 0),
    ],
)
def test_one_finding_gives_its_advice_with_a_remedy_and_an_exit_code(
    change: dict[str, object], code: str, level: str, exit_code: int
) -> None:
    judged = assess([replace(WELL, **change)])  # type: ignore[arg-type]
    [found] = [one for one in judged.advice if one.code == code]
    assert found.level == level
    assert found.store == 0
    assert found.remedy or level == "ok"
    assert judged.exit_code == exit_code


def test_store_that_is_away_is_said_once_and_nothing_else_of_it() -> None:
    judged = assess([AWAY])
    assert codes(judged) == {"unreachable"}
    assert judged.exit_code == 11
    assert not writable(AWAY)


def test_clock_that_may_be_right_within_what_is_known_is_not_blamed() -> None:
    assert "clock-skew" not in codes(assess([replace(WELL, skew_s=3700.0, skew_unsure_s=200.0)]))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_quorum_is_judged_for_every_mixture_of_stores(count: int) -> None:
    kinds = {
        "well": WELL,
        "away": AWAY,
        "denied": DENIED,
        "replica": replace(WELL, create_only=False),
    }
    for names in product(kinds, repeat=count):
        judged = assess([kinds[name] for name in names])
        good = sum(name in ("well", "replica") for name in names)
        quorum = count // 2 + 1
        assert (judged.write_quorum, judged.answers_min) == (quorum, count - quorum + 1)
        assert ("no-quorum" in codes(judged)) == (good < quorum)
        assert ("one-machine" in codes(judged)) == (good >= quorum > names.count("well"))
        assert judged.ok == (set(names) <= {"well", "replica"})
        levels = [["bad", "warning", "note", "ok"].index(one.level) for one in judged.advice]
        assert levels == sorted(levels)


@pytest.mark.parametrize(("count", "quorum"), [(3, 1), (3, 4), (4, 2), (2, 1), (1, 2)])
def test_quorum_that_is_no_majority_is_refused(count: int, quorum: int) -> None:
    judged = assess([WELL] * count, quorum)
    assert judged.exit_code == 2
    assert "quorum" in codes(judged, "bad")


def test_two_names_of_one_place_count_once() -> None:
    stores = [replace(WELL, same_as=(1,)), replace(WELL, same_as=(0,)), AWAY]
    judged = assess(stores)
    assert [one.code for one in judged.advice if one.level == "bad"] == [
        "no-quorum",
        "same-place",
        "unreachable",
    ]
    assert judged.exit_code == 2
    assert assess([*stores[:2], WELL]).exit_code == 2
    assert "no-quorum" not in codes(assess([*stores[:2], WELL]))


def test_stores_of_two_jobs_two_logs_or_one_id_are_refused() -> None:
    assert codes(assess([member(1), member(2, job="b")]), "bad") == {"other-job"}
    assert codes(assess([member(1), member(2, log_id="9" * 32)]), "bad") == {"other-log"}
    assert codes(assess([member(1), member(1)]), "bad") == {"copied-store"}
    assert assess([member(1), member(2)]).ok


def test_what_the_log_says_of_its_stores_is_compared_with_those_named() -> None:
    ids = tuple(str(number) * 32 for number in (1, 2, 3))
    named = [member(number, members=ids) for number in (1, 2, 3)]
    assert codes(assess(named)) & {"behind", "no-member", "members-missing"} == set()
    assert "members-missing" in codes(assess(named[:2]), "note")
    assert "no-member" in codes(assess([*named, member(4, members=ids)]), "note")
    assert "behind" in codes(assess([*named[:2], member(3, members=ids, next_seq=4)]), "warning")


anything = st.builds(
    StoreFindings,
    url=st.just("s"),
    failures=st.dictionaries(
        st.sampled_from(("reach", "put", "read", "list", "delete", "create")), st.just("x")
    ),
    create_only=st.sampled_from((None, True, False)),
    read_back_right=st.sampled_from((None, True, False)),
    list_after_put=st.sampled_from((None, True, False)),
    skew_s=st.one_of(st.none(), st.floats(-1e6, 1e6)),
    free_bytes=st.one_of(st.none(), st.integers(0, 1 << 50)),
    content=st.sampled_from(
        (EMPTY, A, replace(A, job="b"), StoreContent(kind="headless"), StoreContent(kind="unknown"))
    ),
)


@given(st.lists(anything, min_size=1, max_size=5))
def test_any_findings_get_advice_whose_gravest_word_and_exit_code_agree(
    findings: list[StoreFindings],
) -> None:
    judged = assess(findings)
    bad = codes(judged, "bad")
    assert judged.ok == (not bad) == (judged.exit_code == 0)
    assert judged.exit_code in (0, 2, 11, 20)
    assert (judged.exit_code == 20) == bool(bad & {"log-hole", "headless", "read-back-wrong"})
    assert all(one.remedy for one in judged.advice if one.level == "bad")
    assert all(one.store is None or 0 <= one.store < len(findings) for one in judged.advice)
