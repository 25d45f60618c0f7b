"""``ckpt sync``: make a store a full replica of another one."""

from __future__ import annotations

import sys

import click

from ckpt.backends.base import Backend
from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.output import human_bytes, progress
from ckpt.cli.store_options import (
    CommonOptions,
    common_options,
    open_plain_stores,
    options_of,
    rate_option,
)
from ckpt.errors import IntegrityError, UnavailableError
from ckpt.format import keys
from ckpt.maintenance.replica import SyncLimits, SyncReport
from ckpt.maintenance.sync.sync import sync

_EPILOG = """\b
Examples:
  ckpt sync /mnt/a/run s3://bucket/run
  ckpt sync /mnt/a/run /mnt/new/run --replica /mnt/b/run --deep
  ckpt sync s3://bucket/run runs/copy --rate 100MiB --json

\b
Storage options are numbered in this order: SRC, each --replica, DST.

\b
Exit codes: 0 DST holds everything, 20 SRC has damage (it was not copied, the
rest was), 12 DST has a history of its own, 2 DST is another job's, 11 a store
does not answer or is full: run the same command again, it goes on.

\b
JSON: {"ok", "store_id", "next_seq", "rounds", "copied_objects",
"copied_bytes", "present_objects", "records", "folds",
"damaged": [{"key", "message"}, ...], "hole"}.
"""


@click.command(name="sync", epilog=_EPILOG)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    metavar="URL",
    help="Another store of SRC's job to read from; may be repeated.",
)
@click.option(
    "--deep", is_flag=True, help="Read and compare what DST has already, not just its listing."
)
@rate_option
@common_options
def command(
    src: str,
    dst: str,
    *,
    replicas: tuple[str, ...],
    deep: bool,
    rate_bytes_per_s: float | None,
    options: CommonOptions,
) -> int:
    """Make the store at DST a full replica of the one at SRC: all that snapshots need, and then the
    log.

    DST is an empty place, or a replica that is behind or was interrupted. Each byte that has a
    digest is verified before it is written. Damage of SRC is reported, and never copied. Nothing is
    deleted anywhere. With --replica, what SRC has wrong is read from the other store. A replica
    counts for a running job only once that job knows of it.
    """
    sources = (src, *replicas)
    each = options_of(options.storage_options, stores=len(sources) + 1)
    with (
        open_plain_stores(sources, each[:-1], encryption_key=options.encryption_key) as source,
        open_plain_stores((dst,), each[-1:], encryption_key=options.encryption_key) as store,
        progress(f"filling {store.url}", _packs_bytes(source)) as on_progress,
    ):
        report = sync(
            source,
            store,
            deep=deep,
            limits=SyncLimits(rate_bytes_per_s=rate_bytes_per_s),
            on_progress=on_progress,
        )
    if options.as_json:
        emit_json(_json(report))
    else:
        _print(report, dst)
    if report.damaged or report.hole is not None:
        return IntegrityError.exit_code
    return 0 if report.complete else UnavailableError.exit_code


def _packs_bytes(source: Backend) -> int:
    """The total for the progress bar: what a first sync copies at most."""
    return sum(stat.size_bytes for stat in source.list(keys.PACKS)) if sys.stderr.isatty() else 0


def _print(report: SyncReport, dst: str) -> None:
    for key, reason in report.damaged:
        click.echo(f"DAMAGED  {key}: not copied\n    {reason}")
    if report.hole is not None:
        click.echo(
            f"LOST     the log of the source: record {report.hole.seq} and all after it\n    "
            f"{report.hole.reason}"
        )
    if not report.complete:
        click.echo("the source is written to faster than it is copied; run the same command again")
    click.echo(
        f"{dst} holds the log below {report.next_seq}: copied {report.copied_objects} objects "
        f"({human_bytes(report.copied_bytes)}), {report.records} records, {report.folds} folds; "
        f"{report.present_objects} were there"
    )


def _json(report: SyncReport) -> JsonValue:
    return {
        "ok": report.ok,
        "store_id": report.store_id,
        "next_seq": report.next_seq,
        "rounds": report.rounds,
        "copied_objects": report.copied_objects,
        "copied_bytes": report.copied_bytes,
        "present_objects": report.present_objects,
        "records": report.records,
        "folds": report.folds,
        "damaged": [{"key": key, "message": reason} for key, reason in report.damaged],
        "hole": None
        if report.hole is None
        else {"seq": report.hole.seq, "reason": report.hole.reason},
    }
