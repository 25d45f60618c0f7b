"""``ckpt completion``: the script that teaches a shell our commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ckpt.cli.say import COMPLETE_VARIABLE
from ckpt.errors import InternalError

_EPILOG = """\b
Examples:
  ckpt completion bash > ~/.local/share/bash-completion/completions/ckpt
  ckpt completion zsh > ~/.zfunc/_ckpt
  ckpt completion fish > ~/.config/fish/completions/ckpt.fish
"""


@click.command(name="completion", epilog=_EPILOG)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL."""
    maker = get_completion_class(shell)
    if maker is None:
        raise InternalError(f"click knows no such shell. shell={shell}")
    root = ctx.find_root().command
    click.echo(maker(root, {}, "ckpt", COMPLETE_VARIABLE).source())
