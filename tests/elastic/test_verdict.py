"""What workers tell their agent of a restart that would be futile."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ckpt.elastic.verdict import (
    VERDICT_VARIABLE,
    Verdict,
    VerdictFile,
    fenced_verdict,
    give_verdict,
)
from ckpt.errors import ConflictError, FencedError

FUTILE = Verdict(12, "another writer opened an epoch of this job")


def test_last_verdict_is_what_the_agent_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = VerdictFile(tmp_path / "verdict")
    monkeypatch.setenv(VERDICT_VARIABLE, str(file.path))
    assert file.read() is None
    give_verdict(Verdict(2, "first"))
    give_verdict(FUTILE)
    assert file.read() == FUTILE
    file.remove()
    assert file.read() is None and list(tmp_path.iterdir()) == []


def test_verdict_that_can_not_be_written_is_told_unless_the_agent_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VERDICT_VARIABLE, str(tmp_path / "gone" / "verdict"))
    give_verdict(FUTILE)
    assert not caplog.records
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VERDICT_VARIABLE, str(tmp_path / "file" / "verdict"))
    with caplog.at_level(logging.WARNING, "ckpt"):
        give_verdict(FUTILE)
    [record] = caplog.records
    assert "may start the program again" in record.getMessage()
    assert FUTILE.text in record.getMessage()


def test_only_a_fence_makes_a_restart_futile() -> None:
    assert fenced_verdict(FencedError("a newer epoch is open")) == Verdict(
        12, "a newer epoch is open"
    )
    assert fenced_verdict(ConflictError("look again")) is None
