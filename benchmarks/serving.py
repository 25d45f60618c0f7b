"""A model that follows training while it answers: what a swap costs, and what leaves the store.

    python benchmarks/serving.py            all parts, a 100 MiB model (1 GiB for the adapters)
    python benchmarks/serving.py --quick    a smoke test: small models, no figures to quote
    python benchmarks/serving.py --part swaps|adapters|cold

*swaps*: requests arrive at fixed times (open loop: a late answer counts from when it was due). Three
phases take turns in one run: nothing new; a trainer in another process commits, and a follower swaps;
the same commits, and the handler loads them by ``torch.load`` and ``load_state_dict`` under a lock,
as servers usually do. Each answer is compared with what its generation must answer.
*adapters*: a large frozen base and small adapters that change; bytes that left the store for one
replica and for eight on this machine. *cold*: from the store to the first answer, beside torch.load,
safetensors and DCP reading the same bytes. The page cache is warm in all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import ckpt
import ckpt.serve

MIB = 1 << 20
RATE_HZ = 200.0
WAIT_S = 300.0


@dataclass(frozen=True)
class Sizes:
    """How large and how long."""

    model_bytes: int
    base_bytes: int
    commits: int
    rounds: int
    replicas: int = 8


FULL = Sizes(100 * MIB, 1024 * MIB, 10, 2)
QUICK = Sizes(4 * MIB, 16 * MIB, 3, 1, replicas=3)


class Served(nn.Module):
    """A small layer that answers, and a large one that fills the memory."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.answer = nn.Linear(256, 256, bias=False)
        self.rest = nn.Parameter(torch.zeros(size_bytes // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What a request asks for."""
        return self.answer(x)


def set_step(model: Served, step: int) -> None:
    """All values of a step, so that an answer shows which step it is of, and whether of one."""
    with torch.no_grad():
        model.answer.weight.fill_(step)
        model.rest.uniform_()


# ---- the trainer: a process that commits on order


def train(folder: str, size_bytes: int, orders: multiprocessing.SimpleQueue[int]) -> None:
    """Commit the step that is ordered, to the store and to a file; 0 ends."""
    model = Served(size_bytes)
    with ckpt.Checkpointer(f"{folder}/store", job="serving") as checkpointer:
        while step := orders.get():
            set_step(model, step)
            torch.save(model.state_dict(), f"{folder}/model.{step}.tmp")
            checkpointer.save({"model": model}, step=step)
            Path(f"{folder}/model.{step}.tmp").rename(f"{folder}/model.pt")


@contextmanager
def trainer(folder: Path, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """The trainer's process; call it with the step to commit."""
    context = multiprocessing.get_context("spawn")
    orders: multiprocessing.SimpleQueue[int] = context.SimpleQueue()
    process = context.Process(target=train, args=(str(folder), size_bytes, orders))
    process.start()
    try:
        yield orders.put
    finally:
        orders.put(0)
        process.join()


# ---- requests that arrive at fixed times


@dataclass
class Answers:
    """Seconds from when each request was due to its answer, and answers that were wrong."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0

    def row(self) -> str:
        """p50 and p99 in milliseconds."""
        ordered = sorted(self.seconds)
        p50, p99 = (ordered[int(len(ordered) * part)] * 1e3 for part in (0.5, 0.99))
        return f"{len(ordered):7d} {p50:8.2f} {p99:8.2f} {ordered[-1] * 1e3:9.2f} {self.wrong:6d}"


def ask(
    handle: Callable[[torch.Tensor], tuple[torch.Tensor, int]], over: threading.Event
) -> Answers:
    """Ask ``RATE_HZ`` times a second until it is over."""
    answers = Answers()
    x = torch.ones(1, 256)
    begun, number = time.perf_counter(), 0
    while not over.is_set():
        due = begun + number / RATE_HZ
        number += 1
        if (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        with torch.inference_mode():
            y, step = handle(x)
        answers.wrong += not bool((y == 256.0 * step).all())
        answers.seconds.append(time.perf_counter() - due)
    return answers


class ByHand:
    """What servers usually do: one model, a lock, ``load_state_dict`` where the file changed."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.path = folder / "model.pt"
        self.model = Served(size_bytes)
        self.lock = threading.Lock()
        self.seen = 0

    def handle(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Answer a request; load first if there is something new."""
        with self.lock:
            stamp = self.path.stat().st_mtime_ns if self.path.exists() else 0
            if stamp != self.seen:
                self.model.load_state_dict(torch.load(self.path, weights_only=True))
                self.seen = stamp
            return self.model(x), int(self.model.answer.weight[0, 0])


def swaps(folder: Path, sizes: Sizes) -> None:
    """Latency with and without swaps, and the way from a commit to its answer."""
    phases: dict[str, list[Answers]] = {"nothing new": [], "follower": [], "by hand": []}
    step = 1
    with ExitStack() as stack:
        commit = stack.enter_context(trainer(folder, sizes.model_bytes))
        commit(step)
        follower = stack.enter_context(
            ckpt.serve.Follower(folder / "store", into=lambda: Served(sizes.model_bytes))
        )
        follower.wait(step=step, timeout_s=WAIT_S)
        by_hand = ByHand(folder, sizes.model_bytes)

        def pinned(x: torch.Tensor) -> tuple[torch.Tensor, int]:
            with follower.generation() as g:
                return g.model(x), g.step

        def idle() -> None:
            time.sleep(3.0)

        def commits() -> None:
            nonlocal step
            for _ in range(sizes.commits):
                step += 1
                commit(step)
                follower.wait(step=step, timeout_s=WAIT_S)

        for _ in range(sizes.rounds):
            for name, handle, load in (
                ("nothing new", pinned, idle),
                ("follower", pinned, commits),
                ("by hand", by_hand.handle, commits),
            ):
                phases[name].append(asked_during(handle, load))
        swap = follower.status().last_swap
    print(f"\n{'':14s}requests   p50 ms   p99 ms    max ms  wrong")
    for name, several in phases.items():
        together = Answers(
            [s for one in several for s in one.seconds], sum(a.wrong for a in several)
        )
        print(f"{name:14s} {together.row()}")
    assert swap is not None, "it swapped"
    parts = " ".join(f"{name}={seconds * 1e3:.0f}ms" for name, seconds in swap.seconds.items())
    print(f"the last swap: {parts} read={swap.read_bytes / MIB:.0f} MiB")


def asked_during(
    handle: Callable[[torch.Tensor], tuple[torch.Tensor, int]], load: Callable[[], None]
) -> Answers:
    """The answers while ``load`` runs."""
    over = threading.Event()
    found: list[Answers] = []
    asking = threading.Thread(target=lambda: found.append(ask(handle, over)))
    asking.start()
    load()
    over.set()
    asking.join()
    return found[0]


# ---- adapters


def adapted(sizes: Sizes) -> nn.Module:
    """A frozen base and adapters of a hundredth of it."""
    base, adapter = sizes.base_bytes // 4, sizes.base_bytes // 400
    parts = {"base": torch.zeros(base), "adapter": torch.zeros(adapter)}
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in parts.items()})


def adapters(folder: Path, sizes: Sizes) -> None:
    """Bytes that leave the store for an update of the adapters."""
    model = adapted(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_()
    with ckpt.Checkpointer(folder / "adapted", job="adapters") as checkpointer:
        checkpointer.save({"model": model}, step=1)
        for replicas in (1, sizes.replicas):
            before = updated(folder, sizes, checkpointer, model, replicas)
            part = before / (sizes.base_bytes + sizes.base_bytes // 100)
            print(
                f"{replicas} replica(s), adapters changed: {before / MIB:.1f} MiB read in all, "
                f"{part:.2%} of the model"
            )


def updated(
    folder: Path, sizes: Sizes, checkpointer: ckpt.Checkpointer, model: nn.Module, replicas: int
) -> int:
    """What so many followers read together when the adapters change."""
    with ExitStack() as stack:
        followers = [
            stack.enter_context(
                ckpt.serve.Follower(
                    folder / "adapted",
                    into=lambda: adapted(sizes),
                    keep_generations=1,
                    share_reads=replicas > 1,
                )
            )
            for _ in range(replicas)
        ]
        step = 0
        for follower in followers:
            step = follower.wait(timeout_s=WAIT_S).step
        read = sum(follower.status().read_bytes for follower in followers)
        with torch.no_grad():
            model.get_parameter("adapter").uniform_()
        checkpointer.save({"model": model}, step=step + 1)
        for follower in followers:
            follower.wait(step=step + 1, timeout_s=WAIT_S)
        return sum(follower.status().read_bytes for follower in followers) - read


# ---- cold start


def cold(folder: Path, sizes: Sizes) -> None:
    """From the store to the first answer."""
    model = Served(sizes.model_bytes)
    set_step(model, 1)
    with ckpt.Checkpointer(folder / "cold", job="cold") as checkpointer:
        checkpointer.save({"model": model}, step=1)
    contestants = {"ckpt": lambda: by_follower(folder, sizes), **rivals(folder, model, sizes)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(5):
        for name, load in contestants.items():
            begun = time.perf_counter()
            answer = load()
            seconds[name].append(time.perf_counter() - begun)
            assert bool((answer == 256.0).all()), name
    ours = statistics.median(seconds["ckpt"])
    for name, several in seconds.items():
        median = statistics.median(several)
        print(f"{name:12s} {median:7.3f} s to the first answer, {median / ours:5.2f} of ours")


def by_follower(folder: Path, sizes: Sizes) -> torch.Tensor:
    """Ours: opening the store, the log, the index, the fill with every byte verified."""
    with (
        ckpt.serve.Follower(
            folder / "cold", into=lambda: Served(sizes.model_bytes), keep_generations=1
        ) as follower,
        torch.inference_mode(),
    ):
        return follower.wait(timeout_s=WAIT_S).model(torch.ones(1, 256))


def rivals(folder: Path, model: Served, sizes: Sizes) -> dict[str, Callable[[], torch.Tensor]]:
    """The same bytes by others; each builds the model, loads into it and answers."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415

    torch.save(model.state_dict(), folder / "cold.pt")
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "cold.dcp", no_dist=True)

    def answer(fresh: Served) -> torch.Tensor:
        with torch.inference_mode():
            return fresh(torch.ones(1, 256))

    def by_torch() -> torch.Tensor:
        fresh = Served(sizes.model_bytes)
        fresh.load_state_dict(torch.load(folder / "cold.pt", weights_only=True))
        return answer(fresh)

    def by_dcp() -> torch.Tensor:
        fresh = Served(sizes.model_bytes)
        state = {"model": fresh.state_dict()}
        dcp.load(state, checkpoint_id=folder / "cold.dcp", no_dist=True)
        return answer(fresh)

    found = {"torch.load": by_torch, "dcp": by_dcp}
    try:
        from safetensors.torch import load_file, save_file  # noqa: PLC0415
    except ImportError:
        print("safetensors is not installed, and left out")
        return found
    save_file(model.state_dict(), folder / "cold.safetensors")

    def by_safetensors() -> torch.Tensor:
        fresh = Served(sizes.model_bytes)
        fresh.load_state_dict(load_file(folder / "cold.safetensors"))
        return answer(fresh)

    return {**found, "safetensors": by_safetensors}


PARTS: dict[str, Callable[[Path, Sizes], None]] = {
    "swaps": swaps,
    "adapters": adapters,
    "cold": cold,
}


def main(arguments: Sequence[str]) -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    for name in options.part or PARTS:
        print(f"== {name}")
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), sizes)


if __name__ == "__main__":
    main(sys.argv[1:])
