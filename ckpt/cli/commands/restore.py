"""``ckpt restore``: a snapshot as files that other programs read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from ckpt.cli.echo import JsonValue, emit_json, warn
from ckpt.cli.output import human_bytes, progress
from ckpt.cli.store_options import (
    OpenStore,
    Selector,
    StoreChoice,
    id_json,
    open_store,
    snapshot_options,
    store_command,
)
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.log.catalog import ChunkPlaces, candidates, load_index
from ckpt.maintenance.gc.drop import with_dropped
from ckpt.restore.export.items import ExportedFile, ExportOptions, ItemWriter, export
from ckpt.restore.reader import SnapshotReader
from ckpt.save.persister import SUSPECT_KEY
from ckpt.values import SnapshotId

WRITERS = {
    "torch": ("ckpt.restore.export.torch_files", "TorchWriter"),
    "safetensors": ("ckpt.restore.export.safetensors_files", "SafetensorsWriter"),
}
"""Each format and its writer, imported on use: only one of them needs torch."""

MEMORY_BYTES_MIN = 16 << 20
"""The least memory for streaming: a window and one worker's scratch memory."""

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_EPILOG = """\b
Examples:
  ckpt restore runs/a --to out
  ckpt restore runs/a --to out --step 1200 --item model
  ckpt restore s3://bucket/run-a --to out --format safetensors --memory 1GiB
  ckpt restore runs/a --to out --all-ranks
  ckpt restore runs/a --to out --dropped --step 1200

\b
torch: <item>.pt, which torch.load(weights_only=True) reads; tied tensors stay
tied, optimizers have torch's own form (state by number) where it is possible.
safetensors: <item>.safetensors, and <item>.json for what is no tensor.

\b
JSON: {"snapshot": {"epoch", "step"}, "format", "fell_back_from":
[{"epoch", "step"}, ...], "files": [{"path", "item", "rank", "size_bytes"}]}.
"""


@click.command(name="restore", epilog=_EPILOG)
@store_command
@snapshot_options
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to write into.",
)
@click.option(
    "--format", "form", type=click.Choice(tuple(WRITERS)), default="torch", show_default=True
)
@click.option("--item", "items", multiple=True, help="Only this tracked item; may be repeated.")
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    default=None,
    help="Whose state, where each rank has its own.  [default: 0]",
)
@click.option("--all-ranks", is_flag=True, help="Every rank's, into rank-N/.")
@click.option(
    "--memory", default="256MiB", show_default=True, help="How much memory streaming may take."
)
@click.option(
    "--strict",
    is_flag=True,
    help="Fail on a damaged snapshot instead of taking the next older one.",
)
@click.option("--force", is_flag=True, help="Replace files.")
@click.option(
    "--dropped",
    is_flag=True,
    help="A snapshot that was dropped, as long as its bytes are there; needs --step.",
)
def command(  # noqa: PLR0913
    choice: StoreChoice,
    *,
    selector: Selector,
    folder: Path,
    form: str,
    items: tuple[str, ...],
    rank: int | None,
    all_ranks: bool,
    memory: str,
    strict: bool,
    force: bool,
    dropped: bool,
) -> None:
    """Write a snapshot of the store at URL as plain files, one for each tracked item.

    Without a selector it takes the newest; where that is damaged it says so and takes the next
    older one, unless --strict. A snapshot that was named is restored or the command fails. Data is
    streamed: memory stays small whatever its size. With --dropped the grace of deletion is an undo.
    """
    if dropped and selector.step is None:
        raise UsageError(
            "--dropped needs the step that was dropped. add --step, and --epoch if two"
        )
    if all_ranks and rank is not None:
        raise UsageError("one rank or all. leave out --rank or --all-ranks")
    options = ExportOptions(
        rank=rank or 0,
        all_ranks=all_ranks,
        items=items or None,
        force=force,
        memory_bytes=_bytes(memory),
    )
    module, name = WRITERS[form]
    writer: ItemWriter = getattr(importlib.import_module(module), name)()
    with open_store(choice) as store:
        if dropped and selector.step is not None:
            state, snapshot = with_dropped(
                store.backend, store.state, step=selector.step, epoch=selector.epoch
            )
            store = replace(store, state=state)
            files = _restore_dropped(store, snapshot, folder, writer, options)
            _print(choice, snapshot, form, [], files)
            return
        wanted = (
            list(candidates(store.state))
            if selector.empty and not strict
            else [store.select(selector)]
        )
        if not wanted:
            wanted = [store.select(selector)]
        skipped: list[SnapshotId] = []
        for index, snapshot in enumerate(wanted):
            try:
                files = _restore(store, snapshot, folder, writer, options)
            except IntegrityError as error:
                if index + 1 == len(wanted):
                    raise
                warn(f"{snapshot} is damaged, so the next older one is restored: {error}")
                skipped.append(snapshot)
                continue
            _print(choice, snapshot, form, skipped, files)
            return


def _restore_dropped(
    store: OpenStore, snapshot: SnapshotId, folder: Path, writer: ItemWriter, options: ExportOptions
) -> Sequence[ExportedFile]:
    try:
        return _restore(store, snapshot, folder, writer, options)
    except IntegrityError as error:
        raise NotFoundError(
            f"the snapshot was dropped, and its bytes are deleted, or some of them. "
            f"snapshot={snapshot} why={error}"
        ) from error


def _restore(
    store: OpenStore, snapshot: SnapshotId, folder: Path, writer: ItemWriter, options: ExportOptions
) -> Sequence[ExportedFile]:
    index = load_index(store.backend, store.state, snapshot)
    if (different := index.manifest.metadata.get(SUSPECT_KEY)) is not None:
        warn(f"{snapshot} is a mixture of replicas that differed when it was saved: {different}")
    label = f"restoring {snapshot}"
    with (
        SnapshotReader(
            store.backend,
            index,
            budget_bytes=options.memory_bytes // 2,
            places_of=ChunkPlaces(store.backend, lambda: store.state, index),
        ) as reader,
        progress(label, index.manifest.size_bytes) as on_progress,
    ):
        files = export(reader, folder, writer, options, on_progress=on_progress)
    if damage := list(reader.read_elsewhere.values()):
        warn(
            f"{len(damage)} chunks of {snapshot} are damaged where it stored them, and were read "
            f"from another place; see what else is damaged with ckpt verify --all: {damage[0]}"
        )
    return files


def _print(
    choice: StoreChoice,
    snapshot: SnapshotId,
    form: str,
    fallen: list[SnapshotId],
    files: Sequence[ExportedFile],
) -> None:
    if choice.as_json:
        listed: list[JsonValue] = [
            {
                "path": str(file.path),
                "item": file.item,
                "rank": file.rank,
                "size_bytes": file.size_bytes,
            }
            for file in files
        ]
        emit_json(
            {
                "snapshot": id_json(snapshot),
                "format": form,
                "fell_back_from": [id_json(file) for file in fallen],
                "files": listed,
            }
        )
        return
    click.echo(f"restored {snapshot}")
    for file in files:
        click.echo(f"  {file.path}  {human_bytes(file.size_bytes)}")


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"not a size. memory={text}; write 256MiB or 1GiB")
    size_bytes = int(match[1]) * _UNITS[match[2].upper()]
    if size_bytes < MEMORY_BYTES_MIN:
        raise UsageError(
            f"too little memory to stream with. memory={text} least={MEMORY_BYTES_MIN >> 20}MiB"
        )
    return size_bytes
