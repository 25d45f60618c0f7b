"""Train a byte-level GPT on Python's own sources, and lose nothing when a rank dies.

    python examples/train_gpt.py --steps 200
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_gpt.py --steps 200

Run it, kill it, run it again: it goes on from the last snapshot with the very same losses.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

# Some CUDA matrix products are only repeatable with a workspace of fixed size; read when CUDA
# starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
from gpt_model import GPT, SHAPES, Shape, Windows, learning_rate_factor, read_corpus
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckpt


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    steps: int
    every: int | str
    store: str
    size: str
    seed: int
    loss_file: Path | None
    pid_dir: Path | None

    @property
    def shape(self) -> Shape:
        return SHAPES[self.size]


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description="byte-level GPT, protected by ckpt")
    parser.add_argument(
        "--steps", type=int, default=200, help="optimizer steps in all, counting those already done"
    )
    parser.add_argument(
        "--every", default="20", help='a snapshot every so many steps, or "30s", or "auto"'
    )
    parser.add_argument("--store", default="runs/gpt", help="where snapshots go: a folder or a URL")
    parser.add_argument("--size", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--loss-file", type=Path, help="rank 0 appends each step's number and exact loss here"
    )
    parser.add_argument(
        "--pid-dir", type=Path, help="each rank writes its process id to rank-<n>.pid here"
    )
    options = vars(parser.parse_args())
    every = options.pop("every")
    return Options(every=int(every) if every.isdecimal() else every, **options)


def main() -> None:
    options = parse_options()
    resilient = ckpt.resilient(store=options.store, every=options.every)
    resilient(train)(options)
    if int(os.environ.get("RANK", "0")) == 0:
        list_snapshots(options.store)


def train(run: ckpt.Run, options: Options) -> None:
    if options.pid_dir is not None:
        (options.pid_dir / f"rank-{run.rank}.pid").write_text(str(os.getpid()))
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
    torch.use_deterministic_algorithms(True)
    # The same seed builds the same model on every rank; dropout then draws other numbers on each.
    torch.manual_seed(options.seed)
    model: nn.Module = GPT(options.shape).to(run.device)
    torch.manual_seed(options.seed + 1 + run.rank)
    if run.world_size > 1:
        model = DistributedDataParallel(model)
        warm_up(model, options.shape, run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warmup=20, steps=options.steps)
    )
    loader = Windows(
        read_corpus(), options.shape, rank=run.rank, world_size=run.world_size, seed=options.seed
    )

    run.track(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    say(run, "starts fresh" if run.restored is None else f"restored step {run.restored.step}")
    with contextlib.ExitStack() as stack:
        losses = None
        if run.rank == 0 and options.loss_file is not None:
            losses = stack.enter_context(options.loss_file.open("a", buffering=1))
        for step in run.steps(options.steps):
            inputs, targets = (part.to(run.device) for part in next(loader))
            loss = model(inputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()

            mean = mean_over_ranks(loss.detach(), run.world_size)
            run.log(loss=mean)
            if losses is not None:
                losses.write(f"{step} {mean.hex()}\n")
            if step % 20 == 0 or step + 1 == options.steps:
                say(run, f"step {step} loss {mean:.4f}")
    say(run, f"weights sha256={weights_digest(model)}")
    if run.world_size > 1:
        dist.barrier()  # nobody hangs up while another rank still waits for its last answer
        dist.destroy_process_group()


def warm_up(model: DistributedDataParallel, shape: Shape, device: torch.device) -> None:
    """Let DDP settle its buckets before anything is restored.

    DDP guesses in which order gradients arrive, watches the first backward and regroups its buckets
    at the second forward. At three and more ranks the grouping decides in which order floats are
    added up. A run that never stopped regrouped long ago; a restarted one would take its first step
    with the guess, and differ in the last bits. Two rounds on dummy bytes put both in the same
    state. No optimizer step is taken, and the random state that dropout used up is put back by the
    restore, or is the same in every fresh start.
    """
    dummy = torch.zeros(1, shape.context, dtype=torch.long, device=device)
    for _ in range(2):
        model(dummy, dummy).backward()
    model.zero_grad(set_to_none=True)


def mean_over_ranks(loss: torch.Tensor, world_size: int) -> float:
    """The loss of the whole batch. One more collective a step, so that the number vouches for every
    rank."""
    if world_size > 1:
        dist.all_reduce(loss)
        loss /= world_size
    return loss.item()


def weights_digest(model: nn.Module) -> str:
    """A digest of all parameters, bit by bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def list_snapshots(store: str) -> None:
    with contextlib.closing(ckpt.Checkpointer(store)) as checkpointer:
        for info in checkpointer.snapshots():
            print(
                f"saved step {info.step} bytes={info.size_bytes} new_bytes={info.new_bytes}",
                flush=True,
            )


def say(run: ckpt.Run, text: str) -> None:
    if run.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
