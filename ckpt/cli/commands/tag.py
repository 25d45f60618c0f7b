"""``ckpt tag``: give a snapshot a name."""

from __future__ import annotations

import click

from ckpt.cli.echo import emit_json
from ckpt.cli.store_options import Selector, StoreChoice, id_json, open_store, store_command

_EPILOG = """\b
Examples:
  ckpt tag runs/a best --step 1200
  ckpt tag runs/a before-lr-change

\b
JSON: {"tag", "snapshot": {"epoch", "step"}}.
"""


@click.command(name="tag", epilog=_EPILOG)
@store_command
@click.argument("name")
@click.option(
    "--step",
    type=click.IntRange(min=0),
    help="The snapshot of this step; the newest one that has it.",
)
@click.option(
    "--epoch", type=click.IntRange(min=0), help="The captured epoch; alone: its newest snapshot."
)
def command(choice: StoreChoice, *, name: str, step: int | None, epoch: int | None) -> None:
    """Tag a snapshot of the store at URL with NAME, the newest without a selector.

    A tagged snapshot is never dropped. A tag that exists moves.
    """
    with open_store(choice) as store:
        chosen = store.select(Selector(step, epoch, None))
        store.journal.tag(name, chosen)
        if choice.as_json:
            emit_json({"tag": name, "snapshot": id_json(chosen)})
        else:
            click.echo(f"tagged {chosen} as {name}")
