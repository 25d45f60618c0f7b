"""Which objects are known to be missing or damaged in which store. Pure; bounded: what does not fit is left to a scrub."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckpt.backends.replicated.pace import Pace, backoff_s
from ckpt.values import Digest


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
