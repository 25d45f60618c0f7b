"""``ckpt standby`` against a stand-in keeper on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.keepers.standin import STORE, StandIn, folder_of, job_report
from msgspec.structs import replace

from ckpt.ipc.messages import NodeReport
from ckpt.values import SnapshotId

NODES = (
    NodeReport(node="a-1", here=True, first_rank=0, ranks=2, mirrored=SnapshotId(5, 118)),
    NodeReport(node="b-2", here=False, first_rank=2, ranks=1, mirrored=SnapshotId(5, 118)),
    NodeReport(node="c-3", here=False, first_rank=-1, ranks=0, mirrored=SnapshotId(5, 110)),
    NodeReport(node="d-4", here=False, first_rank=-1, ranks=0, mirrored=None),
)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture
def keeper() -> Iterator[None]:
    made = StandIn(folder_of(), replace(job_report(completed=120), nodes=NODES))
    yield
    made.close()


def test_each_node_is_told_with_what_it_has_and_how_far_behind_it_is(ckpt, keeper) -> None:
    done = ckpt("standby")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["demo", f"({STORE}),", "attempt", "2"]
    assert lines[1:] == [
        ["NODE", "RANKS", "HAS", "BEHIND"],
        ["a-1", "(here)", "0-1", "5:118", "2"],
        ["b-2", "2", "5:118", "2"],
        ["c-3", "standby", "5:110", "10"],
        ["d-4", "standby", "-", "-"],
    ]


def test_json_has_the_same(ckpt, keeper) -> None:
    [job] = ckpt("standby", "--json").json["jobs"]
    assert (job["job"], job["store"], job["completed"]) == ("demo", STORE, 120)
    assert [(one["node"], one["standby"], one["behind"]) for one in job["nodes"]] == [
        ("a-1", False, 2),
        ("b-2", False, 2),
        ("c-3", True, 10),
        ("d-4", True, None),
    ]
    assert job["nodes"][2]["has"] == {"epoch": 5, "step": 110}


def test_where_there_is_no_job_or_one_of_one_node_it_says_so(ckpt) -> None:
    assert ckpt("standby").out == "no jobs of several nodes\n"
    one = StandIn(folder_of(), job_report())
    try:
        assert ckpt("standby").out == "no jobs of several nodes\n"
        assert ckpt("standby", "--json").json["jobs"][0]["nodes"] == []
    finally:
        one.close()


def test_a_keeper_that_does_not_answer_is_told_and_exits_11(ckpt) -> None:
    one = StandIn(folder_of(), None)
    try:
        done = ckpt("standby")
        assert done.code == 11 and "does not answer" in done.err
    finally:
        one.close()
