"""The root record of one snapshot: what was captured, and the parts that locate its bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ckpt.errors import IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import digest_hex, prepare_decoders, seal, unseal
from ckpt.values import SnapshotId

FORMAT_VERSION = 2
MANIFEST_BYTES_MAX = 64 << 20
"""Larger manifests are refused. A part reference takes about 190 bytes: room for 350,000 nodes."""
PART_STORED_BYTES_MAX = 256 << 20
"""Largest part object that a manifest may name."""
METADATA_ENTRIES_MAX = 1024
METADATA_BYTES_MAX = 1 << 20
"""All user metadata of a snapshot together, in UTF-8."""
INT_MAX = 2**63 - 1

Scalar = bool | int | float | str | None
"""What user metadata may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRef:
    """One part: its key, the digest of the stored object (32 hex digits) and its stored size.

    It holds ``ranks`` ranks, from ``rank`` on.
    """

    key: str
    digest: str
    size_bytes: int
    rank: int
    ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All parts of one snapshot, in rank order, each rank in one of them. Equal values: equal
    bytes.

    ``base`` is the committed snapshot whose chunks this one refers to (None: none). ``size_bytes``
    is the state's raw size, ``new_bytes`` what was newly stored for it. ``created_unix_s`` is for
    people, never for decisions.
    """

    job: str
    snapshot: SnapshotId
    world_size: int
    parts: tuple[PartRef, ...]
    size_bytes: int
    new_bytes: int
    created_unix_s: float
    base: SnapshotId | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def encode(self) -> bytes:
        """Canonical JSON. Raises UsageError that names a field out of range."""
        if reason := problem(self):
            raise UsageError(f"not a manifest that can be written: {reason}")
        return seal(_to_wire(self), label="manifest", bytes_max=MANIFEST_BYTES_MAX)[0]

    @property
    def digest(self) -> str:
        """The digest of the encoded bytes, as the commit record and the key hold it. Encodes."""
        return digest_hex(self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
        wire = unseal(
            data,
            _ManifestWire,
            label="manifest",
            version=FORMAT_VERSION,
            bytes_max=MANIFEST_BYTES_MAX,
        )
        manifest = _from_wire(wire)
        if reason := problem(manifest):
            raise IntegrityError(f"manifest contradicts itself: {reason}")
        return manifest


def problem(manifest: Manifest) -> str | None:
    """What makes ``manifest`` invalid, as ``fact. key=value``, or None."""
    m = manifest
    if m.format_version != FORMAT_VERSION:
        return f"unknown format version. found={m.format_version} known={FORMAT_VERSION}"
    for pair in (m.snapshot, m.base):
        if pair is not None and not keys.is_snapshot_id(pair):
            return f"epoch or step out of range. epoch={pair.epoch} step={pair.step}"
    if m.base is not None and m.base == m.snapshot:
        return "refers to itself as base"
    if not is_job_name(m.job):
        return f"not a job name. job={m.job!r}"
    if not (0 <= m.size_bytes <= INT_MAX and 0 <= m.new_bytes <= INT_MAX):
        return f"size out of range. size_bytes={m.size_bytes} new_bytes={m.new_bytes}"
    if not (math.isfinite(m.created_unix_s) and m.created_unix_s >= 0):
        return f"not a time. created_unix_s={m.created_unix_s}"
    return _parts_problem(m) or metadata_problem(m.metadata)


def is_job_name(job: str) -> bool:
    """Whether ``job`` can name a job: 1 to 200 printable characters."""
    return 1 <= len(job) <= 200 and job.isprintable()


def metadata_problem(metadata: Mapping[str, object]) -> str | None:
    """What makes user metadata unfit for a manifest, or None."""
    if len(metadata) > METADATA_ENTRIES_MAX:
        return f"too many metadata entries. entries={len(metadata)} limit={METADATA_ENTRIES_MAX}"
    total = 0
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, Scalar):
            return (
                f"metadata holds str -> None, bool, int, float or str only. name={name!r} "
                f"type={type(value).__name__}"
            )
        if isinstance(value, int) and not -INT_MAX - 1 <= value <= INT_MAX:
            return f"metadata integer exceeds 64 bits. name={name!r} store it as str"
        for text in (name, value) if isinstance(value, str) else (name,):
            try:
                total += len(text.encode())
            except UnicodeEncodeError:
                return f"metadata text is not Unicode. name={name!r}"
    if total > METADATA_BYTES_MAX:
        return f"metadata too large. size_bytes={total} limit_bytes={METADATA_BYTES_MAX}"
    return None


def _parts_problem(m: Manifest) -> str | None:
    rank = 0
    for part in m.parts:
        if part.rank != rank or part.ranks < 1:
            return (
                f"parts that do not follow each other. rank={part.rank} ranks={part.ranks} "
                f"expected_rank={rank}"
            )
        if not keys.is_digest_hex(part.digest):
            return f"not a digest. rank={rank} digest={part.digest!r}"
        if not 0 < part.size_bytes <= PART_STORED_BYTES_MAX:
            return (
                f"part size out of range. rank={rank} size_bytes={part.size_bytes} "
                f"limit_bytes={PART_STORED_BYTES_MAX}"
            )
        parsed = keys.parse_part_key(part.key)
        if parsed is None or parsed[0] != m.snapshot:
            return f"not the key of a part of this snapshot. rank={rank} key={part.key!r}"
        rank += part.ranks
    if m.world_size < 1 or rank != m.world_size:
        return (
            f"not each rank in one part. world_size={m.world_size} ranks={rank} "
            f"parts={len(m.parts)}"
        )
    if len({part.key for part in m.parts}) != len(m.parts):
        return "a part is named twice"
    return None


class _Float(msgspec.Struct, forbid_unknown_fields=True):
    """A float that JSON has no number for: ``{"float": "nan" | "inf" | "-inf"}``. A NaN's payload
    is not kept."""

    float: str


class _ManifestWire(msgspec.Struct, forbid_unknown_fields=True):
    format_version: int
    job: str
    snapshot: SnapshotId
    world_size: int
    base: SnapshotId | None
    parts: list[PartRef]
    size_bytes: int
    new_bytes: int
    created_unix_s: float
    metadata: dict[str, bool | int | float | str | _Float | None]
    digest: str = ""


_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _to_wire(m: Manifest) -> _ManifestWire:
    return _ManifestWire(
        format_version=m.format_version,
        job=m.job,
        snapshot=m.snapshot,
        world_size=m.world_size,
        base=m.base,
        parts=list(m.parts),
        size_bytes=m.size_bytes,
        new_bytes=m.new_bytes,
        created_unix_s=float(m.created_unix_s),
        metadata={name: _metadata_wire(value) for name, value in m.metadata.items()},
    )


def _metadata_wire(value: Scalar) -> bool | int | float | str | _Float | None:
    match value:  # subclasses, as numpy's float64 is one of float, become the plain type
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else _Float(str(float(value)))
        case str():
            return str(value)


def _from_wire(wire: _ManifestWire) -> Manifest:
    metadata: dict[str, Scalar] = {}
    for name, value in wire.metadata.items():
        if not isinstance(value, _Float):
            metadata[name] = value
        elif value.float in _NON_FINITE:
            metadata[name] = _NON_FINITE[value.float]
        else:
            raise IntegrityError(f"not a non-finite float. name={name!r} text={value.float!r}")
    return Manifest(
        format_version=wire.format_version,
        job=wire.job,
        snapshot=wire.snapshot,
        world_size=wire.world_size,
        base=wire.base,
        parts=tuple(wire.parts),
        size_bytes=wire.size_bytes,
        new_bytes=wire.new_bytes,
        created_unix_s=wire.created_unix_s,
        metadata=metadata,
    )


prepare_decoders(_ManifestWire)
