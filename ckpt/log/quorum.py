"""The log as several stores together hold it: their copies in, records that count out, one place after the other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt.format.records import BY_STORES, Record, Stores
from ckpt.format.store import SEQUENCER_STORE
from ckpt.log.commit_fold import Unreadable, fold
from ckpt.log.commit_quorum import Decided, Seen, Taken, Unclear, Vacant, decide, is_stand_in
from ckpt.log.state import LogState, StoreSet


@dataclass(frozen=True, slots=True)
class Held:
    """What one store was seen to hold of the log from some place on: valid records, and places where others lie.

    ``store_id`` is what its ``ckpt.json`` says now, empty where it has none. ``newer``: the damaged places that look like a
    newer release's. ``elsewhere``: the id of another log, which it belongs to instead.
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

    def at(self, seq: int) -> Seen:
        """What it holds at one place."""
        record, settled = self.records.get(seq), self.settled.get(seq)
        return Seen(
            record.digest if record else "", settled.digest if settled else "", damaged=seq in self.damaged
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Silent:
    """A store that did not answer, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Tail:
    """The last record that was taken: on how many stores it was seen, and which set had to hold it.

    ``settled``: it stands at its place's second key; ``followed``: another one names it.
    """

    record: Record
    copies: int
    settled: bool
    members: StoreSet
    followed: bool = False

    @property
    def sure(self) -> bool:
        """Whether it counts for good, so that its writer may be told, and whichever W - 1 stores are lost from now on."""
        if self.followed:
            return True
        if self.settled or self.members.sequencer != BY_STORES:
            return self.copies >= self.members.write_quorum
        # Another vote, seen or not, could be taken for this record's where W - 1 of its own are lost.
        return self.copies >= sum(not is_stand_in(store_id) for store_id in self.members.ids)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The log after what was read. ``full``: which stores (by their number) count; ``tail``: None where nothing was new.

    ``thin``: places whose record is on fewer stores than it was written to; a scrub mends them. ``before``: the state before
    the last record, where that is not sure: it may turn out not to count.
    """

    state: LogState
    full: frozenset[int]
    tail: Tail | None
    thin: tuple[int, ...]
    before: LogState | None = None


def gather(state: LogState, held: Sequence[Held | Silent], urls: Sequence[str]) -> Gathered:
    """``state`` and the records after it that count.

    ``held``: what each store holds from ``state.next_seq`` on; ``urls`` names them in reasons. Stops at the first place that is
    vacant; says in ``hole`` where something must have been there, and in ``short`` where too few stores answered to know.
    """
    batch: list[Record] = []
    end: list[Unreadable] = []
    before: LogState | None = None
    members, seq = state.stores, state.next_seq
    tail: Tail | None = None
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
            tail = Tail(record, decided.copies, decided.settled, inside, follows)
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
        elif any(isinstance(one, Held) and one.last() > seq for one in held):
            end.append(Unreadable(seq, f"no store has a readable record there. {_silent(held, urls)}"))
        break
    if batch:
        before = fold(state, batch[:-1])
        state = fold(before, batch[-1:])
    state = fold(state, end)
    full, short = _full(state.stores, held, urls)
    doubted = before if tail is not None and not tail.sure else None
    if not short and doubted is not None and tail is not None and tail.copies < tail.members.write_quorum:
        # It may change the set, and not count: then it is the set before that knows what is newest.
        _, short = _full(doubted.stores, held, urls)
    return Gathered(replace(state, short=short), full, tail, tuple(thin), doubted)


def _first(held: Sequence[Held | Silent], copies: Mapping[str, Record]) -> tuple[StoreSet, Decided]:
    """What the first place holds: a record counts there on the stores that it names itself."""
    lone = _lone(held)
    if not copies:
        return lone, _decide(held, 0, lone)
    taken: dict[str, tuple[StoreSet, Decided]] = {}
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


def _seen(held: Sequence[Held | Silent], seq: int, members: StoreSet) -> list[Seen]:
    by_id = {one.store_id: one for one in held if isinstance(one, Held)}
    return [by_id[name].at(seq) if name in by_id else Seen(answered=is_stand_in(name)) for name in members.ids]


def _decide(held: Sequence[Held | Silent], seq: int, members: StoreSet) -> Decided:
    followed = {record.prev for record in dict(_copies(held, seq + 1)).values()}
    decided = decide(_seen(held, seq, members), members.write_quorum, followed)
    if isinstance(decided, Taken) or not followed:
        return decided
    # Also a store that counts no longer, or not yet, may hold what a record that was seen follows.
    anywhere = decide([one.at(seq) for one in held if isinstance(one, Held)], members.write_quorum, followed)
    return anywhere if isinstance(anywhere, Taken) else decided


def _copies(held: Sequence[Held | Silent], seq: int) -> Iterator[tuple[str, Record]]:
    for one in held:
        if isinstance(one, Held):
            for found in (one.records.get(seq), one.settled.get(seq)):
                if found is not None:
                    yield found.digest, found


def _named_by(record: Record) -> StoreSet | None:
    """The set that a log's first record names."""
    body = record.body
    return StoreSet(body.ids, body.write_quorum, body.sequencer) if isinstance(body, Stores) else None


def _lone(held: Sequence[Held | Silent]) -> StoreSet:
    """Before a log knows of several stores it is in one, and what is there counts."""
    ids = tuple(one.store_id for one in held if isinstance(one, Held) and one.store_id)
    return StoreSet(ids, 1, SEQUENCER_STORE)


def _full(members: StoreSet | None, held: Sequence[Held | Silent], urls: Sequence[str]) -> tuple[frozenset[int], str]:
    if members is None:
        full = frozenset(number for number, one in enumerate(held) if isinstance(one, Held) and one.store_id)
        others = [url for url, one in zip(urls, held, strict=True) if isinstance(one, Held) and one.elsewhere]
        if not others and not any(isinstance(one, Silent) for one in held):
            return full, ""
        return full, (
            f"where the log lies is not known, and other stores may hold it. of_another_log={others} {_silent(held, urls)}"
        )
    full = frozenset(number for number, one in enumerate(held) if isinstance(one, Held) and one.store_id in members.ids)
    if len(full) >= members.answers_min:
        return full, ""
    return full, (
        f"too few of the log's stores answered to know what is newest. answered={len(full)} stores={len(members.ids)} "
        f"needed={members.answers_min} {_silent(held, urls)}"
    )


def _silent(held: Sequence[Held | Silent], urls: Sequence[str]) -> str:
    silent = [f"{url}: {one.why}" for url, one in zip(urls, held, strict=True) if isinstance(one, Silent)]
    return f"silent=[{'; '.join(silent)}]"
