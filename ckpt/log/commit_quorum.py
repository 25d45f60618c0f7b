"""Which record has a place in the log, given what each store was seen to hold there. Pure.

Only bytes that lie on W of the R stores count. A reader that hears from fewer than R can't always know whether they do; so it
takes what may: a record that is not on W of them after all has been claimed by nobody, and harms nobody who only reads. A
writer first brings what it builds on to W stores. Nobody writes a record before its predecessor counts; so one that stands
anywhere says which of several records before it does.

Where writers who have no sequencer in common met at one place, their records may have split the stores so that none can ever
be on W. Places are created only once, so the split stands, and everybody finds the same winner in it; it is written again at
the place's second key, the settled one, by whoever comes by. The same is done for a record that has its place but not all
stores, before its writer is told: W votes of which W - 1 are lost could not be told from another's single one. So at most one
record is ever written at a second key, and it is the place's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seen:
    """What one store holds at one place: ``record`` and ``settled`` are digests of valid records there, empty for none.

    ``answered``: the store could be asked. ``damaged``: it holds something at one of the two keys that is no record, so that
    the record may have been there.
    """

    record: str = ""
    settled: str = ""
    answered: bool = True
    damaged: bool = False

    @property
    def sure(self) -> bool:
        """Whether nothing else can have been acknowledged by this store."""
        return self.answered and not self.damaged


@dataclass(frozen=True, slots=True)
class Taken:
    """The place has this record. ``copies`` stores were seen to hold it; ``settled``: at its second key."""

    digest: str
    copies: int
    settled: bool


@dataclass(frozen=True, slots=True)
class Vacant:
    """Nothing there counts, as far as it can be seen."""


@dataclass(frozen=True, slots=True)
class Unclear:
    """Several records may count, or one that was not seen; the stores that did not answer know which.

    ``digests`` of those that were seen and may.
    """

    digests: tuple[str, ...]


Decided = Taken | Vacant | Unclear


def decide(seen: Sequence[Seen], quorum: int, followed: Collection[str] = ()) -> Decided:
    """What the place holds. ``seen``: one for each store of the set.

    ``followed``: the digests that records at the next place name as their predecessor, wherever they were seen.
    """
    for digest in sorted(followed):
        copies = [sum(digest == getattr(one, name) for one in seen) for name in ("settled", "record")]
        if any(copies):
            return Taken(digest, max(copies), settled=copies[0] > 0)
    if followed:
        return Vacant()  # what counts there is on none of these
    settled = _possible([one.settled for one in seen], seen, quorum)
    if settled:
        return _one(settled, settled_key=True)
    records = _possible([one.record for one in seen], seen, quorum)
    if written := {one.settled for one in seen if one.settled}:
        # Its writer knew that nothing else can have the place, and is not done.
        records = {digest: count for digest, count in records.items() if digest in written}
    elif (
        max(records.values(), default=0) < quorum <= sum(not one.sure for one in seen)
        and any(one.damaged for one in seen)
    ):  # fmt: skip
        return Unclear(tuple(sorted(records)))  # what counts may have been where there is only damage now
    return _one(records, settled_key=False)


@dataclass(frozen=True, slots=True)
class Won:
    """Our record is on W stores. ``sure``: on all that have a vote, so that another one can never be taken for it."""

    sure: bool


@dataclass(frozen=True, slots=True)
class Beaten:
    """Another record is on W stores."""

    digest: str


@dataclass(frozen=True, slots=True)
class Split:
    """No record can ever be on W stores: ``digest`` is to be settled."""

    digest: str


@dataclass(frozen=True, slots=True)
class Open:
    """The stores that did not answer decide."""


def contest(mine: str, held: Sequence[str | None], quorum: int) -> Won | Beaten | Split | Open:
    """How a claim stands after ``mine`` was created at every store that creates only once.

    ``held`` says for each store that has a vote the digest that it holds; None where that is not known.
    """
    counts = Counter(digest for digest in held if digest is not None)
    if counts[mine] >= quorum:
        return Won(counts[mine] == len(held))
    best = winner(counts)
    if best is not None and counts[best] >= quorum:
        return Beaten(best)
    silent = sum(digest is None for digest in held)
    if best is None or counts[best] + silent >= quorum:
        return Open()
    # All that can be known of a split must be known, or two writers would find different winners.
    return Split(best) if silent == 0 else Open()


def winner(counts: Mapping[str, int]) -> str | None:
    """Of the records that split the stores, the one that is settled: the most frequent, of equals the smallest digest."""
    return min(counts, key=lambda digest: (-counts[digest], digest), default=None)


def _possible(digests: Sequence[str], seen: Sequence[Seen], quorum: int) -> dict[str, int]:
    counts = Counter(digest for digest in digests if digest)
    unknown = [digest == "" and not one.sure for digest, one in zip(digests, seen, strict=True)]
    return {digest: count for digest, count in counts.items() if count + sum(unknown) >= quorum}


def _one(possible: Mapping[str, int], *, settled_key: bool) -> Decided:
    if not possible:
        return Vacant()
    if len(possible) > 1:
        return Unclear(tuple(sorted(possible)))
    ((digest, copies),) = possible.items()
    return Taken(digest, copies, settled_key)


_STAND_IN = b"no store yet".hex()


def stand_in(number: int) -> str:
    """The id in a set of stores for one that did not answer when the log was made: nothing that counts is ever on it.

    It gets a real one when it is added.
    """
    return f"{_STAND_IN}{number:08x}"


def is_stand_in(store_id: str) -> bool:
    """Whether ``store_id`` only stands for a store that was not there."""
    return store_id.startswith(_STAND_IN)
