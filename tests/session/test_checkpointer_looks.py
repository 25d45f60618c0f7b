"""What a store holds: tags, metadata, lists, single tensors, verification."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.faults import CountingBackend


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
    metadata = {
        "loss": math.nan,
        "lr": math.inf,
        "low": -math.inf,
        "n": 2**62,
        "ok": True,
        "who": "ü\n",
        "none": None,
    }
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
    "metadata",
    [
        {"x": [1]},
        {"x": torch.ones(1)},
        {1: "x"},
        {"x": 2**70},
        {"x": b"bytes"},
        {"x": "a" * (2 << 20)},
    ],
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


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
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
            c.save(
                {"t": torch.full((2,), float(step))}, step=step, tag="one" if step == 1 else None
            )
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


def _flip_middle(store: MemoryBackend, step: int) -> None:
    """Flip one stored bit of the tensor ``t`` of that step."""
    from_log = ckpt.Checkpointer(store)
    index = from_log._index(step, None, None)
    place = next(shard.locations[0] for shard in index.parts[0].shards if shard.leaf.name == "t")
    body, when = store._objects[place.pack]
    changed = bytearray(body)
    changed[place.offset_bytes + place.stored_bytes // 2] ^= 4
    store._objects[place.pack] = (bytes(changed), when)
