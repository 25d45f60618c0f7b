"""A job's processes over one store in memory: they save with dedup, die, come back late, and drop
and sweep meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import CkptError, ConflictError
from ckpt.format import keys
from ckpt.format.canonical import digest
from ckpt.format.manifest import Manifest
from ckpt.format.part import Part
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.maintenance.gc.sweep import sweep
from ckpt.save.chunks import NO_COMPRESSION, plan_repacking
from ckpt.save.packs import PersistLimits, persist, put_part
from ckpt.testing.crashes import CrashingBackend, CrashMode
from ckpt.testing.sample import Piece, stage, tensor
from ckpt.values import ChunkLocation, Digest, SnapshotId

JOB = "job"
LEAVES = 6
LEAF_BYTES = 64
PACK_BYTES = 3 * 4096
OBJECTS = (keys.PACKS, keys.PARTS, keys.MANIFESTS)


class Death(BaseException):
    """The process is killed."""


class ClockedStore:
    """A store whose clock the test turns. ``before`` is asked before each operation."""

    def __init__(self, inner: Backend, clock: Callable[[], float]) -> None:
        self._inner = inner
        self._clock = clock
        self._stamps: dict[str, float] = {}

    @property
    def url(self) -> str:
        return self._inner.url

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=True, read_bytes_best=64 << 10, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._inner.put(key, data, create_only=create_only)
        self._stamps[key] = self._clock()

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        found = self._inner.stat(key)
        return None if found is None else Stat(key, found.size_bytes, self._stamps[key])

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        for found in self._inner.list(prefix, after=after):
            yield Stat(found.key, found.size_bytes, self._stamps[found.key])

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()


class Watched:
    """One process's way to a store: ``before(op, key)`` is asked before each operation, and may
    raise Death."""

    def __init__(self, inner: Backend, before: Callable[[str, str], None]) -> None:
        self._inner = inner
        self._before = before

    @property
    def url(self) -> str:
        return self._inner.url

    def capabilities(self) -> Capabilities:
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._before("put", key)
        self._inner.put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._before("read_into", key)
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        self._before("stat", key)
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        self._before("list", prefix)
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._before("delete", key)
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()


@dataclass
class InFlight:
    """A snapshot whose bytes are in the store, or part of them, and that nobody has committed
    yet."""

    manifest: Manifest
    locations: dict[Digest, ChunkLocation]
    content: frozenset[Digest]


@dataclass
class Process:
    """One start of a job's writer: its epoch, its last state, what it may refer to, and what it has
    yet to commit."""

    world: CollectedStore
    journal: Journal
    epoch: int
    values: list[int]
    step: int
    writer: str
    base: SnapshotId | None = None
    known: dict[Digest, ChunkLocation] = field(default_factory=dict)
    packs: int = 0
    in_flight: list[InFlight] = field(default_factory=list)

    def capture(self, store: Backend) -> None:
        """Train on, and write the new chunks and the parts of one snapshot; it is not committed
        yet."""
        dice = self.world.dice
        for place in dice.sample(range(LEAVES), dice.randint(1, LEAVES // 2)):
            self.values[place] = self.world.fresh()
        self.step += dice.randint(1, 3)
        pair = SnapshotId(self.captured, self.step)
        parts: list[Part] = []
        found: dict[Digest, ChunkLocation] = {}
        size = 0
        ranks = dice.choice([1, 2])
        for rank in range(ranks):
            staged, data = stage(pair, self.pieces(rank, ranks), rank=rank, world_size=ranks)
            wanted = frozenset(one for shard in staged.shards for one in shard.digests)
            known = {one: place for one, place in self.known.items() if one in wanted}
            if dice.random() < 0.5:
                sizes = {place.pack: 4 * 4096 for place in known.values()}
                known = dict(
                    plan_repacking(known, wanted, sizes, budget_bytes=1 << 20).stored_chunks
                )
            self.packs += LEAVES
            done = persist(
                staged,
                data,
                stored_chunks=known,
                backend=store,
                writer=f"{self.writer[:-1]}{rank}",
                pack_start=self.packs,
                compression=NO_COMPRESSION,
                limits=PersistLimits(pack_bytes_max=PACK_BYTES, puts_max=1),
            )
            parts.append(done.part)
            found |= done.locations
            size += sum(shard.size_bytes for shard in staged.shards)
        nodes = [parts] if dice.random() < 0.5 else [[part] for part in parts]
        refs = [put_part(node, backend=store, writer=node[0].writer) for node in nodes]
        manifest = Manifest(
            job=JOB,
            snapshot=pair,
            world_size=ranks,
            parts=tuple(refs),
            size_bytes=size,
            new_bytes=0,
            created_unix_s=self.world.now,
            base=self.base,
            metadata={"loss": dice.random()},
        )
        self.in_flight.append(InFlight(manifest, found, frozenset(found)))

    captured: int = 0
    """The epoch that its trainer captures in: a keeper commits that under a newer one, too."""

    def pieces(self, rank: int, ranks: int) -> list[Piece]:
        mine = [place for place in range(LEAVES) if place % ranks == rank]
        return [
            tensor(f"leaf{place}", np.full(LEAF_BYTES, self.values[place], np.int32))
            for place in mine
        ]

    def commit(self) -> None:
        """Commit the oldest that is in flight; what the log refuses is given up, as a persister
        does."""
        if not self.in_flight:
            return
        one = self.in_flight.pop(0)
        try:
            self.journal.commit(one.manifest, epoch=self.epoch)
        except ConflictError:
            self.base, self.known = None, {}
            return
        self.world.content[one.manifest.snapshot] = one.content
        self.base, self.known = one.manifest.snapshot, one.locations

    def open_again(self) -> None:
        """As a keeper that was cut off and comes back: what its trainer captured goes on under a
        new epoch."""
        resume = SnapshotId(self.captured, self.step)
        self.epoch = self.journal.open_epoch(resume=resume)
        if self.world.dice.random() < 0.5:
            self.captured = self.epoch


@dataclass
class CollectedStore:
    """All of it. One seed is one run."""

    seed: int
    dice: random.Random = field(init=False)
    now: float = 1000.0
    inner: MemoryBackend = field(default_factory=MemoryBackend)
    store: ClockedStore = field(init=False)
    processes: list[Process] = field(default_factory=list)
    content: dict[SnapshotId, frozenset[Digest]] = field(default_factory=dict)
    """What each snapshot that was ever committed held."""
    _values: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.store = ClockedStore(self.inner, lambda: self.now)
        Journal.open(self.store, job=JOB, create=True)

    def fresh(self) -> int:
        """A value that no leaf had before."""
        self._values += 1
        return self._values

    def state(self) -> LogState:
        return Journal.open(self.store).refresh()

    def start(self) -> Process:
        """A new process takes over: it restores some snapshot, mostly the newest, and opens an
        epoch from it."""
        journal = Journal.open(self.store)
        state = journal.refresh()
        held = [entry.snapshot for entry in state.snapshots]
        resume = self.dice.choice([state.newest()] * 6 + [*held, None])
        epoch = journal.open_epoch(resume=resume)
        process = Process(
            self,
            journal,
            epoch,
            [self.fresh() for _ in range(LEAVES)],
            resume.step if resume else 0,
            keys.writer_name("node", f"{self.dice.getrandbits(60):015x}0"),
            captured=epoch,
        )
        if resume is not None and self.dice.random() < 0.7:
            # It read and verified some of what it restored, and may refer to that.
            self._remember(process, resume)
        self.processes.append(process)
        return process

    def _remember(self, process: Process, resume: SnapshotId) -> None:
        try:
            index = load_index(self.store, self.state(), resume)
        except CkptError:
            return  # dropped since, and perhaps swept
        process.base, process.known = resume, index.locations()
        for name in range(LEAVES):
            for shard in index.shards(f"leaf{name}"):
                data = bytearray(shard.size_bytes)
                self.store.read_into(
                    shard.locations[0].pack,
                    memoryview(data),
                    offset_bytes=shard.locations[0].offset_bytes,
                )
                process.values[name] = int(np.frombuffer(data, np.int32)[0])

    def check(self) -> None:
        """Every snapshot that exists is there, bit for bit as it was captured."""
        state = self.state()
        assert state.hole is None
        for entry in state.snapshots:
            index = load_index(self.store, state, entry.snapshot)
            found = index.locations()
            assert frozenset(found) == self.content[entry.snapshot], (
                f"seed={self.seed} {entry.snapshot}"
            )
            for wanted, place in found.items():
                data = bytearray(place.stored_bytes)
                self.store.read_into(place.pack, memoryview(data), offset_bytes=place.offset_bytes)
                assert digest(memoryview(data)) == wanted, (
                    f"seed={self.seed} {entry.snapshot} {place.pack}"
                )

    def needed(self) -> set[str]:
        """The keys that the snapshots that exist refer to."""
        state = self.state()
        found: set[str] = set()
        for entry in state.snapshots:
            index = load_index(self.store, state, entry.snapshot)
            found |= {keys.manifest_key(entry.snapshot, entry.manifest_digest), *index.packs()}
            found |= {ref.key for ref in index.manifest.parts}
        return found

    def objects(self) -> set[str]:
        """The keys of all packs, parts and manifests that are stored."""
        return {stat.key for prefix in OBJECTS for stat in self.inner.list(prefix)}


def sweep_and_die(root: str, at: int, mode: CrashMode) -> None:
    """In a child: sweep a folder, dying by SIGKILL at its ``at``-th change."""
    inner = FileBackend(root)
    sweep(CrashingBackend(inner, at=at, mode=mode), Journal.open(inner).refresh(), grace_s=0.0)
