"""Which copy may be written over, and from which. Pure.

A pack has no digest of its own: a reader knows that one range is right and nothing of the rest. Two copies may be damaged in
different places, and then each holds the only right bytes of the other's. So a copy that is there is replaced only where

* the reader's check covered the whole object, or
* the two copies agree in every byte outside the range in which one was found wrong and the other right,

and a copy that is not there may be made from any whose length no other one contradicts: nothing is lost by that. The rest is
a scrub's work, which knows the digest of each chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ckpt.backends.replicated.quorum import Quorum
from ckpt.backends.replicated.replicate_ledger import Need, Why


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy from one of ``sources``, after its bytes match the need's proof.

    ``compare``: only where it agrees with the target outside the proven range (see ``agree_outside``). ``all_known``: there
    is no other copy that could have the proven bytes (see ``unproven``).
    """

    sources: tuple[int, ...]
    size_bytes: int
    compare: bool
    all_known: bool = True


@dataclass(frozen=True, slots=True)
class Well:
    """There is nothing to mend."""


@dataclass(frozen=True, slots=True)
class Later:
    """Not now: a store that does not answer may be needed."""

    why: str


@dataclass(frozen=True, slots=True)
class Leave:
    """It cannot be known which copy is right."""

    why: str


Plan = Copy | Well | Later | Leave


def plan_mend(need: Need, target: int, sizes: Mapping[int, int | None], quorum: Quorum) -> Plan:
    """What to do about ``need`` at ``target``.

    ``sizes``: the copy's length in each store that answered, None where there is none.
    """
    if target not in sizes:
        return Later("the store does not answer")
    all_known = len(sizes) == quorum.stores
    others = {place: size for place, size in sizes.items() if place != target and size is not None}
    if not others:
        nowhere = {place for place, size in sizes.items() if size is None}
        if quorum.absent(nowhere) or all_known:
            return Well()
        return Later("no other store that answers has the object")
    if need.proof is not None and need.proof.whole:
        return _from_proven(need, sizes[target], others, need.proof.size_bytes, all_known=all_known)
    if len(set(others.values())) > 1:
        return Leave("the other copies differ in length")
    size = next(iter(others.values()))
    if need.proof is not None and size < need.proof.end_bytes:
        return unproven(all_known=all_known)
    return _from_unknown(need, sizes[target], tuple(others), size, all_known=all_known)


def unproven(*, all_known: bool) -> Later | Leave:
    """What to do where no copy that answers has the bytes that a reader found right: it may have rotted since."""
    why = "no other copy has the bytes that were found right"
    return Leave(why) if all_known else Later(why)


def _from_proven(need: Need, mine: int | None, others: Mapping[int, int], size: int, *, all_known: bool) -> Plan:
    """Where every byte is known by its digest."""
    if mine == size and need.why is Why.MISSING:
        return Well()
    sources = tuple(place for place, other in others.items() if other == size)
    return Copy(sources, size, False, all_known) if sources else unproven(all_known=all_known)


def _from_unknown(need: Need, mine: int | None, sources: tuple[int, ...], size: int, *, all_known: bool) -> Plan:
    if mine is None:
        return Copy(sources, size, False, all_known)
    if need.why is Why.MISSING or need.proof is None:
        if mine == size:
            return Well()
        if need.why is Why.MISSING:
            return Leave("the copy that appeared differs in length from the others")
    if mine > size:
        return Leave("the copy is longer than the others")
    return Copy(sources, size, True, all_known)


def agree_outside(mine: memoryview, other: memoryview, offset_bytes: int, need: Need) -> bool:
    """Whether two copies' bytes from ``offset_bytes`` on are the same, but for the proven range of ``need``.

    What ``mine`` lacks at its end counts as the same. O(bytes), no copies.
    """
    length = min(len(mine), len(other))
    low, high = (0, 0) if need.proof is None else (need.proof.offset_bytes, need.proof.end_bytes)
    cut = sorted(min(max(edge - offset_bytes, 0), length) for edge in (low, high))
    return _same(mine[: cut[0]], other[: cut[0]]) and _same(mine[cut[1] : length], other[cut[1] : length])


def _same(one: memoryview, two: memoryview) -> bool:
    return np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)) if len(one) else True
