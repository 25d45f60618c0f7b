"""What the fake of ``tests/kit/cuda_calls.py`` claims, on a real device: streams, graphs, memory that
is refused, errors that stay, several devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt
from ckpt.session.staging import content_digests, device_sums
from ckpt.staging.copy import CopyPlan, CopySource
from ckpt.staging.devices import CudaCalls, HostCopies
from ckpt.staging.slot import Slot, SlotPool
from ckpt.values import Box, Leaf, LeafKind, StagedShard

ELEMENTS = 32 << 20
"""128 MiB of float32: a copy of it takes long enough to be overtaken."""

BUSY_CYCLES = 200_000_000
"""About a tenth of a second of a device's time."""


def source(name: str, tensor: torch.Tensor) -> CopySource:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype, shape=shape)
    return CopySource(leaf, Box.whole(shape), tensor)


def staged(slot: Slot, shard: StagedShard, like: torch.Tensor) -> torch.Tensor:
    data = slot.data[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]
    return torch.frombuffer(data, dtype=like.dtype).reshape(like.shape).clone()


class Stage:
    """A pool of slots, pinned for the device of what is staged."""

    def __init__(self, *tensors: torch.Tensor, copies: HostCopies | None = None) -> None:
        self.copies = copies or HostCopies()
        self.tensors = tensors
        self.plan = CopyPlan.build(
            [source(str(i), tensor) for i, tensor in enumerate(tensors)], self.copies
        )
        self.pool = SlotPool(count=2, data_bytes=self.plan.data_bytes, pinner=self.copies)

    def run(self) -> list[torch.Tensor]:
        """Stage, and give back what the slot holds."""
        slot = self.pool.acquire()
        assert slot is not None
        slot.begin()
        try:
            shards = self.plan.run(slot)
            return [
                staged(slot, shard, tensor)
                for shard, tensor in zip(shards, self.tensors, strict=True)
            ]
        finally:
            slot.invalidate()


@pytest.fixture
def stages() -> Iterator[list[Stage]]:
    made: list[Stage] = []
    yield made
    for stage in made:
        stage.pool.close()


def test_work_of_the_default_stream_is_staged(stages: list[Stage]) -> None:
    tensor = torch.zeros(ELEMENTS, device="cuda")
    stages.append(Stage(tensor))
    torch.cuda._sleep(BUSY_CYCLES)
    tensor.fill_(3.0)
    (found,) = stages[0].run()
    assert found.eq(3.0).all()


def test_work_of_a_stream_that_is_not_current_is_staged(stages: list[Stage]) -> None:
    tensor = torch.zeros(ELEMENTS, device="cuda")
    stages.append(Stage(tensor))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY_CYCLES)
        tensor.fill_(4.0)
    (found,) = stages[0].run()
    assert found.eq(4.0).all()


def test_pinned_host_tensor_with_a_copy_in_flight_is_staged_whole(stages: list[Stage]) -> None:
    host = torch.zeros(ELEMENTS, pin_memory=True)
    device = torch.full((ELEMENTS,), 5.0, device="cuda")
    stages.append(Stage(host))
    torch.cuda._sleep(BUSY_CYCLES)
    host.copy_(device, non_blocking=True)
    (found,) = stages[0].run()
    assert found.eq(5.0).all()


def test_graph_that_is_replayed_is_staged_and_pinning_breaks_no_capture(
    stages: list[Stage],
) -> None:
    tensor = torch.zeros(1 << 20, device="cuda")
    copies = HostCopies()
    copies.expect([tensor])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.add_(1.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1.0)
        pinned = SlotPool(count=1, data_bytes=1 << 20, pinner=copies)
        pinned.wait_prefaulted()
    pinned.close()
    stages.append(Stage(tensor, copies=copies))
    graph.replay()
    graph.replay()
    (found,) = stages[0].run()
    assert found.eq(3.0).all()


def test_slots_are_pinned_and_no_other_device_is_opened(stages: list[Stage]) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    before = CudaCalls().active()
    stages.append(Stage(torch.ones(1024, device=device)))
    stages[0].pool.wait_prefaulted()
    slot = stages[0].pool.acquire()
    assert slot is not None
    assert torch.frombuffer(slot.data, dtype=torch.uint8, count=4096).is_pinned()
    slot.release()
    assert set(CudaCalls().active()) <= {*before, device}


def test_refused_pinning_leaves_no_error_and_copies_are_right(stages: list[Stage]) -> None:
    told: list[str] = []
    failed: list[RuntimeError] = []

    class Twice(HostCopies):
        """Registers a slot's first page beforehand, so that CUDA refuses the whole."""

        def pin(self, slot: Slot) -> None:
            assert int(torch.cuda.cudart().cudaHostRegister(slot.address, 4096, 0)) == 0
            super().pin(slot)
            try:
                torch.ones(8, device="cuda").add_(1)
                torch.cuda.synchronize()
            except RuntimeError as error:
                failed.append(error)
            torch.cuda.cudart().cudaHostUnregister(slot.address)

    tensor = torch.full((ELEMENTS,), 6.0, device="cuda")
    stages.append(Stage(tensor, copies=Twice(on_slow=told.append)))
    stages[0].pool.wait_prefaulted()
    assert len(told) == 1 and "code=" in told[0]
    assert failed == []
    (found,) = stages[0].run()
    assert found.eq(6.0).all()


def test_device_without_free_memory_is_staged(stages: list[Stage]) -> None:
    tensor = torch.full((ELEMENTS,), 7.0, device="cuda")
    turned = torch.full((4096, 8192), 8.0, device="cuda").t()
    stages.append(Stage(tensor, turned))
    stages[0].run()
    kept = []
    try:
        size = 1 << 30
        while size >= 1 << 20:
            try:
                kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.cuda.OutOfMemoryError:
                size //= 2
        found, also = stages[0].run()
    finally:
        kept.clear()
        torch.cuda.empty_cache()
    assert found.eq(7.0).all() and also.eq(8.0).all()


def test_tensors_of_several_devices_are_staged(stages: list[Stage]) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two devices. devices={count}")
    tensors = [torch.full((ELEMENTS,), float(i), device=f"cuda:{i}") for i in range(count)]
    stages.append(Stage(*tensors))
    for found, tensor in zip(stages[0].run(), tensors, strict=True):
        assert found.eq(tensor.cpu()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_digests_on_the_device_are_those_of_the_same_sums_on_the_host(dtype: torch.dtype) -> None:
    host = torch.randn(3, 1_000_003).to(dtype)
    assert device_sums(host.cuda()).tolist() == device_sums(host).tolist()
    assert device_sums(host.t().cuda()).tolist() == device_sums(host.t()).tolist()
    one, two = content_digests([host.cuda(), host.cuda()])
    assert one == two


def test_training_on_the_device_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8)).cuda()
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.randn(16, 64, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses: list[float] = []
    for crash_at in (5, None):

        @ckpt.resilient(store=str(tmp_path / "run"), every=1)
        def train(run: ckpt.Run, crash_at: int | None = crash_at) -> None:
            model, optimizer = make()
            run.track(model=model, optimizer=optimizer)
            for number in run.steps(10):
                if number == crash_at:
                    raise InterruptedError
                del losses[number:]
                losses.append(step(model, optimizer))

        if crash_at is None:
            train()
        else:
            with pytest.raises(InterruptedError):
                train()
    model, optimizer = make()
    assert losses == [step(model, optimizer) for _ in range(10)]


def test_pinning_happens_in_the_background(stages: list[Stage]) -> None:
    threads: list[str] = []

    class Watched(HostCopies):
        def pin(self, slot: Slot) -> None:
            threads.append(threading.current_thread().name)
            super().pin(slot)

    stages.append(Stage(torch.ones(1024, device="cuda"), copies=Watched()))
    stages[0].pool.wait_prefaulted()
    stages[0].run()
    assert set(threads) == {"ckpt-prefault"}
