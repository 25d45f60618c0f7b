"""The example loses its trainer and a replica, and answers every question, ever better."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import serve_sentiment
from kit.servers.process import free_port

from ckpt.errors import UsageError
from ckpt.serve.replica import ModelRequest

RUN_S_MAX = 300


@pytest.mark.slow
def test_all_questions_are_answered_while_processes_are_killed() -> None:
    port = free_port()
    done = subprocess.run(
        [sys.executable, str(Path(serve_sentiment.__file__))],
        env={**os.environ, "SENTIMENT_PORT": str(port), "CKPT_SERVE_GROUP": f"sentiment-{port}"},
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed a replica" in done.stdout
    assert "rank 0 died of SIGKILL" in done.stderr
    assert "ended by signal 9" in done.stderr
    questions, generations = re.findall(r"(\d+) questions, all answered, by (\d+)", done.stdout)[0]
    assert int(questions) == serve_sentiment.QUESTIONS
    assert int(generations) > 3
    last = re.findall(r"right: \d+% of the first 20, (\d+)% of the last", done.stdout)[0]
    assert int(last) >= 90


@pytest.mark.parametrize("body", [b"7", b'["a word that was never seen"]', b"no json"])
def test_bad_input_is_refused(body: bytes) -> None:
    nothing = SimpleNamespace(model=None)
    request = ModelRequest(nothing, "POST", "/sentiment", {}, {}, body)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        serve_sentiment.sentiment(request)
