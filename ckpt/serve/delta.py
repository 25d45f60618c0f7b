"""Which bytes of a snapshot a copy of the model lacks. Pure.

A copy of the model remembers, for each place that a chunk's bytes went to, which chunk it was and
the digest of the bytes as they lie there. Another snapshot needs only the chunks that differ; and
what lies in memory counts only after its digest was made again, so that memory that a program
changed is read anew rather than served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckpt.restore.plan import ChunkCopy, ChunkRead, ReadPlan, Want, join_reads
from ckpt.values import Digest


@dataclass(frozen=True, slots=True)
class Place:
    """Where bytes of a chunk lie in a model: a part of one wanted box.

    ``copy`` is the chunk's copy with ``output`` 0, so that places of different plans compare.
    """

    want: Want
    copy: ChunkCopy


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """What lies at a place: bytes of the chunk with digest ``chunk``; ``own`` is their digest."""

    chunk: Digest
    own: Digest


Reuse = Callable[[Place, ChunkCopy, Digest], bool]
"""Whether the bytes of the chunk are at the place now, where they were or copied from memory."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is left to read, the places that it goes to, and the bytes that were in memory."""

    plan: ReadPlan
    missing: tuple[tuple[Place, ChunkCopy, Digest], ...]
    reused_bytes: int


def place_of(wants: Sequence[Want], copy: ChunkCopy) -> Place:
    """The place of a planned copy."""
    return Place(wants[copy.output], replace(copy, output=0) if copy.output else copy)


def delta_of(plan: ReadPlan, wants: Sequence[Want], reuse: Reuse, *, coalesce_bytes: int) -> Delta:
    """The part of ``plan`` that ``reuse`` does not answer for. O(chunks) and one call for each
    copy."""
    chunks: list[ChunkRead] = []
    missing: list[tuple[Place, ChunkCopy, Digest]] = []
    reused_bytes = 0
    for request in plan.reads:
        for chunk in request.chunks:
            left = []
            for copy in chunk.copies:
                place = place_of(wants, copy)
                if reuse(place, copy, chunk.digest):
                    reused_bytes += copy.size_bytes
                else:
                    left.append(copy)
                    missing.append((place, copy, chunk.digest))
            if left:
                chunks.append(chunk if len(left) == len(chunk.copies) else _with(chunk, left))
    reads = tuple(join_reads(chunks, coalesce_bytes))
    return Delta(ReadPlan(plan.snapshot, plan.output_bytes, reads), tuple(missing), reused_bytes)


def _with(chunk: ChunkRead, copies: Sequence[ChunkCopy]) -> ChunkRead:
    return replace(chunk, copies=tuple(copies))
