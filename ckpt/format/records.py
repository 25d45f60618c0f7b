"""The records of the commit log: their fields, canonical bytes, and the chain between them.
Pure."""

from __future__ import annotations

import re

import msgspec

from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import prepare_decoders, seal, unseal
from ckpt.format.manifest import is_job_name
from ckpt.values import MembershipEpoch, SnapshotId

RECORD_VERSION = 1
MEMBERSHIP_VERSION = 3
"""The version of an ``open`` that carries a membership epoch: a release that does not know the rule
about it must not fold it."""
RECORD_BYTES_MAX = 1 << 20
DROPS_MAX = 10_000
"""How many snapshots one drop record may name."""
STORES_MAX = 99
TAG_CHARS_MAX = 128

BY_STORES = "stores"
"""Sequencer: the stores together. A record that was created on W of them has its position."""
BY_SQLITE = "sqlite:"
"""Sequencer: the SQLite file of one machine; its id follows."""
BY_ETCD = "etcd:"
"""Sequencer: an etcd; the id of its cluster follows."""

_SEQUENCER_RE = re.compile(r"stores|sqlite:[0-9a-f]{32}|etcd:[0-9A-Za-z_.:/-]{1,128}", re.ASCII)
_WRITE_ID_RE = re.compile(r"[0-9a-zA-Z_-]{1,64}", re.ASCII)


class Open(
    msgspec.Struct,
    frozen=True,
    tag_field="kind",
    tag="open",
    rename={"resume": "from"},
    omit_defaults=True,
):
    """A new epoch, and the pair that its training resumed (None: it starts afresh).

    JSON calls ``resume`` "from". ``membership``: of a job with several nodes, the membership epoch
    in whose name it was opened.
    """

    epoch: int
    resume: SnapshotId | None
    membership: MembershipEpoch | None = None


class Commit(msgspec.Struct, frozen=True, tag_field="kind", tag="commit"):
    """A snapshot exists: its manifest's digest (32 hex digits), and the snapshot it refers to
    chunks of."""

    snapshot: SnapshotId
    manifest_digest: str
    base: SnapshotId | None


class Drop(msgspec.Struct, frozen=True, tag_field="kind", tag="drop"):
    """Snapshots that no longer exist; their bytes are deleted later.

    Later commits of pairs below ``floor`` are void.
    """

    snapshots: tuple[SnapshotId, ...]
    floor: SnapshotId | None


class Tag(msgspec.Struct, frozen=True, tag_field="kind", tag="tag"):
    """A name for a snapshot, which keeps it from being dropped. An existing name moves."""

    name: str
    snapshot: SnapshotId


class Untag(msgspec.Struct, frozen=True, tag_field="kind", tag="untag"):
    """A name is removed."""

    name: str


class Stores(msgspec.Struct, frozen=True, tag_field="kind", tag="stores"):
    """The ids of the stores that hold this log, the write quorum, and the sequencer."""

    ids: tuple[str, ...]
    write_quorum: int
    sequencer: str = BY_STORES


Body = Open | Commit | Drop | Tag | Untag | Stores


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One record. ``epoch`` is its writer's, ``prev`` the digest of the record before ("" at seq
    0).

    ``write_id`` names the attempt, so that a record written twice is recognised as one. ``digest``
    covers the canonical bytes without itself. Use ``make_record`` and ``decode_record``.
    """

    v: int
    job: str
    seq: int
    epoch: int
    write_id: str
    prev: str
    body: Body
    digest: str

    def encode(self) -> bytes:
        """The canonical bytes, as stored at ``keys.log_key(seq)``."""
        return _seal(self)[0]


CLOSED_VERSION = 2
"""Above RECORD_VERSION: a release that knows no rounds asks for an upgrade, rather than reporting
damage."""


class Closed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In place of a record at a round's settled key: this store takes no record there.

    Written by a writer that found the votes of the round divided, before the next round.
    """

    v: int = CLOSED_VERSION
    job: str
    seq: int
    closed_round: int
    digest: str = ""

    def encode(self) -> bytes:
        """The canonical bytes."""
        return seal(self, label="closed round", bytes_max=RECORD_BYTES_MAX)[0]


def decode_settled(data: bytes) -> Record | Closed:
    """What is at a settled key: a record, or that the round is closed.

    Raises IntegrityError or FormatVersionError.
    """
    try:
        return decode_record(data)
    except FormatVersionError as error:
        try:
            return unseal(
                data,
                Closed,
                label="closed round",
                version=CLOSED_VERSION,
                bytes_max=RECORD_BYTES_MAX,
            )
        except (FormatVersionError, IntegrityError):
            raise error from None


def is_closed(data: bytes) -> bool:
    """Whether ``data`` closes a round: there is no record at its key."""
    try:
        return isinstance(decode_settled(data), Closed)
    except (FormatVersionError, IntegrityError):
        return False


def make_record(body: Body, *, job: str, seq: int, epoch: int, write_id: str, prev: str) -> Record:
    """A record with its digest. Raises UsageError that names a field out of range."""
    draft = Record(
        v=_version_of(body),
        job=job,
        seq=seq,
        epoch=epoch,
        write_id=write_id,
        prev=prev,
        body=body,
        digest="",
    )
    if reason := problem(draft):
        raise UsageError(f"not a record that can be written: {reason}")
    return msgspec.structs.replace(draft, digest=_seal(draft)[1])


def decode_record(data: bytes) -> Record:
    """The record in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
    record = unseal(
        data,
        Record,
        label="log record",
        version=MEMBERSHIP_VERSION,
        older_versions=(RECORD_VERSION,),
        bytes_max=RECORD_BYTES_MAX,
    )
    if reason := problem(record):
        raise IntegrityError(f"log record contradicts itself: {reason}")
    return record


def problem(record: Record) -> str | None:
    """What makes a record's fields invalid, whatever the log says, or None."""
    if record.v != _version_of(record.body):
        return f"not this record's format version. v={record.v}"
    if not is_job_name(record.job):
        return f"not a job name. job={record.job!r}"
    if not 0 <= record.seq <= keys.SEQ_MAX:
        return f"seq out of range. seq={record.seq}"
    if not 0 <= record.epoch <= keys.EPOCH_MAX:
        return f"epoch out of range. epoch={record.epoch}"
    if not _WRITE_ID_RE.fullmatch(record.write_id):
        return f"not a write id (1 to 64 of 0-9 a-z A-Z _ -). write_id={record.write_id[:80]!r}"
    if record.seq == 0 and record.prev != "":
        return "the first record has none before it"
    if record.seq > 0 and not keys.is_digest_hex(record.prev):
        return f"no digest of the record before. prev={record.prev[:80]!r}"
    return _body_problem(record.body)


def is_tag_name(name: str) -> bool:
    """Whether ``name`` can be a tag: 1 to 128 printable characters, no blank at either end."""
    return 1 <= len(name) <= TAG_CHARS_MAX and name.isprintable() and name == name.strip()


def _body_problem(body: Body) -> str | None:
    match body:
        case Open(epoch, resume, membership):
            if not 1 <= epoch <= keys.EPOCH_MAX:
                return f"epoch out of range. epoch={epoch} (1..{keys.EPOCH_MAX})"
            return _pairs_problem((resume,)) or membership_problem(membership)
        case Commit(snapshot, manifest_digest, base):
            if not keys.is_digest_hex(manifest_digest):
                return f"not a digest. manifest_digest={manifest_digest[:80]!r}"
            return _pairs_problem((snapshot, base)) or (
                "refers to itself as base" if base == snapshot else None
            )
        case Drop(snapshots, floor):
            if len(snapshots) > DROPS_MAX:
                return (
                    f"too many snapshots in one drop. snapshots={len(snapshots)} limit={DROPS_MAX}"
                )
            if list(snapshots) != sorted(set(snapshots)):
                return "dropped snapshots are not in ascending order, each once"
            if not snapshots and floor is None:
                return "drops nothing"
            return _pairs_problem((*snapshots, floor))
        case Tag(name, snapshot):
            return _pairs_problem((snapshot,)) or _tag_problem(name)
        case Untag(name):
            return _tag_problem(name)
        case Stores(ids, write_quorum, sequencer):
            return _stores_problem(ids, write_quorum, sequencer)


def _pairs_problem(pairs: tuple[SnapshotId | None, ...]) -> str | None:
    for pair in pairs:
        if pair is not None and not keys.is_snapshot_id(pair):
            return f"epoch or step out of range. epoch={pair.epoch} step={pair.step}"
    return None


def membership_problem(membership: MembershipEpoch | None) -> str | None:
    """What makes a membership epoch invalid, or None."""
    if membership is None or (
        _WRITE_ID_RE.fullmatch(membership.line) and 1 <= membership.number <= keys.EPOCH_MAX
    ):
        return None
    return f"not a membership epoch. line={membership.line[:80]!r} number={membership.number}"


def _version_of(body: Body) -> int:
    carries = isinstance(body, Open) and body.membership is not None
    return MEMBERSHIP_VERSION if carries else RECORD_VERSION


def _tag_problem(name: str) -> str | None:
    if not is_tag_name(name):
        return (
            f"not a tag (1 to {TAG_CHARS_MAX} printable characters, no blank at either end). "
            f"name={name[:160]!r}"
        )
    return None


def is_sequencer_name(name: str) -> bool:
    """Whether ``name`` names a sequencer of a log on several stores."""
    return _SEQUENCER_RE.fullmatch(name) is not None


def _stores_problem(ids: tuple[str, ...], write_quorum: int, sequencer: str) -> str | None:
    if (
        not 1 <= len(ids) <= STORES_MAX
        or len(set(ids)) != len(ids)
        or not all(map(keys.is_digest_hex, ids))
    ):
        return f"not a set of store ids. stores={len(ids)} (1..{STORES_MAX})"
    # More than half, so that any two write quorums share a store.
    if not len(ids) < 2 * write_quorum <= 2 * len(ids):
        return (
            f"write quorum must be more than half of the stores. write_quorum={write_quorum} "
            f"stores={len(ids)}"
        )
    if not is_sequencer_name(sequencer):
        return f"not a sequencer. sequencer={sequencer[:80]!r}"
    return None


def _seal(record: Record) -> tuple[bytes, str]:
    return seal(record, label="log record", bytes_max=RECORD_BYTES_MAX)


prepare_decoders(Record, Closed)
