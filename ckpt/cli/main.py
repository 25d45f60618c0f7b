"""The ``ckpt`` command: a group of commands, and the mapping of errors to exit codes.

A command's module is imported only when the command is run.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

import click

from ckpt.cli.echo import COMPLETE_VARIABLE, emit_error
from ckpt.errors import CkptError, InternalError

COMMANDS = {
    "run": "ckpt.cli.commands.run",
    "ls": "ckpt.cli.commands.ls",
    "show": "ckpt.cli.commands.show",
    "log": "ckpt.cli.commands.log",
    "read": "ckpt.cli.commands.read",
    "verify": "ckpt.cli.commands.verify",
    "scrub": "ckpt.cli.commands.scrub",
    "sync": "ckpt.cli.commands.sync",
    "doctor": "ckpt.cli.commands.doctor",
    "diff": "ckpt.cli.commands.diff",
    "restore": "ckpt.cli.commands.restore",
    "tag": "ckpt.cli.commands.tag",
    "untag": "ckpt.cli.commands.untag",
    "rm": "ckpt.cli.commands.rm",
    "gc": "ckpt.cli.commands.gc",
    "stores": "ckpt.cli.commands.stores",
    "key": "ckpt.cli.commands.key",
    "ps": "ckpt.cli.commands.ps",
    "top": "ckpt.cli.commands.top",
    "logs": "ckpt.cli.commands.logs",
    "standby": "ckpt.cli.commands.standby",
    "serve": "ckpt.cli.commands.serve",
    "completion": "ckpt.cli.commands.completion",
}
"""Each command and the module that holds it as ``command``."""

EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

_EPILOG = """\b
Exit codes:
  0   done, and everything is well
  2   the command line cannot work as given
  10  no such store, snapshot, tag, leaf, file or running job
  11  the store or a keeper does not answer, or the store is full or denies
  12  another writer came first, or a newer epoch is open
  13  whether a write landed is unknown: run the same command again
  20  damage: stored bytes differ from their digest
  70  a defect of ckpt
  130 interrupted

\b
Stores are named by URL: a folder, s3://bucket/prefix, gs://..., az://...
Every command takes --json, before or after its name.
"""


class LazyGroup(click.Group):
    """A group that imports only the module of the command that is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = COMMANDS.get(cmd_name)
        if home is None:
            return None
        command = importlib.import_module(home).command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.version_option(
    metadata.version("torch-ckpt"), prog_name="ckpt", message="%(prog)s %(version)s"
)
def cli(as_json: bool, debug: bool) -> None:
    """Look into, verify and restore snapshots of PyTorch state."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code.

    Errors are printed to stderr.
    """
    as_json = _flag(arguments, "--json")
    debug = _flag(arguments, "--debug")
    try:
        # Not cli.main: it prints a line on Ctrl-C and exits by itself on a closed pipe.
        with cli.make_context("ckpt", list(arguments) or ["--help"]) as ctx:
            result = cli.invoke(ctx)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has exited. Buffered output must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except click.ClickException as error:
        where = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "ckpt"
        )
        message = f"{error.format_message()} See '{where} --help'."
        code = "usage" if isinstance(error, click.UsageError) else "not-found"
        exit_code = 2 if isinstance(error, click.UsageError) else 10
        return emit_error(message, code=code, exit_code=exit_code, retry=False, as_json=as_json)
    except CkptError as error:
        if debug:
            traceback.print_exc()
        return emit_error(
            str(error),
            code=error.code,
            exit_code=error.exit_code,
            retry=error.retry,
            as_json=as_json,
        )
    except Exception as error:  # noqa: BLE001  the outermost frame: a defect of ours
        if debug:
            traceback.print_exc()
        text = (
            f"this is a defect of ckpt: {type(error).__name__}: {error}; run again with --debug "
            "and report it"
        )
        exit_code = InternalError.exit_code
        return emit_error(
            text, code=InternalError.code, exit_code=exit_code, retry=False, as_json=as_json
        )


def main() -> None:
    """The program: run the command line of this process and exit with its code."""
    if COMPLETE_VARIABLE in os.environ:
        # A shell asks for completions: click answers and exits.
        cli.main(prog_name="ckpt", complete_var=COMPLETE_VARIABLE)
    sys.exit(run(sys.argv[1:]))


def _flag(arguments: Sequence[str], name: str) -> bool:
    """Whether a flag is among the arguments. Used before parsing, because parsing may fail."""
    return name in arguments[: arguments.index("--") if "--" in arguments else len(arguments)]
