"""What a scrub leaves behind: when it ended, and which snapshots' bytes it found right. Pure."""

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


def _is_entry(entry: tuple[SnapshotId, str]) -> bool:
    return keys.is_snapshot_id(entry[0]) and keys.is_digest_hex(entry[1])


class _ScrubWire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format_version: int
    verified: list[tuple[int, int, str]]
    digest: str = ""


prepare_decoders(_ScrubWire)
