"""A fold as stored at ``folds/<seq>.json``: sealed JSON, so that readers can start there. Pure."""

from __future__ import annotations

import msgspec

from ckpt.errors import IntegrityError
from ckpt.format import keys
from ckpt.format.canonical import prepare_decoders, seal, unseal
from ckpt.format.manifest import is_job_name
from ckpt.format.records import is_sequencer_name, is_tag_name, membership_problem
from ckpt.log.state import RECENT_MAX, Committed, LogState, OpenedEpoch, StoreSet, TagEntry, Void
from ckpt.values import MembershipEpoch, SnapshotId

FOLD_VERSION = 1
FOLD_EVERY = 64
"""The writer of a record whose seq + 1 is a multiple of this also stores the fold.

So whoever opens a log reads at most so many records, one request each.
"""
FOLDS_KEPT = 3
"""How many folds stay; whoever stores one deletes the older ones."""
FOLD_BYTES_MAX = 256 << 20
"""Larger folds are refused. A snapshot takes about 180 bytes, so this is room for a million."""


def fold_due(seq: int) -> bool:
    """Whether the fold of the records up to and including ``seq`` is to be stored."""
    return (seq + 1) % FOLD_EVERY == 0


def encode_fold(state: LogState) -> bytes:
    """Canonical bytes of a state without a hole, after at least one record.

    Equal states give equal bytes. Raises UsageError if they exceed FOLD_BYTES_MAX.
    """
    assert state.hole is None and state.next_seq > 0
    wire = _Wire(
        format_version=FOLD_VERSION,
        job=state.job,
        seq=state.next_seq - 1,
        head_digest=state.head_digest,
        opens=[_Opened.of(opened) for opened in state.opens],
        snapshots=list(state.snapshots),
        tags=list(state.tagged),
        floor=state.floor,
        stores=state.stores,
        voids=list(state.voids),
        voids_total=state.voids_total,
        recent=list(state.recent),
    )
    return seal(wire, label="fold", bytes_max=FOLD_BYTES_MAX)[0]


def decode_fold(data: bytes) -> LogState:
    """The state in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
    wire = unseal(data, _Wire, label="fold", version=FOLD_VERSION, bytes_max=FOLD_BYTES_MAX)
    if not 0 <= wire.seq < keys.SEQ_MAX:
        raise IntegrityError(f"fold contradicts itself: seq out of range. seq={wire.seq}")
    state = LogState(
        job=wire.job,
        next_seq=wire.seq + 1,
        head_digest=wire.head_digest,
        opens=tuple(entry.opened for entry in wire.opens),
        snapshots=tuple(wire.snapshots),
        tagged=tuple(wire.tags),
        floor=wire.floor,
        stores=wire.stores,
        voids=tuple(wire.voids),
        voids_total=wire.voids_total,
        recent=tuple(wire.recent),
    )
    if problem := _problem(state):
        raise IntegrityError(f"fold contradicts itself: {problem}")
    return state


class _Opened(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As ``OpenedEpoch``; without ``membership`` as older releases wrote and read it."""

    epoch: int
    seq: int
    resume: SnapshotId | None
    last_step: int | None
    membership: MembershipEpoch | None = None

    @classmethod
    def of(cls, opened: OpenedEpoch) -> _Opened:
        return cls(
            epoch=opened.epoch,
            seq=opened.seq,
            resume=opened.resume,
            last_step=opened.last_step,
            membership=opened.membership,
        )

    @property
    def opened(self) -> OpenedEpoch:
        return OpenedEpoch(self.epoch, self.seq, self.resume, self.last_step, self.membership)


class _Wire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format_version: int
    job: str
    seq: int
    head_digest: str
    opens: list[_Opened]
    snapshots: list[Committed]
    tags: list[TagEntry]
    floor: SnapshotId | None
    stores: StoreSet | None
    voids: list[Void]
    voids_total: int
    recent: list[str]
    digest: str = ""


def _problem(state: LogState) -> str | None:
    # The digest shows that a fold is undamaged, not that its writer was right. A fold that breaks
    # these rules could not have come from records.
    if not is_job_name(state.job) or not keys.is_digest_hex(state.head_digest):
        return "not a job name or head digest"
    if len(state.recent) != min(state.next_seq, RECENT_MAX):
        return f"write ids miscounted. recent={len(state.recent)}"
    if (
        not min(state.voids_total, RECENT_MAX)
        == len(state.voids)
        <= state.voids_total
        <= state.next_seq
    ):
        return f"voids miscounted. voids={len(state.voids)} total={state.voids_total}"
    return _opens_problem(state) or _snapshots_problem(state) or _rest_problem(state)


def _opens_problem(state: LogState) -> str | None:
    opened: set[int] = set()
    last_epoch, last_seq = 0, -1
    for entry in state.opens:
        if not (
            last_epoch < entry.epoch <= keys.EPOCH_MAX and last_seq < entry.seq < state.next_seq
        ):
            return f"epochs do not ascend. epoch={entry.epoch} seq={entry.seq}"
        if entry.resume is not None and (
            not keys.is_snapshot_id(entry.resume) or entry.resume.epoch not in opened
        ):
            return f"resumes an epoch that was never opened. epoch={entry.epoch}"
        if entry.last_step is not None and not 0 <= entry.last_step <= keys.STEP_MAX:
            return f"step out of range. epoch={entry.epoch} step={entry.last_step}"
        if membership_problem(entry.membership):
            return f"not a membership epoch. epoch={entry.epoch}"
        opened.add(entry.epoch)
        last_epoch, last_seq = entry.epoch, entry.seq
    return None


def _snapshots_problem(state: LogState) -> str | None:
    last_steps = {entry.epoch: entry.last_step for entry in state.opens}
    steps: dict[int, int] = {}  # per captured epoch, the greatest step so far
    last_seq = -1
    for entry in state.snapshots:
        pair = entry.snapshot
        last_step = last_steps.get(pair.epoch)
        if last_step is None or entry.writer_epoch not in last_steps or entry.base == pair:
            return f"snapshot of an epoch that was never opened. snapshot={pair}"
        steps_ascend = steps.get(pair.epoch, -1) < pair.step <= last_step
        if not (steps_ascend and last_seq < entry.seq < state.next_seq):
            return f"snapshots do not ascend. snapshot={pair} seq={entry.seq}"
        if not keys.is_digest_hex(entry.manifest_digest) or (
            entry.base and not keys.is_snapshot_id(entry.base)
        ):
            return f"not a digest or base. snapshot={pair}"
        steps[pair.epoch] = pair.step
        last_seq = entry.seq
    return None


def _rest_problem(state: LogState) -> str | None:
    pairs = {entry.snapshot for entry in state.snapshots}
    names = [tag.name for tag in state.tagged]
    if names != sorted(set(names)) or not all(
        is_tag_name(tag.name) and tag.snapshot in pairs for tag in state.tagged
    ):
        return "invalid tag name, or a tag of no snapshot"
    if state.floor is not None and not keys.is_snapshot_id(state.floor):
        return "floor out of range"
    if state.stores is not None:
        ids, quorum = state.stores.ids, state.stores.write_quorum
        if (
            len(set(ids)) != len(ids)
            or not all(map(keys.is_digest_hex, ids))
            or not len(ids) < 2 * quorum <= 2 * len(ids)
            or not is_sequencer_name(state.stores.sequencer)
        ):
            return "invalid set of stores"
    seqs = [void.seq for void in state.voids]
    if seqs != sorted(set(seqs)) or any(not 0 <= seq < state.next_seq for seq in seqs):
        return "voids do not ascend"
    return None


prepare_decoders(_Wire)
