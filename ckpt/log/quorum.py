"""The log as several stores hold it together: their readings in, the records that count out. Pure.

A record counts if W of the R stores hold the same bytes, where 2W > R. A reader that hears from
fewer than R stores cannot always know that; it takes a record that may count. If that record does
not count after all, nothing is lost: its writer has no acknowledgement, and the next writer copies
the record that it builds on to W stores first. No record is written before its predecessor counts,
so a record at the next position proves which of several records before it counts.

Writers that have no sequencer in common may split the stores: each of several records is on some
stores, and none can ever be on W. If all votes are known, every writer finds the same winner and
writes it at the position's second key, the *settled* key. The same is done for a record that won
but is not on all stores, before it is acknowledged: with W - 1 of its stores lost, its votes would
look like those of another record.

If some votes are not known, no winner can be found, and none is needed: a record is acknowledged
only once all stores hold it, or W at the settled key. A writer that knows W votes which differ, and
has closed the settled key of W stores, knows which record may still be acknowledged there: the one
that is at one of these keys, or none. It puts that one, or any, to the next *round* of the vote,
which has keys of its own. So W stores that answer always decide, whatever became of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ckpt.format.records import BY_STORES, Record, Stores
from ckpt.format.store import SEQUENCER_STORE
from ckpt.log.fold import Unreadable, fold
from ckpt.log.state import LogState, StoreSet


@dataclass(frozen=True, slots=True)
class PositionReading:
    """What one store holds at one position: digests of the records at its two keys, or empty.

    ``later``: the record settled in the last round after the first that settled one, and
    ``later_round`` that round's number. ``answered``: the store could be asked. ``damaged``: one of
    the keys holds bytes that are no record, so a record may have been there.
    """

    record: str = ""
    settled: str = ""
    later: str = ""
    later_round: int = 0
    answered: bool = True
    damaged: bool = False

    @property
    def sure(self) -> bool:
        """Whether this store cannot have acknowledged any other record."""
        return self.answered and not self.damaged


@dataclass(frozen=True, slots=True)
class Taken:
    """The record at the position. ``copies`` stores hold it; ``settled``: at the settled key."""

    digest: str
    copies: int
    settled: bool


@dataclass(frozen=True, slots=True)
class Vacant:
    """As far as is known, no record at the position counts."""


@dataclass(frozen=True, slots=True)
class Unclear:
    """Several records may count, or one that was not seen; stores that did not answer decide.

    ``digests``: those that were seen and may count. ``forked``: each of them has a successor, so
    stores were given up that went on by themselves.
    """

    digests: tuple[str, ...]
    forked: bool = False


Position = Taken | Vacant | Unclear

# ---- one position: which of its records may count


def decide(
    readings: Sequence[PositionReading],
    quorum: int,
    followed: Collection[str] = (),
    *,
    voted: bool = False,
) -> Position:
    """What the position holds. ``readings``: one for each store of the set.

    ``followed``: the digests that records at the next position name as their predecessor, on any
    store. ``voted``: the stores gave out the position, so a record that is not on all of them was
    acknowledged only if it is at settled keys.
    """
    if followed:
        return _followed(readings, followed)
    last = max(readings, key=lambda reading: reading.later_round, default=None)
    # Whether damage, with the silent stores, may hide a record that was on W stores.
    hidden = quorum <= sum(not reading.sure for reading in readings) and any(
        reading.damaged for reading in readings
    )
    if last is not None and last.later:
        # What the last round settled is what all earlier ones settled, if they settled anything.
        # Acknowledged are only copies at the settled key of the first round.
        copies = sum(reading.settled == last.later for reading in readings)
        if copies < quorum and hidden:
            return Unclear((last.later,))
        return Taken(last.later, copies, settled=True)
    # One record at most is settled in a round, so that key is read first.
    settled = _possible([reading.settled for reading in readings], readings, quorum)
    if settled:
        position = _only(settled, settled_key=True)
        if isinstance(position, Taken) and position.copies < quorum and hidden:
            return Unclear((position.digest,))  # a later round may have settled another record
        return position
    records = _possible([reading.record for reading in readings], readings, quorum)
    if written := {reading.settled for reading in readings if reading.settled}:
        # A settled copy on fewer than W stores: its writer knew that nothing else can count, and
        # has not finished.
        records = {digest: count for digest, count in records.items() if digest in written}
    elif max(records.values(), default=0) < quorum and hidden:
        return Unclear(tuple(sorted(records)))
    if voted and len(records) > 1:
        return Vacant()  # none is on all stores or settled: none was acknowledged
    return _only(records, settled_key=False)


def _followed(readings: Sequence[PositionReading], followed: Collection[str]) -> Position:
    """A record is written only after its predecessor counts, so a successor proves what counts,
    however few copies are left."""
    held = {digest for one in readings for digest in {one.record, one.settled, one.later}}
    both = sorted(held.intersection(followed))
    if not both:
        return Vacant()  # none of these stores has the record that counts
    if len(both) > 1:
        return Unclear(tuple(both), forked=True)
    (digest,) = both
    settled_copies = sum(reading.settled == digest for reading in readings)
    record_copies = sum(reading.record == digest for reading in readings)
    # Where it is at neither key, a later round settled it.
    settled = settled_copies > 0 or record_copies == 0
    return Taken(digest, max(settled_copies, record_copies), settled)


def _possible(
    digests: Sequence[str], readings: Sequence[PositionReading], quorum: int
) -> dict[str, int]:
    """The records that may be on W stores, counting every store that may hold them unseen."""
    counts = Counter(digest for digest in digests if digest)
    unknown = sum(
        not digest and not reading.sure for digest, reading in zip(digests, readings, strict=True)
    )
    return {digest: count for digest, count in counts.items() if count + unknown >= quorum}


def _only(possible: Mapping[str, int], *, settled_key: bool) -> Position:
    if not possible:
        return Vacant()
    if len(possible) > 1:
        return Unclear(tuple(sorted(possible)))
    ((digest, copies),) = possible.items()
    return Taken(digest, copies, settled_key)


# ---- an append: the vote of the stores that create a key only once


@dataclass(frozen=True, slots=True)
class Won:
    """Our record is on W stores.

    ``sure``: on all stores that vote, so no other record can ever be taken for it.
    """

    sure: bool


@dataclass(frozen=True, slots=True)
class Beaten:
    """Another record is on W stores."""

    digest: str


@dataclass(frozen=True, slots=True)
class Split:
    """No record can ever be on W stores; the winner ``digest`` is to be settled."""

    digest: str


@dataclass(frozen=True, slots=True)
class Divided:
    """W votes or more are known, and they differ; the others are not known.

    None of the records is on all stores. ``digest`` is the most frequent one.
    """

    digest: str


@dataclass(frozen=True, slots=True)
class Undecided:
    """The stores that did not answer decide."""


def contest(
    mine: str, votes: Sequence[str | None], quorum: int
) -> Won | Beaten | Split | Divided | Undecided:
    """The outcome of an append, after record ``mine`` was created at every store that votes.

    ``votes``: for each voting store the digest that it holds, or None if unknown.
    """
    counts = Counter(digest for digest in votes if digest is not None)
    if counts[mine] >= quorum:
        return Won(counts[mine] == len(votes))
    best = winner(counts)
    if best is None:
        return Undecided()
    if counts[best] >= quorum:
        return Beaten(best)
    # A split has one winner only if every vote is known: with one unknown, two writers could count
    # different votes and find different winners.
    if counts.total() == len(votes):
        return Split(best)
    return Divided(best) if counts.total() >= quorum else Undecided()


@dataclass(frozen=True, slots=True)
class Settled:
    """The record ``digest`` is at the settled key of W stores: it has the position for good."""

    digest: str


@dataclass(frozen=True, slots=True)
class NextRound:
    """The round settled nothing, or what it settled is on too few stores.

    ``digest`` is the record to vote for in the next round; empty if any will do.
    """

    digest: str


def conclude(held: Sequence[str | None], quorum: int) -> Settled | NextRound | Undecided:
    """What a round settled. ``held``: for each store the digest at the round's settled key.

    Empty if the key is closed, None if unknown; stores that nothing is known of may be left out.
    """
    counts = Counter(digest for digest in held if digest)
    best = winner(counts) or ""
    if counts[best] >= quorum:
        return Settled(best)
    if sum(digest is not None for digest in held) < quorum:
        return Undecided()
    # Of W known keys at least one is among the W that a settled record needs: if none of them holds
    # a record, none was settled. Different records at the first round's keys mean that a later
    # round settled one of them, and then any vote will do here.
    return NextRound(best)


def contest_among_survivors(
    votes: Sequence[str | None], *, first: bool
) -> Beaten | Divided | Undecided:
    """As ``contest``, if all other stores are declared lost, and those that are left are fewer than
    W: the record that all of them vote for wins.

    Not in the first round: there a split whose votes are all known has a winner too.
    """
    best = winner(Counter(digest for digest in votes if digest is not None))
    if best is None or None in votes:
        return Undecided()
    return Divided(best) if first or set(votes) != {best} else Beaten(best)


def winner(counts: Mapping[str, int]) -> str | None:
    """The most frequent record of a split; of equally frequent ones the smallest digest."""
    return min(counts, key=lambda digest: (-counts[digest], digest), default=None)


# ---- a whole log: from what each store holds to one state

_PLACEHOLDER = b"no store yet".hex()


def placeholder_id(number: int) -> str:
    """The id in a set of stores for a store that did not answer when the log was made.

    No record that counts is ever on it. The store gets a real id when it is added.
    """
    return f"{_PLACEHOLDER}{number:08x}"


def is_placeholder(store_id: str) -> bool:
    """Whether ``store_id`` is a placeholder for a store that did not answer."""
    return store_id.startswith(_PLACEHOLDER)


@dataclass(frozen=True, slots=True)
class StoreRecords:
    """What one store holds of the log from some position on.

    ``store_id`` is what its ``ckpt.json`` says now; empty if it has none. ``records`` and
    ``settled`` are the valid records by seq, at the first and at the settled key. ``damaged``:
    positions with other bytes. ``newer``: damaged positions that look like a newer release's
    records. ``elsewhere``: the id of another log, if the store belongs to that one. ``later``: the
    last round after the first that settled a record at a position, and that record.
    """

    store_id: str
    records: Mapping[int, Record] = field(default_factory=dict)
    settled: Mapping[int, Record] = field(default_factory=dict)
    damaged: frozenset[int] = frozenset()
    newer: frozenset[int] = frozenset()
    elsewhere: str = ""
    later: Mapping[int, tuple[int, Record]] = field(default_factory=dict)

    def last(self) -> int:
        """The last position at which it holds anything; -1 for none."""
        return max({*self.records, *self.settled, *self.damaged, *self.later}, default=-1)

    def all_at(self, seq: int) -> Iterator[Record]:
        """The valid records that it holds at one position, those of later rounds last."""
        later = self.later.get(seq)
        for record in (self.records.get(seq), self.settled.get(seq), later and later[1]):
            if record is not None:
                yield record

    def at(self, seq: int) -> PositionReading:
        """What it holds at one position."""
        record, settled = self.records.get(seq), self.settled.get(seq)
        later_round, later = self.later.get(seq, (0, None))
        return PositionReading(
            record.digest if record else "",
            settled.digest if settled else "",
            later.digest if later else "",
            later_round,
            damaged=seq in self.damaged,
        )


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A store did not answer."""

    reason: str


StoreAnswer = StoreRecords | NoAnswer


@dataclass(frozen=True, slots=True)
class LastRecord:
    """The last record that was taken, its number of copies seen, and the set that must hold it.

    ``settled``: it is at its settled key. ``followed``: another record names it as predecessor.
    """

    record: Record
    copies: int
    settled: bool
    members: StoreSet
    followed: bool = False

    @property
    def is_final(self) -> bool:
        """Whether it counts even if any W - 1 stores are lost from now on.

        Only then may it be acknowledged to its writer.
        """
        if self.followed:
            return True
        if self.settled or self.members.sequencer != BY_STORES:
            return self.copies >= self.members.write_quorum
        # At its first key it is one vote among others. If W - 1 of its stores were lost, another
        # vote, seen or not, could be taken for the winner; so all real stores must hold it.
        return self.copies >= sum(not is_placeholder(store_id) for store_id in self.members.ids)


@dataclass(frozen=True, slots=True)
class MergedLog:
    """The log after what was read. ``full``: the stores that count, by number.

    ``tail`` is None if nothing was new. ``underreplicated``: positions whose record is on fewer
    stores than it was written to; a scrub repairs them. ``before``: the state before the last
    record, if that record may still not count.
    """

    state: LogState
    full: frozenset[int]
    tail: LastRecord | None
    underreplicated: tuple[int, ...]
    before: LogState | None = None


def merge_stores(
    state: LogState,
    answers: Sequence[StoreAnswer],
    urls: Sequence[str],
    known: Mapping[int, str] = MappingProxyType({}),
) -> MergedLog:
    """``state`` and the records after it that count.

    ``answers``: what each store holds from ``state.next_seq`` on; ``urls`` names the stores in
    reasons. ``known``: digests of records that counted before, by position. Stops at the first
    vacant position. Sets ``hole`` if a record must have been there, and ``short`` if too few stores
    answered to know.
    """
    batch: list[Record] = []  # taken, not folded yet
    end: list[Unreadable] = []
    before: LogState | None = None
    members, seq = state.stores, state.next_seq
    tail: LastRecord | None = None
    underreplicated: list[int] = []
    while True:
        records = dict(_records_at(answers, seq))
        if members is None and seq == 0:
            in_force, position = _first(answers, records)
        else:
            in_force = members or _lone(answers)
            position = _decide(answers, seq, in_force, known.get(seq))
        if isinstance(position, Taken):
            record = records[position.digest]
            batch.append(record)
            followed = any(
                successor.prev == record.digest for _, successor in _records_at(answers, seq + 1)
            )
            tail = LastRecord(record, position.copies, position.settled, in_force, followed)
            if position.copies < in_force.write_quorum:
                underreplicated.append(seq)
            if isinstance(record.body, Stores) or members is None:
                # The set may change here, and it decides what counts at the next position.
                before = fold(state, batch[:-1])
                state, batch = fold(before, batch[-1:]), []
                members = state.stores
            seq += 1
            continue
        if isinstance(position, Unclear) and position.forked:
            reason = (
                "two histories go on there: stores of the log were declared lost that were not, or "
                "were rolled back. "
                f"stores={list(urls)} name only those of the history that is to go on"
            )
            end.append(Unreadable(seq, reason))
        elif isinstance(position, Unclear):
            held = "different records" if position.digests else "damage"
            reason = (
                f"stores hold {held} there, and too few answered to know what counts. "
                f"{_silent(answers, urls)}"
            )
            end.append(Unreadable(seq, reason))
        elif any(isinstance(answer, StoreRecords) and answer.last() > seq for answer in answers):
            reason = f"no store has a readable record there. {_silent(answers, urls)}"
            end.append(Unreadable(seq, reason))
        break
    if batch:
        before = fold(state, batch[:-1])
        state = fold(before, batch[-1:])
    state = fold(state, end)
    full, short = _full(state.stores, answers, urls)
    before_doubtful = before if tail is not None and not tail.is_final else None
    if (
        not short
        and before_doubtful is not None
        and tail is not None
        and tail.copies < tail.members.write_quorum
    ):
        # The doubtful record may change the set and not count after all. Then the set before it
        # decides how many answers are needed.
        _, short = _full(before_doubtful.stores, answers, urls)
    return MergedLog(
        replace(state, short=short), full, tail, tuple(underreplicated), before_doubtful
    )


def _first(
    answers: Sequence[StoreAnswer], records: Mapping[str, Record]
) -> tuple[StoreSet, Position]:
    """The set of stores and the record at position 0.

    A first record counts on the stores that it names, so each candidate is judged by its own set.
    """
    lone = _lone(answers)
    if not records:
        return lone, _decide(answers, 0, lone)
    taken: dict[str, tuple[StoreSet, Position]] = {}
    unclear = False
    for digest, record in records.items():
        members = _named_by(record) or lone
        position = _decide(answers, 0, members)
        unclear = unclear or isinstance(position, Unclear)
        if isinstance(position, Taken) and position.digest == digest:
            taken[digest] = members, position
    if unclear or len(taken) > 1:
        return lone, Unclear(tuple(sorted(records)))
    return next(iter(taken.values()), (lone, Vacant()))


def _readings(answers: Sequence[StoreAnswer], seq: int, members: StoreSet) -> list[PositionReading]:
    by_id = {answer.store_id: answer for answer in answers if isinstance(answer, StoreRecords)}
    # A placeholder is known to hold nothing; any other absent store may hold something.
    return [
        by_id[store_id].at(seq)
        if store_id in by_id
        else PositionReading(answered=is_placeholder(store_id))
        for store_id in members.ids
    ]


def _decide(
    answers: Sequence[StoreAnswer], seq: int, members: StoreSet, known: str | None = None
) -> Position:
    followed = {record.prev for record in dict(_records_at(answers, seq + 1)).values()}
    # What was seen to count is as sure as what a successor names, and stores that were rolled back
    # forgot both. If none has it, the stores hold an older log, which is for the journal to say.
    if known in dict(_records_at(answers, seq)):
        followed.add(known)
    # Makers of a log may name different stores, so they hold no further rounds.
    voted = members.sequencer == BY_STORES and seq > 0
    position = decide(_readings(answers, seq, members), members.write_quorum, followed, voted=voted)
    if isinstance(position, Taken) or not followed:
        return position
    # The predecessor of a record that was seen may also be on a store outside the set: one that
    # counts no longer, or not yet.
    anywhere = decide(
        [answer.at(seq) for answer in answers if isinstance(answer, StoreRecords)],
        members.write_quorum,
        followed,
    )
    return anywhere if isinstance(anywhere, Taken) else position


def _records_at(answers: Sequence[StoreAnswer], seq: int) -> Iterator[tuple[str, Record]]:
    """The valid records that any store holds at a position, with their digests."""
    for answer in answers:
        if isinstance(answer, StoreRecords):
            for record in answer.all_at(seq):
                yield record.digest, record


def _named_by(record: Record) -> StoreSet | None:
    """The set of stores that a log's first record names."""
    body = record.body
    if not isinstance(body, Stores):
        return None
    return StoreSet(body.ids, body.write_quorum, body.sequencer)


def _lone(answers: Sequence[StoreAnswer]) -> StoreSet:
    """Before a log names several stores it is on one, and what that store holds counts."""
    ids = tuple(
        answer.store_id
        for answer in answers
        if isinstance(answer, StoreRecords) and answer.store_id
    )
    return StoreSet(ids, 1, SEQUENCER_STORE)


def _full(
    members: StoreSet | None, answers: Sequence[StoreAnswer], urls: Sequence[str]
) -> tuple[frozenset[int], str]:
    """The stores that count, and why the newest cannot be known with these answers (or empty)."""
    if members is None:
        full = frozenset(
            number
            for number, answer in enumerate(answers)
            if isinstance(answer, StoreRecords) and answer.store_id
        )
        others = [
            url
            for url, answer in zip(urls, answers, strict=True)
            if isinstance(answer, StoreRecords) and answer.elsewhere
        ]
        if not others and not any(isinstance(answer, NoAnswer) for answer in answers):
            return full, ""
        return full, (
            "the stores of the log are not known, and other stores may hold it. "
            f"of_another_log={others} {_silent(answers, urls)}"
        )
    full = frozenset(
        number
        for number, answer in enumerate(answers)
        if isinstance(answer, StoreRecords) and answer.store_id in members.ids
    )
    if len(full) >= members.answers_min:
        return full, ""
    return full, (
        f"too few of the log's stores answered to know what is newest. answered={len(full)} "
        f"stores={len(members.ids)} needed={members.answers_min} {_silent(answers, urls)}"
    )


def _silent(answers: Sequence[StoreAnswer], urls: Sequence[str]) -> str:
    silent = [
        f"{url}: {answer.reason}"
        for url, answer in zip(urls, answers, strict=True)
        if isinstance(answer, NoAnswer)
    ]
    return f"silent=[{'; '.join(silent)}]"
