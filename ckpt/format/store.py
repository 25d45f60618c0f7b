"""``ckpt.json``: which job and log a store belongs to. Written once, never replaced. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import DIGEST_NAME, UPGRADE, prepare_decoders, seal, unseal
from ckpt.format.manifest import is_job_name
from ckpt.values import CHUNK_BYTES

JOB_VERSION = 1
JOB_BYTES_MAX = 64 << 10
SEQUENCER_STORE = "store"
"""Sequencer: the store's own create-if-absent, until a ``stores`` record names another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """The job's name, this store's own random id (32 hex digits), and the log's sequencer.

    ``log_id`` is the same in all stores of one log: the id of the store in which it began, or a
    random one if it began on several.
    """

    job: str
    store_id: str
    log_id: str = ""
    sequencer: str = SEQUENCER_STORE
    digest: str = DIGEST_NAME
    chunk_bytes: int = CHUNK_BYTES
    format_version: int = JOB_VERSION

    def __post_init__(self) -> None:
        if not self.log_id:
            object.__setattr__(self, "log_id", self.store_id)

    def encode(self) -> bytes:
        """Canonical JSON. Raises UsageError for a field out of range."""
        if reason := _problem(self):
            raise UsageError(f"not a job record that can be written: {reason}")
        wire = _JobWire(
            format_version=self.format_version,
            job=self.job,
            store_id=self.store_id,
            log_id=self.log_id,
            sequencer=self.sequencer,
            digest_name=self.digest,
            chunk_bytes=self.chunk_bytes,
        )
        return seal(wire, label="ckpt.json", bytes_max=JOB_BYTES_MAX)[0]

    @classmethod
    def decode(cls, data: bytes) -> JobRecord:
        """The record in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
        wire = unseal(
            data, _JobWire, label="ckpt.json", version=JOB_VERSION, bytes_max=JOB_BYTES_MAX
        )
        record = cls(
            format_version=wire.format_version,
            job=wire.job,
            store_id=wire.store_id,
            log_id=wire.log_id,
            sequencer=wire.sequencer,
            digest=wire.digest_name,
            chunk_bytes=wire.chunk_bytes,
        )
        if reason := _problem(record):
            raise IntegrityError(f"ckpt.json contradicts itself: {reason}")
        if (record.digest, record.chunk_bytes) != (DIGEST_NAME, CHUNK_BYTES):
            raise FormatVersionError(
                "store uses a digest or grid that this release does not read. "
                f"found={record.digest}/{record.chunk_bytes} "
                f"known={DIGEST_NAME}/{CHUNK_BYTES} upgrade torch-ckpt: {UPGRADE}"
            )
        return record


def _problem(record: JobRecord) -> str | None:
    if not is_job_name(record.job):
        return f"not a job name (1 to 200 printable characters). job={record.job!r}"
    for name, text in (("store_id", record.store_id), ("log_id", record.log_id)):
        if not keys.is_digest_hex(text):
            return f"not an id of 32 hex digits. {name}={text!r}"
    for name, text in (("sequencer", record.sequencer), ("digest", record.digest)):
        if not (1 <= len(text) <= 64 and text.isascii() and text.isprintable()):
            return f"not a name. {name}={text[:80]!r}"
    if not 1 <= record.chunk_bytes <= 2**40:
        return f"chunk size out of range. chunk_bytes={record.chunk_bytes}"
    return None


class _JobWire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format_version: int
    job: str
    store_id: str
    log_id: str
    sequencer: str
    digest_name: str
    chunk_bytes: int
    digest: str = ""


prepare_decoders(_JobWire)
