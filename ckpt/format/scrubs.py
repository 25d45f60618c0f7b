"""What scrubs leave: when one ended, which snapshots' bytes it found right, where one was that was
cut short. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ckpt.errors import IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import prepare_decoders, seal, unseal
from ckpt.values import SnapshotId

SCRUB_VERSION = 1
SCRUB_BYTES_MAX = 1 << 20

VERIFIED_MAX = 1000
"""Snapshots that a record names, the newest ones: who reads it wants the newest."""


@dataclass(frozen=True, slots=True)
class ScrubRecord:
    """The snapshots whose every byte some store had right, each with the digest of its manifest.

    A snapshot that is missing was not there, was not right, or is older than the VERIFIED_MAX
    newest.
    """

    verified: frozenset[tuple[SnapshotId, str]] = frozenset()

    def encode(self) -> bytes:
        """Canonical JSON. Raises UsageError for a field out of range."""
        newest = sorted(self.verified, reverse=True)[:VERIFIED_MAX]
        if not all(map(_is_entry, newest)):
            raise UsageError(f"not a scrub's record that can be written. verified={newest[:3]}")
        entries = [(snapshot.epoch, snapshot.step, digest) for snapshot, digest in newest]
        wire = _ScrubWire(format_version=SCRUB_VERSION, verified=entries)
        return seal(wire, label="a scrub's record", bytes_max=SCRUB_BYTES_MAX)[0]

    @classmethod
    def decode(cls, data: bytes) -> ScrubRecord:
        """The record in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
        wire = unseal(
            data,
            _ScrubWire,
            label="a scrub's record",
            version=SCRUB_VERSION,
            bytes_max=SCRUB_BYTES_MAX,
        )
        entries = [(SnapshotId(epoch, step), digest) for epoch, step, digest in wire.verified]
        if not all(map(_is_entry, entries)):
            raise IntegrityError(f"a scrub's record contradicts itself. verified={entries[:3]}")
        return cls(frozenset(entries))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubCursor:
    """How far a scrub came that is not at its end.

    ``last_pack``: it and all packs with smaller keys were read on the stores ``store_ids``, and
    none of their copies is left to be repaired. ``sound``: the snapshots that the scrub began with,
    without those that need a chunk that was right in no store; the newest VERIFIED_MAX. ``lost``:
    packs with such a chunk.
    """

    at_unix_ms: int
    last_pack: str
    store_ids: tuple[str, ...]
    sound: frozenset[tuple[SnapshotId, str]]
    lost: int = 0

    def encode(self) -> bytes:
        """Canonical JSON. Raises UsageError for a field out of range."""
        newest = sorted(self.sound, reverse=True)[:VERIFIED_MAX]
        wire = _CursorWire(
            format_version=SCRUB_VERSION,
            at_unix_ms=self.at_unix_ms,
            last_pack=self.last_pack,
            store_ids=list(self.store_ids),
            sound=[(snapshot.epoch, snapshot.step, digest) for snapshot, digest in newest],
            lost=self.lost,
        )
        if not _is_cursor(wire):
            raise UsageError(f"not a scrub's cursor that can be written. last={self.last_pack}")
        return seal(wire, label="a scrub's cursor", bytes_max=SCRUB_BYTES_MAX)[0]

    @classmethod
    def decode(cls, data: bytes) -> ScrubCursor:
        """The cursor in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
        wire = unseal(
            data,
            _CursorWire,
            label="a scrub's cursor",
            version=SCRUB_VERSION,
            bytes_max=SCRUB_BYTES_MAX,
        )
        if not _is_cursor(wire):
            raise IntegrityError(f"a scrub's cursor contradicts itself. last={wire.last_pack}")
        return cls(
            at_unix_ms=wire.at_unix_ms,
            last_pack=wire.last_pack,
            store_ids=tuple(wire.store_ids),
            sound=frozenset((SnapshotId(epoch, step), text) for epoch, step, text in wire.sound),
            lost=wire.lost,
        )


def _is_cursor(wire: _CursorWire) -> bool:
    entries = [(SnapshotId(epoch, step), digest) for epoch, step, digest in wire.sound]
    return (
        keys.parse_pack_key(wire.last_pack) is not None
        and wire.at_unix_ms >= 0
        and wire.lost >= 0
        and all(map(_is_entry, entries))
    )


def _is_entry(entry: tuple[SnapshotId, str]) -> bool:
    return keys.is_snapshot_id(entry[0]) and keys.is_digest_hex(entry[1])


class _ScrubWire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format_version: int
    verified: list[tuple[int, int, str]]
    digest: str = ""


class _CursorWire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format_version: int
    at_unix_ms: int
    last_pack: str
    store_ids: list[str]
    sound: list[tuple[int, int, str]]
    lost: int
    digest: str = ""


prepare_decoders(_ScrubWire, _CursorWire)
