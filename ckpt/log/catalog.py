"""The snapshots of a log, and one snapshot's index, checked against the digests that name its
parts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from ckpt.backends.base import Backend
from ckpt.backends.checked import Check, read_object
from ckpt.backends.encrypted.layout import looks_encrypted
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.index import SnapshotIndex
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest, PartRef
from ckpt.format.part import Part, decode_part
from ckpt.log.reader import read_all
from ckpt.log.select import candidates, select
from ckpt.log.state import Committed, LogState
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

__all__ = [
    "ChunkPlaces",
    "candidates",
    "info_of",
    "load_index",
    "load_manifest",
    "read_committed",
    "select",
    "snapshots",
]


def snapshots(backend: Backend, state: LogState) -> tuple[SnapshotInfo, ...]:
    """Every snapshot that exists, in log order. Reads one manifest each, in parallel.

    A snapshot whose manifest cannot be read is included: ``problem`` says why, its sizes are 0.
    Raises UnavailableError.
    """
    tags = _tags_by_snapshot(state)

    def read(entry: Committed) -> SnapshotInfo:
        names = tags.get(entry.snapshot, ())
        try:
            return _info(_manifest(backend, state, entry), names, stale=bool(state.stale_reason))
        except (IntegrityError, FormatVersionError, NotFoundError) as error:
            return _unreadable(entry, names, stale=bool(state.stale_reason), problem=str(error))

    return tuple(read_all(state.snapshots, read))


def info_of(manifest: Manifest, state: LogState) -> SnapshotInfo:
    """What users see of the snapshot of ``manifest``, with the tags of ``state``.

    ``maybe_stale`` is set if a newer snapshot may exist.
    """
    return _info(
        manifest,
        _tags_by_snapshot(state).get(manifest.snapshot, ()),
        stale=bool(state.stale_reason),
    )


def load_manifest(backend: Backend, state: LogState, snapshot: SnapshotId) -> Manifest:
    """The manifest that the log committed for ``snapshot``.

    Raises NotFoundError if the log has no such snapshot; IntegrityError if its manifest is missing
    or is not the committed one; UnavailableError.
    """
    entry = state.find(snapshot)
    if entry is None:
        raise NotFoundError(
            f"no such snapshot, or it was dropped. snapshot={snapshot} job={state.job!r}"
        )
    return _manifest(backend, state, entry)


def load_index(backend: Backend, state: LogState, snapshot: SnapshotId) -> SnapshotIndex:
    """The index of ``snapshot``: its manifest checked against the log, its parts against the
    manifest.

    Raises NotFoundError if the log has no such snapshot; IntegrityError if an object is missing,
    damaged or contradicts another; UnavailableError. Cost: reads the manifest and all parts, in
    parallel.
    """
    manifest = load_manifest(backend, state, snapshot)
    return SnapshotIndex(manifest, read_all(manifest.parts, lambda ref: _part(backend, ref)))


class ChunkPlaces:
    """Every place of a snapshot's chunks: in its own parts, then in those of the other snapshots.

    Calling it with a digest gives the places one by one, those of the snapshot itself first, then
    of the others, newest first. The parts of another snapshot are read when a caller gets so far,
    each once; one that is unreadable is passed over. Raises UnavailableError. Threads may share it.
    Costs nothing before the first call, which asks for ``state``. Memory: the distinct places of
    the snapshot's own chunks.

    ``before``: the places of another snapshot that could not be read. What was looked for there in
    vain, to the last place, is not looked for again: one chunk that many snapshots share would have
    each of them read all others.
    """

    __slots__ = ("_backend", "_found", "_index", "_lock", "_state", "_vain")

    def __init__(
        self,
        backend: Backend,
        state: Callable[[], LogState],
        index: SnapshotIndex,
        *,
        before: ChunkPlaces | None = None,
    ) -> None:
        self._vain: set[Digest] = set() if before is None else before._vain
        self._backend = backend
        self._state = state
        self._index = index
        self._lock = threading.Lock()
        self._found: _FoundPlaces | None = None

    def __call__(self, digest: Digest) -> Iterator[ChunkLocation]:
        given = 0
        if digest in self._vain:
            return
        while True:
            with self._lock:
                found = self._found = self._found or _FoundPlaces(self._state(), self._index)
                places = list(found.places.get(digest, ()))[given:]
                if not places and not found.look_at_next(self._backend):
                    self._vain.add(digest)
                    return
            given += len(places)
            yield from places


class _FoundPlaces:
    """The places that are known so far, and the snapshots that were not looked at."""

    def __init__(self, state: LogState, index: SnapshotIndex) -> None:
        self.places: dict[Digest, dict[ChunkLocation, None]] = {}
        self._state = state
        self._add(index, only_known=False)
        others = (entry.snapshot for entry in state.snapshots)
        self._left = sorted(other for other in others if other != index.manifest.snapshot)

    def look_at_next(self, backend: Backend) -> bool:
        """Add the places in the newest of the other snapshots that are left; False if none is."""
        if not self._left:
            return False
        # One that is damaged has no place to offer; a scrub tells what is wrong with it.
        with suppress(IntegrityError, FormatVersionError, NotFoundError):
            self._add(load_index(backend, self._state, self._left.pop()), only_known=True)
        return True

    def _add(self, index: SnapshotIndex, *, only_known: bool) -> None:
        for part in index.parts:
            for shard in part.shards:
                for digest, at in zip(shard.digests, shard.locations, strict=True):
                    if not only_known or digest in self.places:
                        self.places.setdefault(digest, {})[at] = None


def _manifest(backend: Backend, state: LogState, entry: Committed) -> Manifest:
    key = keys.manifest_key(entry.snapshot, entry.manifest_digest)
    check = _digest_is(entry.manifest_digest, "manifest differs from what was committed")
    data = read_committed(backend, key, check, bytes_max=MANIFEST_BYTES_MAX)
    manifest = Manifest.decode(data)
    if (manifest.job, manifest.snapshot, manifest.base) != (state.job, entry.snapshot, entry.base):
        raise IntegrityError(
            f"manifest of another job, snapshot or base than its commit. key={key} "
            f"store={backend.url}"
        )
    return manifest


def _part(backend: Backend, ref: PartRef) -> Part:
    check = _digest_is(ref.digest, "part differs from what its manifest names")
    data = read_committed(
        backend, ref.key, check, bytes_max=min(ref.size_bytes, PART_STORED_BYTES_MAX)
    )
    if len(data) != ref.size_bytes:
        raise IntegrityError(
            f"part has another length than its manifest says. key={ref.key} store={backend.url}"
        )
    return decode_part(data)


def _digest_is(digest: str, fact: str) -> Check:
    def check(data: memoryview) -> str | None:
        if digest_hex(data) == digest:
            return None
        if looks_encrypted(data):
            return f"{fact}: it is encrypted, give its key with encryption_key"
        return fact

    return check


def read_committed(backend: Backend, key: str, check: Check, *, bytes_max: int) -> bytes:
    """The bytes of a manifest or part that a commit names, or those of its second copy.

    Raises IntegrityError if neither passes ``check``, also if both are missing, and
    UnavailableError.
    """
    try:
        return read_object(backend, key, check, bytes_max=bytes_max)
    except (NotFoundError, IntegrityError) as error:
        try:
            return read_object(backend, keys.copy_key(key), check, bytes_max=bytes_max)
        except (NotFoundError, IntegrityError):
            if isinstance(error, IntegrityError):
                raise error from None
        raise IntegrityError(
            f"an object of a committed snapshot is missing. key={key} store={backend.url}"
        ) from error


def _tags_by_snapshot(state: LogState) -> Mapping[SnapshotId, tuple[str, ...]]:
    tags: dict[SnapshotId, tuple[str, ...]] = {}
    for tag in state.tagged:
        tags[tag.snapshot] = (*tags.get(tag.snapshot, ()), tag.name)
    return tags


def _info(manifest: Manifest, tags: tuple[str, ...], *, stale: bool) -> SnapshotInfo:
    return SnapshotInfo(
        epoch=manifest.snapshot.epoch,
        step=manifest.snapshot.step,
        world_size=manifest.world_size,
        size_bytes=manifest.size_bytes,
        new_bytes=manifest.new_bytes,
        created_unix_s=manifest.created_unix_s,
        tags=tags,
        metadata=manifest.metadata,
        maybe_stale=stale,
    )


def _unreadable(
    entry: Committed, tags: tuple[str, ...], *, stale: bool, problem: str
) -> SnapshotInfo:
    return SnapshotInfo(
        epoch=entry.snapshot.epoch,
        step=entry.snapshot.step,
        world_size=0,
        size_bytes=0,
        new_bytes=0,
        created_unix_s=0.0,
        tags=tags,
        maybe_stale=stale,
        problem=problem,
    )
