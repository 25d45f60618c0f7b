"""Items as plain ``torch.save`` files, written without ever holding their data.

torch writes the file with room for each storage; then the bytes are streamed into their places, and
the checksums that the zip format keeps of them are corrected. ``torch.load(...,
weights_only=True)`` reads the result, with ``mmap=True`` too. A module of its own because it needs
torch.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ckpt.errors import InternalError, UsageError
from ckpt.format.objects import Named, Ref
from ckpt.restore.export.items import ExportItem, StreamOptions, indexed_optimizer, plain_tree
from ckpt.restore.reader import SnapshotReader, size_bytes
from ckpt.values import Leaf

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_CENTRAL_CRC_AT = 16
_DESCRIPTOR = b"PK\x07\x08"
_HAS_DESCRIPTOR = 0x08


class TorchWriter:
    """``<item>.pt``: the item's state dict. Tensors that shared memory share it again when
    loaded.
    """

    def names(self, item: ExportItem) -> tuple[str, ...]:
        return (f"{item.name}.pt",)

    def write(
        self, item: ExportItem, reader: SnapshotReader, paths: Sequence[Path], how: StreamOptions
    ) -> None:
        (path,) = paths
        builder = _EmptyTensors(item, reader)
        tree = plain_tree(
            indexed_optimizer(item.tree),
            tensor=builder.leaf,
            array=builder.array,
            named=_library_constant,
        )
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(tree, path)
        slots = _slots(path)
        sources = [source for source in builder.sources if _source_bytes(source)]
        if [slot.size_bytes for slot in slots] != [_source_bytes(source) for source in sources]:
            raise InternalError(
                f"torch.save laid out other storages than it was given. path={path}"
            )
        _check_order(path, tree, builder, slots)
        _fill(path, reader, list(zip(sources, slots, strict=True)), how)


Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Source = Leaf | Array


@dataclass(frozen=True, slots=True)
class _StorageSlot:
    """Room for one storage in the file, and where its checksums are."""

    offset_bytes: int
    size_bytes: int
    crc_offsets: tuple[int, ...]


class _EmptyTensors:
    """Makes a tensor without data for each reference, the same one for leaves that share memory;
    remembers the order.
    """

    def __init__(self, item: ExportItem, reader: SnapshotReader) -> None:
        self._item = item
        self._index = reader.index
        self._mode = FakeTensorMode()
        self._known: dict[tuple[str, int | None], torch.Tensor] = {}
        self.sources: list[Source] = []

    def leaf(self, ref: Ref) -> torch.Tensor:
        leaf = self._item.leaves[ref.leaf]
        target = self._index.target(leaf.name, leaf.rank) or leaf
        key = (target.name, target.rank)
        if key not in self._known:
            self._known[key] = self._empty(target.shape, _dtype(target.dtype))
            self.sources.append(target)
        return self._known[key]

    def array(self, array: Array) -> object:
        if array.dtype.kind not in "biufc" or not array.dtype.isnative:
            return array.tolist()
        dense = np.ascontiguousarray(array).reshape(array.shape)
        self.sources.append(dense)
        return self._empty(dense.shape, _dtype(str(dense.dtype)))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self._mode:
            return torch.empty(shape, dtype=dtype)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(
            f"this torch has no such dtype. dtype={name} torch={torch.__version__}; export with a "
            "newer one"
        )
    return dtype


def _library_constant(value: Named) -> object:
    match value.kind:
        case "torch.dtype":
            return _dtype(value.text.removeprefix("torch."))
        case "torch.device":
            return torch.device(value.text)
        case "torch.Size":
            return torch.Size(
                int(size) for size in value.text.strip("()[]").replace(",", " ").split()
            )
        case _:
            return value.text


def _source_bytes(source: Source) -> int:
    return size_bytes(source) if isinstance(source, Leaf) else source.nbytes


def _slots(path: Path) -> list[_StorageSlot]:
    """The storages' places in the order in which torch numbered them, without empty ones."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        crc_at = _central_crcs(file.fileno(), archive.start_dir, len(archive.infolist()))
        numbered: dict[int, _StorageSlot] = {}
        for index, info in enumerate(archive.infolist()):
            folder, _, number = info.filename.rpartition("/")
            if not folder.endswith("/data") or not number.isdecimal() or not info.file_size:
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise InternalError(
                    f"torch.save compressed a storage. path={path} entry={info.filename}"
                )
            fields = _LOCAL_HEADER.unpack(
                os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
            )
            start = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
            crcs = [crc_at[index]]
            if info.flag_bits & _HAS_DESCRIPTOR:
                end = start + info.file_size
                signed = os.pread(file.fileno(), 4, end) == _DESCRIPTOR
                crcs.append(end + 4 if signed else end)
            else:
                crcs.append(info.header_offset + 14)
            numbered[int(number)] = _StorageSlot(start, info.file_size, tuple(crcs))
    return [numbered[number] for number in sorted(numbered)]


def _central_crcs(fd: int, start: int, entries: int) -> list[int]:
    offsets: list[int] = []
    at = start
    for _ in range(entries):
        fields = _CENTRAL_HEADER.unpack(os.pread(fd, _CENTRAL_HEADER.size, at))
        offsets.append(at + _CENTRAL_CRC_AT)
        at += _CENTRAL_HEADER.size + sum(fields[10:13])
    return offsets


def _check_order(
    path: Path, tree: object, builder: _EmptyTensors, slots: Sequence[_StorageSlot]
) -> None:
    """Ask torch itself which tensor is where, so that a change in its numbering can never swap two
    of one size.
    """
    loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    order = {id(tensor): None for tensor in _tensors(tree) if tensor.numel()}
    pointer_of = {
        id(saved_tensor): loaded_tensor.data_ptr()
        for saved_tensor, loaded_tensor in zip(_tensors(tree), _tensors(loaded), strict=True)
    }
    pointers = [pointer_of[key] for key in order]
    if len(pointers) != len(slots):
        raise InternalError(f"torch.load finds other storages than were saved. path={path}")
    if any(
        pointer - pointers[0] != slot.offset_bytes - slots[0].offset_bytes
        for pointer, slot in zip(pointers, slots, strict=True)
    ):
        raise InternalError(
            f"torch.load finds storages in another order than they were saved. path={path}"
        )


def _tensors(value: object) -> Iterator[torch.Tensor]:
    match value:
        case torch.Tensor():
            yield value
        case dict():
            for item in value.values():
                yield from _tensors(item)
        case list() | tuple():
            for item in value:
                yield from _tensors(item)
        case _:
            return


def _fill(
    path: Path,
    reader: SnapshotReader,
    places: Sequence[tuple[Source, _StorageSlot]],
    how: StreamOptions,
) -> None:
    streamed = [(source, slot) for source, slot in places if isinstance(source, Leaf)]
    crcs = [0] * len(streamed)
    with path.open("r+b") as file:
        fd = file.fileno()
        leaves = [leaf for leaf, _ in streamed]
        for piece in reader.stream(
            leaves, window_bytes=how.window_bytes, on_progress=how.on_progress
        ):
            slot = streamed[piece.number][1]
            crcs[piece.number] = zlib.crc32(piece.data, crcs[piece.number])
            _write(fd, piece.data, slot.offset_bytes + piece.offset_bytes)
        for (_, slot), crc in zip(streamed, crcs, strict=True):
            _write_crc(fd, slot, crc)
        for source, slot in places:
            if not isinstance(source, Leaf):
                data = memoryview(source.tobytes())
                _write(fd, data, slot.offset_bytes)
                _write_crc(fd, slot, zlib.crc32(data))


def _write_crc(fd: int, slot: _StorageSlot, crc: int) -> None:
    for offset in slot.crc_offsets:
        _write(fd, memoryview(struct.pack("<I", crc)), offset)


def _write(fd: int, data: memoryview, offset_bytes: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset_bytes + done)
