"""A serving group under load: replicas, a standby and a front in processes of their own.

    python benchmarks/serving_group.py            all parts, a 100 MiB model, 60 s of swaps
    python benchmarks/serving_group.py --quick    a smoke test: small and short, no figures to quote
    python benchmarks/serving_group.py --part swaps|failover|balance|rollback

Requests arrive at fixed times from a process of its own (open loop: a late answer counts from when
it was due), through the front, and each answer is compared with what its generation must answer.
*swaps*: three replicas, 200 requests a second; phases in which nothing changes take turns with such
in which a trainer commits on the same cores, to replicas that are pinned and that follow. *failover*: a replica is killed and one is stopped, each under load.
*balance*: four replicas of which one is five times slower, by each policy, beside the supermarket
model. *rollback*: until all replicas serve the generation before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch
from serving import MIB, WAIT_S, Served, set_step

import ckpt
import ckpt.serve
from ckpt.serve.front.policies import POLICIES, supermarket_tail

HERE = Path(__file__).parent
STORE = "SERVING_GROUP_STORE"
SIZE = "SERVING_GROUP_BYTES"
GROUP = "benchmark"
APP = "serving_group:replica"

replica = ckpt.serve.Replica(
    os.environ.get(STORE, "store"),
    into=lambda: Served(int(os.environ.get(SIZE, str(MIB)))),
)


@replica.post("/answer", repeatable=True)
def answer(request: ckpt.serve.ModelRequest) -> object:
    """One row through the layer that answers; slower where the environment says so."""
    y = request.model(torch.ones(1, 256))
    time.sleep(float(os.environ.get("SERVING_GROUP_SLEEP_S", "0")))
    return {"least": float(y.min()), "most": float(y.max()), "step": request.generation.step}


@dataclass(frozen=True)
class Sizes:
    """How large, how often and how long."""

    model_bytes: int
    rate_hz: float
    phase_s: float
    commits: int
    rounds: int
    balance_s: float


FULL = Sizes(100 * MIB, 200.0, 15.0, 10, 2, 15.0)
QUICK = Sizes(4 * MIB, 50.0, 2.0, 2, 1, 2.0)


# ---- the load: a process that asks at fixed times


@dataclass(frozen=True)
class Asked:
    """One request: when it was due, by the wall clock, how long after that it was answered."""

    due_s: float
    seconds: float
    status: int
    step: int
    right: bool
    replica: str


def load(url: str, rate_hz: float, begun: object, stop: object, results: object) -> None:
    """Ask until ``stop`` is set; then hand the results over."""
    begun.set()  # type: ignore[attr-defined]
    results.put(asyncio.run(_load(url, rate_hz, stop)))  # type: ignore[attr-defined]


async def _load(url: str, rate_hz: float, stop: object) -> list[Asked]:
    asked: list[Asked] = []
    tasks: set[asyncio.Task[None]] = set()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begun_s, number = time.time(), 0
        while not stop.is_set():  # type: ignore[attr-defined]
            due_s = begun_s + number / rate_hz
            number += 1
            if (left_s := due_s - time.time()) > 0:
                await asyncio.sleep(left_s)
            task = asyncio.create_task(_ask(session, url, due_s, asked))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return asked


async def _ask(session: aiohttp.ClientSession, url: str, due_s: float, asked: list[Asked]) -> None:
    try:
        async with session.post(url, data=b"x") as response:
            body = await response.json()
            status, name = response.status, response.headers.get("X-Ckpt-Replica", "")
    except aiohttp.ClientError:
        body, status, name = {}, 0, ""
    seconds = time.time() - due_s
    step = body.get("step", -1)
    right = status == 200 and body["least"] == body["most"] == 256.0 * step
    asked.append(Asked(due_s, seconds, status, step, right, name))


@contextmanager
def asking(url: str, rate_hz: float) -> Iterator[list[Asked]]:
    """Requests while the block runs; the list is filled at its end."""
    context = multiprocessing.get_context("spawn")
    begun, stop, results = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=load, args=(url, rate_hz, begun, stop, results))
    process.start()
    begun.wait()
    asked: list[Asked] = []
    try:
        yield asked
    finally:
        stop.set()
        asked += results.get(timeout=WAIT_S)
        process.join()


def percentiles(asked: Sequence[Asked]) -> str:
    """Requests, p50, p99, the worst in milliseconds, and how many failed or were wrong."""
    ordered = sorted(one.seconds for one in asked)
    p50, p99 = (ordered[int(len(ordered) * part)] * 1e3 for part in (0.5, 0.99))
    failed = sum(one.status != 200 for one in asked)
    wrong = sum(one.status == 200 and not one.right for one in asked)
    return (
        f"{len(ordered):7d} {p50:8.2f} {p99:8.2f} {ordered[-1] * 1e3:9.2f} {failed:6d} {wrong:6d}"
    )


HEAD = f"{'':22s}requests   p50 ms   p99 ms    max ms failed  wrong"


# ---- the trainer and the group


def train(folder: str, size_bytes: int, orders: object, steps: object) -> None:
    """Make the step that is ordered and commit it; tell when the optimizer's step was done."""
    torch.set_num_threads(1)
    model = Served(size_bytes)
    with ckpt.Checkpointer(f"{folder}/store", job="serving") as checkpointer:
        while step := orders.get():  # type: ignore[attr-defined]
            set_step(model, step)
            made_s = time.time()
            checkpointer.save({"model": model}, step=step)
            steps.put((step, made_s, time.time()))  # type: ignore[attr-defined]


class Trainer:
    """A training process that commits on order. ``made``: when each step was made and durable."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, self._steps = context.SimpleQueue(), context.SimpleQueue()
        given = (str(folder), size_bytes, self._orders, self._steps)
        self._process = context.Process(target=train, args=given)
        self._process.start()
        self.made: dict[int, tuple[float, float]] = {}
        self.step = 0

    def commit(self) -> int:
        """One more step, durable when this returns."""
        self.step += 1
        self._orders.put(self.step)
        step, made_s, durable_s = self._steps.get()
        self.made[step] = (made_s, durable_s)
        return step

    def close(self) -> None:
        """End the process."""
        self._orders.put(0)
        self._process.join()


class Group:
    """``ckpt serve``, with replicas (``run``) or a front alone (``front``); ended with the block."""

    def __init__(self, folder: Path, sizes: Sizes, *words: str) -> None:
        self.port = 18_080
        self.url = f"http://127.0.0.1:{self.port}/answer"
        self._environment = {
            **os.environ,
            STORE: str(folder / "store"),
            SIZE: str(sizes.model_bytes),
            "CKPT_RUNTIME_DIR": tempfile.mkdtemp(dir=folder),
        }
        self._log = (folder / "serve.log").open("wb")
        self._processes = [self.start(*words, "--port", str(self.port))]

    def start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """One more ``ckpt serve`` of the group."""
        command = [sys.executable, "-m", "ckpt", "serve", *words, "--group", GROUP]
        return subprocess.Popen(
            command, cwd=HERE, env={**self._environment, **environment}, stderr=self._log
        )

    def add(self, *words: str, **environment: str) -> None:
        """A replica of its own."""
        self._processes.append(self.start("replica", APP, *words, **environment))

    def command(self, *words: str) -> dict[str, object]:
        """A ``ckpt serve`` command that prints facts."""
        command = [sys.executable, "-m", "ckpt", "--json", "serve", *words, "--group", GROUP]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )
        return json.loads(done.stdout) if done.stdout else {"replicas": [], "said": done.stderr}

    def replicas(self, role: str) -> list[dict[str, object]]:
        """The replicas of that role."""
        rows: list[dict[str, object]] = self.command("status")["replicas"]  # type: ignore[assignment]
        return [row for row in rows if row["role"] == role and row["state"] == "ready"]

    def wait(self, serving: int, standby: int = 0) -> None:
        """Until so many serve and stand by."""
        deadline_s = time.monotonic() + WAIT_S
        while (len(self.replicas("serving")), len(self.replicas("standby"))) != (serving, standby):
            assert time.monotonic() < deadline_s, "the group did not come up; see serve.log"

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait()
        self._log.close()


def get(url: str) -> dict[str, object]:
    """A JSON document over HTTP."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as reply:
        found: dict[str, object] = json.loads(reply.read())
    return found


# ---- the parts


PINNED, FOLLOWING = "commits, pinned", "commits, following"


def swaps(folder: Path, sizes: Sizes) -> None:
    """Latency with and without swaps, and from the optimizer's step to answers of all replicas."""
    trainer = Trainer(folder, sizes.model_bytes)
    trainer.commit()
    phases: dict[str, list[Asked]] = {name: [] for name in ("nothing new", PINNED, FOLLOWING)}
    with Group(folder, sizes, APP, "--replicas", "3") as group:
        group.wait(3)
        names = {str(row["name"]): str(row["address"]) for row in group.replicas("serving")}
        seconds: dict[str, list[float]] = {}
        followed: dict[int, tuple[float, float]] = {}
        with asking(group.url, sizes.rate_hz):
            time.sleep(1.0)
        for _ in range(sizes.rounds):
            with asking(group.url, sizes.rate_hz) as asked:
                time.sleep(sizes.phase_s)
            phases["nothing new"] += asked
            for name, order in ((PINNED, "pin"), (FOLLOWING, "follow")):
                group.command(order)
                time.sleep(2.0)
                with asking(group.url, sizes.rate_hz) as asked:
                    for _ in range(sizes.commits):
                        next_s = time.monotonic() + sizes.phase_s / sizes.commits
                        step = trainer.commit()
                        time.sleep(max(0.0, next_s - time.monotonic()))
                        if name == FOLLOWING:
                            followed[step] = trainer.made[step]
                            note_phases(names.values(), seconds)
                phases[name] += asked
    trainer.close()
    print(f"\n{HEAD}")
    for name, asked in phases.items():
        print(f"{name:22s}{percentiles(asked)}")
    fresh = sorted(freshness(phases[FOLLOWING], followed, set(names)))
    print(
        f"from the optimizer's step to an answer of each of {len(names)} replicas: "
        f"median {fresh[len(fresh) // 2]:.2f} s, worst {fresh[-1]:.2f} s of {len(fresh)} commits"
    )
    commit = sorted(durable - made for made, durable in trainer.made.values())
    parts = {"commit": commit[len(commit) // 2]}
    parts |= {phase: sorted(values)[len(values) // 2] for phase, values in seconds.items()}
    print("medians: " + " ".join(f"{name}={value * 1e3:.0f}ms" for name, value in parts.items()))


def note_phases(addresses: Iterable[str], seconds: dict[str, list[float]]) -> None:
    """Add what each replica's last swap took."""
    for address in addresses:
        report = get(f"http://{address}/ckpt/status")["last_swap"]
        assert isinstance(report, dict)
        for phase, value in report["seconds"].items():
            seconds.setdefault(phase, []).append(value)


def freshness(
    asked: Sequence[Asked], made: dict[int, tuple[float, float]], names: set[str]
) -> Iterator[float]:
    """For each step: how long after it was made the last replica answered with it or a later."""
    for step, (made_s, _) in made.items():
        first: dict[str, float] = {}
        for one in asked:
            if one.step >= step:
                at_s = one.due_s + one.seconds
                first[one.replica] = min(first.get(one.replica, at_s), at_s)
        if any(one.step < step for one in asked) and first.keys() >= names:
            yield max(first.values()) - made_s


def failover(folder: Path, sizes: Sizes) -> None:
    """A serving replica is lost under load: what fails, and when the standby has its place."""
    trainer = Trainer(folder, sizes.model_bytes)
    trainer.commit()
    print(f"\n{HEAD}")
    with Group(folder, sizes, APP, "--replicas", "3", "--standby", "1") as group:
        group.wait(3, 1)
        for name, number in (("kill -9", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
            before = {str(row["name"]) for row in group.replicas("serving")}
            lost = group.replicas("serving")[0]
            front = f"http://127.0.0.1:{group.port}/ckpt/status"
            with asking(group.url, sizes.rate_hz) as asked:
                time.sleep(2.0)
                os.kill(int(str(lost["pid"])), number)
                begun_s = time.monotonic()
                while len(serving(front) - {str(lost["name"])}) < len(before):
                    time.sleep(0.005)
                back_s = time.monotonic() - begun_s
                time.sleep(2.0)
            print(f"{name:22s}{percentiles(asked)}   back at full strength in {back_s:.2f} s")
            if number == signal.SIGSTOP:
                os.kill(int(str(lost["pid"])), signal.SIGCONT)
            group.wait(3, 1)
    trainer.close()


def serving(front: str) -> set[str]:
    """The replicas that a front sends to."""
    rows = get(front)["replicas"]
    assert isinstance(rows, list)
    return {row["name"] for row in rows if row["serving"] and row["usable"]}


SERVICE_S = 0.01
SLOWER = 5
BALANCE_LOAD = 0.5


def balance(folder: Path, sizes: Sizes) -> None:
    """Four replicas, one of them slower: p99 by policy, and who was asked how often."""
    small = Sizes(MIB, *list(vars(sizes).values())[1:])
    trainer = Trainer(folder, small.model_bytes)
    trainer.commit()
    trainer.close()
    rate_hz = BALANCE_LOAD * (3 + 1 / SLOWER) / SERVICE_S
    print(
        f"\none of 4 replicas {SLOWER} times slower, {rate_hz:.0f} requests/s, "
        f"{BALANCE_LOAD:.0%} of what all can do\n{HEAD}   share of the slow one"
    )
    for policy in POLICIES:
        with Group(folder, small, "front", "--replicas", "4", "--policy", policy) as group:
            for index in range(4):
                sleep_s = SERVICE_S if index else SERVICE_S * SLOWER
                words = ("--name", f"r{index}", "--threads", "1", "--replica-queue", "4096")
                group.add(*words, SERVING_GROUP_SLEEP_S=str(sleep_s), OMP_NUM_THREADS="1")
            group.wait(4)
            with asking(group.url, rate_hz) as asked:
                time.sleep(sizes.balance_s)
        share = sum(one.replica == "r0" for one in asked) / len(asked)
        print(f"{policy:22s}{percentiles(asked)}   {share:.1%}")
    for choices in (1, 2):
        tail = supermarket_tail(BALANCE_LOAD, choices=choices)
        mean = sum(tail) * SERVICE_S / BALANCE_LOAD
        print(
            f"supermarket model, equal servers, {choices} choice(s): mean {mean * 1e3:.1f} ms, "
            f"{sum(share > 0.01 for share in tail)} requests in all but 1 % of the queues"
        )


def rollback(folder: Path, sizes: Sizes) -> None:
    """Until every serving replica answers by the generation before."""
    trainer = Trainer(folder, sizes.model_bytes)
    trainer.commit()
    with Group(folder, sizes, APP, "--replicas", "3") as group:
        group.wait(3)
        trainer.commit()
        while {row["generation"] for row in group.replicas("serving")} != {"1-2"}:
            time.sleep(0.1)
        begun_s = time.monotonic()
        shown = group.command("rollback")
        seconds = time.monotonic() - begun_s
        assert {row["generation"] for row in shown["replicas"]} == {"1-1"}  # type: ignore[attr-defined, index]
        begun_s = time.monotonic()
        group.command("status")
        alone_s = time.monotonic() - begun_s
        print(
            f"\nrollback of 3 replicas: {seconds:.2f} s, of which starting a command takes "
            f"{alone_s:.2f} s"
        )
    trainer.close()


PARTS: dict[str, Callable[[Path, Sizes], None]] = {
    "swaps": swaps,
    "failover": failover,
    "balance": balance,
    "rollback": rollback,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description="A serving group under load.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=[*PARTS])
    given = parser.parse_args()
    for name in [given.part] if given.part else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), QUICK if given.quick else FULL)


if __name__ == "__main__":
    main()
