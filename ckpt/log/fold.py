"""Whether a record counts, given all before it; and if so, what it changes. Pure.

A record that does not count stays in the log and holds its seq; it is void. Each rule says why it is one.
"""

from __future__ import annotations

from ckpt.format.records import Commit, Drop, Open, Record, Stores, Tag, Untag
from ckpt.log.state import Committed, Opened, StoreSet, VoidCode
from ckpt.log.working import Working

Refusal = tuple[VoidCode, str]


def refusal(log: Working, record: Record) -> Refusal | None:
    """Why ``record`` counts for nothing after ``log``, or None where it counts."""
    if log.seen(record.write_id):
        # A put whose reply was lost, and that was repeated at a later place.
        return "repeat", f"this write was recorded before. write_id={record.write_id}"
    match record.body:
        case Open() as body:
            return _refuse_open(log, record.epoch, body)
        case Commit() as body:
            return _refuse_commit(log, record.epoch, body)
        case Drop() as body:
            return _refuse_drop(log, body)
        case Tag(name, snapshot):
            if snapshot not in log.snapshots:
                return "not-committed", f"tag of a snapshot that does not exist. tag={name!r} snapshot={snapshot}"
            return None
        case Untag(name):
            if name not in log.tags:
                return "no-such-tag", f"no such tag. tag={name!r}"
            return None
        case Stores():
            if record.epoch < log.epoch:
                # Whoever trains now may be about to write to other stores than this writer knows of.
                return "fenced", f"a newer epoch is open. writer={record.epoch} newest={log.epoch}"
            return None


def apply(log: Working, record: Record) -> None:
    """Change ``log`` by a record that counts."""
    match record.body:
        case Open(epoch, resume):
            log.open(Opened(epoch, record.seq, resume))
        case Commit(snapshot, manifest_digest, base):
            log.commit(Committed(snapshot, manifest_digest, base, record.seq, record.epoch))
        case Drop(snapshots, floor):
            for pair in snapshots:
                if pair in log.snapshots:
                    log.drop(pair)
            if floor is not None:
                log.floor = floor if log.floor is None else max(log.floor, floor)
        case Tag(name, snapshot):
            log.tags[name] = snapshot
        case Untag(name):
            del log.tags[name]
        case Stores(ids, write_quorum, sequencer):
            log.stores = StoreSet(ids, write_quorum, sequencer)


def _refuse_open(log: Working, writer_epoch: int, body: Open) -> Refusal | None:
    if writer_epoch != body.epoch:
        # Its writer claims to act in one epoch and opens another: no honest writer does.
        return "epoch-not-new", f"opened by a writer of another epoch. epoch={body.epoch} writer={writer_epoch}"
    if body.epoch <= log.epoch:
        return "epoch-not-new", f"epoch does not exceed all seen. epoch={body.epoch} newest={log.epoch}"
    if body.resume is not None and body.resume.epoch not in log.opens:
        # The pair itself need not be committed: training may resume what was only staged.
        return "resume-unknown", f"resumes an epoch that was never opened. from={body.resume}"
    return None


def _refuse_commit(log: Working, writer_epoch: int, body: Commit) -> Refusal | None:
    pair = body.snapshot
    if writer_epoch < log.epoch:
        return "fenced", f"a newer epoch is open. writer={writer_epoch} newest={log.epoch}"
    if writer_epoch > log.epoch:
        return "epoch-not-open", f"the writer's epoch was never opened. writer={writer_epoch} newest={log.epoch}"
    captured = log.opens.get(pair.epoch)
    if captured is None:
        return "captured-epoch-unknown", f"captured in an epoch that was never opened. snapshot={pair}"
    if (known := log.snapshots.get(pair)) is not None:
        if known.manifest_digest == body.manifest_digest:
            return "repeat", f"this snapshot was committed before. snapshot={pair} seq={known.seq}"
        return "pair-taken", f"another manifest was committed for this pair. snapshot={pair} seq={known.seq}"
    if captured.last_step is not None and pair.step <= captured.last_step:
        # Also what keeps a dropped snapshot from coming back.
        return "step-not-newer", f"steps grow within an epoch. snapshot={pair} last_step={captured.last_step}"
    if log.floor is not None and pair < log.floor:
        return "below-floor", f"captured below the floor of a drop. snapshot={pair} floor={log.floor}"
    if body.base is not None and body.base not in log.snapshots:
        # Its chunks may be deleted at any time, or never existed.
        return "base-gone", f"the snapshot whose chunks it refers to does not exist. snapshot={pair} base={body.base}"
    return None


def _refuse_drop(log: Working, body: Drop) -> Refusal | None:
    kept = log.kept()
    if kept is not None and kept in body.snapshots:
        return "newest-kept", f"the newest snapshot is never dropped. snapshot={kept}"
    named = {pair: tag for tag, pair in log.tags.items()}
    for pair in body.snapshots:
        if pair in named:
            return "tag-kept", f"a tagged snapshot is never dropped. snapshot={pair} tag={named[pair]!r}"
    if body.floor is not None and (kept is None or body.floor > kept):
        # A floor above the newest would make commits void that nothing has replaced.
        return "floor-too-high", f"floor above the newest snapshot. floor={body.floor} newest={kept}"
    lifts = body.floor is not None and (log.floor is None or body.floor > log.floor)
    if not lifts and not any(pair in log.snapshots for pair in body.snapshots):
        # Some gone already is no harm (two sweeps met); all gone is a mistake worth telling.
        return "nothing-to-drop", f"none of these snapshots exists. snapshots={len(body.snapshots)}"
    return None
