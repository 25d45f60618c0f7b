"""Which copies are missing or damaged, and how each may be repaired. Pure.

Which copy may be overwritten: a pack has no digest of its own, so a reader's check proves one range
right and nothing about the rest. Two copies may be damaged in different places, and then each holds
the only right bytes of the other's damage. So an existing copy is replaced only if

* the reader's check covered the whole object, or
* the two copies agree in every byte outside the range in which one was wrong and the other right.

A missing copy may be made from any copy whose length no other copy contradicts: that loses nothing.
Every other case is left to a scrub, which knows the digest of each chunk.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ckpt.backends.replicated.policy import Quorum, ReplicationLimits, backoff_s
from ckpt.format.keys import SharedKey
from ckpt.values import Digest

# ---- Ledger: which objects are missing or damaged in which store. Bounded: a scrub finds the rest.


class CopyFault(enum.Enum):
    """What is wrong with a copy.

    MISSING: absent, or not known to be there. DAMAGED: wrong bytes, or too few.
    """

    MISSING = "missing"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class VerifiedRange:
    """Bytes that a reader's check found right: their range in the object, and their digest.

    ``whole``: the range is the whole object.
    """

    offset_bytes: int
    size_bytes: int
    digest: Digest
    whole: bool = False

    @property
    def end_bytes(self) -> int:
        """The offset behind the last byte."""
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True)
class RepairNeed:
    """One copy to be repaired. ``tries`` failed so far; the next is due at ``due_s``."""

    fault: CopyFault
    verified: VerifiedRange | None = None
    tries: int = 0
    due_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RepairLedger:
    """The needs of each store by key, in the order they were noted.

    ``scrub``: whether a store also lacks objects that only a scrub can find.
    """

    needs: tuple[Mapping[str, RepairNeed], ...]
    scrub: tuple[bool, ...]


def empty_ledger(stores: int) -> RepairLedger:
    """A ledger without needs."""
    return RepairLedger(tuple({} for _ in range(stores)), (False,) * stores)


def with_need(
    ledger: RepairLedger, index: int, key: SharedKey, need: RepairNeed, *, keys_max: int
) -> RepairLedger:
    """The ledger with ``need`` of ``key`` in store ``index``. The only way into a ledger.

    A need with a verified range is not replaced by one without: the range is what allows a repair.
    """
    needs = ledger.needs[index]
    before = needs.get(key)
    if before is not None and before.verified is not None and need.verified is None:
        return ledger
    # Bounded: what does not fit is not noted, and the flag says that only a scrub can find it.
    if before is None and len(needs) >= keys_max:
        return _with_scrub(ledger, index)
    return _with_needs(ledger, index, {**needs, key: need})


def without_need(ledger: RepairLedger, index: int, key: str) -> RepairLedger:
    """The ledger without the need of ``key`` in store ``index``: repaired, or obsolete."""
    if key not in ledger.needs[index]:
        return ledger
    return _with_needs(
        ledger, index, {other: need for other, need in ledger.needs[index].items() if other != key}
    )


def without_key(ledger: RepairLedger, key: str) -> RepairLedger:
    """The ledger without ``key`` in any store: the object was deleted."""
    for index in range(len(ledger.needs)):
        ledger = without_need(ledger, index, key)
    return ledger


def postponed(
    ledger: RepairLedger,
    index: int,
    key: str,
    now_s: float,
    *,
    limits: ReplicationLimits,
    jitter: float,
) -> RepairLedger:
    """The ledger after a repair that was not possible now.

    ``jitter`` is a random number in [0, 1).
    """
    need = ledger.needs[index].get(key)
    if need is None:
        return ledger
    tries = need.tries + 1
    due_s = now_s + backoff_s(limits.probe_s_first, limits.probe_s_max, tries, jitter)
    return _with_needs(
        ledger, index, {**ledger.needs[index], key: replace(need, tries=tries, due_s=due_s)}
    )


def left_to_scrub(ledger: RepairLedger, index: int, key: str) -> RepairLedger:
    """The ledger after a need that only a scrub can meet, by reading every byte."""
    return _with_scrub(without_need(ledger, index, key), index)


def scrubbed(ledger: RepairLedger, index: int) -> RepairLedger:
    """The ledger after a scrub of store ``index``, which found what did not fit here."""
    return replace(
        ledger, scrub=tuple(flag and other != index for other, flag in enumerate(ledger.scrub))
    )


def all_due(ledger: RepairLedger) -> RepairLedger:
    """The ledger with every need due now."""
    return replace(
        ledger,
        needs=tuple(
            {key: replace(need, due_s=0.0) for key, need in needs.items()} for needs in ledger.needs
        ),
    )


def next_need(ledger: RepairLedger, index: int) -> tuple[str, RepairNeed] | None:
    """The need of store ``index`` that is due first, the oldest of equals."""
    needs = ledger.needs[index]
    return min(needs.items(), key=lambda entry: entry[1].due_s, default=None)


def _with_scrub(ledger: RepairLedger, index: int) -> RepairLedger:
    return replace(
        ledger, scrub=tuple(flag or other == index for other, flag in enumerate(ledger.scrub))
    )


def _with_needs(ledger: RepairLedger, index: int, needs: Mapping[str, RepairNeed]) -> RepairLedger:
    return replace(ledger, needs=(*ledger.needs[:index], needs, *ledger.needs[index + 1 :]))


@dataclass(frozen=True, slots=True)
class RepairCopy:
    """Copy the object from one of ``sources``, if its bytes match the need's verified range.

    ``compare``: only if the source agrees with the target outside that range (see
    ``equal_outside``). ``all_answered``: no other copy could have the verified bytes (see
    ``no_verified_source``).
    """

    sources: tuple[int, ...]
    size_bytes: int
    compare: bool
    all_answered: bool = True


@dataclass(frozen=True, slots=True)
class CopyIntact:
    """Nothing to repair."""


@dataclass(frozen=True, slots=True)
class RepairLater:
    """Not now: a store that does not answer may be needed."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaveToScrub:
    """It is unknown which copy is right."""

    reason: str


RepairPlan = RepairCopy | CopyIntact | RepairLater | LeaveToScrub


def plan_repair(
    need: RepairNeed, target: int, sizes: Mapping[int, int | None], quorum: Quorum
) -> RepairPlan:
    """What to do about ``need`` in store ``target``.

    ``sizes``: the copy's length in each store that answered, None if it has no copy.
    """
    # The target itself must answer: whether its copy exists decides what may be written.
    if target not in sizes:
        return RepairLater("the store does not answer")
    all_answered = len(sizes) == quorum.stores
    others = {index: size for index, size in sizes.items() if index != target and size is not None}
    # No other store has the object. It may have been deleted, or be on a store that does not
    # answer.
    if not others:
        nowhere = {index for index, size in sizes.items() if size is None}
        if quorum.proves_absent(nowhere) or all_answered:
            return CopyIntact()
        return RepairLater("no other store that answers has the object")
    # The whole object is verified: any copy of that length is compared with its digest.
    if need.verified is not None and need.verified.whole:
        return _plan_verified(
            need, sizes[target], others, need.verified.size_bytes, all_answered=all_answered
        )
    # From here on no copy is known to be right as a whole.
    if len(set(others.values())) > 1:
        return LeaveToScrub("the other copies differ in length")
    size = next(iter(others.values()))
    # The other copies are too short to hold the range that was found right.
    if need.verified is not None and size < need.verified.end_bytes:
        return no_verified_source(all_answered=all_answered)
    return _plan_unverified(need, sizes[target], tuple(others), size, all_answered=all_answered)


def no_verified_source(*, all_answered: bool) -> RepairLater | LeaveToScrub:
    """What to do if no answering copy has the verified bytes: it may have been damaged since."""
    reason = "no other copy has the bytes that were found right"
    return LeaveToScrub(reason) if all_answered else RepairLater(reason)


def _plan_verified(
    need: RepairNeed,
    target_size: int | None,
    others: Mapping[int, int],
    size: int,
    *,
    all_answered: bool,
) -> RepairPlan:
    """The plan if the whole object is verified."""
    if target_size == size and need.fault is CopyFault.MISSING:
        return CopyIntact()
    sources = tuple(index for index, other in others.items() if other == size)
    return (
        RepairCopy(sources, size, False, all_answered)
        if sources
        else no_verified_source(all_answered=all_answered)
    )


def _plan_unverified(
    need: RepairNeed,
    target_size: int | None,
    sources: tuple[int, ...],
    size: int,
    *,
    all_answered: bool,
) -> RepairPlan:
    """The plan if at most a range is verified. ``size`` is the length of all other copies."""
    # Nothing is overwritten, so nothing can be lost.
    if target_size is None:
        return RepairCopy(sources, size, False, all_answered)
    if need.fault is CopyFault.MISSING or need.verified is None:
        if target_size == size:
            return CopyIntact()
        if need.fault is CopyFault.MISSING:
            return LeaveToScrub("the copy that appeared differs in length from the others")
    # Its bytes behind the others' end are in no other copy.
    if target_size > size:
        return LeaveToScrub("the copy is longer than the others")
    return RepairCopy(sources, size, True, all_answered)


def equal_outside(
    damaged: memoryview, source: memoryview, offset_bytes: int, need: RepairNeed
) -> bool:
    """Whether two copies are equal outside the verified range of ``need``.

    Both are given from ``offset_bytes`` on. Bytes that ``damaged`` lacks at its end count as equal:
    it is too short, so it holds nothing there that could be lost. O(bytes), no copies.
    """
    length = min(len(damaged), len(source))
    low, high = (
        (0, 0) if need.verified is None else (need.verified.offset_bytes, need.verified.end_bytes)
    )
    cut = sorted(min(max(edge - offset_bytes, 0), length) for edge in (low, high))
    return _equal(damaged[: cut[0]], source[: cut[0]]) and _equal(
        damaged[cut[1] : length], source[cut[1] : length]
    )


def _equal(first: memoryview, second: memoryview) -> bool:
    return (
        np.array_equal(np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8))
        if len(first)
        else True
    )
