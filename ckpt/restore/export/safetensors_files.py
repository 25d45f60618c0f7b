"""Items in the safetensors format: a JSON header, then the tensors' bytes, streamed. No torch.

Tensors that share memory are written once; the other names are in the header's ``__metadata__`` as
``{other: written}``, which ``safetensors.torch.load_model`` understands. What is no tensor goes
into a JSON file beside it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from ckpt.errors import UsageError
from ckpt.restore.export.items import ExportItem, StreamOptions, is_flat, json_tree
from ckpt.restore.reader import SnapshotReader, size_bytes
from ckpt.values import DTYPE_BYTES, Leaf

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
"""safetensors' name for torch's dtype; the format has no others."""


class SafetensorsWriter:
    """``<item>.safetensors`` for an item's tensors, ``<item>.json`` for its structure if it is more
    than flat names.
    """

    def names(self, item: ExportItem) -> tuple[str, ...]:
        files = (f"{item.name}.safetensors",) if item.leaves else ()
        return files if is_flat(item) and files else (*files, f"{item.name}.json")

    def write(
        self, item: ExportItem, reader: SnapshotReader, paths: Sequence[Path], how: StreamOptions
    ) -> None:
        """Raises UsageError for a dtype that the format cannot hold."""
        for path, name in zip(paths, self.names(item), strict=True):
            if name.endswith(".json"):
                path.write_text(
                    json.dumps(json_tree(item.tree, item.short), indent=1, ensure_ascii=True) + "\n"
                )
            else:
                _write_tensors(item, reader, path, how)


def _write_tensors(
    item: ExportItem, reader: SnapshotReader, path: Path, how: StreamOptions
) -> None:
    kept: dict[tuple[str, int | None], Leaf] = {}
    metadata = {"format": "pt"}
    for leaf in item.leaves.values():
        target = reader.index.target(leaf.name, leaf.rank) or leaf
        first = kept.setdefault((target.name, target.rank), leaf)
        if first is not leaf:
            metadata[item.short(leaf.name)] = item.short(first.name)
    # Descending element size keeps every tensor aligned without padding, which the format forbids.
    leaves = sorted(kept.values(), key=lambda leaf: (-DTYPE_BYTES[leaf.dtype], leaf.name))
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for leaf in leaves:
        if leaf.dtype not in NAMES:
            raise UsageError(
                f"safetensors cannot hold this dtype. leaf={leaf.name} dtype={leaf.dtype}; export "
                "with --format torch"
            )
        end = at + size_bytes(leaf)
        header[item.short(leaf.name)] = {
            "dtype": NAMES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in reader.stream(
            leaves, window_bytes=how.window_bytes, on_progress=how.on_progress
        ):
            file.write(piece.data)
