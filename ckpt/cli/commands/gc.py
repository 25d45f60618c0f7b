"""``ckpt gc``: drop what a policy does not keep, and delete the bytes that nothing needs any
more."""

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
from ckpt.maintenance.gc.sweep import GRACE_S, StoreSweep, SweepReport, snapshot_references, sweep
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
"kept_by"}, ...], "dropped": [{"epoch", "step"}, ...], "floor", "stores":
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
    help="How long the bytes of dropped snapshots stay, by the stores' clocks, for restores in progress.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(urls: StoreList, *, keep: str | None, dry_run: bool, grace: str, yes: bool) -> int:
    """Drop the snapshots of the job at URL... that --keep does not keep, then delete bytes that
    nothing needs.

    A drop is a record: what it names can't be restored any more. Its bytes go when the grace is
    over, in a later run. Safe beside a job that trains. Name every store of the job, or those left
    out keep their bytes.
    """
    wish = _GcRequest(None if keep is None else parse_policy(keep), duration_s(grace), dry_run, yes)
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
        plan = preview(store.backend, store.state, wish.policy, now_unix_s=now_unix_s)
        if not choice.as_json:
            _print_plan(plan)
        if dry_run:
            report = _rehearse(store, plan, wish)
        else:
            _ask(choice, store, plan, wish)
            plan, state = drop(
                store.backend, store.journal, wish.policy, now_unix_s=now_unix_s, approved=plan
            )
            report = sweep(store.backend, state, grace_s=wish.grace_s)
        if choice.as_json:
            emit_json(_json(store, plan, report, wish))
        else:
            _print_report(plan, report, wish)
        if report.held:
            return IntegrityError.exit_code
        return 0 if report.ok else UnavailableError.exit_code


def _ask(choice: StoreChoice, store: OpenStore, plan: GcPlan, wish: _GcRequest) -> None:
    if not plan.drops or wish.yes:
        return
    if choice.as_json:
        raise UsageError("with --json nobody can be asked. pass --yes or --dry-run")
    many = f"{len(plan.drops)} snapshot{'s' if len(plan.drops) > 1 else ''}"
    click.confirm(
        f"Drop {many} of {store.backend.url}? They cannot be restored afterwards.",
        abort=True,
        err=True,
    )


def _rehearse(store: OpenStore, plan: GcPlan, wish: _GcRequest) -> SweepReport:
    """What a sweep would find after the drop. The clock is this machine's: asking the stores' would
    write to them."""
    going = frozenset(plan.drops)
    before = store.state
    after = _without(before, going, plan)
    gone = replace(
        before, snapshots=tuple(entry for entry in before.snapshots if entry.snapshot in going)
    )
    return sweep(
        store.backend,
        after,
        grace_s=wish.grace_s,
        about_to_drop=snapshot_references(store.backend, gone),
        dry_run=True,
        clock=lambda _: time.time(),
    )


def _without(state: LogState, going: Collection[SnapshotId], plan: GcPlan) -> LogState:
    left = tuple(entry for entry in state.snapshots if entry.snapshot not in going)
    return replace(state, snapshots=left, floor=plan.floor or state.floor)


def _print_plan(plan: GcPlan) -> None:
    if not plan.decisions:
        click.echo("no snapshots")
        return
    table(
        ("", "EPOCH", "STEP", "SIZE", "NEW", "CREATED", "KEPT BY"),
        [
            (
                ("" if one.on_line else "-") if one.kept else "drop",
                str(one.info.epoch),
                str(one.info.step),
                human_bytes(one.info.size_bytes),
                human_bytes(one.info.new_bytes),
                human_time(one.info.created_unix_s),
                "; ".join(one.reasons)
                + (f"  (damaged: {one.info.problem})" if one.info.problem else ""),
            )
            for one in reversed(plan.decisions)
        ],
        right=frozenset(("EPOCH", "STEP", "SIZE", "NEW")),
    )


def _print_report(plan: GcPlan, report: SweepReport, wish: _GcRequest) -> None:
    if plan.drops:
        click.echo(
            f"{'would drop' if wish.dry_run else 'dropped'} {len(plan.drops)} of "
            f"{len(plan.decisions)} snapshots"
        )
    for one in report.stores:
        if one.problem:
            warn(f"not swept to the end, and for the next time: {one.url}: {one.problem}")
        click.echo(f"{one.url}: {_done(one, wish)}")
    for held in report.held:
        warn(
            f"no pack is deleted, for nobody knows which ones {held.snapshot} needs: {held.problem}"
        )


def _done(one: StoreSweep, wish: _GcRequest) -> str:
    going = (one.objects[ObjectStatus.GARBAGE], one.size_bytes[ObjectStatus.GARBAGE])
    count, size = going if wish.dry_run else (one.deleted, one.deleted_bytes)
    words = [
        f"{'would delete' if wish.dry_run else 'deleted'} {count} objects, {human_bytes(size)}"
    ]
    waiting = one.size_bytes[ObjectStatus.GRACE] + one.size_bytes[ObjectStatus.YOUNG]
    if waiting:
        words.append(
            f"{human_bytes(waiting)} go when the grace of {duration_text(wish.grace_s)} is over"
        )
    if one.size_bytes[ObjectStatus.OPEN]:
        words.append(
            f"{human_bytes(one.size_bytes[ObjectStatus.OPEN])} of snapshots that may still be "
            "committed"
        )
    if one.size_bytes[ObjectStatus.HELD]:
        words.append(f"{human_bytes(one.size_bytes[ObjectStatus.HELD])} held back")
    words.append(f"{human_bytes(one.size_bytes[ObjectStatus.LIVE])} needed")
    return "; ".join(words)


def _json(store: OpenStore, plan: GcPlan, report: SweepReport, wish: _GcRequest) -> JsonValue:
    return {
        "url": store.backend.url,
        "dry_run": wish.dry_run,
        "policy": None if wish.policy is None else str(wish.policy),
        "grace_s": wish.grace_s,
        "snapshots": [
            {
                **id_json(one.info.id),
                "on_line": one.on_line,
                "size_bytes": one.info.size_bytes,
                "new_bytes": one.info.new_bytes,
                "created_unix_s": one.info.created_unix_s,
                "tags": list(one.info.tags),
                "problem": one.info.problem,
                "kept_by": list(one.reasons),
            }
            for one in reversed(plan.decisions)
        ],
        "dropped": [id_json(pair) for pair in plan.drops],
        "floor": None if plan.floor is None else id_json(plan.floor),
        "stores": [
            {
                "url": one.url,
                "deleted": one.deleted,
                "deleted_bytes": one.deleted_bytes,
                "objects": {verdict.value: one.objects[verdict] for verdict in ObjectStatus},
                "size_bytes": {verdict.value: one.size_bytes[verdict] for verdict in ObjectStatus},
                "problem": one.problem or None,
            }
            for one in report.stores
        ],
        "held": [{**id_json(one.snapshot), "problem": one.problem} for one in report.held],
    }
