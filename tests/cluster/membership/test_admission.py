"""Who is a node of a job: scenes of nodes that differ, of nodes nobody has heard, and who leads
then."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import pytest
from kit.membership.views import view_of

from ckpt.cluster.membership.admission import (
    NO_LOG,
    PROOF_S,
    TELL_S,
    Admission,
    AdmissionVerdict,
    SharedFacts,
    awaited_nodes,
    facts_of,
    misfit,
    misfits,
    shared_facts,
    without_members,
)
from ckpt.cluster.membership.records import TEXT_CHARS_MAX, View, node_problem

SILENT_S = 12.0
OPTIONS = {"nodes": "2:2", "stores": 1}
SHARED = shared_facts(["/mnt/a"], log_id="1" * 32, options=OPTIONS)
FRESH = replace(SHARED, log_id=NO_LOG)
UNKNOWN = replace(SHARED, log_id="")
ELSEWHERE = shared_facts(["/mnt/b"], log_id="2" * 32, options=OPTIONS)


def saying(view: View, **said: SharedFacts) -> View:
    """The view, its members as they say these facts; others say nothing."""
    return replace(
        view,
        members=tuple(
            replace(
                member,
                info=replace(
                    member.info,
                    capabilities=said[member.node].capabilities() if member.node in said else (),
                ),
            )
            for member in view.members
        ),
    )


def looked(
    view: View,
    me: str,
    *,
    proved: Collection[str] = (),
    at_s: Collection[float] = (0.0,),
    ended: bool = False,
) -> AdmissionVerdict:
    """What a node makes of a view that does not change, at the last of these moments."""
    admission = Admission(silent_s=SILENT_S)
    for now_s in at_s:
        verdict = admission.look(
            view, me, proved=frozenset(proved), suspects=(), ended=ended, now_s=now_s
        )
    return verdict


# ---- what a node says


def test_facts_go_through_a_nodes_record_and_show_no_password() -> None:
    long = "/mnt/" + "x" * 400
    facts = shared_facts(["s3://key:word@bucket/run", long], log_id="", options={"nodes": "1:2"})
    view = saying(view_of("a"), a=facts)
    info = view.by_node["a"].info
    assert node_problem(info) is None
    assert all(len(text) <= TEXT_CHARS_MAX for text in info.capabilities)
    assert facts_of(info).shown_stores.startswith("s3://bucket/run, /mnt/xxx")
    assert "word" not in "".join(info.capabilities)


def test_addresses_are_compared_whole_and_in_any_order() -> None:
    long = "/mnt/" + "x" * 400
    one, same, other = (
        shared_facts(stores, log_id="", options=OPTIONS)
        for stores in ([long, "/b"], ["/b", long], [long + "y", "/b"])
    )
    view = saying(view_of("abc"), a=one, b=same, c=other)
    assert list(misfits(view)) == ["c"]


# ---- who fits


@pytest.mark.parametrize(
    ("older", "newer", "fits"),
    [
        (SHARED, SHARED, True),
        (FRESH, FRESH, True),
        (FRESH, SHARED, True),  # the log was made in between
        (SHARED, FRESH, False),  # it was there, and the newer one does not see it
        (SHARED, UNKNOWN, True),
        (UNKNOWN, SHARED, True),
        (SHARED, ELSEWHERE, False),
        (FRESH, replace(ELSEWHERE, log_id=NO_LOG), False),
        (UNKNOWN, replace(ELSEWHERE, log_id=""), False),
        (SHARED, replace(ELSEWHERE, log_id=SHARED.log_id), True),  # one log, under two names
        (SHARED, replace(SHARED, options="nodes=2:3 stores=1"), False),
        (replace(SHARED, capture_rule="every=5"), replace(SHARED, capture_rule="every=7"), False),
        (SHARED, replace(SHARED, capture_rule="every=5"), True),  # a release that says none
        (SHARED, SharedFacts(), True),  # a release that says nothing
    ],
)
def test_nodes_fit_by_their_log_else_by_their_addresses(
    older: SharedFacts, newer: SharedFacts, fits: bool
) -> None:
    view = saying(view_of("ab"), a=older, b=newer)
    assert (misfits(view) == {}) is fits
    if not fits:
        reason = misfits(view)["b"]
        assert "a=(" in reason and "b=(" in reason, "both sides are named"
        # Whoever is asked, the older one is the older one.
        assert misfit(view.by_node["b"], view.by_node["a"])


def test_ranks_decide_who_is_right_not_who_joined_first() -> None:
    view = saying(view_of("abc", places="bc"), a=ELSEWHERE, b=SHARED, c=SHARED)
    assert list(misfits(view)) == ["a"]
    assert list(misfits(view, ended=True)) == ["b", "c"]


def test_node_that_does_not_fit_is_not_placed_and_one_that_holds_ranks_stays() -> None:
    view = saying(view_of("abc", places="ab"), a=SHARED, b=SHARED, c=ELSEWHERE)
    assert [one.node for one in without_members(view, misfits(view)).members] == ["a", "b"]
    assert [one.node for one in without_members(view, {"b": "", "c": ""}).members] == ["a", "b"]


# ---- when a launch ends for it


def test_newcomer_that_does_not_fit_ends_and_the_running_job_does_not() -> None:
    view = saying(view_of("abc", places="ab"), a=SHARED, b=SHARED, c=ELSEWHERE)
    first = looked(view, "c", proved="ab")
    assert (first.refusal, first.look_s) == ("", TELL_S)
    assert "different" in looked(view, "c", proved="ab", at_s=(0.0, TELL_S)).refusal
    for member in "ab":
        verdict = looked(view, member, proved="abc", at_s=(0.0, TELL_S, 1e6))
        assert verdict.refusal == "" and list(verdict.excluded) == ["c"]


def test_before_any_rank_runs_all_nodes_end_because_nobody_knows_who_is_right() -> None:
    view = saying(view_of("ab"), a=SHARED, b=ELSEWHERE)
    for me, other in ("ab", "ba"):
        assert looked(view, me, proved=other, at_s=(0.0, TELL_S)).refusal


def test_member_that_was_never_heard_counts_once_it_cannot_be_one_that_is_gone() -> None:
    view = saying(view_of("ab"), a=ELSEWHERE, b=SHARED)
    assert not looked(view, "b", at_s=(0.0, SILENT_S - 0.1)).refusal
    assert looked(view, "b", at_s=(0.0, SILENT_S)).refusal


@pytest.mark.parametrize("me", ["a", "b"])
def test_all_nodes_end_though_the_other_one_was_quicker(me: str) -> None:
    other = "b" if me == "a" else "a"
    admission = Admission(silent_s=SILENT_S)
    both = saying(view_of("ab"), a=SHARED, b=ELSEWHERE)
    alone = saying(view_of(me), a=SHARED, b=ELSEWHERE)
    running = saying(view_of(me, places=me), a=SHARED, b=ELSEWHERE)
    scenes = ((both, 0.0, ""), (alone, 0.3, ""), (alone, TELL_S, "different stores"))
    for view, now_s, says in (*scenes, (running, TELL_S, "")):
        verdict = admission.look(
            view, me, proved=frozenset(other), suspects=(), ended=False, now_s=now_s
        )
        assert (says in verdict.refusal) if says else not verdict.refusal
        if view is alone and not says:
            assert verdict.look_s == TELL_S


def test_nodes_of_the_job_before_that_leave_at_its_end_do_not_end_the_next() -> None:
    admission = Admission(silent_s=SILENT_S)
    both = saying(view_of("ab", places="a"), a=ELSEWHERE, b=SHARED)
    alone = saying(view_of("b"), b=SHARED)
    for view, now_s in ((both, 0.0), (alone, 0.5), (alone, TELL_S), (alone, SILENT_S)):
        verdict = admission.look(
            view, "b", proved=frozenset("a"), suspects=(), ended=True, now_s=now_s
        )
        assert not verdict.refusal


def test_conflict_that_goes_away_is_forgotten() -> None:
    admission = Admission(silent_s=SILENT_S)
    both, alone = saying(view_of("ab"), a=ELSEWHERE, b=SHARED), saying(view_of("b"), b=SHARED)
    for view, now_s in ((both, 0.0), (alone, 5.0), (both, SILENT_S)):
        verdict = admission.look(
            view, "b", proved=frozenset(), suspects=(), ended=False, now_s=now_s
        )
    assert not verdict.refusal


# ---- only nodes that proved the secret count as places


def test_member_without_a_proof_is_waited_for_briefly_and_then_gets_no_ranks() -> None:
    view = view_of("abs", places="ab")
    early = looked(view, "a", proved="b")
    assert (early.pending, early.pending_until_s) == ({"s"}, PROOF_S)
    late = looked(view, "a", proved="b", at_s=(0.0, PROOF_S))
    assert (late.pending, late.pending_until_s) == (frozenset(), math.inf)
    assert list(late.excluded) == ["s"]
    assert not looked(view, "a", proved="bs").excluded


def test_strangers_that_take_turns_are_waited_for_once() -> None:
    admission = Admission(silent_s=SILENT_S)
    for turn in range(4):
        now_s = 3.0 * turn
        verdict = admission.look(
            view_of(["a", "b", f"s{turn}"], places="ab"),
            "a",
            proved=frozenset("b"),
            suspects=(),
            ended=False,
            now_s=now_s,
        )
        assert verdict.pending, "each is new when it comes"
        assert verdict.wait_until_s(0.0) == PROOF_S
    proved = looked(view_of("ab", places="ab"), "a", proved="b")
    assert proved.wait_until_s(0.0) == -math.inf


def test_node_that_holds_ranks_is_no_stranger_to_a_new_leader() -> None:
    assert not looked(view_of("abc", places="abc"), "a", at_s=(0.0, 1e6)).excluded


def test_stranger_that_came_first_gives_up_the_lead() -> None:
    view = view_of("abs", leader="s")
    assert looked(view, "s", at_s=(0.0, 1.0)).may_lead, "connections take a moment"
    assert not looked(view, "s", at_s=(0.0, PROOF_S)).may_lead
    assert looked(view, "a", proved="b", at_s=(0.0, PROOF_S)).may_lead


def test_stranger_does_not_take_the_lead() -> None:
    view = view_of("abs", leader=None)
    assert not looked(view, "s").may_lead
    assert looked(view, "a", proved="b").may_lead


def test_node_that_holds_ranks_may_lead_whoever_else_comes() -> None:
    view = view_of("as", places="a")
    assert looked(view, "a", at_s=(0.0, 1e6)).may_lead


def test_node_alone_leads() -> None:
    assert looked(view_of("a"), "a").may_lead
    admission = Admission(silent_s=SILENT_S)
    verdict = admission.look(
        view_of("as"), "a", proved=frozenset(), suspects=["s"], ended=False, now_s=0.0
    )
    assert verdict.may_lead, "the other one is known to be dead"


# ---- for whom a node waits


@pytest.mark.parametrize(
    ("view", "proved", "waits_for"),
    [
        (view_of("a"), "", "more nodes: 1 of 2 are here"),
        (view_of("as"), "", "more nodes: 1 of 2 are here; not connected: s"),
        (view_of("ab"), "b", "an epoch of 2 nodes"),
        (view_of("abs", places="ab"), "b", ""),
        (view_of("abc", places="bc"), "c", ""),  # it stands by
        (view_of("abc", places="bc"), "", "a connection to a node that trains: b, c"),
        (view_of("a", places="ab"), "", "a node in the place of b: 1 of 2 are here"),
        (view_of("ab", places="cd"), "b", "an epoch of 2 nodes"),
    ],
)
def test_whom_a_node_waits_for(view: View, proved: str, waits_for: str) -> None:
    said = awaited_nodes(view, "a", proved=frozenset(proved), nodes_min=2, ended=False)
    assert said == waits_for


def test_node_that_may_be_of_a_run_that_is_over_says_so_while_it_waits_for_more() -> None:
    how = {"proved": frozenset[str](), "nodes_min": 2, "ended": True, "last_end": "all ranks ended"}
    said = awaited_nodes(view_of("a"), "a", **how)  # type: ignore[arg-type]
    assert said.startswith("more nodes: 1 of 2 are here; the last run of this job ended")
    assert "(all ranks ended)" in said and "stop this node" in said
