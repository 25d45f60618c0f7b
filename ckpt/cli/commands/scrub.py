"""``ckpt scrub``: read everything on every store, and mend what is not as it should be."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of, write_quorum_of
from ckpt.cli.echo import emit_json, warn
from ckpt.cli.output import human_bytes
from ckpt.cli.replica_report import exit_code_of, print_report, report_json
from ckpt.cli.store_options import StoreList, open_plain_stores, rate_option, urls_command
from ckpt.errors import InternalError, UnavailableError
from ckpt.log.state import Committed
from ckpt.maintenance.scrub.history import record_scrub
from ckpt.maintenance.scrub.scrub import Scrub

_EPILOG = """\b
Examples:
  ckpt scrub /mnt/a/run /mnt/b/run s3://bucket/run
  ckpt scrub runs/a --rate 50MiB
  ckpt scrub /mnt/a/run /mnt/new/run --fill-empty --json

\b
Exit codes: 0 all is well now (what was found was mended), 20 damage is left,
11 a store did not answer, is empty, or could not be written to.

\b
JSON: {"ok", "job", "snapshots", "records", "moved_bytes", "thin", "lost",
"unmended", "hole", "untraced", "stores": [{"url", "role", "store_id",
"problem", "objects", "ok", "missing", "damaged", "unreadable", "mended",
"strays", "stray_bytes"}, ...], "troubles": [{"key", "store", "what",
"message", "offsets", "lost", "mended"}, ...], "troubles_total"}. "store" is a
place in "stores", "what" is missing, damaged or unreadable; "lost": no store
has it; "thin": objects on fewer stores than the write quorum; "strays": objects
that nothing refers to, which are left alone.
"""


@click.command(name="scrub", epilog=_EPILOG)
@urls_command
@rate_option
@click.option("--no-mend", "look_only", is_flag=True, help="Write nothing, just report.")
@click.option(
    "--fill-empty",
    is_flag=True,
    help="Make an empty store a replica. Without it, it may be a disk that isn't mounted.",
)
def command(
    choice: StoreList, *, rate_bytes_per_s: float | None, look_only: bool, fill_empty: bool
) -> int:
    """Read everything on each store at URL..., compare it with its digests and with the other
    stores, and mend it.

    Name all stores of one job. Every record of the log, every manifest and part, and every stored
    byte that a snapshot needs is read on every store. What is missing or damaged in one is written
    anew from another that has it right; a pack of which no store has a whole copy is put together
    from several. What no store has right is reported, and left alone. It may run beside training,
    be interrupted, and be repeated.
    """
    with open_plain_stores(
        choice.urls,
        choice.options,
        encryption_key=choice.encryption_key,
        write_quorum=choice.write_quorum,
    ) as backend:
        stores = stores_of(backend)
        scrub = Scrub(
            stores,
            write_quorum_of(backend),
            repair=not look_only,
            fill_empty=fill_empty,
            rate_bytes_per_s=rate_bytes_per_s,
        )
        report = scrub.run(
            threads=threads_for(stores),
            on_verified=None if look_only else lambda verified: _record(stores, verified),
        )
    if report is None:
        raise InternalError("a scrub without a stop event was stopped")
    if choice.as_json:
        emit_json(report_json(report))
    else:
        print_report(report)
        click.echo(f"{human_bytes(report.moved_bytes)} read and written")
    return exit_code_of(report)


def _record(stores: tuple[Backend, ...], verified: Sequence[Committed]) -> None:
    """Record the scrub; a warning if no store takes that, for what was found has to be told."""
    try:
        record_scrub(stores, verified, now_unix_ms=int(time.time() * 1000))
    except UnavailableError as error:
        warn(f"no store took the record of this scrub. {error}")


def threads_for(stores: tuple[object, ...]) -> int:
    """How many objects to check at once, each on all stores."""
    return max(2, min(8, 2 * len(stores)))
