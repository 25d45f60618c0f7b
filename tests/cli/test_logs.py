"""What keepers wrote can be read after they have ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from kit.jobs import wait_for

from ckpt.cli.main import cli
from ckpt.ipc import runtime_dir
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.runtime_dir import JobFolder, kept_logs


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtime and state folders of the test's own."""
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path / "state"))


def _job(text: str, *, job: str = "gpt", store: str = "/runs/gpt") -> JobFolder:
    folder = JobFolder(store, job)
    folder.path.mkdir(parents=True, mode=0o700, exist_ok=True)
    folder.write_info(store, job)
    folder.log_path.write_text(text)
    return folder


def _logs(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["logs", *arguments])


def test_log_outlives_an_orderly_end_and_a_dead_keepers_folder() -> None:
    _job("all went well\n").remove()
    assert not JobFolder("/runs/gpt", "gpt").path.exists()
    assert "all went well" in _logs("gpt").output
    assert _job("then it was killed").sweep()
    assert "then it was killed" in _logs("gpt").output
    assert len(kept_logs()) == 2


def test_running_keepers_log_comes_first_and_stores_name_a_job_too() -> None:
    _job("old").remove()
    folder = _job("new")
    assert _logs("/runs/gpt").output == "new\n"
    [running, kept] = json.loads(_logs("--json").output)["logs"]
    assert (running["ended_unix_s"], running["path"]) == (None, str(folder.log_path))
    assert kept["ended_unix_s"] > 0
    assert (kept["job"], kept["store"]) == ("gpt", "/runs/gpt")
    assert "STORE" in _logs().output


def test_no_log_of_a_job_is_told_with_those_that_there_are() -> None:
    assert _logs().output == "no logs\n"
    _job("x").remove()
    found = _logs("bert")
    assert found.exit_code != 0
    assert "known=['gpt']" in str(found.exception)


def test_few_logs_of_each_job_stay_and_only_the_end_of_each(monkeypatch) -> None:
    monkeypatch.setattr(runtime_dir, "LOG_BYTES_MAX", 10)
    for number in range(runtime_dir.LOGS_PER_JOB_MAX + 3):
        _job("." * 50 + str(number)).remove()
    _job("other", job="bert").remove()
    logs = kept_logs()
    assert len(logs) == runtime_dir.LOGS_PER_JOB_MAX + 1
    assert [log.text.strip()[-1] for log in logs if log.info.job == "gpt"] == list("76543")
    assert all(len(log.text) <= 11 for log in logs)


def test_home_that_can_not_be_written_keeps_no_folder_from_being_removed(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path / "file"))
    folder = _job("x")
    folder.remove()
    assert not folder.path.exists()


def test_keeper_that_fails_leaves_its_traceback(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path / "store"), "gpt")
    folder.path.mkdir(parents=True, mode=0o700)
    program = (
        "import ckpt.keeper.daemon as daemon, sys; from ckpt.keeper import __main__ as keeper\n"
        "def run(self): raise ZeroDivisionError('a defect')\n"
        "daemon.Daemon.run = run; sys.exit(keeper.main())"
    )
    spec = KeeperSpec(job="gpt", store=str(tmp_path / "store"))
    with folder.log_path.open("wb") as log:
        subprocess.run(
            [sys.executable, "-c", program, str(folder.path)],
            input=spec.encode(),
            stdout=log,
            stderr=log,
            check=True,
        )
    wait_for(lambda: not folder.path.exists(), "the keeper's end")
    assert "ZeroDivisionError: a defect" in _logs("gpt").output
