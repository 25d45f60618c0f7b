"""``ckpt diff``: what changed between two snapshots."""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np

from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.numbers import is_numeric, readable
from ckpt.cli.output import human_bytes, table
from ckpt.cli.store_options import (
    OpenStore,
    StoreChoice,
    id_json,
    open_store,
    parse_reference,
    store_command,
)
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import ChunkPlaces, load_index
from ckpt.restore.reader import LeafValues, SnapshotReader, numpy_dtype, size_bytes
from ckpt.values import Leaf, LeafKind

WINDOW_BYTES = 32 << 20
"""Memory for each side while values are compared."""

_EPILOG = """\b
Examples:
  ckpt diff runs/a 1000 1200
  ckpt diff runs/a best newest --values
  ckpt diff runs/a 3:1000 4:1000 --json

\b
JSON: {"a": {"epoch", "step"}, "b": {...}, "unchanged", "changed_bytes",
"leaves": [{"name", "rank", "change", "size_bytes", "changed_bytes",
"max_abs_diff"}, ...]}. "unchanged" counts leaves. "change" is added, removed,
changed, retyped (another dtype or shape) or relaid (cut differently over the
ranks, so that digests cannot tell). "max_abs_diff" is null without --values,
for objects, and where a difference is not a number.
"""


@dataclass(frozen=True, slots=True)
class LeafChange:
    """How one leaf differs. ``changed_bytes``: chunks with other digests, or the whole leaf."""

    leaf: Leaf
    kind: str
    changed_bytes: int
    max_abs_diff: float | None = None


@click.command(name="diff", epilog=_EPILOG)
@store_command
@click.argument("a")
@click.argument("b")
@click.option(
    "--values",
    "by_values",
    is_flag=True,
    help="Read the leaves that changed, and print their greatest difference.",
)
def command(choice: StoreChoice, *, a: str, b: str, by_values: bool) -> None:
    """Compare snapshots A and B of the store at URL, by digests: no tensor is read unless --values
    is given.

    A and B are each a step, epoch:step, a tag, or 'newest'.
    """
    with open_store(choice) as store:
        first, second = (parse_reference(store.state, text) for text in (a, b))
        old, new = (
            load_index(store.backend, store.state, snapshot) for snapshot in (first, second)
        )
        changes, unchanged = compare(old, new)
        if by_values:
            with (
                SnapshotReader(store.backend, old, places_of=_places(store, old)) as left,
                SnapshotReader(store.backend, new, places_of=_places(store, new)) as right,
            ):
                changes = [_with_values(change, left, right) for change in changes]
        changed_bytes = sum(
            change.changed_bytes for change in changes if change.leaf.alias_of is None
        )
        if choice.as_json:
            emit_json(
                {
                    "a": id_json(first),
                    "b": id_json(second),
                    "unchanged": unchanged,
                    "changed_bytes": changed_bytes,
                    "leaves": [_json(change) for change in changes],
                }
            )
            return
        click.echo(f"{first} -> {second}: {len(changes)} leaves differ, {unchanged} are the same")
        if changes:
            _print(changes, by_values)
            click.echo(f"changed: {human_bytes(changed_bytes)}")


def _places(store: OpenStore, index: SnapshotIndex) -> ChunkPlaces:
    return ChunkPlaces(store.backend, lambda: store.state, index)


def compare(old: SnapshotIndex, new: SnapshotIndex) -> tuple[list[LeafChange], int]:
    """The leaves that differ, by name, and the number of equal ones. Reads records only."""
    before = {(leaf.name, leaf.rank): leaf for leaf in old.leaves()}
    after = {(leaf.name, leaf.rank): leaf for leaf in new.leaves()}
    changes: list[LeafChange] = []
    for key in sorted(
        before.keys() | after.keys(), key=lambda key: (key[0], -1 if key[1] is None else key[1])
    ):
        was, now = before.get(key), after.get(key)
        if was is None and now is not None:
            changes.append(LeafChange(now, "added", size_bytes(now)))
        elif now is None and was is not None:
            changes.append(LeafChange(was, "removed", size_bytes(was)))
        elif (
            was is not None
            and now is not None
            and (change := _change(old, new, was, now)) is not None
        ):
            changes.append(change)
    return changes, len(before.keys() | after.keys()) - len(changes)


def _change(old: SnapshotIndex, new: SnapshotIndex, was: Leaf, now: Leaf) -> LeafChange | None:
    if (was.kind, was.dtype, was.shape) != (now.kind, now.dtype, now.shape):
        kind = "changed" if was.kind is now.kind is LeafKind.OBJECT else "retyped"
        return LeafChange(now, kind, size_bytes(now))
    before = {shard.box: shard for shard in old.shards(was.name, was.rank)}
    after = {shard.box: shard for shard in new.shards(now.name, now.rank)}
    if before.keys() != after.keys():
        return LeafChange(now, "relaid", size_bytes(now))
    changed_bytes = sum(
        at.raw_bytes
        for box, shard in after.items()
        for old_digest, new_digest, at in zip(
            before[box].digests, shard.digests, shard.locations, strict=True
        )
        if old_digest != new_digest
    )
    return LeafChange(now, "changed", changed_bytes) if changed_bytes else None


def _with_values(change: LeafChange, left: SnapshotReader, right: SnapshotReader) -> LeafChange:
    leaf = change.leaf
    if (
        change.kind not in ("changed", "relaid")
        or leaf.kind is LeafKind.OBJECT
        or not is_numeric(leaf.dtype)
    ):
        return change
    before, after = left.index.leaf(leaf.name, leaf.rank), right.index.leaf(leaf.name, leaf.rank)
    assert before is not None
    assert after is not None
    greatest = 0.0
    carrier = numpy_dtype(leaf.dtype)
    pieces = zip(
        left.stream([before], window_bytes=WINDOW_BYTES),
        right.stream([after], window_bytes=WINDOW_BYTES),
        strict=True,
    )
    for left_piece, right_piece in pieces:
        left_values, right_values = (
            readable(LeafValues(np.frombuffer(piece.data, carrier), leaf.dtype))
            for piece in (left_piece, right_piece)
        )
        # Equal values first: infinities in the same position differ by 0.
        with np.errstate(invalid="ignore"):
            gap = np.where(
                left_values == right_values,
                0.0,
                np.abs(left_values.astype(np.float64) - right_values.astype(np.float64)),
            )
        both_nan = (left_values != left_values) & (right_values != right_values)  # noqa: PLR0124
        greatest = float(np.maximum(greatest, np.max(np.where(both_nan, 0.0, gap), initial=0.0)))
    return LeafChange(leaf, change.kind, change.changed_bytes, greatest)


def _print(changes: list[LeafChange], by_values: bool) -> None:
    columns = ("CHANGE", "LEAF", "RANK", "BYTES", "OF") + (("MAX |A-B|",) if by_values else ())
    rows = [
        (
            change.kind,
            change.leaf.name,
            "all" if change.leaf.rank is None else str(change.leaf.rank),
            human_bytes(change.changed_bytes),
            human_bytes(size_bytes(change.leaf)),
            *(
                ("" if change.max_abs_diff is None else f"{change.max_abs_diff:.6g}",)
                if by_values
                else ()
            ),
        )
        for change in changes
    ]
    table(columns, rows, right=frozenset(("RANK", "BYTES", "OF", "MAX |A-B|")))


def _json(change: LeafChange) -> JsonValue:
    return {
        "name": change.leaf.name,
        "rank": change.leaf.rank,
        "change": change.kind,
        "size_bytes": size_bytes(change.leaf),
        "changed_bytes": change.changed_bytes,
        "max_abs_diff": change.max_abs_diff,
    }
