"""The public face without the decorator: what users call, in one process."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm


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


def test_saved_state_comes_back_bit_for_bit_in_another_process_of_the_same_program(tmp_path: Path) -> None:
    model, optimizer = _trained()
    with ckpt.Checkpointer(str(tmp_path / "run")) as c:
        info = c.save({"model": model, "optimizer": optimizer, "extra": {"best": 0.25, "names": ["a"]}}, step=3)
    assert (info.step, info.epoch, info.world_size) == (3, 1, 1)
    fresh, fresh_optimizer = _trained(seed=1, steps=0)
    extra: dict[str, object] = {"best": 0.0, "names": []}
    with ckpt.Checkpointer(str(tmp_path / "run")) as c:
        restored = c.restore({"model": fresh, "optimizer": fresh_optimizer, "extra": extra})
    assert restored.id == info.id
    assert _same(fresh.state_dict(), model.state_dict())
    assert _same(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert extra == {"best": 0.25, "names": ["a"]}


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
    one_more = threading.Thread(target=lambda: pendings.append(c.save_async({"t": tensor.fill_(99)}, step=99)))
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
        assert [pair.id for pair in c.snapshots() if pair.id == c.latest().id] == [ckpt.SnapshotId(2, 2)]


def test_explicit_step_that_is_damaged_is_an_error() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        for step in (1, 2):
            c.save({"t": torch.full((1000,), float(step))}, step=step)
        _flip_middle(store, 2)
        with pytest.raises(ckpt.IntegrityError):
            c.restore({"t": torch.zeros(1000)}, step=2)
        assert c.restore({"t": torch.zeros(1000)}, step=1).step == 1


# --- tags, metadata, listing ------------------------------------------------------------------------------------------


def test_tag_moves_to_the_snapshot_that_got_it_last() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"x": {"v": 1}}, step=1, tag="best")
        assert c.save({"x": {"v": 2}}, step=2).tags == ()
        assert [info.tags for info in c.snapshots()] == [("best",), ()]
        assert c.save({"x": {"v": 3}}, step=3, tag="best").tags == ("best",)
        assert [info.tags for info in c.snapshots()] == [(), (), ("best",)]
        state = {"x": {"v": 0}}
        c.save({"x": {"v": 4}}, step=4)
        assert c.restore(state, tag="best").step == 3
        assert state == {"x": {"v": 3}}


def test_unknown_tag_lists_the_tags_there_are() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"x": {"v": 1}}, step=1, tag="best")
        with pytest.raises(ckpt.NotFoundError, match="tag='bets' tags='best'"):
            c.restore({"x": {"v": 1}}, tag="bets")


def test_unknown_step_lists_the_nearest_ones() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        for step in (10, 20, 30, 40, 50, 60, 70):
            c.save({"x": {"v": step}}, step=step)
        with pytest.raises(ckpt.NotFoundError, match=r"step=44 nearest_steps=20, 30, 40, 50, 60"):
            c.restore({"x": {"v": 1}}, step=44)
        with pytest.raises(ckpt.NotFoundError, match=r"step=44 nearest_steps"):
            c.read("x", step=44)
        with pytest.raises(ckpt.NotFoundError, match=r"step=44 nearest_steps"):
            c.verify(step=44)


def test_metadata_travels_with_the_snapshot_including_values_that_are_no_numbers() -> None:
    metadata = {"loss": math.nan, "lr": math.inf, "low": -math.inf, "n": 2**62, "ok": True, "who": "ü\n", "none": None}
    with ckpt.Checkpointer(MemoryBackend()) as c:
        saved = c.save({"x": {"v": 1}}, step=1, metadata=metadata)
        for info in (saved, c.latest(), c.snapshots()[0]):
            assert info.metadata.keys() == metadata.keys()
            assert math.isnan(info.metadata["loss"])
            assert {k: v for k, v in info.metadata.items() if k != "loss"} == {
                k: v for k, v in metadata.items() if k != "loss"
            }
            assert info.metadata["ok"] is True


@pytest.mark.parametrize(
    "metadata", [{"x": [1]}, {"x": torch.ones(1)}, {1: "x"}, {"x": 2**70}, {"x": b"bytes"}, {"x": "a" * (2 << 20)}]
)
def test_metadata_that_can_not_be_stored_is_refused_at_the_call(metadata: dict) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError):
        c.save_async({"x": {"v": 1}}, step=1, metadata=metadata)
    assert c.save({"x": {"v": 1}}, step=2).step == 2
    c.close()


def test_metadata_changed_after_the_call_is_stored_as_it_was() -> None:
    store = GatedBackend()
    c = ckpt.Checkpointer(store)
    metadata = {"loss": 1.0}
    pending = c.save_async({"x": {"v": 1}}, step=1, metadata=metadata)
    metadata["loss"] = 2.0
    store.gate.set()
    assert pending.durable(20).metadata == {"loss": 1.0}
    c.close()


def test_empty_store_has_no_latest_and_no_snapshots_and_is_not_touched(tmp_path: Path) -> None:
    c = ckpt.Checkpointer(str(tmp_path / "run"))
    assert c.latest() is None
    assert c.snapshots() == ()
    with pytest.raises(ckpt.NotFoundError):
        c.restore({"x": {"v": 1}})
    with pytest.raises(ckpt.NotFoundError):
        c.read("x")
    with pytest.raises(ckpt.NotFoundError):
        c.verify()
    assert not (tmp_path / "run" / "ckpt.json").exists()
    c.close()


def test_making_one_touches_nothing(tmp_path: Path) -> None:
    store = CountingBackend(MemoryBackend())
    ckpt.Checkpointer(store).close()
    ckpt.Checkpointer(str(tmp_path / "run")).close()
    assert store.calls() == []
    assert list(tmp_path.iterdir()) == []


# --- read and verify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_rows_of_one_tensor_are_read_without_the_rest(dtype: torch.dtype) -> None:
    store = CountingBackend(MemoryBackend())
    table = (torch.arange(4000 * 700) % 251).reshape(4000, 700).to(dtype)
    with ckpt.Checkpointer(store, compression="off") as c:
        c.save({"emb": {"table": table}, "other": torch.randn(100_000)}, step=1)
        store.forget()
        got = c.read("emb/table", rows=slice(1000, 1010))
        assert got.dtype == dtype
        assert torch.equal(got, table[1000:1010])
        assert store.size_bytes("read_into", prefix="packs/") <= 2 * (4 << 20) + 4096
        assert torch.equal(c.read("emb/table"), table)
        assert torch.equal(c.read("emb/table", rows=slice(-3, None)), table[-3:])
        assert torch.equal(c.read("emb/table", rows=slice(5, 5)), table[5:5])
        assert torch.equal(c.read("emb/table", rows=slice(0, 10**9)), table)


def test_scalars_and_empty_tensors_are_read() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"t": {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7)}}, step=1)
        assert torch.equal(c.read("t/scalar"), torch.tensor(3.5))
        assert c.read("t/empty").shape == (0, 7)


def test_reading_names_close_matches() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"model": nn.Linear(3, 3)}, step=1)
        with pytest.raises(ckpt.NotFoundError, match="model/weight"):
            c.read("model/wieght")


def test_read_picks_step_tag_and_epoch() -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        for step in (1, 2, 3):
            c.save({"t": torch.full((2,), float(step))}, step=step, tag="one" if step == 1 else None)
        assert c.read("t")[0] == 3
        assert c.read("t", step=2)[0] == 2
        assert c.read("t", tag="one")[0] == 1
        assert c.read("t", epoch=1)[0] == 3


def test_verify_reports_a_flipped_byte_and_only_it() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        for step in (1, 2):
            c.save({"t": torch.full((1000,), float(step))}, step=step)
        assert c.verify().ok
        _flip_middle(store, 2)
        report = c.verify()
        assert not report.ok
        assert c.verify(step=1).ok


# --- ends -------------------------------------------------------------------------------------------------------------


def test_close_makes_everything_durable_and_twice_is_free(tmp_path: Path) -> None:
    c = ckpt.Checkpointer(str(tmp_path / "run"))
    pending = c.save_async({"t": torch.ones(1000)}, step=1)
    c.close()
    assert pending.done()
    assert pending.durable().step == 1
    c.close()


def test_close_raises_what_kept_the_last_snapshot_from_durable_once() -> None:
    store = FaultyBackend(MemoryBackend(), [Fault(harm=Harm.FULL, op="put", key="packs/", times=None)])
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


def test_context_left_by_an_exception_passes_it_on_and_keeps_what_was_staged(tmp_path: Path) -> None:
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


# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_store_of_another_job_is_refused() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, job="mine") as c:
        c.save({"x": {"v": 1}}, step=1)
    other = ckpt.Checkpointer(store, job="yours")
    with pytest.raises(ckpt.UsageError, match="mine"):
        other.save({"x": {"v": 1}}, step=2)


def test_store_whose_folder_was_renamed_is_still_the_same_job(tmp_path: Path) -> None:
    with ckpt.Checkpointer(str(tmp_path / "old")) as c:
        c.save({"x": {"v": 1}}, step=1)
    (tmp_path / "old").rename(tmp_path / "new")
    with ckpt.Checkpointer(str(tmp_path / "new")) as c:
        assert c.save({"x": {"v": 2}}, step=2).epoch == 2


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None])
def test_step_that_is_no_count_is_refused(step: object) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError, match="whole number from 0 on"):
        c.save_async({"x": {"v": 1}}, step=step)


def test_step_beyond_what_names_can_hold_is_refused_at_the_call() -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError):
        c.save({"x": {"v": 1}}, step=10**15)


@pytest.mark.parametrize("tag", ["", " a", "a ", "x" * 129, "a\nb", 7, "\x00"])
def test_tag_that_can_not_name_a_snapshot_is_refused(tag: object) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError, match="a tag is 1 to 128 printable"):
        c.save_async({"x": {"v": 1}}, step=1, tag=tag)


@pytest.mark.parametrize("state", [{}, None, [1], "state", nn.Linear(2, 2), {1: torch.ones(2)}, {"": torch.ones(2)}])
def test_state_that_is_no_dict_of_names_is_refused(state: object) -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError):
        c.save(state, step=1)


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 0}, {"slots": 65}, {"slots": True}, {"slots": "2"}, {"threads": 0}, {"compression": "lz4"}, {"job": ""},
        {"job": 7},
    ],
)  # fmt: skip
def test_options_that_can_not_work_are_refused_when_it_is_made(options: dict) -> None:
    with pytest.raises(ckpt.UsageError):
        ckpt.Checkpointer(MemoryBackend(), **options)


@pytest.mark.parametrize("store", [None, 7, "", b"runs/x"])
def test_store_that_is_no_address_is_refused(store: object) -> None:
    with pytest.raises(ckpt.UsageError):
        ckpt.Checkpointer(store)


def test_path_object_is_an_address(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path / "run") as c:
        assert c.save({"x": {"v": 1}}, step=1).step == 1


@pytest.mark.parametrize("only", ["model", b"model"])
def test_only_as_one_text_is_refused_with_the_remedy(only: object) -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"model": {"v": 1}}, step=1)
        with pytest.raises(ckpt.UsageError, match="only"):
            c.restore({"model": {"v": 1}}, only=only)


@pytest.mark.parametrize("choice", [{"step": "7"}, {"step": -1}, {"tag": 7}, {"epoch": "x"}, {"tag": "a", "step": 1}])
def test_choice_that_can_not_be_meant_is_an_error_of_ours(choice: dict) -> None:
    with ckpt.Checkpointer(MemoryBackend()) as c:
        c.save({"x": {"v": 1}}, step=1)
        with pytest.raises(ckpt.CkptError):
            c.restore({"x": {"v": 1}}, **choice)


def test_missing_is_one_of_two_words() -> None:
    with pytest.raises(ckpt.UsageError, match="missing is 'error' or 'keep'"):
        ckpt.Checkpointer(MemoryBackend()).restore({"x": {"v": 1}}, missing="ignore")


def test_what_can_not_be_captured_is_named_with_its_place() -> None:
    c = ckpt.Checkpointer(MemoryBackend())
    with pytest.raises(ckpt.UsageError, match="x/deep"):
        c.save({"x": {"deep": object()}}, step=1)


def test_every_public_name_is_there() -> None:
    for name in ckpt.__all__:
        assert getattr(ckpt, name) is not None
    assert set(ckpt.__all__) <= set(dir(ckpt))


@pytest.mark.slow
def test_script_without_a_main_guard_saves_and_restores(tmp_path: Path) -> None:
    script = """
import torch, ckpt
c = ckpt.Checkpointer("run")
state = {"t": torch.zeros(3)}
try:
    c.restore(state)
except ckpt.NotFoundError:
    pass
state["t"] += 1
c.save_async(state, step=int(state["t"][0]))
print(int(state["t"][0]))
c.close()
"""
    for wanted in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout.strip()) == (0, wanted), done.stderr


def _flip_middle(store: MemoryBackend, step: int) -> None:
    """Flip one stored bit of the tensor ``t`` of that step."""
    from_log = ckpt.Checkpointer(store)
    index = from_log._index(step, None, None)
    place = next(shard.locations[0] for shard in index.parts[0].shards if shard.leaf.name == "t")
    body, when = store._objects[place.pack]
    changed = bytearray(body)
    changed[place.offset_bytes + place.stored_bytes // 2] ^= 4
    store._objects[place.pack] = (bytes(changed), when)
