"""Which copy may be written over, and from which. Pure.

A pack has no digest of its own: a reader knows that one range is right and nothing of the rest. Two copies may be damaged in
different places, and then each holds the only right bytes of the other's. So a copy that is there is replaced only where

* the reader's check covered the whole object, or
* the two copies agree in every byte outside the range in which one was found wrong and the other right,

and a copy that is not there may be made from any whose length no other one contradicts: nothing is lost by that. The rest is
a scrub's work, which knows the digest of each chunk.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ckpt.backends.replicated.policy import Pace, Quorum, backoff_s
from ckpt.values import Digest

# Which objects are known to be missing or damaged in which store. Pure; bounded: what does not
# fit is left to a scrub.


class Why(enum.Enum):
    """What is wrong with a copy. MISSING: not there, or not known to be. DAMAGED: it had wrong bytes, or too few."""

    MISSING = "missing"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Proof:
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
class Need:
    """One copy to be mended, tried ``tries`` times and not before ``due_s`` again."""

    why: Why
    proof: Proof | None = None
    tries: int = 0
    due_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ledger:
    """By place: the needs by key in the order they were noted, and whether only a scrub can find the rest."""

    needs: tuple[Mapping[str, Need], ...]
    scrub: tuple[bool, ...]


def empty(stores: int) -> Ledger:
    """Nothing is known to be missing anywhere."""
    return Ledger(tuple({} for _ in range(stores)), (False,) * stores)


def noted(ledger: Ledger, place: int, key: str, need: Need, *, keys_max: int) -> Ledger:
    """With ``need`` of ``key`` at ``place``. A need with a proof is not replaced by one without."""
    needs = ledger.needs[place]
    before = needs.get(key)
    if before is not None and before.proof is not None and need.proof is None:
        return ledger
    if before is None and len(needs) >= keys_max:
        return _scrub(ledger, place)
    return _with(ledger, place, {**needs, key: need})


def settled(ledger: Ledger, place: int, key: str) -> Ledger:
    """Without the need of ``key`` at ``place``: it is mended, or nothing that must be."""
    if key not in ledger.needs[place]:
        return ledger
    return _with(ledger, place, {other: need for other, need in ledger.needs[place].items() if other != key})


def dropped(ledger: Ledger, key: str) -> Ledger:
    """Without ``key`` anywhere: it was deleted."""
    for place in range(len(ledger.needs)):
        ledger = settled(ledger, place, key)
    return ledger


def put_off(ledger: Ledger, place: int, key: str, now_s: float, *, pace: Pace, jitter: float) -> Ledger:
    """The need could not be met now. ``jitter`` is a random number in [0, 1)."""
    need = ledger.needs[place].get(key)
    if need is None:
        return ledger
    tries = need.tries + 1
    due_s = now_s + backoff_s(pace.probe_s_first, pace.probe_s_max, tries, jitter)
    return _with(ledger, place, {**ledger.needs[place], key: replace(need, tries=tries, due_s=due_s)})


def left(ledger: Ledger, place: int, key: str) -> Ledger:
    """The need cannot be met without looking at every byte: that is a scrub's work."""
    return _scrub(settled(ledger, place, key), place)


def scrubbed(ledger: Ledger, place: int) -> Ledger:
    """A scrub has been through the store at ``place``: what did not fit here is found."""
    return replace(ledger, scrub=tuple(flag and at != place for at, flag in enumerate(ledger.scrub)))


def hastened(ledger: Ledger) -> Ledger:
    """With every need due now."""
    return replace(
        ledger, needs=tuple({key: replace(need, due_s=0.0) for key, need in needs.items()} for needs in ledger.needs)
    )


def next_need(ledger: Ledger, place: int) -> tuple[str, Need] | None:
    """The need at ``place`` that is due first, the oldest of equals."""
    needs = ledger.needs[place]
    return min(needs.items(), key=lambda entry: entry[1].due_s, default=None)


def _scrub(ledger: Ledger, place: int) -> Ledger:
    return replace(ledger, scrub=tuple(flag or at == place for at, flag in enumerate(ledger.scrub)))


def _with(ledger: Ledger, place: int, needs: Mapping[str, Need]) -> Ledger:
    return replace(ledger, needs=(*ledger.needs[:place], needs, *ledger.needs[place + 1 :]))


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
