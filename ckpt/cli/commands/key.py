"""``ckpt key``: make a key for encrypted stores, or look at one."""

from __future__ import annotations

import click

from ckpt.backends.encrypted.keys import load_keys, write_new_key
from ckpt.backends.replicated.open import KEY_VARIABLE
from ckpt.cli.echo import emit_json, wants_json

_EPILOG = f"""\b
Examples:
  ckpt key new job.key             make a key that only you can read
  ckpt key id file:job.key         the id of the key that a store is asked for

\b
Keep a copy of the key elsewhere: without it what was encrypted with it is lost. Programs and \
commands get it as
--encryption-key file:job.key, encryption_key="file:job.key" or {KEY_VARIABLE}=file:job.key. To \
change keys give the new one
first: file:new.key,file:old.key.

\b
JSON: {{"ids": [...]}}, the first is written with.
"""


@click.command(name="key", epilog=_EPILOG)
@click.argument("action", type=click.Choice(["new", "id"]))
@click.argument("where")
@click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
@click.pass_context
def command(ctx: click.Context, *, action: str, where: str, as_json: bool) -> None:
    """Make a key in the new file WHERE, or tell the id of the key that WHERE leads to; never the
    key itself."""
    ids = [write_new_key(where).id.hex()] if action == "new" else load_keys(where).ids.split(",")
    if wants_json(ctx, as_json):
        emit_json({"ids": list(ids)})
    else:
        click.echo("\n".join(ids))
