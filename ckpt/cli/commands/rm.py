"""``ckpt rm``: drop a snapshot."""

from __future__ import annotations

import click

from ckpt.cli.echo import emit_json
from ckpt.cli.store_options import Selector, StoreChoice, id_json, open_store, store_command
from ckpt.errors import UsageError

_EPILOG = """\b
Examples:
  ckpt rm runs/a --step 1200
  ckpt rm runs/a --epoch 3 --step 1200 --yes

\b
JSON (needs --yes): {"dropped": {"epoch", "step"}}.
"""


@click.command(name="rm", epilog=_EPILOG)
@store_command
@click.option("--step", type=click.IntRange(min=0), required=True, help="The snapshot's step.")
@click.option(
    "--epoch", type=click.IntRange(min=0), help="The captured epoch, where several have the step."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(choice: StoreChoice, *, step: int, epoch: int | None, yes: bool) -> None:
    """Drop one snapshot of the store at URL: it can no longer be restored.

    Refuses the newest and tagged ones. Only a record is written: the bytes go with a later 'ckpt
    gc'.
    """
    with open_store(choice) as store:
        chosen = store.select(Selector(step, epoch, None))
        if chosen == store.state.newest():
            raise UsageError(
                f"the newest snapshot is never dropped. snapshot={chosen}; commit a newer one first"
            )
        if tags := store.tags_of(chosen):
            raise UsageError(
                f"a tagged snapshot is never dropped. snapshot={chosen} tags={','.join(tags)}; "
                "untag it first"
            )
        if not yes:
            if choice.as_json:
                raise UsageError("--json cannot ask for confirmation. pass --yes")
            click.confirm(
                f"Drop {chosen} of {store.backend.url}? It cannot be restored afterwards.",
                abort=True,
                err=True,
            )
        store.journal.drop([chosen])
        if choice.as_json:
            emit_json({"dropped": id_json(chosen)})
        else:
            click.echo(f"dropped {chosen}; its bytes go with ckpt gc, after a grace")
