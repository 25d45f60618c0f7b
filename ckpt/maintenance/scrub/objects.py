"""The manifests, parts and packs of existing snapshots: every copy looked at, and bad ones written
anew from good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

from ckpt.errors import CkptError, IntegrityError, UnavailableError
from ckpt.format import keys
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest
from ckpt.format.part import Part, decode_part
from ckpt.log.state import Committed
from ckpt.maintenance.copies import (
    CHUNK_REF_BYTES,
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

# Objects that a store lists and nothing refers to: counted beside the scrub's way through the
# keys, never touched.


class OrphanWalk:
    """A walk through each store's keys below ``prefix``, behind ``after``. Closing it adds what was
    met to the tallies."""

    def __init__(
        self, bench: ScrubContext, prefix: str, *, after: str, numbers: Sequence[int]
    ) -> None:
        self._bench = bench
        self._walks = {
            number: ListingWalk(bench.stores[number], prefix, after=after) for number in numbers
        }

    def reach(self, key: str) -> None:
        """``key`` is referred to; what lies before it and was not passed yet is not."""
        self._each(lambda walk: walk.take(key))

    def skip_folder(self, folder: str) -> None:
        """Pass over what lies in ``folder`` without counting it: whether it is referred to can't be
        known."""
        self._each(lambda walk: walk.skip(folder))
        self._each(lambda walk: walk.skip(f"{folder}~", count=False))

    def finish(self) -> None:
        """Everything that is left is referred to by nothing."""
        self._each(lambda walk: walk.skip(None))

    def close(self) -> None:
        """Add what was met to the stores' tallies."""
        for number, walk in self._walks.items():
            tally = self._bench.findings.stores[number]
            tally.orphans += walk.orphans
            tally.orphan_bytes += walk.orphan_bytes
        self._walks = {}

    def _each(self, act: Callable[[ListingWalk], object]) -> None:
        active = set(self._bench.active)
        for number, walk in self._walks.items():
            if number not in active:
                continue
            try:
                act(walk)
            except UnavailableError as error:
                self._bench.mark_away(number, str(error))
                active.discard(number)


WholeCopies = dict[int, tuple[CopyCheck, bytes]]
"""What each store has of a small object, and the bytes where they are right."""


class ObjectScrub:
    """Goes through ``snapshots``: first their manifests and parts, then the packs. Each can be left
    and taken up again."""

    def __init__(
        self,
        bench: ScrubContext,
        snapshots: Sequence[Committed],
        *,
        everything: bool,
        dropped: DropCheck,
        budget_bytes: int,
    ) -> None:
        self._bench = bench
        self._snapshots = sorted(snapshots, key=lambda entry: entry.snapshot)
        self._everything = everything
        self._gone = dropped
        self._at = 0
        self._gathered = PackReferences(max(1, budget_bytes // 2 // CHUNK_REF_BYTES))
        self._cursor = ""
        self.untraced: list[Committed] = []
        """Snapshots whose manifest or a part can't be had."""

    def records(self, *, threads: int) -> None:
        """Manifests and parts. Raises Stopped between two objects, and goes on there when called
        again."""
        last = self._snapshots[self._at - 1] if self._at else None
        # No writer's name holds a tilde, and all that they hold are smaller.
        after = "" if last is None else f"{keys.PARTS}{last.snapshot.key}/~"
        with (
            closing(
                self._strays(keys.MANIFESTS, "" if last is None else manifest_key(last))
            ) as manifests,
            closing(self._strays(keys.PARTS, after)) as parts,
        ):
            while self._at < len(self._snapshots):
                entry = self._snapshots[self._at]
                manifests.reach(manifest_key(entry))
                found = self._snapshot(entry, parts, threads=threads)
                for part in found:
                    self._gathered.add(part, self._at)
                self._at += 1
            manifests.finish()
            parts.finish()

    def packs(self, *, threads: int) -> None:
        """Every chunk that is referred to. As ``records``; memory stays within the budget, however
        many chunks there are."""
        with closing(self._strays(keys.PACKS, self._cursor)) as strays:
            while True:
                todo = [key for key in self._gathered.packs() if key > self._cursor]
                with closing(map_in_order(todo, self._look_pack, threads=threads)) as looked:
                    for key, copies in looked:
                        strays.reach(key)
                        self._settle_pack(
                            self._gathered.pack(key), self._gathered.users(key), copies
                        )
                        self._cursor = key
                if self._gathered.complete:
                    break
                following = self._gathered.next_round()
                for number, entry in enumerate(self._snapshots):
                    for part in self._load(entry):
                        following.add(part, number)
                self._gathered = following
            # What only a snapshot that can't be traced refers to is no stray.
            if not self.untraced:
                strays.finish()

    def _snapshot(self, entry: Committed, parts: OrphanWalk, *, threads: int) -> list[Part]:
        """The parts of one snapshot that can be had."""
        want = WholeObject(manifest_key(entry), entry.manifest_digest)
        data = self._settle_whole(want, self._look_whole(want, MANIFEST_BYTES_MAX), entry)
        manifest = _manifest(data)
        if manifest is None:
            self.untraced.append(entry)
            parts.skip_folder(f"{keys.PARTS}{entry.snapshot.key}/")
            return []
        wants = [WholeObject(ref.key, ref.digest, ref.size_bytes) for ref in manifest.parts]
        wants.sort(key=lambda want: want.key)
        found: list[Part] = []
        with closing(map_in_order(wants, self._look_part, threads=threads)) as looked:
            for want, looks in looked:
                parts.reach(want.key)
                part = _part(self._settle_whole(want, looks, entry))
                if part is not None:
                    found.append(part)
        if len(found) < len(wants):
            self.untraced.append(entry)
        return found

    def _look_part(self, want: WholeObject) -> WholeCopies:
        return self._look_whole(want, PART_STORED_BYTES_MAX)

    def _look_whole(self, want: WholeObject, bytes_max: int) -> WholeCopies:
        bench = self._bench
        return {
            n: check_whole(bench.stores[n], want, bytes_max=bytes_max, pace=bench.pace)
            for n in bench.active
        }

    def _settle_whole(
        self, want: WholeObject, looks: WholeCopies, entry: Committed
    ) -> bytes | None:
        bench = self._bench
        copies = {number: copy for number, (copy, _) in looks.items()}
        bench.count_silence(copies)
        if _any_wrong(copies) and self._gone.all_dropped([entry]):
            return None
        decision = decide_whole(bench.copy_of_each(copies), writable=bench.writable)
        mended: list[int] = []
        if isinstance(decision, CopyRepair):
            data = looks[decision.source][1]
            mended = [number for number in decision.targets if bench.put(number, want.key, data)]
        bench.count_object(want.key, copies, repaired=mended, lost=isinstance(decision, CopyLost))
        return next((data for copy, data in looks.values() if copy.status is CopyStatus.OK), None)

    def _look_pack(self, key: str) -> dict[int, CopyCheck]:
        pack, bench = self._gathered.pack(key), self._bench
        return {
            number: check_pack(bench.stores[number], pack, pace=bench.pace)
            for number in bench.active
        }

    def _settle_pack(
        self, pack: Pack, users: frozenset[int], copies: Mapping[int, CopyCheck]
    ) -> None:
        bench = self._bench
        bench.count_silence(copies)
        if _any_wrong(copies) and self._gone.all_dropped([self._snapshots[user] for user in users]):
            return
        decision = decide_pack(pack, bench.copy_of_each(copies), writable=bench.writable)
        mended = self._mend_pack(pack, decision) if isinstance(decision, CopyRepair) else []
        nowhere = decision.chunks if isinstance(decision, CopyLost | CopyUnknown) else pack.chunks
        bench.count_object(
            pack.key,
            copies,
            repaired=mended,
            lost=isinstance(decision, CopyLost),
            bad_everywhere=nowhere,
        )

    def _mend_pack(self, pack: Pack, mend: CopyRepair) -> list[int]:
        bench = self._bench
        try:
            memory = assemble_pack(bench.stores, pack, mend, pace=bench.pace)
        except CkptError as error:
            # It was right a moment ago: the store went away, or what is beneath it is failing.
            bench.findings.stores[mend.source].problem = str(error)
            return []
        if memory is None:
            return []
        return [number for number in mend.targets if bench.put(number, pack.key, memory)]

    def _load(self, entry: Committed) -> Iterator[Part]:
        """The parts of a snapshot once more, from whichever store has them; what can't be had was
        told before."""
        manifest = _manifest(
            self._any(WholeObject(manifest_key(entry), entry.manifest_digest), MANIFEST_BYTES_MAX)
        )
        for ref in () if manifest is None else manifest.parts:
            part = _part(
                self._any(WholeObject(ref.key, ref.digest, ref.size_bytes), PART_STORED_BYTES_MAX)
            )
            if part is not None:
                yield part

    def _any(self, want: WholeObject, bytes_max: int) -> bytes | None:
        bench = self._bench
        for number in bench.active:
            copy, data = check_whole(
                bench.stores[number], want, bytes_max=bytes_max, pace=bench.pace
            )
            if copy.status is CopyStatus.OK:
                return data
        return None

    def _strays(self, prefix: str, after: str) -> OrphanWalk:
        # Only where all snapshots are looked at is it known what nothing refers to.
        return OrphanWalk(
            self._bench, prefix, after=after, numbers=self._bench.active if self._everything else []
        )


def manifest_key(entry: Committed) -> str:
    """The key of the manifest that was committed."""
    return keys.manifest_key(entry.snapshot, entry.manifest_digest)


def _any_wrong(copies: Mapping[int, CopyCheck]) -> bool:
    return any(copy.status is not CopyStatus.OK for copy in copies.values())


def _manifest(data: bytes | None) -> Manifest | None:
    """None too where bytes that have the committed digest are no manifest: then nothing can be
    found through it."""
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
