"""SIGTERM in a process without supervisor: asked once, however often it comes at once; a later one
ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ckpt.elastic import sigterm as terms
from ckpt.elastic.sigterm import SigtermHistory, SigtermMeaning

WAIT_S = 60
PROGRAM = """
import os, signal, sys, threading, time
from ckpt.elastic import sigterm as terms
from ckpt.elastic.sigterm import InPlaceSigterm
terms.REPEAT_S = 1000.0
asked = threading.Semaphore(0)
def ask():
    os.write(1, b"asked\\n")
    asked.release()
    return sys.argv[1] == "yes"
with InPlaceSigterm(ask):
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "sigterm\\n":
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(1, b"lives\\n")
        if line == "asked\\n":
            asked.acquire()
        if line == "later\\n":
            terms.REPEAT_S = 0.0
"""


def test_terms_soon_after_the_first_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(terms.time, "monotonic", lambda: now[0])
    came = SigtermHistory()
    assert came.classify() is SigtermMeaning.FIRST
    now[0] += 1.9
    assert came.classify() is SigtermMeaning.REPEAT
    now[0] += 0.2
    assert came.classify() is SigtermMeaning.NOW


def ended(answer: str, *lines: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, answer],
        input="\n".join(lines) + "\n",
        env=kept,
        timeout=WAIT_S,
        capture_output=True,
        text=True,
        check=False,
    )


def test_sigterm_that_comes_twice_at_once_is_asked_once() -> None:
    done = ended("yes", "sigterm", "sigterm", "asked", "sigterm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("asked") == 1
    assert done.stdout.split().count("lives") == 3


def test_a_later_sigterm_ends() -> None:
    done = ended("yes", "sigterm", "asked", "later", "sigterm")
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.split().count("lives") == 1


def test_sigterm_that_nobody_can_obey_ends() -> None:
    done = ended("no", "sigterm", "asked", "asked")
    assert done.returncode == -signal.SIGTERM
    assert "asked" in done.stdout
