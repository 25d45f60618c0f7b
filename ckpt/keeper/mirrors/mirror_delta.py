"""What of a share must be sent to a node that has an earlier one of the same rank. Pure.

A chunk is taken for the same where the digests are: 128 bits of xxh3, made by the trainer that staged it, and trusted here as
everywhere in ckpt. They tell apart what happens to differ, not what somebody makes collide: who could do that holds the job's
secret or trains in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckpt.cluster.peermem.changed import RANGES_MAX, Range
from ckpt.values import CHUNK_BYTES, StagedIndex, StagedShard

CHANGED_SHARE_MAX = 0.75
"""Where more of the bytes changed, all are sent: copying the rest would gain the peer nothing."""

JOIN_BYTES = 16 << 10
"""Ranges that lie nearer to each other are sent as one: another range costs about as much as so many bytes."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank staged of a snapshot as it is sent: a header, and behind it the data that ``index`` tells of."""

    index: StagedIndex
    header_bytes: int
    data_bytes: int

    @property
    def size_bytes(self) -> int:
        """All of it."""
        return self.header_bytes + self.data_bytes


@dataclass(frozen=True, slots=True)
class Changed:
    """Only these ranges are sent, header and data counted as one; all else is as in the earlier share."""

    ranges: tuple[Range, ...]

    @property
    def size_bytes(self) -> int:
        """How much they hold."""
        return sum(length for _, length in self.ranges)


@dataclass(frozen=True, slots=True)
class Everything:
    """All is sent, and why."""

    why: str


def what_changed(share: Share, base: Share) -> Changed | Everything:
    """What of ``share`` must be sent where ``base`` is.

    The header always, and each chunk unless ``base`` has a shard at the same place and of the same length, whose chunk has the
    same digest there: its name and box are the header's matter. So what of the data is in no shard is the base's.
    """
    if (share.header_bytes, share.data_bytes) != (base.header_bytes, base.data_bytes):
        return Everything("another length of header or data")
    ranges = _joined([(0, share.header_bytes), *sorted(_changed_chunks(share, base))])
    if len(ranges) > RANGES_MAX:
        return Everything("changes lie too far apart")
    changed = Changed(tuple(ranges))
    if changed.size_bytes > CHANGED_SHARE_MAX * share.size_bytes:
        return Everything("most has changed")
    return changed


def _changed_chunks(share: Share, base: Share) -> Iterator[Range]:
    there = {_place(shard): shard.digests for shard in base.index.shards}
    for shard in share.index.shards:
        known: Sequence[bytes | None] = there.get(_place(shard)) or [None] * len(shard.digests)
        begin = share.header_bytes + shard.offset_bytes
        for number, (digest, old) in enumerate(zip(shard.digests, known, strict=True)):
            if digest != old:
                at = number * CHUNK_BYTES
                yield begin + at, min(CHUNK_BYTES, shard.size_bytes - at)


def _place(shard: StagedShard) -> Range:
    return shard.offset_bytes, shard.size_bytes


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """``ranges``, which ascend and may overlap, with those that touch or nearly do as one."""
    joined: list[Range] = []
    for offset, length in ranges:
        if joined and offset - sum(joined[-1]) < JOIN_BYTES:
            first, before = joined[-1]
            joined[-1] = first, max(before, offset + length - first)
        else:
            joined.append((offset, length))
    return joined
