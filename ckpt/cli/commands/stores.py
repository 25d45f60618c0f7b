"""``ckpt stores``: show or change the stores of a log."""

from __future__ import annotations

from contextlib import closing

import click

from ckpt.backends.base import Backend
from ckpt.backends.replicated.open import open_job_stores
from ckpt.cli.echo import emit_json
from ckpt.cli.output import table
from ckpt.cli.store_options import (
    StoreChoice,
    open_store,
    options_of,
    store_command,
    warn_on_alarm,
)
from ckpt.errors import UsageError
from ckpt.log.state import StoreSet
from ckpt.maintenance import store_set as sets
from ckpt.maintenance.replica import SyncLimits

_ACTIONS = ("show", "add", "replace", "remove", "takeover", "accept")

_EPILOG = """\b
Examples:
  ckpt stores show s3://east/run --replica s3://west/run --replica /mnt/nfs/run
  ckpt stores add /mnt/a/run --store /mnt/b/run          one more store; it is filled first
  ckpt stores replace URL --replica URL... --id ID --store NEW
  ckpt stores remove URL --replica URL... --id ID [--id ID]
  ckpt stores takeover URL --replica URL...
  ckpt stores accept URL --replica URL...

\b
URL and --replica name the stores as they are now. `add`, `replace` and `remove` first bring \
every store what it will be counted
on to hold, then write one record to the log; running jobs go by it from their next commit on, \
and are started with the new
list from then on. A store that is replaced counts no more, should it come back.

\b
Where fewer stores are left than the write quorum (of two that must both hold a record, one), add \
--lost: your word that
the store that goes out is gone for good. All others must answer then. Make sure that nobody can \
reach the lost store: who
reads that one alone sees an old log, and who gives up the other one makes a second history.

\b
`takeover` is for a log whose places a file of another machine gave out, or another etcd (stores \
that do not create a key only
once). Nothing but your word keeps those who used it from writing in the meantime: make sure that \
they are gone. The places come
from the etcd that CKPT_SEQUENCER names from then on, or else from a file of this machine.

\b
`accept` goes on with stores that hold an older log than was seen from this machine before: a disk \
or a store that was rolled
back. What was written since then is lost with it.

\b
JSON: {"write_quorum", "sequencer", "ids": [...], "stores": [{"url", "store_id", "counts"}]}.
"""


@click.command(name="stores", epilog=_EPILOG)
@click.argument("action", type=click.Choice(_ACTIONS))
@store_command
@click.option("--store", "new_url", metavar="URL", help="add, replace: the store that comes in.")
@click.option(
    "--store-option",
    "new_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A storage option of that store.",
)
@click.option(
    "--id",
    "store_ids",
    multiple=True,
    metavar="ID",
    help="replace, remove: the store that goes out, as `show` names it. For remove, also several.",
)
@click.option(
    "--lost",
    is_flag=True,
    help="replace, remove: your word that the store that goes out is gone for good. Needed where "
    "too few others are left for the write quorum.",
)
@click.option(
    "--quorum",
    type=click.IntRange(min=1),
    help="add, remove: the write quorum from then on (default: the majority).",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB/S",
    help="How fast to copy (default: no limit).",
)
def command(
    choice: StoreChoice,
    *,
    action: str,
    new_url: str | None,
    new_options: tuple[str, ...],
    store_ids: tuple[str, ...],
    lost: bool,
    quorum: int | None,
    rate: float | None,
) -> None:
    """Show or change on which stores the log of the job at URL lies. ACTION: show, add, replace,
    remove, takeover or accept."""
    _require(action, new_url=new_url, store_ids=store_ids, quorum=quorum)
    if lost and not store_ids:
        raise UsageError(f"--lost goes with --id. action={action}")
    limits = SyncLimits(rate_bytes_per_s=rate * 1e6 if rate is not None else None)
    with open_store(choice) as store:
        journal, backend = store.journal, store.backend
        match action:
            case "add":
                with _open_new(new_url, new_options, choice) as new:
                    sets.add(
                        journal,
                        backend,
                        new,
                        write_quorum=quorum or sets.MAJORITY,
                        limits=limits,
                        emit=warn_on_alarm,
                    )
            case "replace":
                with _open_new(new_url, new_options, choice) as new:
                    sets.replace(
                        journal,
                        backend,
                        new,
                        store_ids[0],
                        lost=lost,
                        limits=limits,
                        emit=warn_on_alarm,
                    )
            case "remove":
                sets.remove(
                    journal,
                    backend,
                    store_ids,
                    lost=lost,
                    write_quorum=quorum or sets.MAJORITY,
                    limits=limits,
                    emit=warn_on_alarm,
                )
            case "takeover":
                sets.take_over(journal, backend)
            case "accept":
                journal.accept_rollback()
            case _:
                pass
        _print(choice, *sets.store_memberships(journal, backend))


def _require(
    action: str, *, new_url: str | None, store_ids: tuple[str, ...], quorum: int | None
) -> None:
    for option, given, where in (
        ("--store", new_url is not None, ("add", "replace")),
        ("--id", bool(store_ids), ("replace", "remove")),
    ):
        if given != (action in where):
            raise UsageError(
                f"{option} goes with {' and '.join(where)}"
                f"{', and is required' if action in where else ' only'}. action={action}"
            )
    if len(store_ids) > 1 and action == "replace":
        raise UsageError("replace puts one store in the place of one: give --id once")
    if quorum is not None and action not in ("add", "remove"):
        raise UsageError(f"--quorum goes with add and remove only. action={action}")


def _open_new(url: str | None, options: tuple[str, ...], choice: StoreChoice) -> closing[Backend]:
    """The store to add, closed afterwards."""
    return closing(
        open_job_stores(
            [url or ""],
            options_of(options, stores=1),
            encryption_key=choice.encryption_key,
            emit=warn_on_alarm,
        )
    )


def _print(
    choice: StoreChoice, members: StoreSet | None, stores: tuple[sets.StoreMembership, ...]
) -> None:
    if choice.as_json:
        emit_json(
            {
                "write_quorum": members.write_quorum if members else 1,
                "sequencer": members.sequencer if members else "store",
                "ids": list(members.ids) if members else [store.store_id for store in stores],
                "stores": [
                    {"url": store.url, "store_id": store.store_id, "counts": store.counts}
                    for store in stores
                ],
            }
        )
        return
    lost = (
        [store for store in members.ids if store not in {store.store_id for store in stores}]
        if members
        else []
    )
    rows = [[store.url, store.store_id or "-", "yes" if store.counts else "no"] for store in stores]
    rows += [["(not named, or silent)", store, "no"] for store in lost]
    table(["STORE", "ID", "COUNTS"], rows)
    if members is not None:
        click.echo(
            f"write quorum {members.write_quorum} of {len(members.ids)}, places by "
            f"{members.sequencer}"
        )
