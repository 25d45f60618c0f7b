"""The log as several stores together hold it: their copies in, records that count out, one place after the other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt.commit.fold import Unreadable, fold
from ckpt.commit.quorum import Seen, Taken, Unclear, Vacant, decide
from ckpt.commit.state import LogState, StoreSet
from ckpt.manifest.records import Record, Stores


@dataclass(frozen=True, slots=True)
class Held:
    """What one store was seen to hold of the log from some place on: valid records, and places where others lie.

    ``store_id`` is what its ``ckpt.json`` says now, empty where it has none.
    """

    store_id: str
    records: Mapping[int, Record] = field(default_factory=dict)
    settled: Mapping[int, Record] = field(default_factory=dict)
    damaged: frozenset[int] = frozenset()

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

    ``settled``: it stands at its place's second key.
    """

    record: Record
    copies: int
    settled: bool
    members: StoreSet


@dataclass(frozen=True, slots=True)
class Gathered:
    """The log after what was read. ``full``: which stores (by their number) count; ``tail``: None where nothing was new.

    ``thin``: places whose record is on fewer stores than it was written to; a scrub mends them.
    """

    state: LogState
    full: frozenset[int]
    tail: Tail | None
    thin: tuple[int, ...]


def gather(state: LogState, held: Sequence[Held | Silent], urls: Sequence[str]) -> Gathered:
    """``state`` and the records after it that count.

    ``held``: what each store holds from ``state.next_seq`` on; ``urls`` names them in reasons. Stops at the first place that is
    vacant; says in ``hole`` where something must have been there, and in ``short`` where too few stores answered to know.
    """
    batch: list[Record | Unreadable] = []
    members, seq = state.stores, state.next_seq
    tail: Tail | None = None
    thin: list[int] = []
    while True:
        copies = dict(_copies(held, seq))
        inside = members or _named_by(copies) or _lone(held)
        decided = _decide(held, seq, inside)
        if isinstance(decided, Taken):
            record = copies[decided.digest]
            batch.append(record)
            tail = Tail(record, decided.copies, decided.settled, inside)
            if decided.copies < inside.write_quorum:
                thin.append(seq)
            if isinstance(record.body, Stores) or members is None:
                state, batch = fold(state, batch), []
                members = state.stores
            seq += 1
            continue
        if isinstance(decided, Unclear):
            reason = (
                f"stores hold different records there, and too few answered to know which counts. {_silent(held, urls)}"
            )
            batch.append(Unreadable(seq, reason))
        elif any(isinstance(one, Held) and one.last() > seq for one in held) or _may_be_damaged(held, seq, inside):
            batch.append(Unreadable(seq, f"no store has a readable record there. {_silent(held, urls)}"))
        break
    state = fold(state, batch)
    full, short = _full(state.stores, held, urls)
    return Gathered(replace(state, short=short), full, tail, tuple(thin))


def _decide(held: Sequence[Held | Silent], seq: int, members: StoreSet) -> Taken | Vacant | Unclear:
    followed = {record.prev for record in dict(_copies(held, seq + 1)).values()}
    by_id = {one.store_id: one for one in held if isinstance(one, Held)}
    seen = [by_id[name].at(seq) if name in by_id else Seen(answered=False) for name in members.ids]
    decided = decide(seen, members.write_quorum, followed)
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


def _named_by(copies: Mapping[str, Record]) -> StoreSet | None:
    """The set that a log's first record names, where all copies name one."""
    bodies = {
        (body.ids, body.write_quorum, body.sequencer) for one in copies.values() if isinstance(body := one.body, Stores)
    }
    if len(bodies) != 1:
        return None
    ((ids, quorum, sequencer),) = bodies
    return StoreSet(ids, quorum, sequencer)


def _lone(held: Sequence[Held | Silent]) -> StoreSet:
    """Before a log knows of several stores it is in one, and what is there counts."""
    return StoreSet(tuple(one.store_id for one in held if isinstance(one, Held) and one.store_id), 1)


def _may_be_damaged(held: Sequence[Held | Silent], seq: int, members: StoreSet) -> bool:
    """Whether a record that counts may have been where only damage is now."""
    inside = {one.store_id: one for one in held if isinstance(one, Held) and one.store_id in members.ids}
    damaged = sum(seq in one.damaged for one in inside.values())
    return damaged > 0 and damaged + len(members.ids) - len(inside) >= members.write_quorum


def _full(members: StoreSet | None, held: Sequence[Held | Silent], urls: Sequence[str]) -> tuple[frozenset[int], str]:
    if members is None:
        return frozenset(number for number, one in enumerate(held) if isinstance(one, Held) and one.store_id), ""
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
