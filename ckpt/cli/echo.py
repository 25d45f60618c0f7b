"""Output of every command: JSON documents on stdout, errors and warnings on stderr.

It stays apart from ``output`` so that an error is printed without importing rich.
"""

from __future__ import annotations

import json

import click

COMPLETE_VARIABLE = "_CKPT_COMPLETE"
"""Set by the completion scripts when a shell asks for words."""

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


def wants_json(ctx: click.Context, as_json: bool) -> bool:
    """Whether ``--json`` was given after the command's name (``as_json``) or before it."""
    return as_json or bool(ctx.find_root().params.get("as_json"))


def emit_json(value: JsonValue) -> None:
    """Print one JSON document on one line; numbers that JSON lacks become null."""
    click.echo(json.dumps(_finite(value), ensure_ascii=True, allow_nan=False))


def emit_error(message: str, *, code: str, exit_code: int, retry: bool, as_json: bool) -> int:
    """Print an error to stderr, as ``error: ...`` or as an object, and return ``exit_code``."""
    if as_json:
        error = {"code": code, "message": message, "exit_code": exit_code, "retry": retry}
        click.echo(json.dumps({"error": error}, ensure_ascii=True), err=True)
    else:
        click.echo(f"error: {message}", err=True)
    return exit_code


def warn(message: str) -> None:
    """Print a warning to stderr."""
    click.echo(f"warning: {message}", err=True)


def _finite(value: JsonValue) -> JsonValue:
    match value:
        case float():
            return value if value - value == 0 else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case _:
            return value
