"""ls, show, log, read, diff: what is looked at without being changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit.damage import without_second_copies

from ckpt.backends.file.store import FileBackend
from ckpt.cli.numbers import readable
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.restore.reader import LeafValues
from ckpt.testing.sample import SampleWriter, damage, sample_state, tensor
from ckpt.values import SnapshotId


def test_ls_lists_newest_first_with_tags(ckpt, store) -> None:
    done = ckpt("ls", store.url, "--json")
    assert done.code == 0
    found = done.json["snapshots"]
    assert [one["step"] for one in found] == [30, 20, 10]
    assert [one["newest"] for one in found] == [True, False, False]
    assert found[1]["tags"] == ["best"]
    assert found[1]["metadata"] == {"loss": 0.05, "note": "sample"}
    text = ckpt("ls", store.url).out
    assert text.splitlines()[1].startswith("*")
    assert "best" in text


def test_ls_of_a_store_without_snapshots_says_so(ckpt, tmp_path: Path) -> None:
    SampleWriter(FileBackend(tmp_path / "empty")).open_epoch()
    assert ckpt("ls", tmp_path / "empty").out == "no snapshots\n"
    assert ckpt("ls", tmp_path / "empty", "--json").json["snapshots"] == []
    assert ckpt("show", tmp_path / "empty").code == 10


def test_ls_shows_what_is_off_the_line(ckpt, store) -> None:
    writer = SampleWriter(store)
    writer.open_epoch(resume=SnapshotId(1, 10))
    found = {one["step"]: one for one in ckpt("ls", store.url, "--json").json["snapshots"]}
    assert (found[10]["newest"], found[30]["on_line"]) == (True, False)


def test_ls_goes_on_past_an_unreadable_manifest(ckpt, store) -> None:
    key = next(stat.key for stat in store.list("manifests/") if "30-" in stat.key)
    damage(store, key, 5)
    assert ckpt("ls", store.url).code == 0, "the second copy is right"
    without_second_copies(store)
    done = ckpt("ls", store.url, "--json")
    found = done.json["snapshots"]
    assert done.code == 20
    assert found[0]["problem"]
    assert found[1]["problem"] is None


def test_show_names_leaves_shapes_and_ranks(ckpt, store) -> None:
    done = ckpt("show", store.url, "--tag", "best", "--json")
    assert done.json["snapshot"]["step"] == 20
    leaves = {(leaf["name"], leaf["rank"]): leaf for leaf in done.json["leaves"]}
    assert leaves["model/fc.weight", None] == {
        "name": "model/fc.weight",
        "rank": None,
        "kind": "tensor",
        "dtype": "float32",
        "shape": [48, 32],
        "size_bytes": 6144,
        "shards": 2,
        "alias_of": None,
    }
    assert leaves["model/head.weight", None]["alias_of"] == "model/embed.weight"
    assert leaves["progress", 1]["kind"] == "object"
    text = ckpt("show", store.url, "--step", 10).out
    assert "epoch 1 step 10" in text
    assert "48x32" in text


@pytest.mark.parametrize("selector", [("--step", 11), ("--tag", "worst"), ("--epoch", 9)])
def test_snapshot_that_is_not_there_exits_10(ckpt, store, selector) -> None:
    done = ckpt("show", store.url, *selector)
    assert done.code == 10


def test_tag_beside_a_step_is_refused(ckpt, store) -> None:
    assert ckpt("show", store.url, "--tag", "best", "--step", "10").code == 2


def test_log_tells_records_and_why_some_are_void(ckpt, store) -> None:
    done = ckpt("log", store.url, "--json")
    records = done.json["records"]
    assert [one["kind"] for one in records] == ["open", "commit", "commit", "commit", "tag"]
    assert records[0]["opened"] == 1
    assert records[2]["base"] == {"epoch": 1, "step": 10}
    assert all(one["void"] is None for one in records)
    assert len(ckpt("log", store.url, "--last", 2, "--json").json["records"]) == 2
    assert "best = epoch 1 step 20" in ckpt("log", store.url).out


def test_hole_in_the_log_is_told(ckpt, store) -> None:
    store.delete("log/00000000000000000002.json")
    assert len(ckpt("ls", store.url, "--json").json["snapshots"]) == 3, "there is a second copy"
    without_second_copies(store)
    done = ckpt("ls", store.url, "--json")
    assert [one["step"] for one in done.json["snapshots"]] == [10]
    assert "hole" in done.err
    assert ckpt("log", store.url, "--json").json["hole"]["seq"] == 2


def test_read_gives_rows_as_numbers(ckpt, store, tmp_path: Path) -> None:
    done = ckpt("read", store.url, "model/fc.bias", "--rows", "3:5", "--json")
    assert done.json["values"] == [3.0, 4.0]
    file = tmp_path / "w.npy"
    assert (
        ckpt("read", store.url, "model/fc.weight", "--step", 10, "--rows", "-2:", "-o", file).code
        == 0
    )
    assert np.array_equal(np.load(file), sample_state(10).weight[-2:])
    assert ckpt("read", store.url, "model/fc.weight", "-o", file).code == 2
    assert ckpt("read", store.url, "model/fc.weight", "-o", file, "--force").code == 0
    assert np.array_equal(np.load(file), sample_state(30).weight)


def test_read_of_bfloat16_prints_numbers_and_stores_bits(ckpt, store, tmp_path: Path) -> None:
    bits = sample_state(30).embed_bits
    values = ckpt("read", store.url, "model/embed.weight", "--json").json["values"]
    assert np.array_equal(
        np.array(values, np.float32), (bits.astype(np.uint32) << 16).view(np.float32)
    )
    done = ckpt("read", store.url, "model/embed.weight", "-o", tmp_path / "e.npy")
    assert "raw bits" in done.err
    assert np.array_equal(np.load(tmp_path / "e.npy"), bits)


def test_read_of_an_object_prints_its_structure(ckpt, store, tmp_path: Path) -> None:
    done = ckpt("read", store.url, "progress", "--rank", 1, "--json")
    assert done.json["values"] == {
        "step": 30,
        "rank": 1,
        "loss": {"$float": "inf"},
        "seen": {"$tuple": [1, 2]},
    }
    assert '"rank": 1' in ckpt("read", store.url, "progress", "--rank", 1).out
    assert ckpt("read", store.url, "progress", "-o", tmp_path / "p.json").code == 0
    assert ckpt("read", store.url, "progress", "--rows", "0:1").code == 2


def test_read_of_an_unknown_leaf_names_close_ones(ckpt, store) -> None:
    done = ckpt("read", store.url, "model/fc.wight")
    assert done.code == 10
    assert "model/fc.weight" in done.err
    assert ckpt("read", store.url, "model/fc.weight", "--rows", "1").code == 2


def test_read_of_a_damaged_leaf_exits_20(ckpt, store) -> None:
    place = (
        load_index(store, Journal.open(store).refresh(), SnapshotId(1, 30))
        .shards("model/fc.weight")[0]
        .locations[0]
    )
    damage(store, place.pack, place.offset_bytes)
    done = ckpt("read", store.url, "model/fc.weight", "--json")
    assert done.code == 20
    assert done.error["code"] == "integrity"


def test_float8_is_spelled_as_torch_spells_it() -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8)
    for name in ("float8_e4m3fn", "float8_e5m2"):
        expected = (
            torch.from_numpy(bits.copy()).view(getattr(torch, name)).to(torch.float32).numpy()
        )
        assert np.array_equal(readable(LeafValues(bits, name)), expected, equal_nan=True)


def test_diff_tells_what_changed_without_reading(ckpt, store) -> None:
    for stat in list(store.list("packs/")):
        store.delete(stat.key)
    done = ckpt("diff", store.url, 10, "best", "--json")
    assert done.code == 0
    changed = {(one["name"], one["rank"]): one for one in done.json["leaves"]}
    assert changed["model/fc.weight", None]["change"] == "changed"
    assert ("model/fc.bias", None) not in changed
    assert done.json["unchanged"] == 7
    assert "fc.weight" in ckpt("diff", store.url, "1:10", "newest").out


def test_diff_by_values_gives_the_greatest_difference(ckpt, store) -> None:
    done = ckpt("diff", store.url, 10, 20, "--values", "--json")
    found = {one["name"]: one["max_abs_diff"] for one in done.json["leaves"]}
    gap = np.abs(sample_state(10).weight.astype(np.float64) - sample_state(20).weight)
    assert found["model/fc.weight"] == gap.max()
    assert found["optimizer/state/fc.weight/step"] == 10
    assert found["progress"] is None
    assert "MAX |A-B|" in ckpt("diff", store.url, 10, 20, "--values").out


def test_diff_tells_added_removed_and_retyped(ckpt, tmp_path: Path) -> None:
    writer = SampleWriter(FileBackend(tmp_path / "s"))
    epoch = writer.open_epoch()
    ones = np.ones(4, np.float32)
    writer.write(SnapshotId(epoch, 1), [[tensor("a", ones), tensor("b", ones)]])
    writer.write(SnapshotId(epoch, 2), [[tensor("b", np.ones(5, np.float32)), tensor("c", ones)]])
    found = ckpt("diff", tmp_path / "s", 1, 2, "--json", "--values").json["leaves"]
    assert [(one["name"], one["change"]) for one in found] == [
        ("a", "removed"),
        ("b", "retyped"),
        ("c", "added"),
    ]


def test_diff_with_an_unknown_name_exits_10(ckpt, store) -> None:
    assert ckpt("diff", store.url, "nobody", "10").code == 10
