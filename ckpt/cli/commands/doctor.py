"""``ckpt doctor``: examine stores before they are trusted, or when something is wrong."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial

import click

from ckpt.backends.open import open_backend
from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.output import human_bytes, table
from ckpt.cli.store_options import StoreList, urls_command
from ckpt.errors import UsageError
from ckpt.maintenance.doctor.findings import Advice, Assessment, StoreFindings, assess
from ckpt.maintenance.doctor.probe import ExaminedStore, examine

LARGE_MIB_MAX = 64

_EPILOG = """\b
Examples:
  ckpt doctor s3://bucket/run
  ckpt doctor /mnt/a/run /mnt/b/run s3://bucket/run --json
  ckpt doctor s3://bucket/run --size 64 --storage-option endpoint_url=http://...

\b
Exit codes: 0 these stores will do (read the warnings), 2 they can't be used
so (one place twice, two jobs, ...), 11 too few answer or allow what is needed,
20 damage: a hole in the log, or bytes that came back changed.

\b
JSON: {"ok", "write_quorum", "answers_min", "stores": [{"url", "failures",
"create_only", "latency": {operation: {"median_s", "p95_s", "count"}},
"up_bytes_per_s", "down_bytes_per_s", "read_back_right", "arrival_check",
"list_after_put", "list_after_delete", "other_client", "skew_s", "free_bytes",
"holds": {"kind", "job", "store_id", "snapshots", "newest", "next_seq", "hole",
"problem"}, "same_as", "leftovers"}, ...], "advice": [{"level", "code", "store", "text",
"remedy"}, ...]}. "store" is a place in "stores", or null for all together;
"level" is bad, warning, note or ok; null: not tried, or it failed.
"""


@click.command(name="doctor", epilog=_EPILOG)
@urls_command
@click.option(
    "--size",
    "size_mib",
    type=click.IntRange(1, LARGE_MIB_MAX),
    default=16,
    show_default=True,
    help="MiB of the object that the throughput is measured with.",
)
def command(choice: StoreList, *, size_mib: int) -> int:
    """Examine the stores at URL...: what each can do, how fast, what is in it, and whether they
    will do together.

    Puts, reads, lists and deletes some twenty small objects and a large one below probe/ in each
    store, and removes them again. Nothing else is changed. Name all stores of a job to hear of its
    quorum.
    """
    if choice.encryption_key is not None:
        raise UsageError(
            "an examination needs no key: what it writes is noise, and the log is not encrypted. "
            "leave it out"
        )
    stores: list[ExaminedStore] = []
    with ExitStack() as stack:
        for url, options in zip(choice.urls, choice.options, strict=True):
            reopen = partial(open_backend, url, options)
            stores.append(ExaminedStore(stack.enter_context(closing(reopen())), reopen))
        findings = examine(stores, large_bytes=size_mib << 20)
    assessment = assess(findings, choice.write_quorum)
    if choice.as_json:
        emit_json(_json(findings, assessment))
    else:
        _print(findings, assessment)
    return assessment.exit_code


def _print(findings: list[StoreFindings], assessment: Assessment) -> None:
    columns = ("", "STORE", "HOLDS", "CREATES ONCE", "PUT", "READ", "LIST", "UP", "DOWN", "FREE")
    rows = [
        (
            str(number + 1),
            store.url,
            store.content.job if store.content.kind == "store" else store.content.kind,
            _yes(store.create_only),
            _time(store, "put"),
            _time(store, "read"),
            _time(store, "list"),
            _speed(store.up_bytes_per_s),
            _speed(store.down_bytes_per_s),
            "-" if store.free_bytes is None else human_bytes(store.free_bytes),
        )
        for number, store in enumerate(findings)
    ]
    table(columns, rows, right=frozenset(columns[4:]))
    for advice in assessment.advice:
        click.echo(_line(advice))
    word = "ok" if assessment.ok else "NOT WELL"
    click.echo(f"{word}: {len(findings)} stores, write quorum {assessment.write_quorum}")


def _line(advice: Advice) -> str:
    owner = "all" if advice.store is None else f"store {advice.store + 1}"
    word = advice.level.upper() if advice.level in ("bad", "warning") else advice.level
    remedy = f"\n    {advice.remedy}" if advice.remedy else ""
    return f"{word:8} {owner}: {advice.text}{remedy}"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _time(store: StoreFindings, operation: str) -> str:
    latency = store.latency.get(operation)
    return (
        "-"
        if latency is None
        else f"{latency.median_s * 1000:.1f} ms (p95 {latency.p95_s * 1000:.1f})"
    )


def _speed(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{human_bytes(round(bytes_per_s))}/s"


def _json(findings: list[StoreFindings], assessment: Assessment) -> JsonValue:
    return {
        "ok": assessment.ok,
        "write_quorum": assessment.write_quorum,
        "answers_min": assessment.answers_min,
        "stores": [_store_json(store) for store in findings],
        "advice": [
            {
                "level": advice.level,
                "code": advice.code,
                "store": advice.store,
                "text": advice.text,
                "remedy": advice.remedy,
            }
            for advice in assessment.advice
        ],
    }


def _store_json(store: StoreFindings) -> JsonValue:
    content = store.content
    return {
        "url": store.url,
        "failures": dict(store.failures),
        "create_only": store.create_only,
        "latency": {
            name: {"median_s": latency.median_s, "p95_s": latency.p95_s, "count": latency.count}
            for name, latency in store.latency.items()
        },
        "up_bytes_per_s": store.up_bytes_per_s,
        "down_bytes_per_s": store.down_bytes_per_s,
        "read_back_right": store.read_back_right,
        "arrival_check": store.arrival_check,
        "list_after_put": store.list_after_put,
        "list_after_delete": store.list_after_delete,
        "other_client": store.other_client,
        "skew_s": store.skew_s,
        "free_bytes": store.free_bytes,
        "holds": {
            "kind": content.kind,
            "job": content.job,
            "store_id": content.store_id,
            "snapshots": content.snapshots,
            "newest": content.newest,
            "next_seq": content.next_seq,
            "hole": content.hole,
            "problem": content.problem,
        },
        "same_as": list(store.same_as),
        "leftovers": list(store.leftovers),
    }
