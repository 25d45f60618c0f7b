"""Where an exception of the function ends the process, and what is said then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from kit.template import run

from ckpt.elastic.failure import Preempted, describe_failure, ends_process
from ckpt.elastic.processes.trainer import TrainerProcess
from ckpt.errors import FencedError, UnavailableError, UsageError
from ckpt.ipc.messages import Policy

WAIT_S = 60
SEAT = TrainerProcess(attempt=2, port=1, how="fork", pid=1, report_fd=9)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(5, "the file server is away"), True),
        (ConnectionResetError("x"), True),
        (TimeoutError("x"), True),
        (UnavailableError("x"), True),
        (dist.DistNetworkError("x"), True),
        (caused(RuntimeError("no answer"), ConnectionError("x")), True),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (caused(RuntimeError("no data"), FileNotFoundError("x")), False),
        (ValueError("x"), False),
        (UsageError("x"), False),
        (FencedError("x"), False),
    ],
)
def test_error_of_an_outage_is_told_from_one_of_the_program(
    error: BaseException, passing: bool
) -> None:
    assert describe_failure(error)["passing"] is passing


@pytest.mark.parametrize(
    ("error", "dies"),
    [
        (ValueError("x"), True),
        (UnavailableError("x"), True),
        (SystemExit(3), True),
        (SystemExit("no data"), True),
        (SystemExit(0), False),
        (SystemExit(), False),
        (KeyboardInterrupt(), False),
        (UsageError("x"), False),
        (FencedError("x"), False),
        (Preempted(3), False),
    ],
)
def test_trainer_dies_of_what_a_new_attempt_may_not_meet(error: BaseException, dies: bool) -> None:
    assert ends_process(error, SEAT, Policy(), outermost=True) is dies
    assert not ends_process(error, None, Policy(), outermost=True), "in place"
    assert not ends_process(error, SEAT, Policy(), outermost=False), "the outer call may catch it"
    assert not ends_process(error, SEAT, Policy(same_error_max=1), outermost=True), (
        "there is no next attempt"
    )
    assert ends_process(error, replace(SEAT, attempt=0), Policy(), outermost=True), "a prepared one"


def died(body: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """How a process ends that dies at the border of what ``body`` raises."""
    program = (
        "import atexit, sys\nfrom ckpt.elastic.failure import die\natexit.register(print, 'exit "
        "handler')\n"
        "def words(): print('last words', flush=True)\n"
        "def broken(): raise OSError('no words')\n"
        "last = words\nprint('buffered')\ntry:\n    try:\n"
        + textwrap.indent(body, " " * 8)
        + "\n    except BaseException as error:\n        die(error, last_words=last)\nfinally:\n    print('unwound')\n"
    )
    return run(
        [sys.executable, "-c", program],
        timeout=WAIT_S,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"),
            "PYTHONUNBUFFERED": "",
        },
    )


@pytest.mark.slow
def test_death_says_what_python_would_say_and_unwinds_nothing(tmp_path: Path) -> None:
    done = died("raise ValueError('bad batch')", tmp_path)
    assert done.returncode == 1
    assert done.stdout.split("\n") == ["buffered", "last words", ""]
    assert "Traceback" in done.stderr
    assert "ValueError: bad batch" in done.stderr
    assert "bad batch" in json.loads((tmp_path / "error.json").read_text())["message"]["message"], (
        "torchrun's report"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status", "said"), [("3", 3, ""), ("256", 1, ""), ("'no data'", 1, "no data\n")]
)
def test_exit_keeps_its_status_and_has_no_traceback(
    tmp_path: Path, code: str, status: int, said: str
) -> None:
    done = died(f"sys.exit({code})", tmp_path)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.slow
def test_last_words_that_fail_are_told_and_hold_nothing_up(tmp_path: Path) -> None:
    done = died("last = broken\nraise ValueError('bad batch')", tmp_path)
    assert done.returncode == 1
    assert done.stderr.index("bad batch") < done.stderr.index("no words")
