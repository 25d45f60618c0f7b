"""``ckpt untag``: take a name away."""

from __future__ import annotations

import click

from ckpt.cli.echo import emit_json
from ckpt.cli.store_options import StoreChoice, id_json, open_store, store_command
from ckpt.errors import NotFoundError

_EPILOG = """\b
Examples:
  ckpt untag runs/a best

\b
JSON: {"untagged", "snapshot": {"epoch", "step"}}.
"""


@click.command(name="untag", epilog=_EPILOG)
@store_command
@click.argument("name")
def command(choice: StoreChoice, *, name: str) -> None:
    """Remove the tag NAME from the store at URL; the snapshot stays."""
    with open_store(choice) as store:
        named = store.state.tags.get(name)
        if named is None:
            known = ", ".join(store.state.tags) or "none"
            raise NotFoundError(f"no such tag. tag={name} tags={known}")
        store.journal.untag(name)
        if choice.as_json:
            emit_json({"untagged": name, "snapshot": id_json(named)})
        else:
            click.echo(f"untagged {name}, which named {named}")
