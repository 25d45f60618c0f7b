"""How trainers are started: the decision for each fact, and the facts of real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from kit.template import run

from ckpt.elastic.processes.enter import gather_process_facts
from ckpt.elastic.processes.start_method import (
    Fork,
    InPlace,
    ProcessFacts,
    Spawn,
    choose_start_method,
)

WAIT_S = 60

STAYS = [
    ({"asked_in_place": True}, "CKPT_IN_PLACE", ""),
    ({"under_pytest": True}, "pytest", ""),
    ({"platform": "darwin"}, "darwin", "Linux"),
    ({"process_group": True}, "process group", "inside the decorated function"),
    ({"notebook": True}, "notebook", "script"),
    ({"several_nodes": True}, "several nodes", "ckpt run"),
    ({"ranks_unknown": True}, "on this node", "LOCAL_WORLD_SIZE"),
    ({"unranked_child": True}, "multiprocessing", "torchrun"),
    ({"main_thread": False}, "thread", "main thread"),
    ({"event_loop": True}, "event loop", "asyncio.run"),
]
NO_FORK = [
    ({"threads": ("Timer",)}, "Timer"),
    ({"gpu_open": True}, "GPU"),
    ({"probe_hung": True}, "parallel"),
]


def test_process_with_nothing_special_forks() -> None:
    assert choose_start_method(ProcessFacts()) == Fork()


def test_call_inside_a_coroutine_is_noticed() -> None:
    async def call() -> ProcessFacts:
        return gather_process_facts(probe=lambda: False)

    assert asyncio.run(call()).event_loop
    assert not gather_process_facts(probe=lambda: False).event_loop


@pytest.mark.slow
def test_program_whose_parent_ignores_ended_children_is_supervised(tmp_path: Path) -> None:
    program = (
        "import ckpt, os\n"
        f"@ckpt.resilient(store={str(tmp_path / 'store')!r}, every=1)\n"
        "def train(run):\n"
        "    run.track(x={'v': 1})\n"
        "    for step in run.steps(3):\n"
        "        if step == 1 and run.restored is None: os.kill(os.getpid(), 9)\n"
        "    print('done', flush=True)\n"
        "train()\n"
    )
    (tmp_path / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "CKPT_RUNTIME_DIR": str(tmp_path / "run"),
            "CKPT_IN_PLACE": "0",
            "CKPT_KEEPER": "",
        },
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "done\n"
    assert "recovered" in ended.stderr


@pytest.mark.parametrize(("facts", "why", "remedy"), STAYS)
def test_process_that_must_stay_alone_runs_in_place_and_says_why(
    facts: dict, why: str, remedy: str
) -> None:
    chosen = choose_start_method(ProcessFacts(**facts))
    assert isinstance(chosen, InPlace)
    assert why in chosen.reason
    assert remedy in chosen.remedy
    assert bool(remedy) == bool(chosen.remedy), "what was asked for needs no warning"


@pytest.mark.parametrize(("facts", "why"), NO_FORK)
def test_process_whose_fork_would_not_be_well_spawns(facts: dict, why: str) -> None:
    chosen = choose_start_method(ProcessFacts(**facts))
    assert isinstance(chosen, Spawn)
    assert why in chosen.reason


@pytest.mark.parametrize(("facts", "why"), NO_FORK)
def test_process_that_can_neither_fork_nor_run_again_stays(facts: dict, why: str) -> None:
    chosen = choose_start_method(ProcessFacts(**facts, rerun=False))
    assert isinstance(chosen, InPlace)
    assert why in chosen.reason
    assert chosen.remedy


@pytest.mark.parametrize(("stays", "_why", "_remedy"), STAYS)
@pytest.mark.parametrize(("spawns", "_why2"), NO_FORK)
def test_staying_comes_before_spawning(
    stays: dict, spawns: dict, _why: str, _remedy: str, _why2: str
) -> None:
    assert isinstance(choose_start_method(replace(ProcessFacts(**spawns), **stays)), InPlace)


def test_test_under_pytest_stays_and_is_not_probed() -> None:
    def never() -> bool:
        raise AssertionError("probed")

    facts = gather_process_facts(probe=never)
    assert facts.under_pytest
    assert isinstance(choose_start_method(facts), InPlace)


def decided(text: str, *options: str, stdin: str | None = None, **environment: str) -> list[str]:
    """What a fresh program decides: the kind, why and the remedy."""
    program = (
        f"{text}\nimport json\nfrom ckpt.elastic.processes.enter import gather_process_facts\n"
        "from ckpt.elastic.processes.start_method import choose_start_method\n"
        "chosen = choose_start_method(gather_process_facts())\n"
        "print(json.dumps([type(chosen).__name__, getattr(chosen, 'reason', ''), getattr(chosen, "
        "'remedy', '')]), flush=True)\n"
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CKPT_", "PYTEST_")) and name != "OMP_NUM_THREADS"
    }
    done = run(
        [sys.executable, *(options or ("-c", program))],
        env={**kept, **environment},
        timeout=WAIT_S,
        check=True,
        capture_output=True,
        text=True,
        input=program if stdin is not None else None,
    )
    return json.loads(done.stdout.splitlines()[-1])


GROUP = """
import torch.distributed as dist
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
"""
THREAD = """
import threading
threading.Thread(target=threading.Event().wait, name="mine", daemon=True).start()
"""
PARALLEL = """
import torch
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1.0).sum()
"""


@pytest.mark.slow
def test_fresh_program_forks_and_is_not_harmed_by_two_native_threads() -> None:
    assert decided("import torch, numpy\ntorch.set_num_threads(2)") == ["Fork", "", ""]


@pytest.mark.slow
def test_program_that_has_threads_spawns() -> None:
    kind, why, _ = decided(THREAD)
    assert kind == "Spawn"
    assert "mine" in why


@pytest.mark.slow
def test_program_that_ran_a_parallel_operation_spawns() -> None:
    kind, why, _ = decided(PARALLEL)
    assert kind == "Spawn"
    assert "parallel" in why


@pytest.mark.slow
def test_program_with_a_process_group_stays() -> None:
    kind, why, remedy = decided(GROUP)
    assert kind == "InPlace"
    assert "process group" in why
    assert "init_process_group" in remedy


@pytest.mark.slow
def test_program_of_several_nodes_stays_and_one_of_one_node_does_not() -> None:
    assert decided("", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")[0] == "InPlace"
    assert decided("", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")[0] == "Fork"
    assert decided("", WORLD_SIZE="2", SLURM_NNODES="1")[0] == "Fork"


@pytest.mark.slow
def test_program_that_can_not_know_its_node_stays() -> None:
    kind, _, remedy = decided("", WORLD_SIZE="2", RANK="0")
    assert kind == "InPlace"
    assert "LOCAL_WORLD_SIZE" in remedy


@pytest.mark.slow
def test_process_that_multiprocessing_started_stays_unless_it_has_a_rank(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, sys\n"
        "from ckpt.elastic.processes.enter import gather_process_facts\n"
        "def child(): print(gather_process_facts().unranked_child, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    one = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    one.start(); one.join()\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "RANK"}
    for more, wanted in (({}, "True"), ({"RANK": "0"}, "False")):
        done = subprocess.run(
            [sys.executable, str(program)],
            env={**kept, **more},
            timeout=WAIT_S,
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.slow
def test_program_that_is_asked_to_stays() -> None:
    assert decided("", CKPT_IN_PLACE="1") == ["InPlace", "CKPT_IN_PLACE=1", ""]


@pytest.mark.slow
def test_interactive_program_stays() -> None:
    kind, why, _ = decided("", "-i", "-q", stdin="")
    assert kind == "InPlace"
    assert "interactive" in why


@pytest.mark.slow
def test_program_from_standard_input_forks_but_cannot_spawn() -> None:
    assert decided("", "-", stdin="")[0] == "Fork"
    kind, why, _ = decided(THREAD, "-", stdin="")
    assert kind == "InPlace"
    assert "second time" in why


@pytest.mark.slow
def test_ipython_stays() -> None:
    assert decided("import builtins\nbuiltins.__IPYTHON__ = True")[0] == "InPlace"
