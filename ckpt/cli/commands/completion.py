"""``ckpt completion``: the script that teaches a shell our commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ckpt.cli.echo import COMPLETE_VARIABLE, emit_json, wants_json
from ckpt.errors import InternalError

_EPILOG = """\b
Examples:
  ckpt completion bash > ~/.local/share/bash-completion/completions/ckpt
  ckpt completion zsh > ~/.zfunc/_ckpt
  ckpt completion fish > ~/.config/fish/completions/ckpt.fish

\b
JSON: {"shell", "script"}.
"""


@click.command(name="completion", epilog=_EPILOG)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.option("--json", "as_json", is_flag=True, help="Print the script and errors as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
@click.pass_context
def command(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the completion script for SHELL."""
    maker = get_completion_class(shell)
    if maker is None:
        raise InternalError(f"click knows no such shell. shell={shell}")
    root = ctx.find_root().command
    script = maker(root, {}, "ckpt", COMPLETE_VARIABLE).source()
    if wants_json(ctx, as_json):
        emit_json({"shell": shell, "script": script})
    else:
        click.echo(script)
