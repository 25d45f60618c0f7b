"""Two real ranks under torchrun: gloo, DDP, one program after the other over the same store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.template import Program

import ckpt

WAIT_S = 120

PROGRAM = """
import json, os, sys, time
import torch, torch.distributed as dist
from torch import nn
import ckpt

case = json.loads(sys.argv[1])
out = {"losses": {}}

@ckpt.resilient(store=case["store"], every=case.get("every", 4))
def train(run):
    if case.get("group", True):
        dist.init_process_group("gloo")
    out["rank"], out["world"] = run.rank, run.world_size
    torch.manual_seed(case.get("seed", 0))
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    if case.get("differ"):
        wrapped = nn.parallel.DistributedDataParallel(model)
        with torch.no_grad():
            model[0].weight += run.rank
    else:
        wrapped = nn.parallel.DistributedDataParallel(model) if case.get("group", True) and run.world_size > 1 else model
    if run.world_size == 1 or not case.get("ddp", True):
        wrapped = model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.02)
    torch.manual_seed(100 * case.get("seed", 0) + run.rank)
    run.track(model=wrapped, optimizer=optimizer, mine={"rank": run.rank, "noise": torch.rand(3)})
    out["began"] = run.completed_steps
    for step in run.steps(case["total"]):
        x = torch.randn(8, 6)
        loss = wrapped(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out["losses"][step] = loss.item()
        time.sleep(case.get("pause_s", 0.0))
        if case.get("save") == [run.rank, step]:
            run.save(tag="asked")
        if case.get("break") == step:
            break
    out["done"] = run.completed_steps
    out["sum"] = [p.double().sum().item() for p in model.state_dict().values()]
    if case.get("destroy"):
        dist.destroy_process_group()

try:
    train()
except ckpt.CkptError as error:
    out["error"], out["text"] = type(error).__name__, str(error)
if dist.is_initialized():
    dist.destroy_process_group()
with open(f"{case['out']}/{os.environ['RANK']}.json", "w") as file:
    json.dump(out, file)
"""


@dataclass
class Launcher:
    """Runs the program under torchrun and gives each rank's report."""

    folder: Path
    launches: int = 0

    @property
    def store(self) -> str:
        """The store's path."""
        return str(self.folder / "run")

    def run(self, ranks: int = 2, **case: object) -> list[dict]:
        """Each rank's report. A hang fails after ``WAIT_S`` seconds and kills only what it
        started."""
        self.launches += 1
        out = self.folder / f"out{self.launches}"
        out.mkdir()
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        facts = json.dumps({"store": self.store, "out": str(out), "total": 10, **case})
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        environment = {
            **os.environ,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
        }
        process = Program(
            [*command, str(program), facts],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"hung: {process.communicate()[0][-4000:]}")
        assert process.returncode == 0, said[-4000:]
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]

    def steps(self) -> list[int]:
        """The steps of the snapshots in the store."""
        return [info.step for info in ckpt.Checkpointer(self.store).snapshots()]


@pytest.fixture
def launch(tmp_path: Path) -> Launcher:
    """A launcher with a store of its own."""
    return Launcher(tmp_path)


@pytest.mark.slow
def test_training_that_goes_on_after_a_normal_end_is_bit_exact(
    launch: Launcher, tmp_path: Path
) -> None:
    whole = launch.run(total=14, store=str(tmp_path / "whole"))
    first = launch.run(total=6)
    second = launch.run(total=14, seed=5)
    for rank in range(2):
        assert (first[rank]["began"], second[rank]["began"], second[rank]["done"]) == (0, 6, 14)
        assert {**first[rank]["losses"], **second[rank]["losses"]} == whole[rank]["losses"]
        assert second[rank]["sum"] == whole[rank]["sum"]
    assert launch.steps() == [4, 6, 8, 12, 14]


@pytest.mark.slow
def test_request_of_one_rank_is_one_snapshot_of_all_and_break_ends_all_alike(
    launch: Launcher,
) -> None:
    reports = launch.run(total=50, every=100, save=[1, 3], pause_s=0.1, **{"break": 20})
    assert [report["done"] for report in reports] == [21, 21]
    infos = ckpt.Checkpointer(launch.store).snapshots()
    assert [info.world_size for info in infos] == [2, 2]
    assert infos[0].tags == ("asked",)
    assert 4 <= infos[0].step <= 21
    assert infos[1].step == 21
    assert ckpt.Checkpointer(launch.store).verify().ok


@pytest.mark.slow
def test_replicas_that_differ_are_refused_on_every_rank(launch: Launcher) -> None:
    reports = launch.run(differ=True)
    assert [report["error"] for report in reports] == ["UsageError", "UsageError"], reports
    assert all("model/0.weight" in report["text"] for report in reports)


@pytest.mark.slow
def test_function_without_a_process_group_works_through_the_launchers_store_or_says_what_to_do(
    launch: Launcher,
) -> None:
    reports = launch.run(group=False, ddp=False)
    for report in reports:
        if "error" in report:
            assert report["error"] == "UsageError"
            assert "init_process_group" in report["text"]
        else:
            assert report["done"] == 10


@pytest.mark.slow
def test_process_group_that_is_destroyed_before_the_function_returns_loses_nothing(
    launch: Launcher,
) -> None:
    reports = launch.run(destroy=True)
    assert [report.get("error") for report in reports] == [None, None], reports
    assert launch.steps() == [4, 8, 10]


@pytest.mark.slow
def test_world_that_shrinks_and_grows_again_goes_on(launch: Launcher) -> None:
    two = launch.run(ranks=2, total=4)
    one = launch.run(ranks=1, total=8)
    again = launch.run(ranks=2, total=12)
    assert [report["began"] for report in (*two, *one, *again)] == [0, 0, 4, 8, 8]
    assert [report["done"] for report in (*two, *one, *again)] == [4, 4, 8, 12, 12]
    assert all("error" not in report for report in (*two, *one, *again))
    infos = ckpt.Checkpointer(launch.store).snapshots()
    assert [(info.step, info.world_size) for info in infos] == [(4, 2), (8, 1), (12, 2)]
