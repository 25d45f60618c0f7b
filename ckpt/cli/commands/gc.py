"""``ckpt gc``: drop what a policy does not keep, and delete unreferenced bytes."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import click

from ckpt.cli.echo import JsonValue, emit_json, warn
from ckpt.cli.output import human_bytes, human_time, table
from ckpt.cli.store_options import (
    OpenStore,
    StoreChoice,
    StoreList,
    id_json,
    open_store,
    urls_command,
)
from ckpt.errors import IntegrityError, UnavailableError, UsageError
from ckpt.log.state import LogState
from ckpt.maintenance.gc.drop import drop, preview
from ckpt.maintenance.gc.plan import GcPlan, ObjectStatus
from ckpt.maintenance.gc.sweep import (
    GRACE_S,
    StoreSweep,
    SweepReport,
    keep_reserves,
    snapshot_references,
    sweep,
)
from ckpt.maintenance.retention import KeepPolicy, duration_s, duration_text, parse_policy
from ckpt.values import SnapshotId

_EPILOG = """\b
Examples:
  ckpt gc runs/a --keep last=5 --dry-run
  ckpt gc runs/a --keep last=5,every=1000,best=loss:3 --yes
  ckpt gc s3://one/a s3://two/a s3://three/a --keep last=3,for=7d --yes
  ckpt gc runs/a                        (drop nothing, only delete bytes)

\b
Rules of --keep, separated by commas; a snapshot stays if any keeps it:
  last=N            the N newest of the newest line
  every=STEPS       those whose step is a multiple of STEPS
  tagged            tagged ones (which stay in any case)
  best=METRIC:N     the N with the least METRIC in their metadata
  best=METRIC:N:max the N with the greatest
  for=7d            those made within this time (w, d, h, m, s)
The newest snapshot and tagged ones stay whatever the rules say. So does
the newest whose bytes are all there, where the newest lacks some.
'last' looks at the newest line alone; the others at all snapshots.

\b
Exit codes: 0 done, 11 a store did not answer and is for the next time,
20 records cannot be read, so that no pack was deleted; or the log has a
hole, and nothing was. Run it again at any time, also after a crash.

\b
JSON (needs --yes or --dry-run if anything is to be dropped): {"url",
"dry_run", "policy", "grace_s", "snapshots": [{"epoch", "step", "on_line",
"size_bytes", "new_bytes", "created_unix_s", "tags", "problem",
"kept_by"}, ...], "dropped": [{"epoch", "step"}, ...], "problems", "floor",
"stores":
[{"url", "deleted", "deleted_bytes", "objects", "size_bytes", "problem"},
...], "held": [{"epoch", "step", "problem"}, ...]}. "objects" and
"size_bytes" are by what the sweep made of them: live, grace, open, young,
held, foreign, garbage.
"""


@dataclass(frozen=True, slots=True)
class _GcRequest:
    """What the command line asks for."""

    policy: KeepPolicy | None
    grace_s: int
    dry_run: bool
    yes: bool


@click.command(name="gc", epilog=_EPILOG)
@urls_command
@click.option("--keep", metavar="POLICY", help="What to keep; without it nothing is dropped.")
@click.option(
    "--dry-run", is_flag=True, help="Show what would be done, and write and delete nothing."
)
@click.option(
    "--grace",
    default=duration_text(int(GRACE_S)),
    show_default=True,
    help="How long the bytes of dropped snapshots stay, by the stores' clocks, for restores in "
    "progress.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(urls: StoreList, *, keep: str | None, dry_run: bool, grace: str, yes: bool) -> int:
    """Drop the snapshots of the job at URL... that --keep does not keep, then delete bytes that
    nothing needs.

    A drop is a record: what it names can't be restored any more. Its bytes go when the grace is
    over, in a later run. Safe beside a job that trains. Name every store of the job, or those left
    out keep their bytes.
    """
    request = _GcRequest(
        None if keep is None else parse_policy(keep), duration_s(grace), dry_run, yes
    )
    choice = StoreChoice(
        urls.urls[0],
        urls.storage_options,
        urls.as_json,
        replicas=urls.urls[1:],
        write_quorum=urls.write_quorum,
        encryption_key=urls.encryption_key,
    )
    with open_store(choice) as store:
        now_unix_s = time.time()
        plan = preview(store.backend, store.state, request.policy, now_unix_s=now_unix_s)
        if not choice.as_json:
            _print_plan(plan)
        if dry_run:
            report = _rehearse(store, plan, request)
        else:
            _ask(choice, store, plan, request)
            plan, state = drop(
                store.backend,
                store.journal,
                request.policy,
                now_unix_s=now_unix_s,
                approved=plan,
                grace_s=request.grace_s,
            )
            report = sweep(store.backend, state, grace_s=request.grace_s)
            keep_reserves(store.backend, state)
        if choice.as_json:
            emit_json(_json(store, plan, report, request))
        else:
            _print_report(plan, report, request)
        if report.held:
            return IntegrityError.exit_code
        return 0 if report.ok else UnavailableError.exit_code


def _ask(choice: StoreChoice, store: OpenStore, plan: GcPlan, request: _GcRequest) -> None:
    if not plan.drops or request.yes:
        return
    if choice.as_json:
        raise UsageError("--json cannot ask for confirmation. pass --yes or --dry-run")
    many = f"{len(plan.drops)} snapshot{'s' if len(plan.drops) > 1 else ''}"
    click.confirm(
        f"Drop {many} of {store.backend.url}? They cannot be restored afterwards.",
        abort=True,
        err=True,
    )


def _rehearse(store: OpenStore, plan: GcPlan, request: _GcRequest) -> SweepReport:
    """What a sweep would find after the drop.

    It uses this machine's clock: reading a store's clock would write to the store.
    """
    drops = frozenset(plan.drops)
    before = store.state
    after = _without(before, drops, plan)
    dropped = replace(
        before, snapshots=tuple(entry for entry in before.snapshots if entry.snapshot in drops)
    )
    return sweep(
        store.backend,
        after,
        grace_s=request.grace_s,
        about_to_drop=snapshot_references(store.backend, dropped),
        dry_run=True,
        clock=lambda _: time.time(),
    )


def _without(state: LogState, drops: Collection[SnapshotId], plan: GcPlan) -> LogState:
    left = tuple(entry for entry in state.snapshots if entry.snapshot not in drops)
    return replace(state, snapshots=left, floor=plan.floor or state.floor)


def _print_plan(plan: GcPlan) -> None:
    if not plan.decisions:
        click.echo("no snapshots")
        return
    table(
        ("", "EPOCH", "STEP", "SIZE", "NEW", "CREATED", "KEPT BY"),
        [
            (
                ("" if entry.on_line else "-") if entry.kept else "drop",
                str(entry.info.epoch),
                str(entry.info.step),
                human_bytes(entry.info.size_bytes),
                human_bytes(entry.info.new_bytes),
                human_time(entry.info.created_unix_s),
                "; ".join(entry.reasons)
                + (f"  (damaged: {entry.info.problem})" if entry.info.problem else ""),
            )
            for entry in reversed(plan.decisions)
        ],
        right=frozenset(("EPOCH", "STEP", "SIZE", "NEW")),
    )


def _print_report(plan: GcPlan, report: SweepReport, request: _GcRequest) -> None:
    for problem in plan.problems:
        warn(problem)
    if plan.drops:
        click.echo(
            f"{'would drop' if request.dry_run else 'dropped'} {len(plan.drops)} of "
            f"{len(plan.decisions)} snapshots"
        )
    for store in report.stores:
        if store.problem:
            warn(f"not swept to the end, and for the next time: {store.url}: {store.problem}")
        click.echo(f"{store.url}: {_done(store, request)}")
    for held in report.held:
        warn(f"no pack is deleted: it is unknown which ones {held.snapshot} needs: {held.problem}")


def _done(store: StoreSweep, request: _GcRequest) -> str:
    garbage = (store.objects[ObjectStatus.GARBAGE], store.size_bytes[ObjectStatus.GARBAGE])
    count, size = garbage if request.dry_run else (store.deleted, store.deleted_bytes)
    words = [
        f"{'would delete' if request.dry_run else 'deleted'} {count} objects, {human_bytes(size)}"
    ]
    waiting = store.size_bytes[ObjectStatus.GRACE] + store.size_bytes[ObjectStatus.YOUNG]
    if waiting:
        words.append(
            f"{human_bytes(waiting)} go when the grace of {duration_text(request.grace_s)} is over"
        )
    if store.size_bytes[ObjectStatus.OPEN]:
        words.append(
            f"{human_bytes(store.size_bytes[ObjectStatus.OPEN])} of snapshots that may still be "
            "committed"
        )
    if store.size_bytes[ObjectStatus.HELD]:
        words.append(f"{human_bytes(store.size_bytes[ObjectStatus.HELD])} held back")
    words.append(f"{human_bytes(store.size_bytes[ObjectStatus.LIVE])} needed")
    return "; ".join(words)


def _json(store: OpenStore, plan: GcPlan, report: SweepReport, request: _GcRequest) -> JsonValue:
    return {
        "url": store.backend.url,
        "dry_run": request.dry_run,
        "policy": None if request.policy is None else str(request.policy),
        "grace_s": request.grace_s,
        "snapshots": [
            {
                **id_json(entry.info.id),
                "on_line": entry.on_line,
                "size_bytes": entry.info.size_bytes,
                "new_bytes": entry.info.new_bytes,
                "created_unix_s": entry.info.created_unix_s,
                "tags": list(entry.info.tags),
                "problem": entry.info.problem,
                "kept_by": list(entry.reasons),
            }
            for entry in reversed(plan.decisions)
        ],
        "dropped": [id_json(snapshot) for snapshot in plan.drops],
        "problems": list(plan.problems),
        "floor": None if plan.floor is None else id_json(plan.floor),
        "stores": [
            {
                "url": entry.url,
                "deleted": entry.deleted,
                "deleted_bytes": entry.deleted_bytes,
                "objects": {verdict.value: entry.objects[verdict] for verdict in ObjectStatus},
                "size_bytes": {
                    verdict.value: entry.size_bytes[verdict] for verdict in ObjectStatus
                },
                "problem": entry.problem or None,
            }
            for entry in report.stores
        ],
        "held": [{**id_json(entry.snapshot), "problem": entry.problem} for entry in report.held],
    }
