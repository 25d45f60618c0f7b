from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from kit.jobs import PROGRAMS
from kit.template import Program

PROGRAM = PROGRAMS / "train_and_die.py"
SOAK = os.environ.get("CKPT_SOAK") == "1"
SEED = os.environ.get("CKPT_SEED", "1")
STEPS = 100
KILLS_PLAIN = 2 if not SOAK else 100
KILLS_RANKS = 2 if not SOAK else 50
RUN_S_MAX = 300.0 if not SOAK else 1800.0


def run(command: list[str], folder: Path, *, kills: int, seed: str, steps: int) -> int:
    """Run the program once to its end or death; its own process group dies with it where it
    hangs."""
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with (folder / "output.txt").open("a") as output:
        process = Program(
            [*command, str(PROGRAM), str(folder), str(steps), seed, str(kills)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            return process.wait(RUN_S_MAX)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def plain() -> list[str]:
    return [sys.executable]


def ranks(restarts: int) -> list[str]:
    options = [
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
    ]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def losses(folder: Path, rank: int) -> dict[int, list[str]]:
    """Every loss that was computed for each step; the last line may be torn by a death."""
    text = (folder / f"losses-{rank}.txt").read_text()
    found: dict[int, list[str]] = {}
    for line in text.splitlines():
        step, _, loss = line.partition(" ")
        found.setdefault(int(step), []).append(loss)
    return found


def differences(calm: Path, killed: Path, rank: int) -> list[str]:
    """Where the killed run strays from the undisturbed one, in losses first."""
    wanted, found = losses(calm, rank), losses(killed, rank)
    wrong = [f"rank {rank} misses step {step}" for step in sorted(wanted.keys() - found.keys())]
    for step, values in sorted(found.items()):
        if set(values) != set(wanted[step]):
            wrong.append(f"rank {rank} step {step}: {values}, undisturbed {wanted[step]}")
    ends = [json.loads((folder / f"final-{rank}.json").read_text()) for folder in (calm, killed)]
    wrong += [
        f"rank {rank}: {name} differs at the end"
        for name in ends[0]
        if ends[0][name] != ends[1][name]
    ]
    return wrong[:5]


def attempts(folder: Path, rank: int) -> int:
    return len((folder / f"attempts-{rank}.txt").read_text().splitlines())


def check(calm: Path, killed: Path, *, world_size: int, kills: int) -> None:
    redone = sum(len(values) - 1 for values in losses(killed, 0).values())
    made = attempts(killed, 0)
    print(f"seed={SEED} kills={kills} attempts={made} steps redone={redone}")
    where = f"seed={SEED} (CKPT_SEED={SEED} repeats it) folder={killed}\n{(killed / 'output.txt').read_text()[-4000:]}"
    assert made > kills, where
    assert [one for rank in range(world_size) for one in differences(calm, killed, rank)] == [], (
        where
    )


@pytest.mark.slow
def test_plain_process_killed_at_random_moments_ends_bit_for_bit_as_if_never_killed(
    tmp_path: Path,
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    steps = STEPS if not SOAK else STEPS * 10
    assert run(plain(), calm, kills=0, seed=SEED, steps=steps) == 0, (
        calm / "output.txt"
    ).read_text()
    for _ in range(KILLS_PLAIN):
        status = run(plain(), killed, kills=KILLS_PLAIN, seed=SEED, steps=steps)
        assert status == -signal.SIGKILL, (
            f"seed={SEED} status={status}\n{(killed / 'output.txt').read_text()[-4000:]}"
        )
    status = run(plain(), killed, kills=KILLS_PLAIN, seed=SEED, steps=steps)
    assert status == 0, (
        f"seed={SEED} status={status}\n{(killed / 'output.txt').read_text()[-4000:]}"
    )
    check(calm, killed, world_size=1, kills=KILLS_PLAIN)


@pytest.mark.slow
def test_two_ranks_killed_at_random_moments_end_bit_for_bit_as_if_never_killed(
    tmp_path: Path,
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    steps = STEPS if not SOAK else STEPS * 10
    assert run(ranks(0), calm, kills=0, seed=SEED, steps=steps) == 0, (
        calm / "output.txt"
    ).read_text()[-4000:]
    status = run(ranks(KILLS_RANKS + 2), killed, kills=KILLS_RANKS, seed=SEED, steps=steps)
    assert status == 0, (
        f"seed={SEED} status={status}\n{(killed / 'output.txt').read_text()[-4000:]}"
    )
    check(calm, killed, world_size=2, kills=KILLS_RANKS)
