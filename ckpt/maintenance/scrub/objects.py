"""The scrub of objects: manifests, parts and packs of existing snapshots, checked and repaired."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from ckpt.errors import CkptError, IntegrityError, UnavailableError
from ckpt.format import keys
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest
from ckpt.format.part import Part, decode_part
from ckpt.format.scrubs import ScrubCursor
from ckpt.log.state import Committed
from ckpt.maintenance.copies import (
    CHUNK_REF_BYTES,
    ChunkRef,
    CopyCheck,
    CopyLost,
    CopyRepair,
    CopyStatus,
    CopyUnknown,
    Pack,
    PackReferences,
    WholeObject,
    decide_pack,
    decide_whole,
)
from ckpt.maintenance.copy_io import (
    ListingWalk,
    assemble_pack,
    check_pack,
    check_whole,
    map_in_order,
)
from ckpt.maintenance.scrub.report import DropCheck, ScrubContext
from ckpt.maintenance.scrub.second import check_second_of, whole_alone
from ckpt.values import SnapshotId


class OrphanWalk:
    """A walk through each store's keys below ``prefix``, counting objects that nothing refers to.

    It runs beside the scrub's own walk through the referenced keys, and deletes nothing. ``close``
    adds the counts to the statistics of the stores.
    """

    def __init__(
        self, context: ScrubContext, prefix: str, *, after: str, numbers: Sequence[int]
    ) -> None:
        self._context = context
        self._walks = {
            number: ListingWalk(context.stores[number], prefix, after=after) for number in numbers
        }

    def reach(self, key: str) -> None:
        """Advance to ``key``, which is referred to; everything skipped on the way is an orphan."""
        self._each(lambda walk: walk.take(key))

    def skip_folder(self, folder: str) -> None:
        """Skip ``folder`` without counting: it is unknown whether its objects are referred to."""
        self._each(lambda walk: walk.skip(folder))
        self._each(lambda walk: walk.skip(f"{folder}~", count=False))

    def finish(self) -> None:
        """Count the rest as orphans."""
        self._each(lambda walk: walk.skip(None))

    def close(self) -> None:
        """Add the counts to the stores' statistics."""
        for number, walk in self._walks.items():
            store = self._context.findings.stores[number]
            store.orphans += walk.orphans
            store.orphan_bytes += walk.orphan_bytes
        self._walks = {}

    def _each(self, act: Callable[[ListingWalk], object]) -> None:
        active = set(self._context.active)
        for number, walk in self._walks.items():
            if number not in active:
                continue
            try:
                act(walk)
            except UnavailableError as error:
                self._context.mark_away(number, str(error))
                active.discard(number)


class PacksDone(NamedTuple):
    """The last pack up to which all were read and repaired, and how many of them are lost."""

    last_pack: str
    lost: int


NOTHING_DONE = PacksDone("", 0)


@dataclass(slots=True)
class _PackWalk:
    """Where the walk through the packs is, and what is known of those that it passed."""

    references: PackReferences
    compared: frozenset[int]
    """The stores that were compared at its start."""
    last_pack: str = ""
    lost: int = 0
    is_left: bool = False
    """Whether a copy of a pack could not be repaired."""
    done: PacksDone = NOTHING_DONE

    def go_on(self, done: PacksDone) -> None:
        """Go on behind what another process has done."""
        self.last_pack, self.lost, self.done = done.last_pack, done.lost, done
        self.references = PackReferences(self.references.chunks_max, after=done.last_pack)

    def reach(self, key: str, active: Collection[int]) -> None:
        """The pack ``key`` was read. A process that goes on from here knows nothing of what is
        before, so it goes on at the first pack of which a copy is left unrepaired: no record may
        reach a store that lacks it.
        """
        self.last_pack = key
        if not self.is_left and self.compared.issubset(active):
            self.done = PacksDone(key, self.lost)


WholeCopies = dict[int, tuple[CopyCheck, bytes]]
"""Each store's copy of a small object, and its bytes, empty unless they are right."""


class ObjectScrub:
    """The scrub of the objects of ``snapshots``: first manifests and parts, then packs.

    Each of the two steps can be stopped, and continues where it was when called again.
    ``everything``: these are all snapshots of the log, so that orphans can be counted. ``alone``:
    the one store holds the log alone, and has second copies of manifests and parts.
    """

    def __init__(
        self,
        context: ScrubContext,
        snapshots: Sequence[Committed],
        *,
        everything: bool,
        drop_check: DropCheck,
        budget_bytes: int,
        alone: bool = False,
    ) -> None:
        self._context = context
        self._alone = alone
        self._snapshots = sorted(snapshots, key=lambda entry: entry.snapshot)
        self._everything = everything
        self._drop_check = drop_check
        self._next = 0
        self._begun_with: frozenset[tuple[SnapshotId, str]] | None = None
        """The snapshots that an earlier process began this scrub with; None: it began here."""
        references = PackReferences(max(1, budget_bytes // 2 // CHUNK_REF_BYTES))
        self._walk = _PackWalk(references, frozenset(context.active))
        self.untraced: list[Committed] = []
        """Snapshots whose manifest or a part has no right copy."""
        self._unsound: set[int] = set()
        """Numbers of snapshots that need a chunk of which no right copy was found, or of which a
        part could not be read again, so that what they need is not known."""

    def verified(self) -> list[Committed]:
        """The snapshots of which each byte was found right in some store. Once ``records`` and
        ``packs`` are done; a snapshot that was dropped meanwhile may be among them. Of a scrub that
        an earlier process began only snapshots that it knew.
        """
        return [
            entry
            for number, entry in enumerate(self._snapshots)
            if number not in self._unsound
            and entry not in self.untraced
            and (self._begun_with is None or named(entry) in self._begun_with)
        ]

    def go_on(self, cursor: ScrubCursor) -> None:
        """Leave out the packs that an earlier process read in this scrub. Before ``records``."""
        self._begun_with = cursor.sound
        self._walk.go_on(PacksDone(cursor.last_pack, cursor.lost))
        self._context.findings.lost += cursor.lost

    @property
    def records_end(self) -> int | None:
        """The position of the first record that names a snapshot of which packs may have been left
        out: an earlier process did not know it, or not all of it. None: there is none.
        """
        if self._begun_with is None:
            return None
        left = [one.seq for one in self._snapshots if named(one) not in self._begun_with]
        return min(left, default=None)

    @property
    def done(self) -> PacksDone:
        """How far the packs were read."""
        return self._walk.done

    def records(self, *, threads: int) -> None:
        """Check manifests and parts. Raises Stopped; a repeated call continues."""
        last = self._snapshots[self._next - 1] if self._next else None
        # No writer's name has a tilde, so this key is above all parts of the last snapshot.
        after = "" if last is None else f"{keys.PARTS}{last.snapshot.key}/~"
        after_manifest = "" if last is None else manifest_key(last)
        with (
            closing(self._orphans(keys.MANIFESTS, after_manifest)) as manifests,
            closing(self._orphans(keys.PARTS, after)) as parts,
        ):
            while self._next < len(self._snapshots):
                entry = self._snapshots[self._next]
                manifests.reach(manifest_key(entry))
                # Only a snapshot that was checked completely is added: after a stop it comes again.
                for part in self._snapshot(entry, parts, threads=threads):
                    self._walk.references.add(part, self._next)
                self._next += 1
            manifests.finish()
            parts.finish()

    def packs(self, *, threads: int, after_each: Callable[[], None] = lambda: None) -> None:
        """Check every referenced chunk. Raises Stopped; a repeated call continues."""
        with closing(self._orphans(keys.PACKS, self._walk.last_pack)) as orphans:
            while True:
                todo = [key for key in self._walk.references.packs() if key > self._walk.last_pack]
                with closing(map_in_order(todo, self._check_pack, threads=threads)) as checked:
                    for key, copies in checked:
                        orphans.reach(key)
                        pack, users = (
                            self._walk.references.pack(key),
                            self._walk.references.users(key),
                        )
                        self._repair_pack(pack, users, copies)
                        self._walk.reach(key, self._context.active)
                        after_each()
                if self._walk.references.complete:
                    break
                # The packs that did not fit into memory are next, gathered anew from the parts.
                references = self._walk.references.next_round()
                for number in range(len(self._snapshots)):
                    for part in self._load(number):
                        references.add(part, number)
                self._walk.references = references
            # An untraced snapshot may refer to any of the rest, so none of it counts as an orphan.
            if not self.untraced:
                orphans.finish()

    def _snapshot(self, entry: Committed, parts: OrphanWalk, *, threads: int) -> list[Part]:
        """Check the manifest and parts of one snapshot; the readable parts."""
        want = WholeObject(manifest_key(entry), entry.manifest_digest)
        copies = self._check_whole(want, MANIFEST_BYTES_MAX)
        manifest = _manifest(self._repair_whole(want, copies, entry, MANIFEST_BYTES_MAX))
        if manifest is None:
            self.untraced.append(entry)
            parts.skip_folder(f"{keys.PARTS}{entry.snapshot.key}/")
            return []
        wants = [WholeObject(ref.key, ref.digest, ref.size_bytes) for ref in manifest.parts]
        wants.sort(key=lambda want: want.key)
        readable: list[Part] = []
        with closing(map_in_order(wants, self._check_part, threads=threads)) as checked:
            for want, copies in checked:
                parts.reach(want.key)
                part = _part(self._repair_whole(want, copies, entry, PART_STORED_BYTES_MAX))
                if part is not None:
                    readable.append(part)
        if len(readable) < len(wants):
            self.untraced.append(entry)
        return readable

    def _check_part(self, want: WholeObject) -> WholeCopies:
        return self._check_whole(want, PART_STORED_BYTES_MAX)

    def _check_whole(self, want: WholeObject, bytes_max: int) -> WholeCopies:
        context = self._context
        return {
            n: check_whole(context.stores[n], want, bytes_max=bytes_max, pace=context.pace)
            for n in context.active
        }

    def _repair_whole(
        self, want: WholeObject, whole_copies: WholeCopies, entry: Committed, bytes_max: int
    ) -> bytes | None:
        """Write the right bytes where they are missing; the bytes, or None if no copy is right."""
        if self._alone and whole_copies:
            return self._repair_alone(want, *whole_copies[0], entry, bytes_max)
        context = self._context
        copies = {number: copy for number, (copy, _) in whole_copies.items()}
        context.count_silence(copies)
        # A snapshot that was dropped meanwhile may have been swept: that is no damage. The log is
        # asked only if something is wrong, because reading it costs requests.
        if _any_wrong(copies) and self._drop_check.all_dropped([entry]):
            return None
        decision = decide_whole(context.copy_of_each(copies), writable=context.writable)
        repaired: list[int] = []
        if isinstance(decision, CopyRepair):
            data = whole_copies[decision.source][1]
            repaired = [
                number for number in decision.targets if context.put(number, want.key, data)
            ]
        lost = isinstance(decision, CopyLost)
        context.count_object(want.key, copies, repaired=repaired, lost=lost)
        return next(
            (data for copy, data in whole_copies.values() if copy.status is CopyStatus.OK), None
        )

    def _repair_alone(
        self, want: WholeObject, copy: CopyCheck, data: bytes, entry: Committed, bytes_max: int
    ) -> bytes | None:
        """As ``_repair_whole``, from the second copy on the same store. That is checked too."""
        context = self._context
        context.count_silence({0: copy})
        if copy.status is CopyStatus.OK:
            context.count_object(want.key, {0: copy})
            check_second_of(context, want, data)
            return data
        if self._drop_check.all_dropped([entry]):
            return None
        if copy.status is CopyStatus.UNREADABLE:
            context.count_object(want.key, {0: copy})
            return None
        right = whole_alone(context, want, bytes_max=bytes_max)
        repaired = right is not None and 0 in context.writable and context.put(0, want.key, right)
        context.count_object(
            want.key, {0: copy}, repaired=(0,) if repaired else (), lost=right is None
        )
        if right is not None:
            check_second_of(context, want, right)
        return right

    def _check_pack(self, key: str) -> dict[int, CopyCheck]:
        pack, context = self._walk.references.pack(key), self._context
        return {
            number: check_pack(context.stores[number], pack, pace=context.pace)
            for number in context.active
        }

    def _repair_pack(
        self, pack: Pack, users: frozenset[int], copies: Mapping[int, CopyCheck]
    ) -> None:
        context = self._context
        context.count_silence(copies)
        entries = [self._snapshots[user] for user in users]
        if _any_wrong(copies) and self._drop_check.all_dropped(entries):
            return
        decision = decide_pack(pack, context.copy_of_each(copies), writable=context.writable)
        repaired = self._write_pack(pack, decision) if isinstance(decision, CopyRepair) else []
        bad_everywhere = pack.chunks
        if isinstance(decision, CopyLost | CopyUnknown):
            bad_everywhere = decision.chunks
            self._note_unsound(users, frozenset(decision.chunks) or frozenset(pack.chunks))
        lost, before = isinstance(decision, CopyLost), context.findings.unrepaired
        self._walk.lost += lost
        context.count_object(
            pack.key, copies, repaired=repaired, lost=lost, bad_everywhere=bad_everywhere
        )
        self._walk.is_left |= context.findings.unrepaired > before

    def _note_unsound(self, users: frozenset[int], bad: frozenset[ChunkRef]) -> None:
        """Note which ``users`` of a pack need one of its ``bad`` chunks. Reads their parts anew."""
        for user in users - self._unsound:
            chunks = (
                chunk
                for part in self._load(user)
                for shard in part.shards
                for chunk in zip(shard.digests, shard.locations, strict=True)
            )
            if not bad.isdisjoint(chunks):
                self._unsound.add(user)

    def _write_pack(self, pack: Pack, repair: CopyRepair) -> list[int]:
        """Write the pack to the targets of ``repair``; the stores that took it."""
        context = self._context
        try:
            memory = assemble_pack(context.stores, pack, repair, pace=context.pace)
        except CkptError as error:
            # The copy was right a moment ago: the store stopped answering, or its disk is failing.
            context.findings.stores[repair.source].problem = str(error)
            return []
        if memory is None:
            return []
        return [number for number in repair.targets if context.put(number, pack.key, memory)]

    def _load(self, number: int) -> Iterator[Part]:
        """The readable parts of a snapshot, from any store. ``records`` counted their problems.

        One of which not all is readable now is unsound.
        """
        entry = self._snapshots[number]
        want = WholeObject(manifest_key(entry), entry.manifest_digest)
        manifest = _manifest(self._read_any(want, MANIFEST_BYTES_MAX))
        if manifest is None:
            self._unsound.add(number)
            return
        for ref in manifest.parts:
            want = WholeObject(ref.key, ref.digest, ref.size_bytes)
            part = _part(self._read_any(want, PART_STORED_BYTES_MAX))
            if part is None:
                self._unsound.add(number)
            else:
                yield part

    def _read_any(self, want: WholeObject, bytes_max: int) -> bytes | None:
        context = self._context
        for number in context.active:
            store = context.stores[number]
            copy, data = check_whole(store, want, bytes_max=bytes_max, pace=context.pace)
            if copy.status is CopyStatus.OK:
                return data
        return None

    def _orphans(self, prefix: str, after: str) -> OrphanWalk:
        # With some snapshots left out, it is unknown what nothing refers to: walk no store.
        numbers = self._context.active if self._everything else []
        return OrphanWalk(self._context, prefix, after=after, numbers=numbers)


def manifest_key(entry: Committed) -> str:
    """The key of the manifest that was committed."""
    return keys.manifest_key(entry.snapshot, entry.manifest_digest)


def named(entry: Committed) -> tuple[SnapshotId, str]:
    """The snapshot and the digest of the manifest that was committed."""
    return entry.snapshot, entry.manifest_digest


def _any_wrong(copies: Mapping[int, CopyCheck]) -> bool:
    return any(copy.status is not CopyStatus.OK for copy in copies.values())


def _manifest(data: bytes | None) -> Manifest | None:
    """The manifest in ``data``; None also if bytes with the committed digest do not decode."""
    if data is None:
        return None
    try:
        return Manifest.decode(data)
    except IntegrityError:
        return None


def _part(data: bytes | None) -> Part | None:
    if data is None:
        return None
    try:
        return decode_part(data)
    except IntegrityError:
        return None
