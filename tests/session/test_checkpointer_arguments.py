"""Arguments that can't work are refused at the call, by our own errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from kit.template import run
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend

# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_store_of_another_job_is_refused() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, job="mine") as c:
        c.save({"x": {"v": 1}}, step=1)
    other = ckpt.Checkpointer(store, job="yours")
    with pytest.raises(ckpt.UsageError, match="mine"):
        other.save({"x": {"v": 1}}, step=2)


def test_store_whose_folder_was_renamed_is_still_the_same_job(tmp_path: Path) -> None:
    with ckpt.Checkpointer(str(tmp_path / "old")) as c:
        c.save({"x": {"v": 1}}, step=1)
    (tmp_path / "old").rename(tmp_path / "new")
    with ckpt.Checkpointer(str(tmp_path / "new")) as c:
        assert c.save({"x": {"v": 2}}, step=2).epoch == 2


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None])
def test_step_that_is_no_count_is_refused(step: object) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError, match="whole number from 0 on"):
        c.save_async({"x": {"v": 1}}, step=step)


def test_step_beyond_what_names_can_hold_is_refused_at_the_call() -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError):
        c.save({"x": {"v": 1}}, step=10**15)


@pytest.mark.parametrize("tag", ["", " a", "a ", "x" * 129, "a\nb", 7, "\x00"])
def test_tag_that_can_not_name_a_snapshot_is_refused(tag: object) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError, match="a tag is 1 to 128 printable"):
        c.save_async({"x": {"v": 1}}, step=1, tag=tag)


@pytest.mark.parametrize(
    "state", [{}, None, [1], "state", nn.Linear(2, 2), {1: torch.ones(2)}, {"": torch.ones(2)}]
)
def test_state_that_is_no_dict_of_names_is_refused(state: object) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError):
        c.save(state, step=1)


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 0},
        {"slots": 65},
        {"slots": True},
        {"slots": "2"},
        {"threads": 0},
        {"compression": "lz4"},
        {"job": ""},
        {"job": 7},
    ],
)
def test_options_that_can_not_work_are_refused_when_it_is_made(options: dict) -> None:
    with pytest.raises(ckpt.UsageError):
        ckpt.Checkpointer(MemoryBackend(), **options)


@pytest.mark.parametrize("store", [None, 7, "", b"runs/x"])
def test_store_that_is_no_address_is_refused(store: object) -> None:
    with pytest.raises(ckpt.UsageError):
        ckpt.Checkpointer(store)


def test_path_object_is_an_address(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path / "run") as c:
        assert c.save({"x": {"v": 1}}, step=1).step == 1


@pytest.mark.parametrize("only", ["model", b"model"])
def test_only_as_one_text_is_refused_with_the_remedy(only: object) -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"model": {"v": 1}}, step=1)
        with pytest.raises(ckpt.UsageError, match="only"):
            c.restore({"model": {"v": 1}}, only=only)


@pytest.mark.parametrize(
    "choice", [{"step": "7"}, {"step": -1}, {"tag": 7}, {"epoch": "x"}, {"tag": "a", "step": 1}]
)
def test_choice_that_can_not_be_meant_is_an_error_of_ours(choice: dict) -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"x": {"v": 1}}, step=1)
        with pytest.raises(ckpt.CkptError):
            c.restore({"x": {"v": 1}}, **choice)


def test_missing_is_one_of_two_words() -> None:
    with pytest.raises(ckpt.UsageError, match="missing is 'error' or 'keep'"):
        ckpt.Checkpointer(MemoryBackend()).restore({"x": {"v": 1}}, missing="ignore")


def test_what_can_not_be_captured_is_named_with_its_place() -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError, match="x/deep"):
        c.save({"x": {"deep": object()}}, step=1)


def test_every_public_name_is_there() -> None:
    for name in ckpt.__all__:
        assert getattr(ckpt, name) is not None
    assert set(ckpt.__all__) <= set(dir(ckpt))


@pytest.mark.slow
def test_script_without_a_main_guard_saves_and_restores(tmp_path: Path) -> None:
    script = """
import torch, ckpt
c = ckpt.Checkpointer("run")
state = {"t": torch.zeros(3)}
try:
    c.restore(state)
except ckpt.NotFoundError:
    pass
state["t"] += 1
c.save_async(state, step=int(state["t"][0]))
print(int(state["t"][0]))
c.close()
"""
    for wanted in ("1", "2"):
        done = run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, wanted), done.stderr
