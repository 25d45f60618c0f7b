"""How long training waits while its state is copied from a CUDA device: ckpt's stage beside the
pinned stager of torch.distributed.checkpoint.

    python benchmarks/stage_gpu.py [GiB]

Contestants alternate; medians of several rounds behind a warm-up, the state resident on one device.
ckpt's time includes a digest of every byte and the sealed header. ``bare`` is one copy of the same
bytes into one pinned tensor. Without a device it says so and ends with status 0.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed.checkpoint.staging as dcp

from ckpt.capture.leaves import World
from ckpt.session.staging import Stager
from ckpt.values import SnapshotId

ROUNDS = 7
TENSORS = 100


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def dcp_stage(state: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Stage with pinned memory that is kept from one call to the next."""
    if hasattr(dcp, "DefaultStager"):
        options = dcp.StagingOptions(
            use_pinned_memory=True, use_shared_memory=False, use_async_staging=False
        )
        stager = dcp.DefaultStager(options)
    else:  # before torch 2.9
        stager = dcp.BlockingAsyncStager(cache_staged_state_dict=True)
    return lambda: stager.stage({"model": state})


def main() -> None:
    if not torch.cuda.is_available():
        print(f"left out: there is no CUDA device here. torch={torch.__version__}")
        return
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else "4") * 2**30)
    elements = size // 4 // TENSORS
    state = {f"layer{i}": torch.randn(elements, device="cuda") for i in range(TENSORS)}
    flat = torch.empty(elements * TENSORS, pin_memory=True)
    stager = Stager(World(0, 1), slots=2, threads=None, compare_replicas=lambda leaves: None)
    stager.prepare({"model": state})
    while any(not slot.registered for slot in stager.slots) or len(stager.slots) < 2:
        time.sleep(0.05)  # until the background thread has pinned all slots
    numbers = iter(range(1, 1_000_000))

    def ours() -> None:
        snapshot = SnapshotId(1, next(numbers))
        stager.stage({"model": state}, snapshot, metadata={}, wait_s=60.0).release()

    def bare() -> None:
        for i, tensor in enumerate(state.values()):
            flat[i * elements : (i + 1) * elements].copy_(tensor, non_blocking=True)

    contestants = {"bare": bare, "ckpt": ours, "DCP, pinned": dcp_stage(state)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS + 1):
        for name, run in contestants.items():
            taken = seconds(run)
            if number:
                times[name].append(taken)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size / 2**30:.1f} GiB")
    print("| | ms | GiB/s | of bare |\n|---|---|---|---|")
    base = statistics.median(times["bare"])
    for name, taken in times.items():
        median = statistics.median(taken)
        rate = size / 2**30 / median
        print(f"| {name} | {median * 1e3:.1f} | {rate:.1f} | {median / base:.2f} |")
    stager.close()


if __name__ == "__main__":
    main()
