"""What the nodes of a job hold in memory, which snapshots they hold completely, and which they
mirror next. Pure.

The ranks of a node are consecutive, and so are the shares that it holds: nodes report ranges of
ranks, and all that is computed from them is ranges. So the cost grows with the number of nodes, not
of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from msgspec import structs

from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.mesh.messages import InventoryEntry, MeshSources
from ckpt.cluster.peermem.http import RANGES_MAX, ByteRange
from ckpt.format.part_rules import WORLD_MAX
from ckpt.values import CHUNK_BYTES, SnapshotId, StagedIndex, StagedShard

SNAPSHOTS_MAX = 8
"""How many complete snapshots are offered to restore from. More are never needed: each slot holds
one."""


@dataclass(frozen=True, slots=True)
class SourceRange:
    """``ranks`` consecutive ranks whose shares the same nodes have; a node that has one in a slot
    precedes those with mirrors."""

    ranks: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """A snapshot that can be restored from memory: a world of ``world_size`` ranks, each rank's
    share at some nodes.

    ``spans``: all its ranks, from 0 on.
    """

    snapshot: SnapshotId
    origin: str
    world_size: int
    spans: tuple[SourceRange, ...]

    @property
    def sources(self) -> tuple[tuple[str, ...], ...]:
        """For each rank the nodes that have its share."""
        return tuple(span.nodes for span in self.spans for _ in range(span.ranks))


def merge_ranges(entries: Iterable[InventoryEntry]) -> list[InventoryEntry]:
    """The same entries, with consecutive ranks merged into one."""
    merged: list[InventoryEntry] = []
    for entry in sorted(
        entries,
        key=lambda entry: (
            entry.snapshot,
            entry.origin,
            entry.world_size,
            entry.mirror,
            entry.rank,
        ),
    ):
        last = merged[-1] if merged else entry
        alike = structs.replace(last, rank=entry.rank, ranks=entry.ranks) == entry
        if merged and alike and entry.rank <= last.rank + last.ranks:
            merged[-1] = structs.replace(
                last, ranks=max(last.ranks, entry.rank + entry.ranks - last.rank)
            )
        else:
            merged.append(entry)
    return merged


def complete_snapshots(held: Mapping[str, Sequence[InventoryEntry]]) -> list[MemorySnapshot]:
    """The snapshots of which every rank's share is somewhere, newest first. ``held``: what each
    node reports."""
    snapshots = []
    for (snapshot, origin, size), segments in _segments(held, with_origin=True).items():
        if all(nodes for _, _, nodes in segments):
            snapshots.append(MemorySnapshot(snapshot, origin, size, _spans(segments)))
    # An epoch's number may have been given out twice: the log says which of the two origins counts.
    return sorted(
        snapshots, key=lambda each: (each.snapshot, each.origin, each.world_size), reverse=True
    )[:SNAPSHOTS_MAX]


def missing_ranks(
    held: Mapping[str, Sequence[InventoryEntry]],
) -> dict[SnapshotId, tuple[range, ...]]:
    """For each snapshot that is not complete, the ranks whose share no node has. For people."""
    incomplete = {}
    for (snapshot, _, _), segments in sorted(
        _segments(held, with_origin=False).items(), reverse=True
    ):
        missing = tuple(range(start, end) for start, end, nodes in segments if not nodes)
        if missing:
            incomplete[snapshot] = missing
    return incomplete


def to_message(attempt: int, snapshots: Sequence[MemorySnapshot]) -> MeshSources:
    """What all nodes receive: each node's name occurs once, and ranges refer to it by number."""
    names = {node: None for each in snapshots for span in each.spans for node in span.nodes}
    numbers = {node: number for number, node in enumerate(names)}
    return MeshSources(
        attempt=attempt,
        nodes=tuple(names),
        pairs=tuple(
            (
                each.snapshot,
                each.world_size,
                tuple(
                    (span.ranks, tuple(numbers[node] for node in span.nodes)) for span in each.spans
                ),
            )
            for each in snapshots
        ),
    )


def from_message(message: MeshSources) -> dict[SnapshotId, tuple[SourceRange, ...]]:
    """Where the shares of each snapshot are. A snapshot whose part of the message is inconsistent
    is left out.

    Of a number that was given out twice the first counts, as in what is offered to restore.
    """
    sources: dict[SnapshotId, tuple[SourceRange, ...]] = {}
    for snapshot, size, spans in message.pairs:
        consistent = all(
            ranks > 0 and nodes and all(0 <= node < len(message.nodes) for node in nodes)
            for ranks, nodes in spans
        )
        if consistent and size <= WORLD_MAX and sum(ranks for ranks, _ in spans) == size:
            named = tuple(
                SourceRange(ranks, tuple(message.nodes[node] for node in nodes))
                for ranks, nodes in spans
            )
            sources.setdefault(snapshot, named)
    return sources


_Segment = tuple[int, int, tuple[str, ...]]
"""Ranks from one up to another, and the nodes that have their shares."""


def _segments(
    held: Mapping[str, Sequence[InventoryEntry]], *, with_origin: bool
) -> dict[tuple[SnapshotId, str, int], list[_Segment]]:
    """For each snapshot of which a node has a share: the whole world in segments, each at the same
    nodes throughout."""
    changes: dict[tuple[SnapshotId, str, int], dict[int, list[tuple[bool, bool, str]]]] = {}
    for node, entries in held.items():
        for entry in entries:
            end = entry.rank + entry.ranks
            if entry.rank < 0 or entry.ranks < 1 or not end <= entry.world_size <= WORLD_MAX:
                continue
            at_rank = changes.setdefault(
                (entry.snapshot, entry.origin if with_origin else "", entry.world_size), {}
            )
            at_rank.setdefault(entry.rank, []).append((True, entry.mirror, node))
            at_rank.setdefault(end, []).append((False, entry.mirror, node))
    return {pair: _sweep(pair[2], at_rank) for pair, at_rank in changes.items()}


def _sweep(size: int, changes: dict[int, list[tuple[bool, bool, str]]]) -> list[_Segment]:
    """``changes``: at which ranks a node's share begins (True) or ends."""
    segments: list[_Segment] = []
    present: dict[tuple[bool, str], int] = {}
    ranks = sorted({0, size, *changes})
    for start, end in pairwise(ranks):
        for begins, mirror, node in changes.get(start, ()):
            count = present.get((mirror, node), 0) + (1 if begins else -1)
            present[mirror, node] = count
            if not count:
                del present[mirror, node]
        segments.append((start, end, tuple(dict.fromkeys(node for _, node in sorted(present)))))
    return segments


def _spans(segments: Sequence[_Segment]) -> tuple[SourceRange, ...]:
    spans: list[SourceRange] = []
    for start, end, nodes in segments:
        if spans and spans[-1].nodes == nodes:
            spans[-1] = SourceRange(spans[-1].ranks + end - start, nodes)
        else:
            spans.append(SourceRange(end - start, nodes))
    return tuple(spans)


# ---- rounds: which snapshot all nodes mirror next
#
# If each node mirrored the newest snapshot that it knows of, the mirrors of two nodes might be of
# different snapshots, and after a loss none would be complete. So the node of rank 0 names one
# snapshot, every node mirrors it (in its own memory beside the slots, and on its peers), and only
# when all have it the next one is named and older mirrors go.


@dataclass(frozen=True, slots=True)
class MirrorRound:
    """``named``: the snapshot that all nodes mirror now; ``kept``: the newest that all have
    mirrored."""

    named: SnapshotId | None = None
    kept: SnapshotId | None = None


@dataclass(frozen=True, slots=True)
class MirrorReport:
    """A node's report: the last named snapshot that it has mirrored everywhere, and the last one
    that it could not."""

    mirrored: SnapshotId | None = None
    missed: SnapshotId | None = None


def next_round(
    now: MirrorRound, reports: Sequence[MirrorReport | None], complete: SnapshotId | None
) -> MirrorRound:
    """The round that follows. ``reports``: of every node, None if it sent none yet;
    ``complete``: the newest snapshot.

    A snapshot that a node could not mirror, because its slot was reused or a peer had no memory, is
    passed over for a newer one.
    """
    if now.named is not None and all(
        report is not None and report.mirrored == now.named for report in reports
    ):
        now = replace(now, kept=now.named)
    over = (
        now.named is None
        or now.kept == now.named
        or any(report is not None and report.missed == now.named for report in reports)
    )
    if over and complete is not None and (now.named is None or complete > now.named):
        return replace(now, named=complete)
    return now


def retained_mirrors(now: MirrorRound, before: frozenset[SnapshotId]) -> frozenset[SnapshotId]:
    """The snapshots whose mirrors stay. ``before``: those that were mirrored when the epoch began,
    until one is kept in this epoch."""
    named = {now.named} if now.named is not None else set()
    return frozenset(named | ({now.kept} if now.kept is not None else before))


# ---- delta: what of a share must be sent to a node that has an earlier one of the same rank
#
# Chunks with equal digests are taken for equal: 128 bits of xxh3, made by the trainer that staged
# the chunk, and trusted here as everywhere in ckpt. They tell apart chunks that happen to differ,
# not chunks that an attacker makes collide: that one would hold the job's secret or train in it.

CHANGED_SHARE_MAX = 0.75
"""If a larger part of the bytes changed, all are sent: copying the rest would save the peer
nothing."""

JOIN_BYTES = 16 << 10
"""Ranges closer to each other than this are sent as one: another range costs about as much as so
many bytes."""


@dataclass(frozen=True, slots=True)
class StagedShare:
    """What one rank staged of a snapshot, as it is sent: a header, then the data that ``index``
    describes."""

    index: StagedIndex
    header_bytes: int
    data_bytes: int

    @property
    def size_bytes(self) -> int:
        """Header and data."""
        return self.header_bytes + self.data_bytes


@dataclass(frozen=True, slots=True)
class DeltaRanges:
    """Only these ranges are sent, counted over header and data; all else is as in the earlier
    share."""

    ranges: tuple[ByteRange, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of all ranges."""
        return sum(length for _, length in self.ranges)


@dataclass(frozen=True, slots=True)
class WholeShare:
    """All is sent; ``why`` says the reason."""

    why: str


def delta_of(share: StagedShare, base: StagedShare) -> DeltaRanges | WholeShare:
    """What of ``share`` must be sent to a node that has ``base``.

    Always the header; and each chunk, unless ``base`` has a shard at the same offset and of the
    same length whose chunk has the same digest. (The header names the shard and its box.) So bytes
    of the data that are in no shard stay those of ``base``.
    """
    if (share.header_bytes, share.data_bytes) != (base.header_bytes, base.data_bytes):
        return WholeShare("another length of header or data")
    ranges = _joined([(0, share.header_bytes), *sorted(_changed_chunks(share, base))])
    if len(ranges) > RANGES_MAX:
        return WholeShare("changes are too far apart")
    changed = DeltaRanges(tuple(ranges))
    if changed.size_bytes > CHANGED_SHARE_MAX * share.size_bytes:
        return WholeShare("most has changed")
    return changed


def _changed_chunks(share: StagedShare, base: StagedShare) -> Iterator[ByteRange]:
    base_digests = {_place(shard): shard.digests for shard in base.index.shards}
    for shard in share.index.shards:
        old_digests: Sequence[bytes | None] = base_digests.get(_place(shard)) or [None] * len(
            shard.digests
        )
        begin_bytes = share.header_bytes + shard.offset_bytes
        for number, (digest, old) in enumerate(zip(shard.digests, old_digests, strict=True)):
            if digest != old:
                at = number * CHUNK_BYTES
                yield begin_bytes + at, min(CHUNK_BYTES, shard.size_bytes - at)


def _place(shard: StagedShard) -> ByteRange:
    return shard.offset_bytes, shard.size_bytes


def _joined(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """``ranges``, which ascend and may overlap, with those that touch or nearly touch merged."""
    joined: list[ByteRange] = []
    for offset, length in ranges:
        if joined and offset - sum(joined[-1]) < JOIN_BYTES:
            first, before = joined[-1]
            joined[-1] = first, max(before, offset + length - first)
        else:
            joined.append((offset, length))
    return joined


# ---- inventory: asking all nodes what they hold in memory, for the node of rank 0

WAIT_S = 3.0
"""How long a node may take to report what it holds, if all else is there."""
WAIT_S_MAX = 60.0
"""How long it is waited for if what the others hold is newer than what they hold completely: what
is missing may be there, and the job would go back without it."""
RECONNECT_S = 0.5
"""How long a standby without a connection is waited for, if something is missing."""
AGAIN_S = 0.5

Answer = Callable[[dict[str, Sequence[InventoryEntry]]], object]


@dataclass(slots=True, eq=False)
class _Asking:
    asked: set[str]
    """Nodes that were asked and have not replied."""
    unasked: set[str]
    """Members without a connection: they are asked as soon as they have one."""
    ranked: frozenset[str]
    """Nodes with ranks, without which no attempt runs."""
    began_s: float
    answer: Answer
    held: dict[str, Sequence[InventoryEntry]] = field(default_factory=dict)
    told: bool = False

    def waits(
        self, now_s: float, incomplete: Callable[[Mapping[str, Sequence[InventoryEntry]]], bool]
    ) -> bool:
        """Whether the answer has to wait at this moment. ``incomplete``: see ``is_incomplete``."""
        waited_s = now_s - self.began_s
        if self.asked and waited_s < WAIT_S:
            return True
        # A standby without a connection may never be reached.
        others = self.unasked if waited_s < RECONNECT_S else self.unasked & self.ranked
        return bool((self.asked or others) and waited_s < WAIT_S_MAX and incomplete(self.held))


def is_incomplete(held: Mapping[str, Sequence[InventoryEntry]]) -> bool:
    """Whether some snapshot is newer than all that are complete, and lacks a rank's share."""
    newest = max((each.snapshot for each in complete_snapshots(held)), default=None)
    return any(newest is None or snapshot > newest for snapshot in missing_ranks(held))


class InventoryQuery:
    """Questions to all nodes, each answered once all have replied, or no reply is worth waiting for
    (``_Asking.waits``). In the keeper's loop.

    ``send`` sends a message to a node; False if there is no connection. ``on_wait`` is called once
    a question with the nodes that have not replied after WAIT_S.
    """

    def __init__(
        self,
        send: Callable[[str, mesh.MeshMessage], bool],
        on_wait: Callable[[Collection[str]], object] = lambda nodes: None,
        *,
        incomplete: Callable[[Mapping[str, Sequence[InventoryEntry]]], bool] = is_incomplete,
    ) -> None:
        """``incomplete`` says of all that is held whether a reply may complete it."""
        self._send = send
        self._on_wait = on_wait
        self._incomplete = incomplete
        self._calls = itertools.count(1)
        self._asking: dict[int, _Asking] = {}

    def ask(
        self,
        nodes: Collection[str],
        own: tuple[str, Sequence[InventoryEntry]],
        now_s: float,
        answer: Answer,
        *,
        ranked: Collection[str] = (),
    ) -> None:
        """Ask ``nodes``, then call ``answer`` with what they and this node hold. ``ranked``: those
        that hold ranks."""
        call = next(self._calls)
        asked = {node for node in nodes if self._send(node, mesh.AskNodeInventory(call=call))}
        self._asking[call] = _Asking(
            asked, set(nodes) - asked, frozenset(ranked), now_s, answer, {own[0]: own[1]}
        )
        self._finish_if_done(call, now_s)

    def answered(self, node: str, message: mesh.NodeInventory, now_s: float) -> None:
        """A node's reply."""
        asking = self._asking.get(message.call)
        if asking is not None and node in asking.asked | asking.unasked:
            asking.asked.discard(node)
            asking.unasked.discard(node)
            asking.held[node] = message.holdings
            self._finish_if_done(message.call, now_s)

    def connected(self, node: str) -> None:
        """A connection to the node is up: ask what it was not asked, or may have missed."""
        for call, asking in self._asking.items():
            if node in asking.unasked and self._send(node, mesh.AskNodeInventory(call=call)):
                asking.unasked.discard(node)
                asking.asked.add(node)

    def disconnected(self, node: str, now_s: float) -> None:
        """The connection to the node ended: its reply may be lost."""
        for call, asking in list(self._asking.items()):
            if node in asking.asked:
                asking.asked.discard(node)
                asking.unasked.add(node)
                self._finish_if_done(call, now_s)

    def keep_members(self, members: Collection[str], now_s: float) -> None:
        """Who is no member any more will not reply."""
        for call, asking in list(self._asking.items()):
            asking.asked.intersection_update(members)
            asking.unasked.intersection_update(members)
            self._finish_if_done(call, now_s)

    def tick(self, now_s: float) -> float:
        """Answer questions that have waited long enough; returns the seconds until the next call is
        needed."""
        for call in list(self._asking):
            self._finish_if_done(call, now_s)
        return min(
            (
                AGAIN_S if asking.unasked or left_s <= 0 else left_s
                for asking in self._asking.values()
                for left_s in (asking.began_s + WAIT_S - now_s,)
            ),
            default=WAIT_S,
        )

    def _finish_if_done(self, call: int, now_s: float) -> None:
        asking = self._asking.get(call)
        if asking is None:
            return
        if not asking.waits(now_s, self._incomplete):
            del self._asking[call]
            asking.answer(asking.held)
        elif now_s - asking.began_s >= WAIT_S and not asking.told:
            asking.told = True
            self._on_wait(sorted(asking.asked | asking.unasked & asking.ranked))
