"""Which copy may be written over, and from which. Pure.

A pack has no digest of its own: a reader knows that one range is right and nothing of the rest. Two
copies may be damaged in different places, and then each holds the only right bytes of the other's.
So a copy that is there is replaced only where

* the reader's check covered the whole object, or
* the two copies agree in every byte outside the range in which one was found wrong and the other right,

and a copy that is not there may be made from any whose length no other one contradicts: nothing is
lost by that. The rest is a scrub's work, which knows the digest of each chunk.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ckpt.backends.replicated.policy import Quorum, ReplicationLimits, backoff_s
from ckpt.values import Digest

# Which objects are known to be missing or damaged in which store. Pure; bounded: what does not
# fit is left to a scrub.


class CopyFault(enum.Enum):
    """What is wrong with a copy. MISSING: not there, or not known to be. DAMAGED: it had wrong
    bytes, or too few."""

    MISSING = "missing"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class VerifiedRange:
    """Bytes that a reader's own check found right: where they lie in the object, and their digest.

    ``whole``: they are all of it.
    """

    offset_bytes: int
    size_bytes: int
    digest: Digest
    whole: bool = False

    @property
    def end_bytes(self) -> int:
        """The offset behind the last of them."""
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True)
class RepairNeed:
    """One copy to be mended, tried ``tries`` times and not before ``due_s`` again."""

    fault: CopyFault
    verified: VerifiedRange | None = None
    tries: int = 0
    due_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RepairLedger:
    """By place: the needs by key in the order they were noted, and whether only a scrub can find
    the rest."""

    needs: tuple[Mapping[str, RepairNeed], ...]
    scrub: tuple[bool, ...]


def empty_ledger(stores: int) -> RepairLedger:
    """Nothing is known to be missing anywhere."""
    return RepairLedger(tuple({} for _ in range(stores)), (False,) * stores)


def with_need(
    ledger: RepairLedger, place: int, key: str, need: RepairNeed, *, keys_max: int
) -> RepairLedger:
    """With ``need`` of ``key`` at ``place``. A need with a proof is not replaced by one without."""
    needs = ledger.needs[place]
    before = needs.get(key)
    if before is not None and before.verified is not None and need.verified is None:
        return ledger
    if before is None and len(needs) >= keys_max:
        return _scrub(ledger, place)
    return _with(ledger, place, {**needs, key: need})


def without_need(ledger: RepairLedger, place: int, key: str) -> RepairLedger:
    """Without the need of ``key`` at ``place``: it is mended, or nothing that must be."""
    if key not in ledger.needs[place]:
        return ledger
    return _with(
        ledger, place, {other: need for other, need in ledger.needs[place].items() if other != key}
    )


def without_key(ledger: RepairLedger, key: str) -> RepairLedger:
    """Without ``key`` anywhere: it was deleted."""
    for place in range(len(ledger.needs)):
        ledger = without_need(ledger, place, key)
    return ledger


def postponed(
    ledger: RepairLedger,
    place: int,
    key: str,
    now_s: float,
    *,
    limits: ReplicationLimits,
    jitter: float,
) -> RepairLedger:
    """The need could not be met now. ``jitter`` is a random number in [0, 1)."""
    need = ledger.needs[place].get(key)
    if need is None:
        return ledger
    tries = need.tries + 1
    due_s = now_s + backoff_s(limits.probe_s_first, limits.probe_s_max, tries, jitter)
    return _with(
        ledger, place, {**ledger.needs[place], key: replace(need, tries=tries, due_s=due_s)}
    )


def left_to_scrub(ledger: RepairLedger, place: int, key: str) -> RepairLedger:
    """The need cannot be met without looking at every byte: that is a scrub's work."""
    return _scrub(without_need(ledger, place, key), place)


def scrubbed(ledger: RepairLedger, place: int) -> RepairLedger:
    """A scrub has been through the store at ``place``: what did not fit here is found."""
    return replace(
        ledger, scrub=tuple(flag and at != place for at, flag in enumerate(ledger.scrub))
    )


def all_due(ledger: RepairLedger) -> RepairLedger:
    """With every need due now."""
    return replace(
        ledger,
        needs=tuple(
            {key: replace(need, due_s=0.0) for key, need in needs.items()} for needs in ledger.needs
        ),
    )


def next_need(ledger: RepairLedger, place: int) -> tuple[str, RepairNeed] | None:
    """The need at ``place`` that is due first, the oldest of equals."""
    needs = ledger.needs[place]
    return min(needs.items(), key=lambda entry: entry[1].due_s, default=None)


def _scrub(ledger: RepairLedger, place: int) -> RepairLedger:
    return replace(ledger, scrub=tuple(flag or at == place for at, flag in enumerate(ledger.scrub)))


def _with(ledger: RepairLedger, place: int, needs: Mapping[str, RepairNeed]) -> RepairLedger:
    return replace(ledger, needs=(*ledger.needs[:place], needs, *ledger.needs[place + 1 :]))


@dataclass(frozen=True, slots=True)
class RepairCopy:
    """Copy from one of ``sources``, after its bytes match the need's proof.

    ``compare``: only where it agrees with the target outside the proven range (see
    ``equal_outside``). ``all_known``: there is no other copy that could have the proven bytes (see
    ``unproven``).
    """

    sources: tuple[int, ...]
    size_bytes: int
    compare: bool
    all_answered: bool = True


@dataclass(frozen=True, slots=True)
class CopyIntact:
    """There is nothing to mend."""


@dataclass(frozen=True, slots=True)
class RepairLater:
    """Not now: a store that does not answer may be needed."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaveToScrub:
    """It cannot be known which copy is right."""

    reason: str


RepairPlan = RepairCopy | CopyIntact | RepairLater | LeaveToScrub


def plan_repair(
    need: RepairNeed, target: int, sizes: Mapping[int, int | None], quorum: Quorum
) -> RepairPlan:
    """What to do about ``need`` at ``target``.

    ``sizes``: the copy's length in each store that answered, None where there is none.
    """
    if target not in sizes:
        return RepairLater("the store does not answer")
    all_known = len(sizes) == quorum.stores
    others = {place: size for place, size in sizes.items() if place != target and size is not None}
    if not others:
        nowhere = {place for place, size in sizes.items() if size is None}
        if quorum.proves_absent(nowhere) or all_known:
            return CopyIntact()
        return RepairLater("no other store that answers has the object")
    if need.verified is not None and need.verified.whole:
        return _from_proven(
            need, sizes[target], others, need.verified.size_bytes, all_known=all_known
        )
    if len(set(others.values())) > 1:
        return LeaveToScrub("the other copies differ in length")
    size = next(iter(others.values()))
    if need.verified is not None and size < need.verified.end_bytes:
        return no_verified_source(all_answered=all_known)
    return _from_unknown(need, sizes[target], tuple(others), size, all_known=all_known)


def no_verified_source(*, all_answered: bool) -> RepairLater | LeaveToScrub:
    """What to do where no copy that answers has the bytes that a reader found right: it may have
    rotted since."""
    why = "no other copy has the bytes that were found right"
    return LeaveToScrub(why) if all_answered else RepairLater(why)


def _from_proven(
    need: RepairNeed, mine: int | None, others: Mapping[int, int], size: int, *, all_known: bool
) -> RepairPlan:
    """Where every byte is known by its digest."""
    if mine == size and need.fault is CopyFault.MISSING:
        return CopyIntact()
    sources = tuple(place for place, other in others.items() if other == size)
    return (
        RepairCopy(sources, size, False, all_known)
        if sources
        else no_verified_source(all_answered=all_known)
    )


def _from_unknown(
    need: RepairNeed, mine: int | None, sources: tuple[int, ...], size: int, *, all_known: bool
) -> RepairPlan:
    if mine is None:
        return RepairCopy(sources, size, False, all_known)
    if need.fault is CopyFault.MISSING or need.verified is None:
        if mine == size:
            return CopyIntact()
        if need.fault is CopyFault.MISSING:
            return LeaveToScrub("the copy that appeared differs in length from the others")
    if mine > size:
        return LeaveToScrub("the copy is longer than the others")
    return RepairCopy(sources, size, True, all_known)


def equal_outside(mine: memoryview, other: memoryview, offset_bytes: int, need: RepairNeed) -> bool:
    """Whether two copies' bytes from ``offset_bytes`` on are the same, but for the proven range of
    ``need``.

    What ``mine`` lacks at its end counts as the same. O(bytes), no copies.
    """
    length = min(len(mine), len(other))
    low, high = (
        (0, 0) if need.verified is None else (need.verified.offset_bytes, need.verified.end_bytes)
    )
    cut = sorted(min(max(edge - offset_bytes, 0), length) for edge in (low, high))
    return _same(mine[: cut[0]], other[: cut[0]]) and _same(
        mine[cut[1] : length], other[cut[1] : length]
    )


def _same(one: memoryview, two: memoryview) -> bool:
    return (
        np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8))
        if len(one)
        else True
    )
