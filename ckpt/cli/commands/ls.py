"""``ckpt ls``: the snapshots of a store."""

from __future__ import annotations

import click

from ckpt.cli.echo import emit_json
from ckpt.cli.output import human_bytes, human_time, table
from ckpt.cli.store_options import StoreChoice, info_json, open_store, store_command
from ckpt.errors import IntegrityError
from ckpt.log.catalog import snapshots

_EPILOG = """\b
Examples:
  ckpt ls runs/a
  ckpt ls s3://bucket/run-a --json | jq '.snapshots[0].step'

\b
JSON: {"url", "job", "snapshots": [{"epoch", "step", "newest", "on_line",
"world_size", "size_bytes", "new_bytes", "created_unix_s", "tags",
"metadata", "problem", "maybe_stale"}, ...]}, last committed first.
"problem" is null, or why the snapshot's manifest cannot be read; its sizes
are 0 then. "maybe_stale": the log has a hole, newer ones may exist.

\b
Exit codes: 0 all can be read, 20 if not: a manifest is damaged, or the log has a
hole, behind which there may be snapshots.
"""


@click.command(name="ls", epilog=_EPILOG)
@store_command
def command(choice: StoreChoice) -> int:
    """List the snapshots of the store at URL, newest first.

    '*' marks what a restore takes, '-' a snapshot off the newest line: kept, and restored only when
    asked for.
    """
    with open_store(choice) as store:
        lineage = store.state.lineage
        newest = store.state.newest()
        infos = tuple(reversed(snapshots(store.backend, store.state)))
        damaged = store.state.hole is not None or any(info.problem for info in infos)
        code = IntegrityError.exit_code if damaged else 0
        if choice.as_json:
            rows = [
                info_json(info, newest=info.id == newest, on_line=info.id in lineage)
                for info in infos
            ]
            emit_json({"url": store.backend.url, "job": store.state.job, "snapshots": list(rows)})
            return code
        if not infos:
            click.echo("no snapshots" if code == 0 else "no snapshots can be read")
            return code
        table(
            ("", "EPOCH", "STEP", "RANKS", "SIZE", "NEW", "CREATED", "TAGS", "PROBLEM"),
            [
                (
                    "*" if info.id == newest else "" if info.id in lineage else "-",
                    str(info.epoch),
                    str(info.step),
                    str(info.world_size),
                    human_bytes(info.size_bytes),
                    human_bytes(info.new_bytes),
                    human_time(info.created_unix_s),
                    ", ".join(info.tags),
                    info.problem or "",
                )
                for info in infos
            ],
            right=frozenset(("EPOCH", "STEP", "RANKS", "SIZE", "NEW")),
        )
        return code
