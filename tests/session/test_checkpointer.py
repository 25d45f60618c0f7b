"""The public face without the decorator: saving and restoring, and how it ends, in one process."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.log.journal import Journal
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.values import SnapshotId


class GatedBackend(MemoryBackend):
    """A store whose packs wait until the gate opens."""

    def __init__(self) -> None:
        super().__init__("gated")
        self.gate = threading.Event()

    def put(self, key, data, *, create_only: bool = False) -> None:
        """See Backend."""
        if key.startswith("packs/"):
            assert self.gate.wait(30)
        super().put(key, data, create_only=create_only)


def _trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _same(a: object, b: object) -> bool:
    match a:
        case torch.Tensor():
            return torch.equal(a, b) and a.dtype == b.dtype
        case dict():
            return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
        case list() | tuple():
            return len(a) == len(b) and all(map(_same, a, b))
    return a == b


# --- save and restore -------------------------------------------------------------------------------------------------


def test_saved_state_comes_back_bit_for_bit_in_another_process_of_the_same_program(
    tmp_path: Path,
) -> None:
    model, optimizer = _trained()
    with ckpt.Checkpointer(str(tmp_path / "run")) as c:
        info = c.save(
            {"model": model, "optimizer": optimizer, "extra": {"best": 0.25, "names": ["a"]}},
            step=3,
        )
    assert (info.step, info.epoch, info.world_size) == (3, 1, 1)
    fresh, fresh_optimizer = _trained(seed=1, steps=0)
    extra: dict[str, object] = {"best": 0.0, "names": []}
    with ckpt.Checkpointer(str(tmp_path / "run")) as c:
        restored = c.restore({"model": fresh, "optimizer": fresh_optimizer, "extra": extra})
    assert restored.id == info.id
    assert _same(fresh.state_dict(), model.state_dict())
    assert _same(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert extra == {"best": 0.25, "names": ["a"]}


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_tensors_changed_right_after_save_async_are_never_mixed_into_it(slots: int) -> None:
    store = MemoryBackend()
    state = {"t": torch.zeros(300_000), "u": torch.zeros(17, dtype=torch.int64)}
    with ckpt.Checkpointer(store, slots=slots) as c:
        pendings = []
        for step in range(1, 9):
            state["t"].fill_(step)
            state["u"].fill_(-step)
            pendings.append(c.save_async(state, step=step))
        state["t"].fill_(math.nan)
        assert [pending.durable().step for pending in pendings] == list(range(1, 9))
        for step in range(1, 9):
            got = {"t": torch.empty(300_000), "u": torch.empty(17, dtype=torch.int64)}
            c.restore(got, step=step)
            assert torch.equal(got["t"], torch.full((300_000,), float(step)))
            assert torch.equal(got["u"], torch.full((17,), -step))


@pytest.mark.parametrize("slots", [1, 2])
def test_save_while_another_is_in_flight_is_queued_up_to_the_slots(slots: int) -> None:
    store = GatedBackend()
    c = ckpt.Checkpointer(store, slots=slots)
    tensor = torch.zeros(64)
    pendings = [c.save_async({"t": tensor.fill_(step)}, step=step) for step in range(1, slots + 1)]
    assert not any(pending.done() for pending in pendings)
    one_more = threading.Thread(
        target=lambda: pendings.append(c.save_async({"t": tensor.fill_(99)}, step=99))
    )
    one_more.start()
    one_more.join(0.05)
    assert one_more.is_alive()
    store.gate.set()
    one_more.join(20)
    assert [pending.durable(20).step for pending in pendings] == [*range(1, slots + 1), 99]
    got = torch.empty(64)
    c.restore({"t": got}, step=1)
    assert torch.equal(got, torch.ones(64))
    c.close()


def test_restore_of_an_older_step_makes_the_line_go_on_from_there() -> None:
    store = MemoryBackend()
    state = {"t": torch.zeros(4)}
    with ckpt.Checkpointer(store) as c:
        for step in (1, 2, 3):
            state["t"].fill_(step)
            c.save(state, step=step)
        assert c.latest().id == ckpt.SnapshotId(1, 3)
        c.restore(state, step=1)
        assert torch.equal(state["t"], torch.ones(4))
        assert c.latest().id == ckpt.SnapshotId(1, 3), "reading alone changes nothing"
        state["t"].fill_(20)
        info = c.save(state, step=2)
        assert info.id == ckpt.SnapshotId(2, 2)
        assert c.latest().id == ckpt.SnapshotId(2, 2)
        assert [snapshot.id for snapshot in c.snapshots()] == [
            ckpt.SnapshotId(1, 1),
            ckpt.SnapshotId(1, 2),
            ckpt.SnapshotId(1, 3),
            ckpt.SnapshotId(2, 2),
        ]
        c.restore(state, step=2)
        assert torch.equal(state["t"], torch.full((4,), 20.0))
        c.restore(state, step=3, epoch=1)
        assert torch.equal(state["t"], torch.full((4,), 3.0)), "off the line, but readable by name"
        with pytest.raises(ckpt.NotFoundError, match="nearest_steps=1, 2"):
            c.restore(state, step=3)


def test_second_checkpointer_goes_on_from_the_newest_and_fences_the_first() -> None:
    store = MemoryBackend()
    first = ckpt.Checkpointer(store)
    first.save({"x": {"v": 1}}, step=1)
    second = ckpt.Checkpointer(store)
    assert second.save({"x": {"v": 2}}, step=2).epoch == 2
    with pytest.raises(ckpt.FencedError):
        first.save({"x": {"v": 3}}, step=3)
    with pytest.raises(ckpt.FencedError):
        first.save_async({"x": {"v": 3}}, step=4)
    with pytest.raises(ckpt.FencedError):
        first.close()
    assert second.latest().step == 2
    second.close()


def test_snapshot_that_comes_while_another_is_chosen_is_gone_on_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryBackend()
    first, second = ckpt.Checkpointer(store), ckpt.Checkpointer(store)
    first.save({"t": torch.zeros(3)}, step=1)
    steps = iter([2, 3])
    real = second._session.newest_first

    def overtaken():  # whoever was before lands one more, after the choice was read
        found = real()
        if (step := next(steps, None)) is not None:
            first.save({"t": torch.full((3,), float(step))}, step=step)
        return found

    monkeypatch.setattr(second._session, "newest_first", overtaken)
    with caplog.at_level("INFO", logger="ckpt"):
        info = second.save({"t": torch.full((3,), 9.0)}, step=4)
    assert (info.epoch, info.step) == (2, 4)
    assert [record.getMessage().count("choose again") for record in caplog.records].count(1) == 2
    newest = Journal.open(store).refresh()
    assert newest.opens[-1].resume == SnapshotId(1, 3), "nothing that was durable is left behind"
    assert [one.step for one in newest.lineage] == [4, 3, 2, 1]
    with pytest.raises(ckpt.FencedError):
        first.save({"t": torch.zeros(3)}, step=5)
    second.close()


def test_choice_that_is_overtaken_every_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryBackend()
    first, second = ckpt.Checkpointer(store), ckpt.Checkpointer(store)
    first.save({"t": torch.zeros(3)}, step=1)
    real = second._session.newest_first
    steps = iter(range(2, 100))

    def overtaken():
        found = real()
        first.save({"t": torch.zeros(3)}, step=next(steps))
        return found

    monkeypatch.setattr(second._session, "newest_first", overtaken)
    with pytest.raises(ckpt.ConflictError, match="choose again"):
        second.save({"t": torch.ones(3)}, step=200)
    assert first.save({"t": torch.zeros(3)}, step=300).epoch == 1, "who goes on was not fenced"
    first.close()


def test_fenced_checkpointer_can_take_over_again_by_restoring() -> None:
    store = MemoryBackend()
    first = ckpt.Checkpointer(store)
    first.save({"x": {"v": 1}}, step=1)
    with ckpt.Checkpointer(store) as second:
        second.save({"x": {"v": 2}}, step=2)
    with pytest.raises(ckpt.FencedError):
        first.save({"x": {"v": 3}}, step=3)
    state = {"x": {"v": 0}}
    first.restore(state)
    assert state == {"x": {"v": 2}}
    assert first.save({"x": {"v": 3}}, step=3).id == ckpt.SnapshotId(3, 3)
    first.close()


def test_steps_grow_until_an_older_snapshot_is_restored() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"x": {"v": 1}}, step=5)
        with pytest.raises(ckpt.UsageError, match="restore the older snapshot first"):
            c.save({"x": {"v": 1}}, step=5)
        c.restore({"x": {"v": 1}}, step=5)
        assert c.save({"x": {"v": 1}}, step=5).epoch == 2


def test_step_zero_is_a_step() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        assert c.save({"x": {"v": 1}}, step=0).step == 0
        assert c.latest().step == 0


def test_failed_save_reaches_the_saver_and_the_next_one_works() -> None:
    store = FaultyBackend(MemoryBackend(), [Fault(harm=Harm.FULL, op="put", key="packs/")])
    with ckpt.Checkpointer(store) as c:
        with pytest.raises(ckpt.StoreFullError):
            c.save({"x": {"v": 1}}, step=1)
        assert c.latest() is None
        assert c.save({"x": {"v": 1}}, step=2).step == 2


def test_unchanged_tensors_cost_no_new_bytes_also_after_a_restart() -> None:
    store = MemoryBackend()
    frozen = torch.randn(100_000)
    state = {"s": {"w": frozen, "n": 0}}
    with ckpt.Checkpointer(store) as c:
        c.save(state, step=1)
        state["s"]["n"] = 1
        assert c.save(state, step=2).new_bytes < 10_000
    with ckpt.Checkpointer(store) as c:
        c.restore(state)
        state["s"]["n"] = 2
        info = c.save(state, step=3)
        assert info.new_bytes < 10_000
        assert info.size_bytes >= frozen.nbytes


def test_after_a_partial_restore_nothing_unread_is_referred_to() -> None:
    store = MemoryBackend()
    state = {"a": torch.randn(50_000), "b": torch.randn(50_000)}
    with ckpt.Checkpointer(store) as c:
        c.save(state, step=1)
    with ckpt.Checkpointer(store) as c:
        c.restore(state, only=["a"])
        assert c.save(state, step=2).new_bytes > 100_000


def test_damaged_newest_falls_back_with_a_warning_and_saves_go_on_from_the_older_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryBackend()
    state = {"t": torch.zeros(1000)}
    with ckpt.Checkpointer(store) as c:
        for step in (1, 2):
            state["t"].fill_(step)
            c.save(state, step=step)
    _flip_middle(store, 2)
    with ckpt.Checkpointer(store) as c:
        info = c.restore(state)
        assert info.step == 1
        assert torch.equal(state["t"], torch.ones(1000))
        assert any("restoring the older one" in record.message for record in caplog.records)
        assert c.save(state, step=2).id == ckpt.SnapshotId(2, 2)
        assert [pair.id for pair in c.snapshots() if pair.id == c.latest().id] == [
            ckpt.SnapshotId(2, 2)
        ]


def test_explicit_step_that_is_damaged_is_an_error() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        for step in (1, 2):
            c.save({"t": torch.full((1000,), float(step))}, step=step)
        _flip_middle(store, 2)
        with pytest.raises(ckpt.IntegrityError):
            c.restore({"t": torch.zeros(1000)}, step=2)
        assert c.restore({"t": torch.zeros(1000)}, step=1).step == 1


# --- ends -------------------------------------------------------------------------------------------------------------


def test_close_makes_everything_durable_and_twice_is_free(tmp_path: Path) -> None:
    c = ckpt.Checkpointer(str(tmp_path / "run"))
    pending = c.save_async({"t": torch.ones(1000)}, step=1)
    c.close()
    assert pending.done()
    assert pending.durable().step == 1
    c.close()


def test_close_raises_what_kept_the_last_snapshot_from_durable_once() -> None:
    store = FaultyBackend(
        MemoryBackend(), [Fault(harm=Harm.FULL, op="put", key="packs/", times=None)]
    )
    c = ckpt.Checkpointer(store)
    c.save_async({"x": {"v": 1}}, step=1)
    with pytest.raises(ckpt.StoreFullError):
        c.close()


def test_use_after_close_is_refused_with_the_remedy(tmp_path: Path) -> None:
    c = ckpt.Checkpointer(str(tmp_path / "run"))
    c.save({"x": {"v": 1}}, step=1)
    c.close()
    with pytest.raises(ckpt.UsageError, match="closed already; make a new one"):
        c.save({"x": {"v": 1}}, step=2)
    with pytest.raises(ckpt.UsageError, match="closed already; make a new one"):
        c.restore({"x": {"v": 1}})


def test_context_left_by_an_exception_passes_it_on_and_keeps_what_was_staged(
    tmp_path: Path,
) -> None:
    with pytest.raises(ZeroDivisionError), ckpt.Checkpointer(str(tmp_path / "run")) as c:
        pending = c.save_async({"t": torch.ones(1000)}, step=1)
        raise ZeroDivisionError
    assert pending.durable().step == 1
    with ckpt.Checkpointer(str(tmp_path / "run")) as c:
        assert c.latest().step == 1


def test_context_left_by_an_exception_before_any_call_passes_it_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ckpt.Checkpointer(str(tmp_path / "run")):
        raise ZeroDivisionError


def test_exception_in_the_context_is_not_replaced_by_a_failing_store() -> None:
    store = FaultyBackend(MemoryBackend(), [Fault(harm=Harm.DENIED, times=None)])
    with pytest.raises(ZeroDivisionError), ckpt.Checkpointer(store) as c:
        with pytest.raises(ckpt.StoreDeniedError):
            c.save({"x": {"v": 1}}, step=1)
        raise ZeroDivisionError


def test_dropped_pending_loses_nothing() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        c.save_async({"t": torch.ones(10)}, step=1)
        c.save_async({"t": torch.ones(10)}, step=2)
    with ckpt.Checkpointer(store) as c:
        assert [info.step for info in c.snapshots()] == [1, 2]


def test_store_given_as_an_object_stays_open_for_its_owner() -> None:
    class Closing(MemoryBackend):
        closed = False

        def close(self) -> None:
            self.closed = True

    store = Closing()
    with ckpt.Checkpointer(store) as c:
        c.save({"x": {"v": 1}}, step=1)
    assert not store.closed


def _flip_middle(store: MemoryBackend, step: int) -> None:
    """Flip one stored bit of the tensor ``t`` of that step."""
    from_log = ckpt.Checkpointer(store)
    index = from_log._index(step, None, None)
    place = next(shard.locations[0] for shard in index.parts[0].shards if shard.leaf.name == "t")
    body, when = store._objects[place.pack]
    changed = bytearray(body)
    changed[place.offset_bytes + place.stored_bytes // 2] ^= 4
    store._objects[place.pack] = (bytes(changed), when)
