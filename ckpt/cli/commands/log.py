"""``ckpt log``: the records of a store's commit log."""

from __future__ import annotations

from dataclasses import dataclass

import click

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.output import table
from ckpt.cli.store_options import StoreChoice, id_json, open_store, store_command
from ckpt.format.records import (
    Body,
    Commit,
    Drop,
    Open,
    Record,
    Stores,
    Tag,
    Untag,
)
from ckpt.log.fold import empty, fold
from ckpt.log.reader import records_back
from ckpt.log.state import RECENT_MAX, LogState, Void


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record, and why it is void (None: it counts)."""

    record: Record
    void: Void | None


def history(backend: Backend, state: LogState) -> list[LogEntry]:
    """All records that ``state`` folded, oldest first. Reads each of them, and writes nothing.

    Raises IntegrityError if a record below a stored fold is missing or damaged.
    """
    seqs = range(state.next_seq - 1, -1, -1)
    records = records_back(stores_of(backend), seqs, state.head_digest)[::-1]
    entries: list[LogEntry] = []
    state_so_far = empty(state.job)
    # A state remembers the last RECENT_MAX void records: a batch has no more than that.
    for start in range(0, state.next_seq, RECENT_MAX):
        batch = records[start : start + RECENT_MAX]
        state_so_far = fold(state_so_far, batch)
        entries += [LogEntry(record, state_so_far.void_at(record.seq)) for record in batch]
    return entries


_EPILOG = """\b
Examples:
  ckpt log runs/a
  ckpt log runs/a --last 20
  ckpt log runs/a --json | jq '.records[] | select(.void)'

\b
JSON: {"job", "records": [{"seq", "epoch", "write_id", "kind", ..., "void"},
...], "hole": null | {"seq", "reason"}}, oldest first. "epoch" is the
writer's; "void" is null or {"code", "reason"}. By "kind":
open {"opened", "from"}, commit {"snapshot", "manifest_digest", "base"},
drop {"snapshots", "floor"}, tag {"tag", "snapshot"}, untag {"tag"},
stores {"ids", "write_quorum"}.
"""


@click.command(name="log", epilog=_EPILOG)
@store_command
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last N records.")
def command(choice: StoreChoice, *, last: int | None) -> None:
    """Print the commit log of the store at URL: every record, and why some count for nothing."""
    with open_store(choice) as store:
        entries = history(store.backend, store.state)
        entries = entries if last is None else entries[-last:]
        hole = store.state.hole
        if choice.as_json:
            emit_json(
                {
                    "job": store.state.job,
                    "records": [_entry_json(entry) for entry in entries],
                    "hole": None if hole is None else {"seq": hole.seq, "reason": hole.reason},
                }
            )
            return
        table(
            ("SEQ", "EPOCH", "KIND", "WHAT", "VOID"),
            [
                (
                    str(entry.record.seq),
                    str(entry.record.epoch),
                    _kind(entry.record.body),
                    _what(entry.record.body),
                    "" if entry.void is None else f"{entry.void.code}: {entry.void.reason}",
                )
                for entry in entries
            ],
            right=frozenset(("SEQ", "EPOCH")),
        )


def _kind(body: Body) -> str:
    return type(body).__name__.lower()


def _what(body: Body) -> str:
    match body:
        case Open(epoch, resume):
            return f"epoch {epoch}, " + ("afresh" if resume is None else f"from {resume}")
        case Commit(snapshot, _, base):
            return f"{snapshot}" + ("" if base is None else f", base {base}")
        case Drop(snapshots, floor):
            return ", ".join(map(str, snapshots)) + (
                "" if floor is None else f"; nothing below {floor}"
            )
        case Tag(name, snapshot):
            return f"{name} = {snapshot}"
        case Untag(name):
            return name
        case Stores(ids, write_quorum, sequencer):
            return f"{len(ids)} stores, quorum {write_quorum}, places by {sequencer}"


def _entry_json(entry: LogEntry) -> JsonValue:
    record = entry.record
    void: JsonValue = (
        None if entry.void is None else {"code": entry.void.code, "reason": entry.void.reason}
    )
    head: dict[str, JsonValue] = {
        "seq": record.seq,
        "epoch": record.epoch,
        "write_id": record.write_id,
        "kind": _kind(record.body),
    }
    return {**head, **_body_json(record.body), "void": void}


def _body_json(body: Body) -> dict[str, JsonValue]:
    match body:
        case Open(epoch, resume):
            return {"opened": epoch, "from": None if resume is None else id_json(resume)}
        case Commit(snapshot, manifest_digest, base):
            return {
                "snapshot": id_json(snapshot),
                "manifest_digest": manifest_digest,
                "base": None if base is None else id_json(base),
            }
        case Drop(snapshots, floor):
            return {
                "snapshots": [id_json(dropped) for dropped in snapshots],
                "floor": None if floor is None else id_json(floor),
            }
        case Tag(name, snapshot):
            return {"tag": name, "snapshot": id_json(snapshot)}
        case Untag(name):
            return {"tag": name}
        case Stores(ids, write_quorum, sequencer):
            return {"ids": list(ids), "write_quorum": write_quorum, "sequencer": sequencer}
