from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.backends.file.store import FileBackend
from ckpt.testing.faults import CountingBackend
from ckpt.values import CHUNK_BYTES

ROWS, COLUMNS = 16_384, 256
TENSORS = 64
TENSOR_BYTES = ROWS * COLUMNS * 4
ROW_BYTES = COLUMNS * 4
METADATA_BYTES_MAX = 64 << 10


def values(number: int) -> torch.Tensor:
    """16 MiB that no other tensor shares a chunk with."""
    out = torch.empty(ROWS, COLUMNS, dtype=torch.int32)
    torch.arange(
        number * ROWS * COLUMNS, (number + 1) * ROWS * COLUMNS, dtype=torch.int32, out=out.view(-1)
    )
    return out


@pytest.fixture(scope="module")
def gibibyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A snapshot of 1 GiB in 64 tensors."""
    folder = tmp_path_factory.mktemp("gibibyte")
    with ckpt.Checkpointer(str(folder / "store"), slots=1, compression="off") as checkpointer:
        info = checkpointer.save({"state": {str(n): values(n) for n in range(TENSORS)}}, step=1)
    assert info.size_bytes >= 1 << 30
    yield folder / "store"
    shutil.rmtree(folder)


def other_reads(store: CountingBackend) -> int:
    """Bytes read beside packs; each object is listed."""
    listed = [call for call in store.calls("read_into") if not call.key.startswith("packs/")]
    for call in listed:
        print(f"metadata: {call.key} {call.size_bytes} bytes")
    return sum(call.size_bytes for call in listed)


@pytest.mark.slow
def test_one_tensor_of_a_large_snapshot_reads_only_its_own_chunks(gibibyte: Path) -> None:
    store = CountingBackend(FileBackend(gibibyte))
    found = ckpt.Checkpointer(store).read("state/41")
    assert torch.equal(found, values(41))
    assert store.size_bytes("read_into", prefix="packs/") == TENSOR_BYTES
    assert other_reads(store) < METADATA_BYTES_MAX


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(5000, 5010), slice(4095, 4097), slice(-3, None), slice(7, 7)]
)
def test_rows_of_a_large_tensor_read_only_the_chunks_that_hold_them(
    gibibyte: Path, rows: slice
) -> None:
    store = CountingBackend(FileBackend(gibibyte))
    found = ckpt.Checkpointer(store).read("state/9", rows=rows)
    assert torch.equal(found, values(9)[rows])
    start, stop, _ = rows.indices(ROWS)
    chunks = (
        0
        if start == stop
        else (stop * ROW_BYTES - 1) // CHUNK_BYTES - start * ROW_BYTES // CHUNK_BYTES + 1
    )
    assert store.size_bytes("read_into", prefix="packs/") == chunks * CHUNK_BYTES
    assert other_reads(store) < METADATA_BYTES_MAX


@pytest.mark.slow
def test_restore_of_one_leaf_reads_only_its_own_chunks(gibibyte: Path) -> None:
    store = CountingBackend(FileBackend(gibibyte))
    live = {"state": {str(n): torch.zeros(ROWS, COLUMNS, dtype=torch.int32) for n in (3, 4)}}
    ckpt.Checkpointer(store).restore(live, only=["state/3"], missing="keep")
    assert torch.equal(live["state"]["3"], values(3))
    assert not live["state"]["4"].any()
    packs = store.size_bytes("read_into", prefix="packs/")
    assert (
        TENSOR_BYTES <= packs < TENSOR_BYTES + METADATA_BYTES_MAX
    )  # the item's structure is stored in a pack too
