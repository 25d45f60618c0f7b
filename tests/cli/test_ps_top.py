"""``ckpt ps`` and ``ckpt top`` against a stand-in keeper on a real socket."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit.keepers.standin import (
    RECOVERY,
    STORE,
    StandIn,
    dead_folder,
    folder_of,
    job_report,
    rank_report,
)
from msgspec.structs import replace as changed

from ckpt.cli import jobs
from ckpt.cli.commands import top
from ckpt.ipc.messages import KeeperReport
from ckpt.ipc.runtime_dir import JobFolder, runtime_root


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "runtime"))
    return runtime_root()


@pytest.fixture
def keeper() -> Iterator[Callable[..., StandIn]]:
    """Start a stand-in keeper in a job's folder; ends it afterwards."""
    with ExitStack() as stack:

        def start(folder: JobFolder, *reports: KeeperReport | None, **options: object) -> StandIn:
            made = StandIn(folder, *reports, **options)
            stack.callback(made.close)
            return made

        yield start


# ---- ps


def test_ps_without_any_job_says_so(ckpt) -> None:
    done = ckpt("ps")
    assert (done.code, done.out) == (0, "no jobs\n")
    assert ckpt("ps", "--json").json == {"jobs": [], "silent": [], "dead": []}


def test_ps_shows_job_ranks_processes_and_slots(ckpt, keeper) -> None:
    one = keeper(folder_of(), job_report())
    done = ckpt("ps")
    assert (done.code, done.err) == (0, "")
    for text in (
        "job       demo",
        f"store     {STORE}",
        f"keeper    pid {os.getpid()}, up 1 min 15 s, 40.0 MiB",
        "state     running, attempt 2, epoch 5",
        "complete  5:119",
        "durable   5:100 (best), committed 2023-11-14 22:13:20Z",
        "uploads   1 in flight, 2 slots held",
        "slots     6.0 MiB",
        "behind    s3://b/run lacks 7 objects that other stores have",
    ):
        assert text in done.out.splitlines()
    [head, first, second] = [line.split() for line in done.out.splitlines()[-3:]]
    assert head == [
        "RANK",
        "SUPERVISOR",
        "TRAINER",
        "STEP",
        "PHASE",
        "IDLE",
        "STAGED",
        "SKIPPED",
        "SLOTS",
    ]
    assert first == [
        "0",
        "4000",
        "5000",
        "120",
        "training",
        "250",
        "ms",
        "12",
        "1",
        "5:119*",
        "5:120",
        "-",
    ]
    assert second[:3] == ["1", "4001", "5001"]
    assert one.roles == ["tool"]


def test_ps_json_has_all_of_the_report(ckpt, keeper) -> None:
    keeper(folder_of(), job_report())
    [job] = ckpt("ps", "--json").json["jobs"]
    ranks = job.pop("ranks")
    assert job == {
        "job": "demo",
        "store": STORE,
        "pid": os.getpid(),
        "launch": "l1",
        "state": "running",
        "since_s": 75.0,
        "attempt": 2,
        "epoch": 5,
        "complete": {"epoch": 5, "step": 119},
        "durable": {
            "epoch": 5,
            "step": 100,
            "size_bytes": 900,
            "new_bytes": 90,
            "created_unix_s": 1.7e9,
            "tags": ["best"],
        },
        "uploads": 1,
        "slot_bytes": 6 << 20,
        "rss_bytes": 40 << 20,
        "recoveries": [RECOVERY],
        "mirror_bytes": 12345,
        "refused": {"mac": 3, "line": 1},
        "behind": [{"store": "s3://b/run", "objects": 7, "more": False}],
    }
    assert len(ranks) == 2
    slots = ranks[1].pop("slots")
    assert ranks[1] == {
        "rank": 1,
        "supervisor_pid": 4001,
        "trainer_pid": 5001,
        "completed": 120,
        "phase": "training",
        "idle_s": 0.25,
        "staged": 12,
        "skipped": 1,
    }
    assert slots[0] == {
        "index": 0,
        "size_bytes": 1 << 20,
        "snapshot": {"epoch": 5, "step": 119},
        "held": True,
    }
    assert slots[2] == {"index": 2, "size_bytes": 1 << 20, "snapshot": None, "held": False}


def test_ps_shows_what_is_not_there_yet_as_a_dash_or_null(ckpt, keeper) -> None:
    lone = changed(rank_report(0, completed=-1), supervisor_pid=0, slots=())
    keeper(folder_of(), changed(job_report(), epoch=0, complete=None, durable=None, ranks=(lone,)))
    out = ckpt("ps").out
    assert "complete  -" in out
    assert "durable   -" in out
    assert "epoch" not in out
    assert out.splitlines()[-1].split() == [
        "0",
        "-",
        "5000",
        "-",
        "training",
        "250",
        "ms",
        "12",
        "1",
        "-",
    ]
    [job] = ckpt("ps", "--json").json["jobs"]
    assert (job["complete"], job["durable"]) == (None, None)
    assert (job["ranks"][0]["supervisor_pid"], job["ranks"][0]["completed"]) == (None, None)


def test_ps_lists_jobs_by_name(ckpt, keeper) -> None:
    for job in ("zebra", "ant", "mole"):
        keeper(folder_of(job), job_report(job))
    assert [job["job"] for job in ckpt("ps", "--json").json["jobs"]] == ["ant", "mole", "zebra"]
    assert [line for line in ckpt("ps").out.splitlines() if line.startswith("job ")] == [
        "job       ant",
        "job       mole",
        "job       zebra",
    ]


def test_ps_names_the_folder_of_a_dead_keeper_and_leaves_it(ckpt) -> None:
    folder = dead_folder("gone")
    before = sorted(folder.path.iterdir())
    document = ckpt("ps", "--json").json
    assert document["dead"] == [
        {"job": "gone", "store": STORE, "pid": os.getpid(), "folder": str(folder.path)}
    ]
    done = ckpt("ps")
    assert done.code == 0
    assert done.out.splitlines()[0] == "folders of dead keepers:"
    assert str(folder.path) in done.out
    assert sorted(folder.path.iterdir()) == before


def test_ps_passes_over_a_folder_whose_first_keeper_has_not_begun(ckpt) -> None:
    with folder_of().in_use():
        assert ckpt("ps").out == "no jobs\n"


@pytest.mark.slow
def test_ps_with_a_keeper_that_does_not_answer_exits_11_and_shows_the_others(
    ckpt, keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "ANSWER_S_MAX", 2.0)  # the other has to answer within it
    keeper(folder_of("hangs"), job_report("hangs"), mute=True)
    keeper(folder_of("well"), job_report("well"))
    done = ckpt("ps", "--json")
    assert done.code == 11
    assert [job["job"] for job in done.json["jobs"]] == ["well"]
    [silent] = done.json["silent"]
    assert (silent["job"], silent["pid"]) == ("hangs", os.getpid())
    assert "time limit" in silent["problem"]
    assert "keepers that do not answer:" in ckpt("ps").out


@pytest.mark.parametrize(
    ("options", "reports", "word"), [({"refuses": True}, (), "version"), ({}, (None,), "no ranks")]
)
def test_ps_says_why_a_keeper_tells_nothing(
    ckpt, keeper, options: dict, reports: tuple, word: str
) -> None:
    keeper(folder_of(), *reports, **options)
    done = ckpt("ps", "--json")
    assert done.code == 11
    assert word in done.json["silent"][0]["problem"]


def test_ps_shows_a_keeper_that_does_not_listen_yet_as_silent(ckpt) -> None:
    lock = folder_of().try_lock()
    assert lock is not None
    done = ckpt("ps", "--json")
    os.close(lock)
    assert done.code == 11
    assert done.json["silent"][0]["job"] == ""


def test_ps_in_a_runtime_folder_that_others_can_enter_exits_2(ckpt, runtime: Path) -> None:
    runtime.chmod(0o755)
    assert ckpt("ps").code == 2
    assert ckpt("ps", "--json").error["code"] == "usage"


def test_ps_and_top_import_no_torch(keeper) -> None:
    keeper(folder_of(), job_report())
    code = """
import sys
from ckpt.cli.main import run
assert run(["ps"]) == 0
assert run(["top", "--once", "--interval", "0.01"]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


# ---- top


def test_top_once_shows_pace_slots_and_recoveries(ckpt, keeper) -> None:
    keeper(folder_of(), job_report(completed=120), job_report(completed=124))
    done = ckpt("top", "demo", "--once", "--interval", "0.02")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["state", "running,", "attempt", "2,", "epoch", "5"] in lines
    [rank] = [line for line in lines if line[:2] == ["0", "5000"]]
    assert rank[2] == "124"
    assert 0 < float(rank[3]) <= 4 / 0.02
    assert rank[4:] == ["250", "ms", "training", "12", "1", "1", "5:119*", "5:120", "-"]
    text = "2        rank 1 died of SIGKILL  512 ms  118   2       detect 2 ms, kill 12 ms, restore 300 ms"
    assert text.split() in lines


def test_top_json_is_ps_job_with_paces(ckpt, keeper) -> None:
    keeper(folder_of(), job_report(completed=120), job_report(completed=124))
    document = ckpt("--json", "top", "--once", "--interval", "0.02").json
    paces = [rank.pop("steps_per_s") for rank in document["ranks"]]
    assert document == ckpt("ps", "--json").json["jobs"][0] | {"ranks": document["ranks"]}
    assert [rank["completed"] for rank in document["ranks"]] == [124, 124]
    assert all(0 < pace <= 4 / 0.02 for pace in paces)


def test_top_in_a_pipe_prints_views_until_the_job_is_over(ckpt, keeper) -> None:
    folder = folder_of()
    reports = [job_report(completed=done) for done in (1, 2, 3)]
    keeper(folder, *reports, answers_max=3, on_end=lambda: shutil.rmtree(folder.path))
    done = ckpt("top", "--interval", "0.01", "--json")
    assert done.code == 0
    documents = [json.loads(line) for line in done.out.splitlines()]
    assert [one["ranks"][0]["completed"] for one in documents] == [1, 2, 3]
    assert documents[0]["ranks"][0]["steps_per_s"] is None
    assert documents[2]["ranks"][0]["steps_per_s"] > 0


def test_top_goes_on_with_the_next_keeper(ckpt, keeper) -> None:
    folder = folder_of()

    def follow() -> None:
        keeper(
            folder,
            job_report(completed=0, attempt=3),
            answers_max=1,
            on_end=lambda: shutil.rmtree(folder.path),
        )

    keeper(folder, job_report(completed=50), answers_max=2, on_end=follow)
    done = ckpt("top", "--interval", "0.01", "--json")
    assert done.code == 0
    documents = [json.loads(line) for line in done.out.splitlines()]
    assert [one["attempt"] for one in documents] == [2, 2, 3]
    assert documents[-1]["ranks"][0]["steps_per_s"] is None


@pytest.mark.slow
def test_top_exits_11_when_the_keeper_died_and_no_other_comes(
    ckpt, keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "LOST_S_MAX", 2.0)
    keeper(folder_of(), job_report(), answers_max=2)
    done = ckpt("top", "--interval", "0.01")
    assert done.code == 11
    assert done.out.count("job       demo") == 2
    assert done.err.startswith("error: no keeper listens")


def test_top_of_a_job_that_does_not_run_exits_10(ckpt, keeper) -> None:
    assert ckpt("top").code == 10
    dead_folder("gone")
    keeper(folder_of(), job_report())
    for name in ("gone", "other"):
        done = ckpt("top", name, "--once")
        assert done.code == 10
        assert "ckpt ps" in done.err


def test_top_of_several_jobs_wants_a_folder(ckpt, keeper) -> None:
    first, second = folder_of(), folder_of(store="file:///runs/b")
    keeper(first, job_report())
    keeper(second, changed(job_report(), store="file:///runs/b"))
    for arguments in ((), ("demo",)):
        done = ckpt("top", *arguments, "--once")
        assert done.code == 2
        assert first.path.name in done.err
        assert second.path.name in done.err
    done = ckpt("top", second.path.name, "--once", "--interval", "0.01", "--json")
    assert done.json["store"] == "file:///runs/b"


@pytest.mark.slow
def test_top_on_a_terminal_redraws_and_ends_at_ctrl_c(keeper) -> None:
    keeper(folder_of(), job_report())
    ours, theirs = os.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    program = [sys.executable, "-m", "ckpt", "top", "--interval", "0.01"]
    with subprocess.Popen(program, stdout=theirs, stderr=subprocess.PIPE, env=env) as child:
        try:
            os.close(theirs)
            shown = b""
            while shown.count(b"job       demo") < 3:
                shown += os.read(ours, 65536)
            child.send_signal(signal.SIGINT)
            drain(ours)
            assert child.wait(10) == 130
            assert child.stderr is not None
            assert child.stderr.read() == b""
        finally:
            child.kill()
    assert b"\x1b[1A" in shown  # the cursor goes up over the view before


def drain(terminal: int) -> None:
    """Read until the other side hangs up: its last view must not block it."""
    try:
        while os.read(terminal, 65536):
            continue
    except OSError:  # EIO: Linux's end of a terminal
        pass
    os.close(terminal)


@pytest.mark.parametrize("label", ["| `ps` | ", "| | *job*: ", "| | *rank*: "])
def test_page_names_the_members_of_the_json(ckpt, keeper, label: str) -> None:
    keeper(folder_of(), job_report())
    document = ckpt("ps", "--json").json
    [job] = document["jobs"]
    found = {"| `ps` | ": document, "| | *job*: ": job, "| | *rank*: ": job["ranks"][0]}[label]
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    text = page.partition(f"{label}`{{")[2].partition("`")[0]
    while (shorter := re.sub(r"\{[^{}]*\}", "", text)) != text:
        text = shorter
    assert sorted(re.findall(r'"(\w+)"', text)) == sorted(found)
