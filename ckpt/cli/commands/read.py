"""``ckpt read``: one leaf, or rows of it."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np

from ckpt.cli.echo import JsonValue, emit_json, warn
from ckpt.cli.numbers import Array, readable
from ckpt.cli.store_options import (
    Selector,
    StoreChoice,
    open_store,
    snapshot_options,
    store_command,
)
from ckpt.errors import UnavailableError, UsageError
from ckpt.log.catalog import ChunkPlaces, load_index
from ckpt.restore.export.items import json_tree
from ckpt.restore.reader import SnapshotReader
from ckpt.values import Leaf, LeafKind


def write_file(path: Path, write: Callable[[BinaryIO], object], *, force: bool) -> None:
    """Write a file whole or not at all: a temporary file is synced, then renamed.

    Raises UsageError if ``path`` exists and ``force`` is off, UnavailableError if the folder cannot
    take the file.
    """
    if not force and os.path.lexists(path):
        raise UsageError(f"a file is in the way. path={path}; name another or pass --force")
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temp.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"the file cannot be written: {error.strerror}. path={path} errno={error.errno}"
        ) from error


VALUES_MAX = 100_000
"""Numbers that JSON output may have; more need a file."""

_ROWS = re.compile(r"(-?\d*):(-?\d*)")

_EPILOG = """\b
Examples:
  ckpt read runs/a model/fc.weight
  ckpt read runs/a model/embed.weight --rows 0:8 -o rows.npy
  ckpt read runs/a progress --rank 1 --json

\b
JSON: {"epoch", "step", "leaf", "rank", "kind", "dtype", "shape", "values",
"file"}. "values" are nested lists (null with -o; inf and nan become null),
for an object its structure. "rank" is null for a shared leaf.
"""


@click.command(name="read", epilog=_EPILOG)
@store_command
@click.argument("leaf")
@snapshot_options
@click.option("--rows", metavar="A:B", help="Only rows A to B (exclusive) of the first dimension.")
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Whose leaf, where each rank has one.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write a .npy file (an object: JSON) instead.",
)
@click.option("--force", is_flag=True, help="Replace the output file.")
def command(
    choice: StoreChoice,
    *,
    selector: Selector,
    leaf: str,
    rows: str | None,
    rank: int,
    output: Path | None,
    force: bool,
) -> None:
    """Read one LEAF of a snapshot of the store at URL, verified, without reading the rest.

    bfloat16 and 8-bit floats are printed as numbers; in a .npy file they are raw bits, for numpy
    has no such types.
    """
    row_range = None if rows is None else _span(rows)
    with open_store(choice) as store:
        chosen = store.select(selector)
        index = load_index(store.backend, store.state, chosen)
        places = ChunkPlaces(store.backend, lambda: store.state, index)
        with SnapshotReader(store.backend, index, places_of=places) as reader:
            entry = reader.leaf(leaf, rank=rank)
            head: dict[str, JsonValue] = {"epoch": chosen.epoch, "step": chosen.step}
            if entry.kind is LeafKind.OBJECT:
                if row_range is not None:
                    raise UsageError(f"an object has no rows. leaf={leaf}; leave out --rows")
                _show_object(choice, reader, entry, head, output, force)
            else:
                _show_tensor(choice, reader, entry, head, row_range, output, force)


def _show_tensor(
    choice: StoreChoice,
    reader: SnapshotReader,
    leaf: Leaf,
    head: dict[str, JsonValue],
    rows: slice | None,
    output: Path | None,
    force: bool,
) -> None:
    values = reader.read(leaf.name, rank=leaf.rank or 0, rows=rows)
    array: Array = values.array
    if output is not None:
        write_file(output, lambda file: np.save(file, array, allow_pickle=False), force=force)
        if str(array.dtype) != values.dtype:
            warn(f"numpy has no {values.dtype}: the file holds its raw bits as {array.dtype}")
    if choice.as_json:
        if output is None and array.size > VALUES_MAX:
            raise UsageError(
                f"too many numbers for JSON. leaf={leaf.name} numbers={array.size} "
                f"limit={VALUES_MAX}; pass -o"
            )
        head |= _leaf_json(leaf, list(array.shape), output)
        head["values"] = None if output is not None else _numbers(readable(values))
        emit_json(head)
    elif output is None:
        click.echo(f"{leaf.name}  {values.dtype}  {'x'.join(map(str, array.shape)) or 'scalar'}")
        click.echo(np.array2string(readable(values), threshold=1000))
    else:
        click.echo(f"wrote {output}: {values.dtype} {'x'.join(map(str, array.shape)) or 'scalar'}")


def _show_object(
    choice: StoreChoice,
    reader: SnapshotReader,
    leaf: Leaf,
    head: dict[str, JsonValue],
    output: Path | None,
    force: bool,
) -> None:
    tree = json_tree(reader.read_object(leaf.name, rank=leaf.rank or 0), lambda name: name)
    text = json.dumps(tree, indent=1)
    if output is not None:
        write_file(output, lambda file: file.write(text.encode() + b"\n"), force=force)
    if choice.as_json:
        head |= _leaf_json(leaf, None, output)
        emit_json({**head, "values": None if output is not None else tree})
    else:
        click.echo(text if output is None else f"wrote {output}")


def _leaf_json(leaf: Leaf, shape: list[int] | None, output: Path | None) -> dict[str, JsonValue]:
    return {
        "leaf": leaf.name,
        "rank": leaf.rank,
        "kind": leaf.kind.value,
        "dtype": leaf.dtype,
        "shape": None if shape is None else list(shape),
        "file": None if output is None else str(output),
    }


def _numbers(array: Array) -> JsonValue:
    if array.dtype.kind == "c":
        pairs = np.stack((array.real, array.imag), axis=-1)
        return _listed(pairs)
    return _listed(array)


def _listed(array: Array) -> JsonValue:
    listed: JsonValue = array.tolist()
    return listed


def _span(text: str) -> slice:
    match = _ROWS.fullmatch(text)
    if match is None:
        raise UsageError(f"rows are A:B, either may be left out. rows={text}")
    low, high = (int(part) if part not in ("", "-") else None for part in match.groups())
    return slice(low, high)
