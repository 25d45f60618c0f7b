"""verify, restore, tag, untag, rm."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.damage import bytes_of, without_second_copies
from safetensors.torch import load_file

from ckpt.backends.file.store import FileBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UnavailableError
from ckpt.format import keys
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.testing.sample import (
    SampleWriter,
    damage,
    sample_ranks,
    sample_state,
    write_sample_store,
)
from ckpt.values import SnapshotId


def spoil(store: FileBackend, step: int, leaf: str = "model/fc.weight") -> str:
    index = load_index(store, Journal.open(store).refresh(), SnapshotId(1, step))
    place = index.shards(leaf, None)[0].locations[0]
    damage(store, place.pack, place.offset_bytes + 1)
    return place.pack


def test_verify_of_a_sound_store_exits_0(ckpt, store) -> None:
    done = ckpt("verify", store.url, "--all", "--json")
    assert done.code == 0
    assert done.json["ok"] is True
    assert [one["step"] for one in done.json["snapshots"]] == [30, 20, 10]
    assert done.json["snapshots"][0]["read_bytes"] > 0
    assert ckpt("verify", store.url).out.startswith("ok")


def test_verify_tells_all_damage_and_exits_20(ckpt, store) -> None:
    pack = spoil(store, 30)
    spoil(store, 30, "optimizer/state/fc.weight/exp_avg")
    done = ckpt("verify", store.url, "--json")
    assert done.code == 20
    damaged = done.json["snapshots"][0]["damaged"]
    assert {tuple(one["leaves"]) for one in damaged} == {
        ("model/fc.weight",),
        ("optimizer/state/fc.weight/exp_avg",),
    }
    assert {one["what"] for one in damaged} == {"mismatch"}
    assert damaged[0]["key"] == pack
    text = ckpt("verify", store.url).out
    assert "DAMAGED" in text
    assert pack in text
    assert ckpt("verify", store.url, "--step", 20).code == 0
    assert [
        one["ok"] for one in ckpt("verify", store.url, "--all", "--json").json["snapshots"]
    ] == [False, True, True]


def test_verify_tells_a_damaged_part(ckpt, store) -> None:
    key = next(stat.key for stat in store.list("parts/") if "0030/" in stat.key)
    damage(store, key, 30)
    done = ckpt("verify", store.url, "--all", "--json")
    assert done.code == 20
    assert done.json["snapshots"][0]["damaged"][0]["what"] == "mismatch", "the second copy is right"
    without_second_copies(store)
    done = ckpt("verify", store.url, "--all", "--json")
    assert done.code == 20
    assert done.json["snapshots"][0]["damaged"][0]["what"] == "record"
    assert done.json["snapshots"][1]["ok"] is True


def test_verify_reads_all_but_the_data_of_other_snapshots_and_says_so(ckpt, store) -> None:
    done = ckpt("verify", store.url, "--json")
    assert done.code == 0
    assert (len(done.json["snapshots"]), done.json["of_snapshots"]) == (1, 3)
    assert (done.json["log"]["records"], done.json["log"]["snapshots"]) == (5, 3)
    assert "data of 1 of 3 snapshots read; --all for the rest" in ckpt("verify", store.url).out
    assert "data of 3 of 3 snapshots read\n" in ckpt("verify", store.url, "--all").out


def test_verify_of_the_newest_knows_damage_of_any_small_object(ckpt, store) -> None:
    # The first copy only: all can still be read, and the damage is told all the same.
    for key in sorted(stat.key for stat in store.list("")):
        if key.startswith("packs/"):
            continue
        right = bytes_of(store, key)
        damage(store, key, 20)
        done = ckpt("verify", store.url, "--json")
        assert done.code == 20, key
        assert key in {one["key"] for one in done.json["log"]["troubles"]}, key
        store.put(key, [right])
    assert ckpt("verify", store.url).code == 0
    damage(store, key, 20)
    assert f"DAMAGED  {key} on {store.url}" in ckpt("verify", store.url).out


@pytest.mark.slow
def test_verify_names_a_record_that_no_copy_is_left_of(ckpt, store) -> None:
    journal = Journal.open(store)
    for number in range(66):
        journal.tag(f"t{number % 5}", SnapshotId(1, 10))
    without_second_copies(store)
    store.delete(keys.log_key(7))
    assert Journal.open(store).refresh().hole is None, "readers start at the fold behind it"
    done = ckpt("verify", store.url)
    assert done.code == 20
    assert f"DAMAGED  {keys.log_key(7)} on {store.url}\n    it is not there" in done.out


def test_verify_of_what_can_not_be_read_is_not_ok(ckpt, store, monkeypatch) -> None:
    part = next(stat.key for stat in store.list("parts/"))
    read_into = FileBackend.read_into

    def away(self: FileBackend, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        if key == part:
            raise UnavailableError("no route")
        read_into(self, key, out, offset_bytes=offset_bytes)

    monkeypatch.setattr(FileBackend, "read_into", away)
    done = ckpt("verify", store.url)
    assert done.code == 11 and f"UNREAD   {part}" in done.out and "ok       the log" not in done.out


def test_verify_of_all_and_of_one_is_refused(ckpt, store) -> None:
    assert ckpt("verify", store.url, "--all", "--step", "10").code == 2


def test_restore_writes_the_newest_as_torch_files(ckpt, store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ckpt("restore", store.url, "--to", out, "--json")
    assert done.code == 0
    assert done.json["snapshot"] == {"epoch": 1, "step": 30}
    assert [Path(one["path"]).name for one in done.json["files"]] == [
        "model.pt",
        "noise.pt",
        "optimizer.pt",
        "progress.pt",
    ]
    model = torch.load(out / "model.pt", weights_only=True)
    assert np.array_equal(model["fc.weight"].numpy(), sample_state(30).weight)
    assert ckpt("restore", store.url, "--to", out).code == 2
    assert ckpt("restore", store.url, "--to", out, "--force", "--tag", "best").code == 0
    model = torch.load(out / "model.pt", weights_only=True)
    assert np.array_equal(model["fc.weight"].numpy(), sample_state(20).weight)


def test_restored_optimizer_loads_into_a_real_one(ckpt, store, tmp_path: Path) -> None:
    ckpt("restore", store.url, "--to", tmp_path, "--item", "optimizer")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((10, 16), (48, 32), (48,))]
    optimizer = torch.optim.Adam(parameters)
    optimizer.load_state_dict(state)
    assert np.array_equal(
        optimizer.state[parameters[1]]["exp_avg"].numpy(), sample_state(30).momentum
    )


def test_restore_as_safetensors_of_all_ranks(ckpt, store, tmp_path: Path) -> None:
    done = ckpt(
        "restore",
        store.url,
        "--to",
        tmp_path / "o",
        "--format",
        "safetensors",
        "--all-ranks",
        "--memory",
        "16MiB",
    )
    assert done.code == 0
    for rank in (0, 1):
        found = load_file(tmp_path / f"o/rank-{rank}/model.safetensors")
        assert np.array_equal(found["fc.weight"].numpy(), sample_state(30).weight)


def test_restore_falls_back_from_damage_and_says_so(ckpt, store, tmp_path: Path) -> None:
    spoil(store, 30)
    done = ckpt("restore", store.url, "--to", tmp_path / "a", "--json")
    assert done.code == 0
    assert done.json["snapshot"]["step"] == 20
    assert done.json["fell_back_from"] == [{"epoch": 1, "step": 30}]
    assert "warning: epoch 1 step 30 is damaged" in done.err
    model = torch.load(tmp_path / "a/model.pt", weights_only=True)
    assert np.array_equal(model["fc.weight"].numpy(), sample_state(20).weight)


def test_restore_reads_damaged_bytes_from_another_snapshot_and_says_so(
    ckpt, store, tmp_path: Path
) -> None:
    writer = SampleWriter(store)  # one that knows of no stored chunk
    writer.write(SnapshotId(writer.open_epoch(), 5), sample_ranks(30))
    spoil(store, 30)
    done = ckpt("restore", store.url, "--to", tmp_path / "a", "--step", 30, "--epoch", 1)
    assert done.code == 0
    assert "1 chunks of epoch 1 step 30 are damaged" in done.err
    model = torch.load(tmp_path / "a/model.pt", weights_only=True)
    assert np.array_equal(model["fc.weight"].numpy(), sample_state(30).weight)


def test_restore_falls_back_from_a_lost_manifest(ckpt, store, tmp_path: Path) -> None:
    without_second_copies(store)
    store.delete(next(stat.key for stat in store.list("manifests/") if "0030-" in stat.key))
    assert (
        ckpt("restore", store.url, "--to", tmp_path / "a", "--json").json["snapshot"]["step"] == 20
    )


@pytest.mark.parametrize("arguments", [("--strict",), ("--step", 30), ("--tag", "newest-tag")])
def test_restore_of_exactly_one_damaged_snapshot_exits_20(
    ckpt, store, tmp_path: Path, arguments
) -> None:
    ckpt("tag", store.url, "newest-tag")
    spoil(store, 30)
    done = ckpt("restore", store.url, "--to", tmp_path / "a", *arguments)
    assert done.code == 20
    assert not list((tmp_path / "a").glob("*"))


def test_restore_with_nothing_sound_left_exits_20(ckpt, store, tmp_path: Path) -> None:
    for stat in list(store.list("packs/")):
        store.delete(stat.key)
    assert ckpt("restore", store.url, "--to", tmp_path / "a").code == 20


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory", "much"),
        ("--memory", "1KiB"),
        ("--rank", 0, "--all-ranks"),
        ("--format", "pickle"),
    ],
)
def test_restore_with_bad_options_exits_2(ckpt, store, tmp_path: Path, arguments) -> None:
    assert ckpt("restore", store.url, "--to", tmp_path / "a", *arguments).code == 2


def test_restore_of_an_unknown_item_exits_10(ckpt, store, tmp_path: Path) -> None:
    assert ckpt("restore", store.url, "--to", tmp_path / "a", "--item", "modle").code == 10
    assert ckpt("restore", store.url, "--to", tmp_path / "a", "--rank", 5).code == 10


def test_tag_names_a_snapshot_and_untag_takes_it_away(ckpt, store) -> None:
    assert ckpt("tag", store.url, "gold", "--step", 10, "--json").json == {
        "tag": "gold",
        "snapshot": {"epoch": 1, "step": 10},
    }
    assert ckpt("show", store.url, "--tag", "gold", "--json").json["snapshot"]["step"] == 10
    assert ckpt("untag", store.url, "gold", "--json").json["untagged"] == "gold"
    done = ckpt("untag", store.url, "gold")
    assert done.code == 10
    assert "best" in done.err


def test_rm_drops_a_snapshot_and_says_when_bytes_go(ckpt, store) -> None:
    done = ckpt("rm", store.url, "--step", 10, "--yes")
    assert done.code == 0
    assert "bytes go" in done.out
    assert [one["step"] for one in ckpt("ls", store.url, "--json").json["snapshots"]] == [30, 20]
    assert ckpt("verify", store.url, "--all").code == 0
    assert ckpt("rm", store.url, "--step", 10, "--yes").code == 10


def test_rm_asks_first(ckpt, store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    done = ckpt("rm", store.url, "--step", 10)
    assert done.code == 130
    assert len(ckpt("ls", store.url, "--json").json["snapshots"]) == 3
    assert ckpt("rm", store.url, "--step", 10, "--json").code == 2


@pytest.mark.slow
@pytest.mark.parametrize(("step", "why"), [(30, "newest"), (20, "untag it first")])
def test_rm_refuses_the_newest_and_tagged_ones(ckpt, store, step: int, why: str) -> None:
    done = ckpt("rm", store.url, "--step", step, "--yes")
    assert done.code == 2
    assert why in done.err


def test_store_that_was_rolled_back_is_accepted_by_command(ckpt, tmp_path: Path) -> None:
    here, image = tmp_path / "run", tmp_path / "image"
    write_sample_store(FileBackend(here), steps=(10, 20))
    shutil.copytree(here, image)
    assert ckpt("tag", here, "late", "--step", 20).code == 0
    shutil.rmtree(here)
    shutil.copytree(image, here)
    looked = ckpt("ls", here)
    assert "rolled back" in looked.err and looked.code == 0
    refused = ckpt("tag", here, "again", "--step", 20)
    assert refused.code == 20 and "ckpt stores accept" in refused.err
    assert ckpt("stores", "accept", here).code == 0
    assert ckpt("tag", here, "again", "--step", 20).code == 0
    assert ckpt("ls", here).err == ""


def test_store_that_is_lost_for_good_is_replaced_where_all_must_hold_a_record(
    ckpt, tmp_path: Path
) -> None:
    east, west, new = (tmp_path / name for name in ("east", "west", "new"))
    with closing(
        ReplicatedBackend([FileBackend(east), FileBackend(west)], emit=lambda _: None)
    ) as both:
        write_sample_store(both, steps=(10,))
    lost_id = ckpt("stores", "show", east, "--replica", west, "--json").json["ids"][1]
    shutil.rmtree(west)
    change = ("stores", "replace", east, "--replica", west, "--id", lost_id, "--store", new)
    refused = ckpt(*change)
    assert refused.code == 11 and "--lost" in refused.err
    assert ckpt(*change, "--lost").code == 0
    assert ckpt("tag", east, "--replica", new, "on", "--step", 10).code == 0
