"""Reading every byte of a snapshot and reporting everything that is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend, read_object
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format.canonical import digest_hex
from ckpt.format.index import SnapshotIndex
from ckpt.format.keys import manifest_key
from ckpt.restore.fetch import BUDGET_BYTES, DamagedChunk, Fetcher, OnProgress
from ckpt.restore.plan import plan_verify
from ckpt.values import ChunkLocation, Digest, SnapshotId

LEAVES_NAMED_MAX = 20
"""Leaves that one damaged range names; deduplication may let thousands share it."""


ChunkPlace = tuple[Digest, ChunkLocation]

VerifyMemo = dict[ChunkPlace, DamagedChunk | None]
"""Chunks verified before, with the damage, if any: snapshots of one store share many."""


@dataclass(frozen=True, slots=True)
class DamagedObject:
    """One object, or range of a pack, that is not intact.

    ``what`` is ``missing``, ``short``, ``mismatch`` or ``unreadable`` (the store did not answer).
    ``offset_bytes`` is 0 for a whole object. ``leaves`` names up to 20 leaves that need the range,
    none for a manifest or part.
    """

    key: str
    offset_bytes: int
    leaves: tuple[str, ...]
    what: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What ``verify`` read and found.

    ``read_bytes`` counts raw bytes of the chunks read now, ``chunks`` and ``packs`` what the
    snapshot refers to, ``objects`` its manifest and parts.
    """

    snapshot: SnapshotId
    read_bytes: int
    chunks: int
    packs: int
    objects: int
    damaged: tuple[DamagedObject, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is intact."""
        return not self.damaged


def verify(
    index: SnapshotIndex,
    backend: Backend,
    *,
    on_progress: OnProgress | None = None,
    threads: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
    memo: VerifyMemo | None = None,
) -> VerifyReport:
    """Read the manifest, the parts and each distinct stored chunk of a snapshot once, and compare
    with their digests.

    Never raises for damage: all of it is in the report. Memory is bounded by ``budget_bytes``
    beside the index. Give the same ``memo`` to several calls on one store to read chunks that
    snapshots share only once.
    """
    manifest = index.manifest
    data = manifest.encode()
    manifest_digest = digest_hex(data)
    objects = [(manifest_key(manifest.snapshot, manifest_digest), manifest_digest, len(data))]
    objects += [(ref.key, ref.digest, ref.size_bytes) for ref in manifest.parts]
    damaged = [
        object_damage
        for entry in objects
        if (object_damage := _check_object(backend, *entry)) is not None
    ]
    verified = {} if memo is None else memo
    places = dict.fromkeys(
        place
        for part in index.parts
        for shard in part.shards
        for place in zip(shard.digests, shard.locations, strict=True)
    )
    plan = plan_verify(
        [shard for part in index.parts for shard in part.shards],
        coalesce_bytes=min(backend.capabilities().read_bytes_best, budget_bytes // 4),
        snapshot=str(manifest.snapshot),
        skip=verified,
    )
    with Fetcher(backend, threads=threads, budget_bytes=budget_bytes) as fetcher:
        scanned = fetcher.scan(plan, on_progress=on_progress)
    verified.update(
        ((chunk.digest, chunk.location), None) for read in plan.reads for chunk in read.chunks
    )
    verified.update(((damage.chunk.digest, damage.chunk.location), damage) for damage in scanned)
    bad = [damage for place in places if (damage := verified[place]) is not None]
    return VerifyReport(
        snapshot=manifest.snapshot,
        read_bytes=sum(chunk.location.raw_bytes for read in plan.reads for chunk in read.chunks),
        chunks=len(places),
        packs=len({location.pack for _, location in places}),
        objects=len(objects),
        damaged=(*damaged, *_name_leaves(index, bad)),
    )


def _check_object(backend: Backend, key: str, wanted: str, size_bytes: int) -> DamagedObject | None:
    if isinstance(backend, MultiStoreBackend):
        return _check_copies(backend, key, wanted, size_bytes)
    found = _look_at(backend, key, wanted, size_bytes)
    if found is None or found.what in ("missing", "unreadable"):
        return found
    return _look_at(backend, key, wanted, size_bytes)  # it may have been the reading


def _look_at(backend: Backend, key: str, wanted: str, size_bytes: int) -> DamagedObject | None:
    try:
        stat = backend.stat(key)
        if stat is None:
            return DamagedObject(key, 0, (), "missing", f"an object is missing. key={key}")
        if stat.size_bytes != size_bytes:
            fact = (
                f"an object has another length. key={key} bytes={stat.size_bytes} "
                f"wanted={size_bytes}"
            )
            return DamagedObject(
                key, 0, (), "short" if stat.size_bytes < size_bytes else "mismatch", fact
            )
        data = bytearray(size_bytes)
        backend.read_into(key, memoryview(data))
    except (NotFoundError, IntegrityError, UnavailableError) as error:
        return DamagedObject(key, 0, (), _what(error), str(error))
    if digest_hex(data) != wanted:
        return DamagedObject(
            key, 0, (), "mismatch", f"an object's bytes differ from their digest. key={key}"
        )
    return None


def _check_copies(backend: Backend, key: str, wanted: str, size_bytes: int) -> DamagedObject | None:
    """Whether any store has it intact; damaged copies are repaired on the way."""

    def problem(data: memoryview) -> str | None:
        return None if digest_hex(data) == wanted else "an object's bytes differ from their digest"

    try:
        read_object(backend, key, problem, bytes_max=size_bytes)
    except (NotFoundError, IntegrityError, UnavailableError) as error:
        kind = "mismatch" if isinstance(error, IntegrityError) else _what(error)
        return DamagedObject(key, 0, (), kind, str(error))
    return None


def _what(error: CkptError) -> str:
    match error:
        case NotFoundError():
            return "missing"
        case UnavailableError():
            return "unreadable"
        case _:
            return "short"


def _name_leaves(index: SnapshotIndex, damaged: Sequence[DamagedChunk]) -> list[DamagedObject]:
    if not damaged:
        return []
    users: dict[ChunkPlace, dict[str, None]] = {
        (damage.chunk.digest, damage.chunk.location): {} for damage in damaged
    }
    for part in index.parts:
        for shard in part.shards:
            for key in zip(shard.digests, shard.locations, strict=True):
                names = users.get(key)
                if names is not None and len(names) < LEAVES_NAMED_MAX:
                    owner = "" if shard.leaf.rank is None else f" (rank {shard.leaf.rank})"
                    names[shard.leaf.name + owner] = None
    return [
        DamagedObject(
            damage.chunk.location.pack,
            damage.chunk.location.offset_bytes,
            tuple(users[damage.chunk.digest, damage.chunk.location]),
            damage.what,
            damage.message,
        )
        for damage in damaged
    ]
