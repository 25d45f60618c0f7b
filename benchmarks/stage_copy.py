"""How much staging costs beside a bare memmove of the same bytes into the same pre-faulted memory.

    python benchmarks/stage_copy.py

Contestants alternate; medians of several rounds; memory is warm. Two states: 300 tensors of 1 GiB
together, and 1,200 tiny ones. Prints times, GiB/s and the ratio.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ckpt.staging.copy import CopyPlan, CopySource
from ckpt.staging.slot import Slot, SlotPool
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex

ROUNDS = 7


def sources(count: int, elements: int) -> list[CopySource]:
    made = []
    for i in range(count):
        leaf = Leaf(
            name=f"model/layer{i}.weight", kind=LeafKind.TENSOR, dtype="float32", shape=(elements,)
        )
        made.append(CopySource(leaf, Box.whole(leaf.shape), torch.randn(elements)))
    return made


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memmove_all(slot: Slot, tensors: list[torch.Tensor]) -> None:
    at = slot.address
    for tensor in tensors:
        ctypes.memmove(at, tensor.data_ptr(), tensor.nbytes)
        at += -(-tensor.nbytes // 4096) * 4096


def stage(pool: SlotPool, plan: CopyPlan, executor: ThreadPoolExecutor | None, step: int) -> Slot:
    slot = pool.acquire()
    assert slot is not None
    slot.begin()
    shards = plan.run(slot, executor=executor)
    slot.seal(StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=shards))
    return slot


def compare(title: str, found: list[CopySource]) -> None:
    plan = CopyPlan.build(found)
    tensors = [source.source for source in found if isinstance(source.source, torch.Tensor)]
    total = sum(tensor.nbytes for tensor in tensors)
    room = max(plan.data_bytes, sum(-(-tensor.nbytes // 4096) * 4096 for tensor in tensors))
    pool = SlotPool(count=2, data_bytes=room)
    pool.wait_prefaulted()
    with ThreadPoolExecutor(1) as executor:
        slots = [stage(pool, plan, None, step) for step in range(2)]
        times: dict[str, list[float]] = {
            "memmove": [],
            "stage, 1 thread": [],
            "stage, 2 threads": [],
        }
        for step in range(2, 2 + 2 * ROUNDS, 2):
            times["stage, 1 thread"].append(
                seconds(lambda step=step: stage(pool, plan, None, step))
            )
            times["stage, 2 threads"].append(
                seconds(lambda step=step: stage(pool, plan, executor, step + 1))
            )
            oldest = min(slots, key=lambda slot: slot.order)
            times["memmove"].append(seconds(lambda slot=oldest: memmove_all(slot, tensors)))
    bare = statistics.median(times["memmove"])
    print(f"{title}: {len(tensors)} tensors, {total / 2**30:.3f} GiB")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(
            f"  {name:18} {median * 1e3:8.2f} ms  {total / 2**30 / median:6.1f} GiB/s  "
            f"x{median / bare:.2f} of memmove"
        )
    pool.close()


def main() -> None:
    print(
        f"torch {torch.__version__}, rounds {ROUNDS}, median; stage = copy + digests + sealed "
        "header"
    )
    compare("large", sources(300, (1 << 28) // 300))
    compare("tiny", sources(1200, 256))


if __name__ == "__main__":
    main()
