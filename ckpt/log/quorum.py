"""The log as several stores together hold it: their copies in, records that count out, one place
after the other. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt.format.records import BY_STORES, Record, Stores
from ckpt.format.store import SEQUENCER_STORE
from ckpt.log.fold import Unreadable, fold
from ckpt.log.state import LogState, StoreSet

# Which record has a place in the log, given what each store was seen to hold there. Pure.
#
# Only bytes that lie on W of the R stores count. A reader that hears from fewer than R can't
# always know whether they do; so it takes what may: a record that is not on W of them after all
# has been claimed by nobody, and harms nobody who only reads. A writer first brings what it
# builds on to W stores. Nobody writes a record before its predecessor counts; so one that stands
# anywhere says which of several records before it does.
#
# Where writers who have no sequencer in common met at one place, their records may have split the
# stores so that none can ever be on W. Places are created only once, so the split stands, and
# everybody finds the same winner in it; it is written again at the place's second key, the
# settled one, by whoever comes by. The same is done for a record that has its place but not all
# stores, before its writer is told: W votes of which W - 1 are lost could not be told from
# another's single one. So at most one record is ever written at a second key, and it is the
# place's.


@dataclass(frozen=True, slots=True)
class PositionReading:
    """What one store holds at one place: ``record`` and ``settled`` are digests of valid records
    there, empty for none.

    ``answered``: the store could be asked. ``damaged``: it holds something at one of the two keys
    that is no record, so that the record may have been there.
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
    """The place has this record. ``copies`` stores were seen to hold it; ``settled``: at its second
    key."""

    digest: str
    copies: int
    settled: bool


@dataclass(frozen=True, slots=True)
class Vacant:
    """Nothing there counts, as far as it can be seen."""


@dataclass(frozen=True, slots=True)
class Unclear:
    """Several records may count, or one that was not seen; the stores that did not answer know
    which.

    ``digests`` of those that were seen and may.
    """

    digests: tuple[str, ...]


Position = Taken | Vacant | Unclear


def decide(
    seen: Sequence[PositionReading], quorum: int, followed: Collection[str] = ()
) -> Position:
    """What the place holds. ``seen``: one for each store of the set.

    ``followed``: the digests that records at the next place name as their predecessor, wherever
    they were seen.
    """
    for digest in sorted(followed):
        copies = [
            sum(digest == getattr(one, name) for one in seen) for name in ("settled", "record")
        ]
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
    elif max(records.values(), default=0) < quorum <= sum(not one.sure for one in seen) and any(
        one.damaged for one in seen
    ):
        return Unclear(
            tuple(sorted(records))
        )  # what counts may have been where there is only damage now
    return _one(records, settled_key=False)


@dataclass(frozen=True, slots=True)
class Won:
    """Our record is on W stores. ``sure``: on all that have a vote, so that another one can never
    be taken for it."""

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
class Undecided:
    """The stores that did not answer decide."""


def contest(mine: str, held: Sequence[str | None], quorum: int) -> Won | Beaten | Split | Undecided:
    """How a claim stands after ``mine`` was created at every store that creates only once.

    ``held`` says for each store that has a vote the digest that it holds; None where that is not
    known.
    """
    counts = Counter(digest for digest in held if digest is not None)
    if counts[mine] >= quorum:
        return Won(counts[mine] == len(held))
    best = winner(counts)
    if best is not None and counts[best] >= quorum:
        return Beaten(best)
    silent = sum(digest is None for digest in held)
    if best is None or counts[best] + silent >= quorum:
        return Undecided()
    # All that can be known of a split must be known, or two writers would find different winners.
    return Split(best) if silent == 0 else Undecided()


def winner(counts: Mapping[str, int]) -> str | None:
    """Of the records that split the stores, the one that is settled: the most frequent, of equals
    the smallest digest."""
    return min(counts, key=lambda digest: (-counts[digest], digest), default=None)


def _possible(
    digests: Sequence[str], seen: Sequence[PositionReading], quorum: int
) -> dict[str, int]:
    counts = Counter(digest for digest in digests if digest)
    unknown = [digest == "" and not one.sure for digest, one in zip(digests, seen, strict=True)]
    return {digest: count for digest, count in counts.items() if count + sum(unknown) >= quorum}


def _one(possible: Mapping[str, int], *, settled_key: bool) -> Position:
    if not possible:
        return Vacant()
    if len(possible) > 1:
        return Unclear(tuple(sorted(possible)))
    ((digest, copies),) = possible.items()
    return Taken(digest, copies, settled_key)


_STAND_IN = b"no store yet".hex()


def placeholder_id(number: int) -> str:
    """The id in a set of stores for one that did not answer when the log was made: nothing that
    counts is ever on it.

    It gets a real one when it is added.
    """
    return f"{_STAND_IN}{number:08x}"


def is_placeholder(store_id: str) -> bool:
    """Whether ``store_id`` only stands for a store that was not there."""
    return store_id.startswith(_STAND_IN)


@dataclass(frozen=True, slots=True)
class StoreRecords:
    """What one store was seen to hold of the log from some place on: valid records, and places
    where others lie.

    ``store_id`` is what its ``ckpt.json`` says now, empty where it has none. ``newer``: the damaged
    places that look like a newer release's. ``elsewhere``: the id of another log, which it belongs
    to instead.
    """

    store_id: str
    records: Mapping[int, Record] = field(default_factory=dict)
    settled: Mapping[int, Record] = field(default_factory=dict)
    damaged: frozenset[int] = frozenset()
    newer: frozenset[int] = frozenset()
    elsewhere: str = ""

    def last(self) -> int:
        """The last place at which it holds anything; -1 for none."""
        return max((*self.records, *self.settled, *self.damaged), default=-1)

    def at(self, seq: int) -> PositionReading:
        """What it holds at one place."""
        record, settled = self.records.get(seq), self.settled.get(seq)
        return PositionReading(
            record.digest if record else "",
            settled.digest if settled else "",
            damaged=seq in self.damaged,
        )


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A store that did not answer, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class LastRecord:
    """The last record that was taken: on how many stores it was seen, and which set had to hold it.

    ``settled``: it stands at its place's second key; ``followed``: another one names it.
    """

    record: Record
    copies: int
    settled: bool
    members: StoreSet
    followed: bool = False

    @property
    def is_final(self) -> bool:
        """Whether it counts for good, so that its writer may be told, and whichever W - 1 stores
        are lost from now on."""
        if self.followed:
            return True
        if self.settled or self.members.sequencer != BY_STORES:
            return self.copies >= self.members.write_quorum
        # Another vote, seen or not, could be taken for this record's where W - 1 of its own are
        # lost.
        return self.copies >= sum(not is_placeholder(store_id) for store_id in self.members.ids)


@dataclass(frozen=True, slots=True)
class MergedLog:
    """The log after what was read. ``full``: which stores (by their number) count; ``tail``: None
    where nothing was new.

    ``thin``: places whose record is on fewer stores than it was written to; a scrub mends them.
    ``before``: the state before the last record, where that is not sure: it may turn out not to
    count.
    """

    state: LogState
    full: frozenset[int]
    tail: LastRecord | None
    underreplicated: tuple[int, ...]
    before: LogState | None = None


def merge_stores(
    state: LogState, held: Sequence[StoreRecords | NoAnswer], urls: Sequence[str]
) -> MergedLog:
    """``state`` and the records after it that count.

    ``held``: what each store holds from ``state.next_seq`` on; ``urls`` names them in reasons.
    Stops at the first place that is vacant; says in ``hole`` where something must have been there,
    and in ``short`` where too few stores answered to know.
    """
    batch: list[Record] = []
    end: list[Unreadable] = []
    before: LogState | None = None
    members, seq = state.stores, state.next_seq
    tail: LastRecord | None = None
    thin: list[int] = []
    while True:
        copies = dict(_copies(held, seq))
        if members is None and seq == 0:
            inside, decided = _first(held, copies)
        else:
            inside = members or _lone(held)
            decided = _decide(held, seq, inside)
        if isinstance(decided, Taken):
            record = copies[decided.digest]
            batch.append(record)
            follows = any(one.prev == record.digest for _, one in _copies(held, seq + 1))
            tail = LastRecord(record, decided.copies, decided.settled, inside, follows)
            if decided.copies < inside.write_quorum:
                thin.append(seq)
            if isinstance(record.body, Stores) or members is None:
                before = fold(state, batch[:-1])
                state, batch = fold(before, batch[-1:]), []
                members = state.stores
            seq += 1
            continue
        if isinstance(decided, Unclear):
            what = "different records" if decided.digests else "damage"
            reason = f"stores hold {what} there, and too few answered to know what counts. {_silent(held, urls)}"
            end.append(Unreadable(seq, reason))
        elif any(isinstance(one, StoreRecords) and one.last() > seq for one in held):
            end.append(
                Unreadable(seq, f"no store has a readable record there. {_silent(held, urls)}")
            )
        break
    if batch:
        before = fold(state, batch[:-1])
        state = fold(before, batch[-1:])
    state = fold(state, end)
    full, short = _full(state.stores, held, urls)
    doubted = before if tail is not None and not tail.is_final else None
    if (
        not short
        and doubted is not None
        and tail is not None
        and tail.copies < tail.members.write_quorum
    ):
        # It may change the set, and not count: then it is the set before that knows what is newest.
        _, short = _full(doubted.stores, held, urls)
    return MergedLog(replace(state, short=short), full, tail, tuple(thin), doubted)


def _first(
    held: Sequence[StoreRecords | NoAnswer], copies: Mapping[str, Record]
) -> tuple[StoreSet, Position]:
    """What the first place holds: a record counts there on the stores that it names itself."""
    lone = _lone(held)
    if not copies:
        return lone, _decide(held, 0, lone)
    taken: dict[str, tuple[StoreSet, Position]] = {}
    unclear = False
    for digest, record in copies.items():
        inside = _named_by(record) or lone
        decided = _decide(held, 0, inside)
        unclear = unclear or isinstance(decided, Unclear)
        if isinstance(decided, Taken) and decided.digest == digest:
            taken[digest] = inside, decided
    if unclear or len(taken) > 1:
        return lone, Unclear(tuple(sorted(copies)))
    return next(iter(taken.values()), (lone, Vacant()))


def _seen(
    held: Sequence[StoreRecords | NoAnswer], seq: int, members: StoreSet
) -> list[PositionReading]:
    by_id = {one.store_id: one for one in held if isinstance(one, StoreRecords)}
    return [
        by_id[name].at(seq) if name in by_id else PositionReading(answered=is_placeholder(name))
        for name in members.ids
    ]


def _decide(held: Sequence[StoreRecords | NoAnswer], seq: int, members: StoreSet) -> Position:
    followed = {record.prev for record in dict(_copies(held, seq + 1)).values()}
    decided = decide(_seen(held, seq, members), members.write_quorum, followed)
    if isinstance(decided, Taken) or not followed:
        return decided
    # Also a store that counts no longer, or not yet, may hold what a record that was seen follows.
    anywhere = decide(
        [one.at(seq) for one in held if isinstance(one, StoreRecords)],
        members.write_quorum,
        followed,
    )
    return anywhere if isinstance(anywhere, Taken) else decided


def _copies(held: Sequence[StoreRecords | NoAnswer], seq: int) -> Iterator[tuple[str, Record]]:
    for one in held:
        if isinstance(one, StoreRecords):
            for found in (one.records.get(seq), one.settled.get(seq)):
                if found is not None:
                    yield found.digest, found


def _named_by(record: Record) -> StoreSet | None:
    """The set that a log's first record names."""
    body = record.body
    return (
        StoreSet(body.ids, body.write_quorum, body.sequencer) if isinstance(body, Stores) else None
    )


def _lone(held: Sequence[StoreRecords | NoAnswer]) -> StoreSet:
    """Before a log knows of several stores it is in one, and what is there counts."""
    ids = tuple(one.store_id for one in held if isinstance(one, StoreRecords) and one.store_id)
    return StoreSet(ids, 1, SEQUENCER_STORE)


def _full(
    members: StoreSet | None, held: Sequence[StoreRecords | NoAnswer], urls: Sequence[str]
) -> tuple[frozenset[int], str]:
    if members is None:
        full = frozenset(
            number
            for number, one in enumerate(held)
            if isinstance(one, StoreRecords) and one.store_id
        )
        others = [
            url
            for url, one in zip(urls, held, strict=True)
            if isinstance(one, StoreRecords) and one.elsewhere
        ]
        if not others and not any(isinstance(one, NoAnswer) for one in held):
            return full, ""
        return full, (
            "where the log lies is not known, and other stores may hold it. "
            f"of_another_log={others} {_silent(held, urls)}"
        )
    full = frozenset(
        number
        for number, one in enumerate(held)
        if isinstance(one, StoreRecords) and one.store_id in members.ids
    )
    if len(full) >= members.answers_min:
        return full, ""
    return full, (
        f"too few of the log's stores answered to know what is newest. answered={len(full)} "
        f"stores={len(members.ids)} "
        f"needed={members.answers_min} {_silent(held, urls)}"
    )


def _silent(held: Sequence[StoreRecords | NoAnswer], urls: Sequence[str]) -> str:
    silent = [
        f"{url}: {one.reason}"
        for url, one in zip(urls, held, strict=True)
        if isinstance(one, NoAnswer)
    ]
    return f"silent=[{'; '.join(silent)}]"
