"""Exports: what other programs read is what was stored."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open

from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.capture.leaves import World
from ckpt.capture.plan import capture
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.objects import DataclassNode, EnumNode, Named, NamedTupleNode, Ref
from ckpt.log.catalog import load_index
from ckpt.restore.export.items import (
    ExportOptions,
    ItemWriter,
    export,
    indexed_optimizer,
    json_tree,
    plain_tree,
)
from ckpt.restore.export.safetensors_files import SafetensorsWriter
from ckpt.restore.export.torch_files import TorchWriter
from ckpt.restore.reader import SnapshotReader
from ckpt.testing.sample import Piece, SampleWriter, damage, sample_state, skeleton, tensor
from ckpt.values import DTYPE_BYTES, Box, SnapshotId


def written(pieces: list[Piece]) -> tuple[MemoryBackend, SnapshotIndex]:
    backend = MemoryBackend("one")
    writer = SampleWriter(backend)
    pair = SnapshotId(writer.open_epoch(), 1)
    writer.write(pair, [pieces])
    return backend, load_index(backend, writer.journal.refresh(), pair)


def exported(
    backend, index: SnapshotIndex, folder: Path, writer: ItemWriter, **options: object
) -> list[str]:
    with SnapshotReader(backend, index) as reader:
        files = export(reader, folder, writer, ExportOptions(**options))
    return [str(file.path.relative_to(folder)) for file in files]


def load(path: Path, **options: object) -> object:
    return torch.load(path, weights_only=True, **options)


def test_model_loads_as_a_plain_state_dict_with_ties(
    sample: SampleWriter, sample_index, tmp_path: Path
) -> None:
    exported(sample.backend, sample_index, tmp_path, TorchWriter())
    for options in ({}, {"mmap": True}):
        model = load(tmp_path / "model.pt", **options)
        state = sample_state(30)
        assert list(model) == ["embed.weight", "fc.weight", "fc.bias", "head.weight"]
        assert np.array_equal(model["fc.weight"].numpy(), state.weight)
        assert np.array_equal(model["fc.bias"].numpy(), state.bias)
        assert model["embed.weight"].dtype is torch.bfloat16
        assert np.array_equal(model["embed.weight"].view(torch.uint16).numpy(), state.embed_bits)
        assert model["head.weight"].data_ptr() == model["embed.weight"].data_ptr()


def test_zip_checksums_are_right(sample: SampleWriter, sample_index, tmp_path: Path) -> None:
    for name in exported(sample.backend, sample_index, tmp_path, TorchWriter()):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None


def test_optimizer_has_torchs_own_form(sample: SampleWriter, sample_index, tmp_path: Path) -> None:
    exported(sample.backend, sample_index, tmp_path, TorchWriter(), items=("optimizer",))
    state = load(tmp_path / "optimizer.pt")
    assert state["param_groups"][0]["params"] == [0, 1, 2]
    assert state["param_groups"][0]["param_names"] == ["embed.weight", "fc.weight", "fc.bias"]
    assert set(state["state"]) == {1}
    assert np.array_equal(state["state"][1]["exp_avg"].numpy(), sample_state(30).momentum)
    assert state["state"][1]["step"] == 30


def test_each_ranks_own_items_go_to_their_folders(
    sample: SampleWriter, sample_index, tmp_path: Path
) -> None:
    names = exported(
        sample.backend,
        sample_index,
        tmp_path,
        TorchWriter(),
        items=("progress", "noise"),
        all_ranks=True,
    )
    assert names == [f"rank-{rank}/{item}.pt" for rank in (0, 1) for item in ("progress", "noise")]
    assert load(tmp_path / "rank-1/progress.pt") == {
        "step": 30,
        "rank": 1,
        "loss": math.inf,
        "seen": (1, 2),
    }
    assert load(tmp_path / "rank-1/noise.pt").tolist() == [1] * 5
    exported(
        sample.backend, sample_index, tmp_path / "one", TorchWriter(), items=("noise",), rank=1
    )
    assert load(tmp_path / "one/noise.pt").tolist() == [1] * 5


TORCH_DTYPES = sorted(
    name for name in DTYPE_BYTES if isinstance(getattr(torch, name, None), torch.dtype)
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_survives_torch_files(tmp_path: Path) -> None:
    kinds = [
        name for name in TORCH_DTYPES if "x2" not in name and name.strip("uint") not in "1234567"
    ]
    pieces = []
    random = np.random.default_rng(5)
    for name in kinds:
        width = DTYPE_BYTES[name]
        bits = random.integers(0, 2 if name == "bool" else 256, (3, 4 * width), dtype=np.uint8)
        pieces.append(tensor(f"all/{name}", bits.view(f"V{width}"), dtype=name))
    backend, index = written(pieces)
    exported(backend, index, tmp_path, TorchWriter())
    loaded = load(tmp_path / "all.pt")
    for piece in pieces:
        name = piece.leaf.dtype
        found = loaded[name]
        assert found.dtype is getattr(torch, name)
        assert bytes(found.untyped_storage()) == piece.data.tobytes()


def test_structure_becomes_what_weights_only_reads(tmp_path: Path) -> None:
    tree = OrderedDict(
        numbers=(1, 2.5, -0.0, 10**30, 1j, None, True),
        text="ü",
        raw=b"\x00\xff",
        array=np.arange(6, dtype=np.int16).reshape(2, 3),
        words=np.array(["a", "bc"]),
        scalar=np.float32(0.5),
        dtype=Named("torch.dtype", "bfloat16"),
        device=Named("torch.device", "cuda:1"),
        size=Named("torch.Size", "2,3"),
        options=DataclassNode("user.Options", {"lr": 0.1, "weight": Ref("thing/w")}),
        point=NamedTupleNode("user.Point", ("x", "y"), (1, 2)),
        mode=EnumNode("user.Mode", "FAST"),
        keys={1: "one", (2, 3): "pair"},
        many={1, 2},
        tensors=[Ref("thing/w"), Ref("thing/empty"), Ref("thing/w")],
    )
    w = np.arange(5, dtype=np.float64)
    empty = np.zeros((0, 3), np.float32)
    backend, index = written(
        [tensor("thing/w", w), tensor("thing/empty", empty), skeleton("thing", tree, rank=0)]
    )
    exported(backend, index, tmp_path, TorchWriter())
    found = load(tmp_path / "thing.pt")
    assert isinstance(found, OrderedDict)
    assert found["numbers"] == (1, 2.5, -0.0, 10**30, 1j, None, True)
    assert found["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["array"].dtype is torch.int16
    assert found["words"] == ["a", "bc"]
    assert (found["dtype"], found["device"], found["size"]) == (
        torch.bfloat16,
        torch.device("cuda:1"),
        torch.Size((2, 3)),
    )
    assert found["options"]["weight"].tolist() == w.tolist()
    assert (found["point"], found["mode"], found["many"]) == ({"x": 1, "y": 2}, "FAST", {1, 2})
    assert found["keys"] == {1: "one", (2, 3): "pair"}
    assert found["tensors"][1].shape == (0, 3)
    assert (
        found["tensors"][0].data_ptr()
        == found["tensors"][2].data_ptr()
        == found["options"]["weight"].data_ptr()
    )
    assert found["scalar"] == 0.5


def test_tensors_of_one_size_are_never_swapped(tmp_path: Path) -> None:
    pieces = [tensor(f"m/{i}", np.full(64, i, np.int32)) for i in range(40)]
    tree = {
        "deep": [{f"k{i}": Ref(f"m/{i}") for i in reversed(range(0, 40, 2))}],
        **{i: Ref(f"m/{i}") for i in range(1, 40, 2)},
    }
    backend, index = written([*pieces, skeleton("m", tree, rank=0)])
    exported(backend, index, tmp_path, TorchWriter())
    found = load(tmp_path / "m.pt")
    for i in range(40):
        one = found[i] if i % 2 else found["deep"][0][f"k{i}"]
        assert one.tolist() == [i] * 64


def test_safetensors_library_reads_what_was_stored(
    sample: SampleWriter, sample_index, tmp_path: Path
) -> None:
    names = exported(sample.backend, sample_index, tmp_path, SafetensorsWriter())
    assert "model.safetensors" in names
    assert "model.json" not in names
    found = load_file(tmp_path / "model.safetensors")
    state = sample_state(30)
    assert np.array_equal(found["fc.weight"].numpy(), state.weight)
    assert np.array_equal(found["embed.weight"].view(torch.uint16).numpy(), state.embed_bits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    moments = load_file(tmp_path / "optimizer.safetensors")
    assert np.array_equal(moments["state/fc.weight/exp_avg"].numpy(), state.momentum)
    tree = json.loads((tmp_path / "optimizer.json").read_text())
    assert tree["state"]["fc.weight"]["exp_avg"] == {"$tensor": "state/fc.weight/exp_avg"}
    assert json.loads((tmp_path / "progress.json").read_text())["loss"] == {"$float": "inf"}


def test_safetensors_takes_scalars_and_empty_tensors(tmp_path: Path) -> None:
    pieces = [
        tensor("m/a", np.array(7, np.int8)),
        tensor("m/b", np.zeros((2, 0), np.float64)),
        tensor("m/c", np.ones(3, np.float64)),
    ]
    backend, index = written(pieces)
    exported(backend, index, tmp_path, SafetensorsWriter())
    found = load_file(tmp_path / "m.safetensors")
    assert (found["a"].item(), found["b"].shape, found["c"].tolist()) == (7, (2, 0), [1.0] * 3)


def test_dtype_unknown_to_safetensors_is_refused(tmp_path: Path) -> None:
    backend, index = written([tensor("m/a", np.zeros(3, np.complex128))])
    with pytest.raises(UsageError, match="--format torch"):
        exported(backend, index, tmp_path, SafetensorsWriter())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", [TorchWriter(), SafetensorsWriter()])
def test_damage_leaves_no_file(
    sample: SampleWriter, sample_index, tmp_path: Path, writer: ItemWriter
) -> None:
    place = sample_index.shards("optimizer/state/fc.weight/exp_avg", None)[1].locations[0]
    damage(sample.backend, place.pack, place.offset_bytes)
    with pytest.raises(IntegrityError, match="exp_avg"):
        exported(sample.backend, sample_index, tmp_path, writer)
    assert list(tmp_path.rglob("*")) == []


def test_existing_file_is_kept_unless_forced(
    sample: SampleWriter, sample_index, tmp_path: Path
) -> None:
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(UsageError, match="in the way"):
        exported(sample.backend, sample_index, tmp_path, TorchWriter())
    assert (tmp_path / "model.pt").read_text() == "mine"
    exported(sample.backend, sample_index, tmp_path, TorchWriter(), items=("model",), force=True)
    assert "fc.bias" in load(tmp_path / "model.pt")


def test_unknown_item_and_rank_are_not_found(
    sample: SampleWriter, sample_index, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="items=model,noise,optimizer,progress"):
        exported(sample.backend, sample_index, tmp_path, TorchWriter(), items=("modle",))
    with pytest.raises(NotFoundError, match="rank=9"):
        exported(sample.backend, sample_index, tmp_path, TorchWriter(), rank=9)


def test_optimizer_over_unknown_names_keeps_its_names() -> None:
    odd = {"state": {"other": {}}, "param_groups": [{"params": ["a"]}]}
    assert indexed_optimizer(odd) == odd
    twice = {"state": {}, "param_groups": [{"params": ["a"]}, {"params": ["a"]}]}
    assert indexed_optimizer(twice) == twice
    assert indexed_optimizer([1]) == [1]


def test_json_spells_what_json_lacks() -> None:
    value = {
        1: (1, math.nan),
        "a": b"\x01",
        "c": {3},
        "n": np.float64(2),
        "z": 1j,
        "e": EnumNode("m.E", "A"),
    }
    assert json_tree(value, str) == {
        "$dict": [
            [1, {"$tuple": [1, {"$float": "nan"}]}],
            ["a", {"$bytes": "01"}],
            ["c", {"$set": [3]}],
            ["n", 2.0],
            ["z", {"$complex": [0.0, 1.0]}],
            ["e", {"$enum": ["m.E", "A"]}],
        ]
    }
    assert plain_tree([value], tensor=str, array=str, named=str)[0]["e"] == "A"


def test_captured_training_state_loads_into_fresh_objects(tmp_path: Path) -> None:
    def build() -> tuple[
        torch.nn.Sequential, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler
    ]:
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4)
        )
        model[2].weight.data.fill_(0.5)
        groups = [{"params": model[2].parameters(), "lr": 0.3}, {"params": model[0].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    model, optimizer, scheduler = build()
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    taken = capture(
        {"model": model, "optim": optimizer, "sched": scheduler, "progress": {"epoch": 3}},
        world=World(0, 1),
    )
    pieces = [
        Piece(one.leaf, one.box, None if one.leaf.alias_of else one.tensor.contiguous().numpy())
        for one in taken.tensors
    ]
    pieces += [
        Piece(one.leaf, Box.whole(one.leaf.shape), np.frombuffer(one.data, np.uint8))
        for one in taken.objects
    ]
    exported(*written(pieces), tmp_path, TorchWriter())

    fresh = build()
    fresh[0].load_state_dict(load(tmp_path / "model.pt"))
    fresh[1].load_state_dict(load(tmp_path / "optim.pt"))
    fresh[2].load_state_dict(load(tmp_path / "sched.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh[0].state_dict()[name], value)
    mine, theirs = optimizer.state_dict(), fresh[1].state_dict()
    assert mine["state"].keys() == theirs["state"].keys()
    for number, state in mine["state"].items():
        for key, value in state.items():
            assert torch.equal(theirs["state"][number][key], value)
    assert [group["lr"] for group in theirs["param_groups"]] == [
        group["lr"] for group in mine["param_groups"]
    ]
    assert fresh[2].last_epoch == 3
    assert load(tmp_path / "progress.pt") == {"epoch": 3}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_memory_stays_small_beside_a_large_snapshot(tmp_path: Path, form: str) -> None:
    random = np.random.default_rng(0)
    big = {
        f"m/w{i}": random.integers(0, 1 << 31, (25 << 20) // 4, dtype=np.int32) for i in range(12)
    }
    for store, arrays in (("small", {"m/w0": big["m/w0"][:1000]}), ("large", big)):
        writer = SampleWriter(FileBackend(tmp_path / store))
        pair = SnapshotId(writer.open_epoch(), 1)
        writer.write(pair, [[tensor(name, values) for name, values in arrays.items()]])
    code = """
import sys, threading
from pathlib import Path
from ckpt.cli.main import run

def restore(store):
    return run(["restore", f"{sys.argv[1]}/{store}", "--to", f"{sys.argv[1]}/from-{store}", *sys.argv[2:]])

def taken():  # what is mapped from files can be taken back at any time
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))

def look():
    while not over.wait(0.002):
        seen.append(taken())

assert restore("small") == 0  # with all that is imported on the way
over, before = threading.Event(), taken()
seen = [before]
looking = threading.Thread(target=look)
looking.start()
code = restore("large")
over.set()
looking.join()
print(max(seen) - before, file=sys.stderr)
sys.exit(code)
"""
    arguments = [str(tmp_path), "--format", form, "--memory", "32MiB"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert 8 << 10 < int(done.stderr) < 48 << 10
    out = tmp_path / "from-large"
    found = load(out / "m.pt", mmap=True) if form == "torch" else load_file(out / "m.safetensors")
    for name, values in big.items():
        assert np.array_equal(found[name[2:]].numpy(), values)
