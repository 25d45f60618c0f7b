"""The header of a slot: the order of its writes, and reading it back from the bytes alone. No
torch.

A header is eight 64-bit words in native byte order, then the index:

    0 magic   1 format version   2 state   3 header_bytes   4 data_bytes   5 index_bytes
    6, 7 digest   byte 64 on: the index

``state`` is ``generation << 1 | valid``: one aligned 8-byte store changes both together. A writer
makes the state invalid under a new generation before it touches anything else, and valid after
everything else. The digest covers generation, lengths and the index (msgpack of a StagedIndex), so
words of two generations never verify together.

Behind the index, at the next multiple of 8, stands a mark once the snapshot was handed in to be
made durable: its length in 8 bytes, its digest in 16, then msgpack of the tags. The digest covers
the generation too, so what an earlier index or mark left there is no mark. The keeper that it was
handed to may die; the next one finds the mark in the slot.
"""

from __future__ import annotations

import struct
import threading
from typing import TypeVar

import msgspec

from ckpt.errors import IntegrityError, InternalError, UsageError
from ckpt.format.canonical import digest, prepare_decoders
from ckpt.staging.layout import index_problem
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex

_T = TypeVar("_T")

MAGIC = int.from_bytes(b"ckptslot", "little")
FORMAT_VERSION = 1
INDEX_OFFSET_BYTES = 64
INDEX_BYTES_MAX = 256 << 20
"""No index is longer: a reader refuses a longer one before it copies anything."""
HEADER_BYTES_DEFAULT = 16 << 20
"""Room for 40,000 leaves with names of 100 characters; unused pages never take memory."""

_WORDS = 8
_STATE = 2

_MARK_BYTES = 24
"""Length and digest of a mark."""


class Header:
    """The header of one slot that this process writes. ``memory`` is the whole slot. Not
    thread-safe.
    """

    __slots__ = ("_fence", "_header_bytes", "_memory", "_words")

    def __init__(self, memory: memoryview, *, header_bytes: int) -> None:
        if header_bytes < PAGE_BYTES or header_bytes % PAGE_BYTES or header_bytes > len(memory):
            raise UsageError(
                f"header is not whole pages inside the slot. header_bytes={header_bytes}"
            )
        self._memory = memory
        self._header_bytes = header_bytes
        self._words = memory[: _WORDS * 8].cast("Q")
        self._fence = threading.Lock()

    @property
    def generation(self) -> int:
        """How often the slot was begun."""
        return self._words[_STATE] >> 1

    @property
    def valid(self) -> bool:
        """Whether the slot is sealed."""
        return bool(self._words[_STATE] & 1)

    def begin(self) -> int:
        """Make the header invalid under the next generation, which is returned. Must come before
        any other write.
        """
        generation = self.generation + 1
        with self._fence:
            self._words[_STATE] = generation << 1
        with self._fence:  # releasing and taking a lock keeps later stores behind the one above
            self._words[0] = MAGIC
            self._words[1] = FORMAT_VERSION
            self._words[3] = self._header_bytes
            self._words[4] = len(self._memory) - self._header_bytes
        return generation

    def seal(self, index: StagedIndex) -> None:
        """Write the index and its digest, then make the header valid with one store.

        Raises UsageError if the index does not fit. The index is not checked here: readers check
        it.
        """
        if self.valid:
            raise InternalError("a slot that was not begun can't be sealed.")
        data_bytes = len(self._memory) - self._header_bytes
        encoded = encode_index(index)
        area_bytes = min(self._header_bytes - INDEX_OFFSET_BYTES, INDEX_BYTES_MAX)
        if len(encoded) > area_bytes:
            raise UsageError(
                f"the index does not fit the slot's header. index_bytes={len(encoded)} "
                f"room_bytes={area_bytes} "
                "give the pool more header_bytes"
            )
        with self._fence:
            self._memory[INDEX_OFFSET_BYTES : INDEX_OFFSET_BYTES + len(encoded)] = encoded
            self._words[5] = len(encoded)
            seal = _seal(self.generation, self._header_bytes, data_bytes, encoded)
            self._words[6], self._words[7] = struct.unpack("=2Q", seal)
        with (
            self._fence
        ):  # as above: no store of the block before may become visible after this one
            self._words[_STATE] = self._words[_STATE] | 1

    def hand_in(self, tags: tuple[str, ...]) -> bool:
        """Mark what is sealed as handed in, with the tags that it is to get. False if the header
        has no room for that: then only the keeper that it is handed to knows of it.
        """
        if not self.valid:
            raise InternalError("a slot that is not sealed can't be handed in.")
        encoded = msgspec.msgpack.encode(tags)
        start = _mark_offset(self._words[5])
        body = start + _MARK_BYTES
        if body + len(encoded) > self._header_bytes:
            return False
        with self._fence:
            self._memory[body : body + len(encoded)] = encoded
            self._memory[start + 8 : body] = _mark_digest(self.generation, encoded)
            self._memory[start : start + 8] = struct.pack("=Q", len(encoded))
        return True


def encode_index(index: StagedIndex) -> bytes:
    """The index as a header holds it. Raises UsageError for metadata that msgpack can't hold."""
    try:
        return msgspec.msgpack.encode(index)
    except (OverflowError, UnicodeError, TypeError) as error:
        raise UsageError(
            f"the index cannot be written. snapshot={index.snapshot} why={error}"
        ) from error


def read_slot(memory: memoryview) -> tuple[StagedIndex, int] | None:
    """The index and generation of a sealed slot, from its bytes alone; ``memory`` is header and
    data.

    None for a slot that is not sealed (never was, is being written, or its writer died meanwhile)
    or was overwritten while it was read. Raises IntegrityError if it claims to be sealed and
    contradicts itself. No size in it is trusted; memory is taken for the header only. Data is not
    read: compare ``generation_of`` after copying, and each chunk's digest. Costs about ten
    microseconds a shard; ``read_summary`` costs far less.
    """
    sealed = _encoded(memory)
    if sealed is None:
        return None
    encoded, generation, data_bytes = sealed
    index = _decode(encoded, StagedIndex)
    problem = index_problem(index, data_bytes=data_bytes)
    if problem is not None:
        raise IntegrityError(f"a sealed slot contradicts itself. {problem} generation={generation}")
    return index, generation


def handed_in(memory: memoryview) -> tuple[str, ...] | None:
    """The tags of a sealed snapshot that was handed in; None if it was not, or nothing is
    sealed.
    """
    generation, header_bytes = generation_of(memory), header_bytes_of(memory)
    if generation is None or header_bytes is None:
        return None
    start = _mark_offset(memory[: _WORDS * 8].cast("Q")[5])
    body = start + _MARK_BYTES
    if body > header_bytes:
        return None
    (length,) = struct.unpack("=Q", memory[start : start + 8])
    if not 0 < length <= header_bytes - body:
        return None
    encoded = bytes(memory[body : body + length])
    if memory[start + 8 : body] != _mark_digest(generation, encoded):
        return None
    return _decode(encoded, tuple[str, ...])


class SlotSummary(msgspec.Struct, frozen=True):
    """Which rank's state of which snapshot a sealed slot holds."""

    snapshot: SnapshotId
    rank: int
    world_size: int
    origin: str = ""


def read_summary(memory: memoryview) -> tuple[SlotSummary, int] | None:
    """As ``read_slot``, but only what the slot holds: the index is compared with its digest and not
    checked further.
    """
    sealed = _encoded(memory)
    return None if sealed is None else (_decode(sealed[0], SlotSummary), sealed[1])


def _encoded(memory: memoryview) -> tuple[bytes, int, int] | None:
    """A sealed slot's encoded index, its generation and its data area's length; the digest is
    right.
    """
    generation = generation_of(memory)
    if generation is None:
        return None
    words = memory[: _WORDS * 8].cast("Q").tolist()
    header_bytes, data_bytes, index_bytes = words[3], words[4], words[5]
    problem = _header_problem(words, len(memory))
    encoded = (
        b"" if problem else bytes(memory[INDEX_OFFSET_BYTES : INDEX_OFFSET_BYTES + index_bytes])
    )
    if generation_of(memory) != generation:  # begun again in between: the bytes may be torn
        return None
    if problem is None and _seal(generation, header_bytes, data_bytes, encoded) != struct.pack(
        "=2Q", words[6], words[7]
    ):
        problem = "the index differs from its digest."
    if problem is not None:
        raise IntegrityError(f"a sealed slot contradicts itself. {problem} generation={generation}")
    return encoded, generation, data_bytes


def generation_of(memory: memoryview) -> int | None:
    """The generation of a sealed slot, or None if it is not sealed. Equal before and after a copy:
    the copy is whole.
    """
    if len(memory) < PAGE_BYTES:
        return None
    words = memory[: _WORDS * 8].cast("Q")
    state: int = words[_STATE]
    return state >> 1 if state & 1 and words[0] == MAGIC else None


def header_bytes_of(memory: memoryview) -> int | None:
    """The header area of a slot that was begun at least once, or None: it never was, or its words
    are not valid.
    """
    if len(memory) < PAGE_BYTES:
        return None
    words = memory[: _WORDS * 8].cast("Q")
    header_bytes: int = words[3]
    whole = PAGE_BYTES <= header_bytes < len(memory) and header_bytes % PAGE_BYTES == 0
    return header_bytes if words[0] == MAGIC and words[1] == FORMAT_VERSION and whole else None


def _header_problem(words: list[int], size_bytes: int) -> str | None:
    if words[1] != FORMAT_VERSION:
        return f"unknown format version. found={words[1]} known={FORMAT_VERSION}"
    header_bytes, data_bytes, index_bytes = words[3], words[4], words[5]
    if (
        header_bytes % PAGE_BYTES
        or header_bytes < PAGE_BYTES
        or header_bytes + data_bytes != size_bytes
    ):
        return (
            f"lengths differ from the slot. header_bytes={header_bytes} data_bytes={data_bytes} "
            f"size={size_bytes}"
        )
    if index_bytes > min(INDEX_BYTES_MAX, header_bytes - INDEX_OFFSET_BYTES):
        return f"index longer than its area. index_bytes={index_bytes}"
    return None


def _mark_offset(index_bytes: int) -> int:
    return INDEX_OFFSET_BYTES + (index_bytes + 7) // 8 * 8


def _mark_digest(generation: int, encoded: bytes) -> bytes:
    return digest(struct.pack("<Q", generation) + b"handed in" + encoded)


def _decode(encoded: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(encoded, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise IntegrityError(f"a sealed slot contradicts itself. not an index: {error}") from error


def _seal(generation: int, header_bytes: int, data_bytes: int, encoded: bytes) -> bytes:
    return digest(struct.pack("<4Q", generation, header_bytes, data_bytes, len(encoded)) + encoded)


prepare_decoders(StagedIndex, SlotSummary, tuple[str, ...])
