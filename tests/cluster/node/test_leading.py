"""What an epoch carries besides places, and which lines a node keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.cluster.membership.decide import NewEpoch, WaitForNodes
from ckpt.cluster.membership.records import (
    EpochRecord,
    Leader,
    Member,
    NodeInfo,
    NodePlacement,
    View,
    ViewScope,
)
from ckpt.cluster.mesh.messages import NodeEnded
from ckpt.cluster.node.leading import (
    FLOOR_CAPABILITY,
    FULL_MESH_NODES_MAX,
    LINE_CAPABILITY,
    NOTE_CHARS_MAX,
    OVER_WAIT_S,
    STOPPED_STATUS,
    EpochNote,
    EpochProblems,
    EpochReports,
    FailureDecision,
    NodeReports,
    assess,
    decode_note,
    encode_note,
    line_of,
    mesh_topology,
    next_epoch,
)
from ckpt.errors import IntegrityError

notes = st.builds(
    EpochNote,
    why=st.text(max_size=200),
    fingerprint=st.text(max_size=50),
    step=st.integers(-1, 10**9),
    same=st.integers(0, 99),
    stuck=st.integers(0, 99),
    completed=st.integers(-1, 10**9),
    end=st.none() | st.integers(0, 255),
    era=st.integers(0, 10**6),
    line=st.text(max_size=64),
)


@given(notes)
def test_note_comes_back_as_it_was(note: EpochNote) -> None:
    assert decode_note(encode_note(note)) == note


def test_reason_that_is_too_long_is_cut() -> None:
    text = encode_note(EpochNote(why="x" * 10_000, era=7))
    assert len(text) <= NOTE_CHARS_MAX
    assert decode_note(text).era == 7


def test_no_text_is_an_empty_note_and_noise_is_none() -> None:
    assert decode_note("") == EpochNote()
    for noise in ("{", "[]", '{"era":"x"}', "\x00"):
        with pytest.raises(IntegrityError):
            decode_note(noise)


def view(count: int, *, leader: int = 0, root: int = 1) -> View:
    names = [f"n{number:03d}" for number in range(count)]
    members = tuple(
        Member(NodeInfo(node=name, host="h", slots=1, address=f"10.0.0.1:{number}"), number + 1, 1)
        for number, name in enumerate(names)
    )
    order = [names[root], *(name for name in names if name != names[root])]
    epoch = EpochRecord(
        job="j",
        number=1,
        places=tuple(NodePlacement(name, 1) for name in order),
        leader=names[leader],
        nodes_min=1,
        nodes_max=count,
    )
    return View(
        job="j",
        revision=1,
        scope=ViewScope.ALL,
        leader=Leader(names[leader], 1),
        epoch=epoch,
        epoch_revision=1,
        members=members,
    )


def test_line_of_epochs_goes_on_from_the_epoch_or_from_who_has_seen_most() -> None:
    def member(node: str, *, seen: int, line: str) -> Member:
        said = (f"{FLOOR_CAPABILITY}{seen}", f"{LINE_CAPABILITY}{line}")
        return Member(NodeInfo(node=node, host="h", slots=1, capabilities=said), 1, 1)

    members = (member("a", seen=0, line=""), member("b", seen=7, line="old"))
    one = replace(view(3), members=members)
    assert line_of(one) == "old", "an epoch that named none: the membership lost its data"
    assert one.epoch is not None
    named = replace(one.epoch, note=encode_note(EpochNote(line="kept")))
    assert line_of(replace(one, epoch=named)) == "kept"
    assert line_of(replace(one, epoch=None, members=members[:1])) == ""
    new = NewEpoch(replace(one.epoch, number=2, leader="a"), (), "first")
    none = EpochProblems(EpochReports({}, {}, frozenset()), {})
    begun = next_epoch(replace(one, epoch=None, members=members[:1]), new, FailureDecision(), none)
    assert begun is not None and begun.note.line == "a", "named by who publishes the first"


def test_epoch_that_places_a_node_whose_ranks_had_ended_ends_the_job() -> None:
    def judged(reports: NodeReports, at_s: float) -> FailureDecision:
        problems = EpochProblems(reports.for_epoch(record), {})
        return assess(one, problems, lambda *_: FailureDecision(), at_s)

    one = view(2, root=0)
    record = replace(one.epoch, number=5)
    one = replace(one, epoch=record)
    reports = NodeReports()
    reports.add("n000", NodeEnded(attempt=4), 10.0)
    reports.forget(one)
    waits = judged(reports, 10.5)
    assert (waits.note, waits.until_s) == (None, 10.0 + OVER_WAIT_S)
    ends = judged(reports, 10.0 + OVER_WAIT_S)
    assert ends.note is not None and ends.note.end == 1
    assert "n000" in ends.note.why
    reports.add("n001", NodeEnded(attempt=4), 10.6)
    all_ended = judged(reports, 10.7).note
    assert all_ended is not None and all_ended.end == 0, "only its word came late"


def test_job_that_can_not_go_on_without_the_node_that_was_asked_to_go_ends() -> None:
    one = view(2, root=0)
    problems = EpochProblems(EpochReports({}, {}, frozenset()), {"n001": 1.0})
    stopped = FailureDecision(EpochNote(why="stopped"), stopped=True)
    lost = FailureDecision(EpochNote(why="lost"))
    for_ever = WaitForNodes(math.inf, "too few nodes left")
    ends = next_epoch(one, for_ever, stopped, problems)
    assert ends is not None and ends.note.end == STOPPED_STATUS
    assert next_epoch(one, for_ever, lost, problems) is None, "a lost node may come back"
    shrinks = WaitForNodes(50.0, "it may come back before the world shrinks")
    assert next_epoch(one, shrinks, stopped, problems) is None


def test_few_nodes_all_know_each_other() -> None:
    found = mesh_topology(view(5), "n003")
    assert found.keys() == {"n000", "n001", "n002", "n004"}
    assert found["n002"] == "10.0.0.1:2"


def test_of_many_nodes_only_leader_and_root_know_all_and_each_has_two_neighbours() -> None:
    many = view(FULL_MESH_NODES_MAX + 20)
    assert (
        len(mesh_topology(many, "n000"))
        == len(mesh_topology(many, "n001"))
        == FULL_MESH_NODES_MAX + 19
    )
    assert mesh_topology(many, "n040").keys() == {"n000", "n001", "n039", "n041"}
    assert mesh_topology(many, f"n{FULL_MESH_NODES_MAX + 19:03d}").keys() == {
        "n000",
        "n001",
        f"n{FULL_MESH_NODES_MAX + 18:03d}",
    }


def test_every_node_is_seen_by_two_others_at_least() -> None:
    many = view(FULL_MESH_NODES_MAX + 20)
    reached: dict[str, set[str]] = {}
    for member in many.members:
        for node in mesh_topology(many, member.node):
            reached.setdefault(node, set()).add(member.node)
            reached.setdefault(member.node, set()).add(node)
    assert all(len(seen) >= 2 for seen in reached.values())
