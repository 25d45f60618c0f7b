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
"up_bytes_per_s", "down_bytes_per_s", "read_back_right", "list_after_put",
"list_after_delete", "other_client", "skew_s", "free_bytes", "holds": {"kind",
"job", "store_id", "snapshots", "newest", "next_seq", "hole", "problem"},
"same_as", "leftovers"}, ...], "advice": [{"level", "code", "store", "text",
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
    patients: list[ExaminedStore] = []
    with ExitStack() as stack:
        for url, options in zip(choice.urls, choice.options, strict=True):
            again = partial(open_backend, url, options)
            patients.append(ExaminedStore(stack.enter_context(closing(again())), again))
        findings = examine(patients, large_bytes=size_mib << 20)
    judged = assess(findings, choice.write_quorum)
    if choice.as_json:
        emit_json(_json(findings, judged))
    else:
        _print(findings, judged)
    return judged.exit_code


def _print(findings: list[StoreFindings], judged: Assessment) -> None:
    columns = ("", "STORE", "HOLDS", "CREATES ONCE", "PUT", "READ", "LIST", "UP", "DOWN", "FREE")
    rows = [
        (
            str(number + 1),
            found.url,
            found.content.job if found.content.kind == "store" else found.content.kind,
            _yes(found.create_only),
            _time(found, "put"),
            _time(found, "read"),
            _time(found, "list"),
            _speed(found.up_bytes_per_s),
            _speed(found.down_bytes_per_s),
            "-" if found.free_bytes is None else human_bytes(found.free_bytes),
        )
        for number, found in enumerate(findings)
    ]
    table(columns, rows, right=frozenset(columns[4:]))
    for one in judged.advice:
        click.echo(_line(one))
    word = "ok" if judged.ok else "NOT WELL"
    click.echo(f"{word}: {len(findings)} stores, write quorum {judged.write_quorum}")


def _line(advice: Advice) -> str:
    whose = "all" if advice.store is None else f"store {advice.store + 1}"
    word = advice.level.upper() if advice.level in ("bad", "warning") else advice.level
    remedy = f"\n    {advice.remedy}" if advice.remedy else ""
    return f"{word:8} {whose}: {advice.text}{remedy}"


def _yes(known: bool | None) -> str:
    return "-" if known is None else "yes" if known else "no"


def _time(found: StoreFindings, operation: str) -> str:
    took = found.latency.get(operation)
    return "-" if took is None else f"{took.median_s * 1000:.1f} ms (p95 {took.p95_s * 1000:.1f})"


def _speed(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{human_bytes(round(bytes_per_s))}/s"


def _json(findings: list[StoreFindings], judged: Assessment) -> JsonValue:
    return {
        "ok": judged.ok,
        "write_quorum": judged.write_quorum,
        "answers_min": judged.answers_min,
        "stores": [_store_json(found) for found in findings],
        "advice": [
            {
                "level": one.level,
                "code": one.code,
                "store": one.store,
                "text": one.text,
                "remedy": one.remedy,
            }
            for one in judged.advice
        ],
    }


def _store_json(found: StoreFindings) -> JsonValue:
    holds = found.content
    return {
        "url": found.url,
        "failures": dict(found.failures),
        "create_only": found.create_only,
        "latency": {
            name: {"median_s": took.median_s, "p95_s": took.p95_s, "count": took.count}
            for name, took in found.latency.items()
        },
        "up_bytes_per_s": found.up_bytes_per_s,
        "down_bytes_per_s": found.down_bytes_per_s,
        "read_back_right": found.read_back_right,
        "list_after_put": found.list_after_put,
        "list_after_delete": found.list_after_delete,
        "other_client": found.other_client,
        "skew_s": found.skew_s,
        "free_bytes": found.free_bytes,
        "holds": {
            "kind": holds.kind,
            "job": holds.job,
            "store_id": holds.store_id,
            "snapshots": holds.snapshots,
            "newest": holds.newest,
            "next_seq": holds.next_seq,
            "hole": holds.hole,
            "problem": holds.problem,
        },
        "same_as": list(found.same_as),
        "leftovers": list(found.leftovers),
    }
