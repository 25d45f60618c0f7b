"""``ckpt show``: what one snapshot holds."""

from __future__ import annotations

import click

from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.output import human_bytes, human_time, table
from ckpt.cli.store_options import (
    Selector,
    StoreChoice,
    info_json,
    open_store,
    snapshot_options,
    store_command,
)
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import info_of, load_index
from ckpt.restore.reader import size_bytes
from ckpt.values import Leaf

_EPILOG = """\b
Examples:
  ckpt show runs/a
  ckpt show runs/a --tag best
  ckpt show runs/a --step 1200 --json | jq -r '.leaves[].name'

\b
JSON: {"snapshot": {as in ls}, "leaves": [{"name", "rank", "kind", "dtype",
"shape", "size_bytes", "shards", "alias_of"}, ...]}; "rank" is null for a
leaf that all ranks share.
"""


@click.command(name="show", epilog=_EPILOG)
@store_command
@snapshot_options
def command(choice: StoreChoice, *, selector: Selector) -> None:
    """Show one snapshot of the store at URL: its leaves, shapes, dtypes, bytes, ranks and metadata.

    Reads records only, no tensor. Without a selector it shows the newest.
    """
    with open_store(choice) as store:
        chosen = store.select(selector)
        index = load_index(store.backend, store.state, chosen)
        info = info_of(index.manifest, store.state)
        if choice.as_json:
            shown = info_json(
                info, newest=chosen == store.state.newest(), on_line=chosen in store.state.lineage
            )
            emit_json(
                {"snapshot": shown, "leaves": [_leaf_json(index, leaf) for leaf in index.leaves()]}
            )
            return
        click.echo(f"snapshot  {chosen}{'  (newest)' if chosen == store.state.newest() else ''}")
        click.echo(f"ranks     {info.world_size}")
        click.echo(
            f"size      {human_bytes(info.size_bytes)}, of which {human_bytes(info.new_bytes)} new"
        )
        click.echo(f"created   {human_time(info.created_unix_s)}")
        if info.tags:
            click.echo(f"tags      {', '.join(info.tags)}")
        for name, value in info.metadata.items():
            click.echo(f"metadata  {name} = {value!r}")
        click.echo()
        table(
            ("LEAF", "RANK", "DTYPE", "SHAPE", "BYTES", "SHARDS"),
            [
                (
                    leaf.name if leaf.alias_of is None else f"{leaf.name} = {leaf.alias_of}",
                    "all" if leaf.rank is None else str(leaf.rank),
                    leaf.dtype if leaf.kind == "tensor" else "object",
                    "x".join(map(str, leaf.shape)) or "scalar",
                    human_bytes(size_bytes(leaf)),
                    str(len(index.shards(leaf.name, leaf.rank))),
                )
                for leaf in index.leaves()
            ],
            right=frozenset(("RANK", "BYTES", "SHARDS")),
        )


def _leaf_json(index: SnapshotIndex, leaf: Leaf) -> JsonValue:
    return {
        "name": leaf.name,
        "rank": leaf.rank,
        "kind": leaf.kind.value,
        "dtype": leaf.dtype,
        "shape": list(leaf.shape),
        "size_bytes": size_bytes(leaf),
        "shards": len(index.shards(leaf.name, leaf.rank)),
        "alias_of": leaf.alias_of,
    }
