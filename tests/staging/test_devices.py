"""Copies from devices, against CUDA calls of a test: what is staged is what the step left, and what
goes wrong on a device harms nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit.cuda_calls import FakeCalls, FakeCuda, FakeStream

from ckpt.capture.leaves import World
from ckpt.errors import UnavailableError
from ckpt.session.staging import StagedSlot, Stager
from ckpt.staging.copy import CopyPlan, CopySource
from ckpt.staging.devices import CudaCalls, HostCopies, _loaded_runtime
from ckpt.staging.slot import Slot, SlotPool
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedShard

DATA = 1 << 20


def source(name: str, tensor: torch.Tensor) -> CopySource:
    shape = tuple(tensor.shape)
    return CopySource(
        Leaf(name=name, kind=LeafKind.TENSOR, dtype="float32", shape=shape),
        Box.whole(shape),
        tensor,
    )


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def copies(cuda: FakeCuda) -> HostCopies:
    return HostCopies(FakeCalls(cuda))


@pytest.fixture
def pool(copies: HostCopies) -> Iterator[SlotPool]:
    made = SlotPool(count=2, data_bytes=DATA, pinner=copies)
    yield made
    made.close()


def staged(slot: Slot, shard: StagedShard) -> list[float]:
    data = slot.data[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]
    return torch.frombuffer(data, dtype=torch.float32).tolist()


def run(pool: SlotPool, copies: HostCopies, *sources: CopySource) -> list[list[float]]:
    slot = pool.acquire()
    assert slot is not None
    slot.begin()
    try:
        return [staged(slot, shard) for shard in CopyPlan.build(sources, copies).run(slot)]
    finally:
        slot.invalidate()


def test_host_tensor_with_a_copy_in_flight_is_staged_as_it_will_be(
    cuda: FakeCuda, copies: HostCopies, pool: SlotPool
) -> None:
    cuda.opened.add(1)
    host = torch.zeros(4)
    cuda.Stream(torch.device("cuda", 1)).launch(lambda: host.fill_(7.0))
    assert run(pool, copies, source("host", host)) == [[7.0] * 4]
    assert cuda.opened == {1}


def test_state_of_an_object_with_a_copy_in_flight_is_staged_as_it_will_be(cuda: FakeCuda) -> None:
    values = torch.zeros(2)

    class Counter:
        def state_dict(self) -> dict[str, object]:
            return {"values": values.tolist()}

        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            raise AssertionError("not reached")

    cuda.opened.add(0)
    cuda.current_stream(torch.device("cuda", 0)).launch(lambda: values.fill_(3.0))
    stager = Stager(
        World(0, 1),
        slots=1,
        threads=1,
        compare_replicas=lambda leaves: None,
        copies=HostCopies(FakeCalls(cuda)),
    )
    staged_slot = stager.stage({"c": Counter()}, SnapshotId(1, 1), metadata={}, wait_s=0.0)
    (shard,) = staged_slot.index.shards
    assert (
        bytes(staged_slot.slot.data[shard.offset_bytes :][: shard.size_bytes]).count(b"\x40\x08")
        == 2
    )
    staged_slot.release()
    stager.close()


def test_skip_for_want_of_a_slot_waits_for_no_device(
    cuda: FakeCuda, copies: HostCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[int] = []
    monkeypatch.setattr(copies, "settle", lambda: settled.append(1))
    stager = Stager(
        World(0, 1),
        slots=1,
        threads=1,
        compare_replicas=lambda leaves: None,
        copies=copies,
    )

    def stage(step: int) -> StagedSlot:
        return stager.stage({"n": {"step": step}}, SnapshotId(1, step), metadata={}, wait_s=0.0)

    first = stage(1)
    del settled[:]
    for step in (2, 3):
        with pytest.raises(UnavailableError, match="all slots are held"):
            stage(step)
    assert settled == []
    first.release()
    stage(4).release()
    assert settled
    stager.close()


def test_skip_compares_a_new_set_of_replicas_which_other_ranks_wait_for(
    copies: HostCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    stager = Stager(
        World(0, 1), slots=1, threads=1, compare_replicas=lambda leaves: None, copies=copies
    )
    laid_out: list[int] = []
    layout = stager._layout
    monkeypatch.setattr(stager, "_layout", lambda capture: (laid_out.append(1), layout(capture))[1])
    held = stager.stage({"n": {"step": 1}}, SnapshotId(1, 1), metadata={}, wait_s=0.0)
    del laid_out[:]
    with pytest.raises(UnavailableError):
        stager.stage({"n": {"step": 2}}, SnapshotId(1, 2), metadata={}, wait_s=0.0)
    assert laid_out == [1]
    held.release()
    stager.close()


def test_state_that_grew_while_its_only_slot_was_held_is_staged_once_that_is_free(
    copies: HostCopies,
) -> None:
    stager = Stager(
        World(0, 1), slots=1, threads=1, compare_replicas=lambda leaves: None, copies=copies
    )
    held = stager.stage({"t": torch.ones(4)}, SnapshotId(1, 1), metadata={}, wait_s=0.0)
    large = {"t": torch.ones(1 << 20)}
    grown = stager.stage(large, SnapshotId(1, 2), metadata={}, wait_s=0.0)
    with pytest.raises(UnavailableError):
        stager.stage(large, SnapshotId(1, 3), metadata={}, wait_s=0.0)
    held.release()
    grown.release()
    stager.stage(large, SnapshotId(1, 4), metadata={}, wait_s=0.0).release()
    stager.close()


def test_device_tensor_is_staged_after_the_work_of_all_streams(
    cuda: FakeCuda, copies: HostCopies, pool: SlotPool
) -> None:
    default, other = cuda.on(0, torch.zeros(4)), cuda.on(1, torch.zeros(2))
    cuda.current_stream(torch.device("cuda", 0)).launch(lambda: default.fill_(1.0))
    cuda.Stream(torch.device("cuda", 1)).launch(lambda: other.fill_(2.0))
    host = torch.full((3,), 3.0)
    found = run(pool, copies, source("a", default), source("h", host), source("b", other))
    assert found == [[1.0] * 4, [3.0] * 3, [2.0] * 2]


def test_after_one_device_failed_no_other_writes_to_the_slot(
    cuda: FakeCuda, copies: HostCopies, pool: SlotPool
) -> None:
    tensors = [cuda.on(0, torch.ones(4)), cuda.on(1, torch.ones(4))]
    plan = CopyPlan.build([source(str(i), tensor) for i, tensor in enumerate(tensors)], copies)
    slot = pool.acquire()
    assert slot is not None
    slot.begin()

    # The device breaks after everything was queued.
    with (
        pytest.raises(RuntimeError, match="unspecified launch failure"),
        copies.running(
            (tensor, torch.frombuffer(slot.data, dtype=torch.float32, count=4))
            for tensor in tensors
        ),
    ):
        cuda.broken.add(torch.device("cuda", 0))
    assert [stream.device for stream in cuda.streams if stream.queue] == []

    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        plan.run(slot)
    assert [stream.device for stream in cuda.streams if stream.queue] == []
    slot.invalidate()


class Cramped(FakeCalls):
    """A device with room for few elements: what is not contiguous has to be made so there."""

    room = 6

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        if not source.is_contiguous() and source.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().copy(target, source, stream)


@pytest.mark.parametrize("shape", [(7, 5), (1, 40), (3, 2, 9)])
def test_tensor_for_whose_contiguous_copy_there_is_no_room_is_staged_in_pieces(
    cuda: FakeCuda, shape: tuple[int, ...]
) -> None:
    base = torch.arange(2.0 * math.prod(shape)).reshape(*reversed(shape), 2)
    tensor = cuda.on(0, base)[..., 0].permute(*reversed(range(len(shape))))
    copies = HostCopies(Cramped(cuda))
    pool = SlotPool(count=1, data_bytes=DATA, prefault=False)
    assert run(pool, copies, source("t", tensor)) == [tensor.flatten().tolist()]
    pool.close()


def test_device_without_any_room_fails_the_stage(cuda: FakeCuda) -> None:
    class Full(FakeCalls):
        def copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pool = SlotPool(count=1, data_bytes=DATA, prefault=False)
    with pytest.raises(torch.OutOfMemoryError):
        run(pool, HostCopies(Full(cuda)), source("t", cuda.on(0, torch.ones(4))))
    pool.close()


def test_slots_are_pinned_in_the_background_on_the_device_of_the_state(
    cuda: FakeCuda, copies: HostCopies
) -> None:
    copies.expect([torch.zeros(1), cuda.on(1, torch.zeros(1))])
    pool = SlotPool(count=2, data_bytes=DATA, pinner=copies)
    pool.wait_prefaulted()
    assert [device.index for _, device in cuda.registered.values()] == [1, 1]
    assert set(cuda.register_threads) == {"ckpt-prefault"}
    assert cuda.opened == {1}, "no other device was opened"
    pool.close()
    assert cuda.registered == {}
    cuda.check()


def test_state_that_moves_to_a_device_later_has_its_slots_pinned_then(
    cuda: FakeCuda, copies: HostCopies, pool: SlotPool
) -> None:
    pool.wait_prefaulted()
    assert cuda.registered == {}
    copies.expect([cuda.on(0, torch.zeros(1))])
    pool.warm()
    pool.wait_prefaulted()
    assert len(cuda.registered) == 2
    pool.warm()
    pool.wait_prefaulted()
    assert len(cuda.register_threads) == 2, "each once"


def test_refused_pinning_is_told_once_leaves_no_error_and_copies_go_on() -> None:
    cuda = FakeCuda(lockable_bytes=DATA)
    told: list[str] = []
    errors: list[int] = []

    class Watched(HostCopies):
        def pin(self, slot: Slot) -> None:
            super().pin(slot)
            errors.append(cuda.cudaGetLastError())

    copies = Watched(FakeCalls(cuda), on_slow=told.append)
    tensor = cuda.on(0, torch.full((4,), 5.0))
    copies.expect([tensor])
    pool = SlotPool(count=3, data_bytes=DATA, pinner=copies)
    pool.wait_prefaulted()
    assert told == ["code=2 error=out of memory"]
    assert errors == [0, 0, 0]
    assert len(cuda.registered) == 1
    assert run(pool, copies, source("t", tensor)) == [[5.0] * 4]
    pool.close()
    cuda.check()


def test_failed_unpinning_leaves_no_error(cuda: FakeCuda) -> None:
    FakeCalls(cuda).unregister(torch.device("cuda", 0), 4096)
    cuda.check()


def test_pinning_does_not_break_a_graph_that_is_captured_meanwhile(
    cuda: FakeCuda, copies: HostCopies
) -> None:
    copies.expect([cuda.on(0, torch.zeros(1))])
    cuda.capturing = True
    pool = SlotPool(count=1, data_bytes=DATA, pinner=copies)
    pool.wait_prefaulted()
    pool.close()
    assert len(cuda.register_threads) == 1
    assert not cuda.capture_broken


def test_runtime_that_is_not_found_is_done_without(cuda: FakeCuda) -> None:
    calls = FakeCalls(cuda, runtime=object())
    assert calls.register(torch.device("cuda", 0), 4096, 4096) == ""
    calls.unregister(torch.device("cuda", 0), 4096)


def test_loaded_runtime_is_the_library_that_is_mapped(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r--p 00000000 00:00 0 \n7f02-7f03 r-xp 0 08:01 7   /lib/other.so\n")
    assert getattr(_loaded_runtime("libcudart", maps=maps), "cudaGetLastError", None) is None
    missing = _loaded_runtime("libcudart", maps=tmp_path / "none")
    assert getattr(missing, "cudaGetLastError", None) is None
    found = _loaded_runtime("libc.so")
    assert callable(getattr(found, "getpid", None))


def test_without_cuda_nothing_of_it_is_called(cuda: FakeCuda) -> None:
    cuda.initialized = False
    copies = HostCopies(FakeCalls(cuda))
    pool = SlotPool(count=1, data_bytes=DATA, pinner=copies)
    assert run(pool, copies, source("t", torch.ones(2))) == [[1.0, 1.0]]
    pool.wait_prefaulted()
    pool.close()
    assert (cuda.opened, cuda.registered, cuda.register_threads) == (set(), {}, [])


def test_real_calls_open_no_device_in_a_process_without_cuda() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use in this process")
    HostCopies(CudaCalls()).settle()
    assert CudaCalls().device_of(torch.zeros(1)) is None
    assert not torch.cuda.is_initialized()
